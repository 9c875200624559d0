"""A loaded model that answers conversations."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.data.prompts import Prompts
from posttrain.generate.decoding import Sampling, check_fits, continuations, stop_tokens
from posttrain.models.tokenizer_files import failures


class Answerer:
    """A loaded model that answers conversations.

    Args:
        model: as posttrain.generate.live_model.load_model returns it.
        tokenizer: as posttrain.generate.live_model.load_model returns it.
        sampling: how to choose tokens.
        batch_size: conversations at once.

    Raises:
        UserError: the tokenizer's chat template is broken.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        batch_size: int = 8,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.batch_size = batch_size
        self.stop = stop_tokens(model, tokenizer)
        self.pad = tokenizer.pad_token_id
        if self.pad is None:
            self.pad = min(self.stop, default=0)
        self.template = Prompts(tokenizer) if tokenizer.chat_template else None

    def __call__(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        """Return the next message of each conversation."""
        prompts = list(map(self.encode, conversations))
        check_fits(self.model, prompts, new_tokens=1)
        answers = dict(continuations(self.model, prompts, self.stop, self.pad, self.sampling, self.batch_size))
        texts = []
        for index in range(len(prompts)):
            texts.append(self.tokenizer.decode(answers[index], skip_special_tokens=True))
        return texts

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Return a prompt's ids; without a chat template the last message is continued as text.

        Raises:
            UserError: the tokenizer, or its chat template, fails on it.
        """
        with failures(self.tokenizer.name_or_path, "the tokenizer or its chat template fails on a prompt"):
            if self.template is None:
                return self.tokenizer(encodable(messages[-1]["content"]))["input_ids"]
            messages = [{**message, "content": encodable(message["content"])} for message in messages]
            return self.tokenizer(self.template.render(messages), add_special_tokens=False)["input_ids"]


def encodable(text: str) -> str:
    """Return `text` with a question mark for each half character.

    Python makes half characters of typed bytes that are not UTF-8.
    """
    return text.encode("utf-8", "replace").decode("utf-8")
