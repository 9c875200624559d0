"""Prompts by a model's own chat template: transformers' text, within the limits that training has."""

import pytest
from tiny_tokenizer import byte_tokenizer

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.prompts import Prompts
from posttrain.errors import UserError
from posttrain.generate.answerer import Answerer
from posttrain.generate.sampling import Sampling

CHATS = [
    [("user", "hi")],
    [("system", "be brief"), ("user", "hello wörld 🎉"), ("assistant", "hello"), ("user", "hello  ")],
    [("user", "hi"), ("assistant", "hi hello")],
    [("user", "hi"), ("assistant", "  hi ")],
]
TRIMMING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}"
ENDLESS = {
    "a loop in a loop": "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}",
    "a text of 20,000,000,000": "{{ 'a' * 20000000000 }}",
    "texts that double": "{% set n = namespace(t='aaaaaaaa') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}"
    "{% endfor %}{{ n.t | length }}",
    "an attribute": "{{ messages.__class__.__mro__ }}{{ cycler.__init__.__globals__.os.system('id') }}",
}


def messages(chat):
    return [{"role": role, "content": text} for role, text in chat]


def conversation(chat):
    return Conversation([Message(role, text) for role, text in chat])


@pytest.mark.parametrize("template", [None, TRIMMING])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompted", [True, False])
def test_the_text_is_that_of_transformers(template, chat, prompted):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    right = tokenizer.apply_chat_template(
        messages(chat), tokenize=False, add_generation_prompt=prompted, continue_final_message=not prompted
    )
    assert Prompts(tokenizer).render(messages(chat), prompted) == right


def test_further_keys_of_a_message_reach_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.name }}: {{ m.content }}<|im_end|>{% endfor %}"
    said = Prompts(tokenizer).render([{"role": "user", "content": "hi", "name": "Ann"}])
    assert said == "Ann: hi<|im_end|>"


@pytest.mark.parametrize("what", ENDLESS)
def test_a_template_that_takes_too_much(what):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ENDLESS[what]
    with pytest.raises(RowError, match="the template model"):
        Prompts(tokenizer).render(messages(CHATS[0]))


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(byte_tokenizer()), **sizes))


def test_generate_renders_within_the_limits(model):
    tokenizer = byte_tokenizer()
    right = tokenizer.apply_chat_template(messages(CHATS[1]), add_generation_prompt=True, return_dict=True)
    assert Answerer(model, tokenizer, Sampling(1)).encode(conversation(CHATS[1])) == right["input_ids"]
    tokenizer.chat_template = ENDLESS["texts that double"]
    with pytest.raises(UserError, match="prompt 'hi': the template model"):
        Answerer(model, tokenizer, Sampling(1)).encode(conversation(CHATS[0]))
    tokenizer.chat_template = "{% for"
    with pytest.raises(UserError, match="not valid Jinja"):
        Answerer(model, tokenizer, Sampling(1))


def test_lm_eval_renders_within_the_limits(model):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from omegaconf import OmegaConf

    from posttrain.evaluate import harness

    options = OmegaConf.create({"batch_size": 1, "chat_template": True})
    tokenizer = byte_tokenizer()
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    wrapped = harness._wrap(model, tokenizer, options)
    for chat in CHATS:
        for prompted in (True, False):
            right = plain.apply_chat_template(messages(chat), add_generation_prompt=prompted)
            assert wrapped.apply_chat_template(messages(chat), add_generation_prompt=prompted) == right
    tokenizer.chat_template = ENDLESS["texts that double"]
    with pytest.raises(UserError, match=r"lm_eval\.chat_template=true: the template model"):
        harness._wrap(model, tokenizer, options).apply_chat_template(messages(CHATS[0]))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        harness._wrap(model, tokenizer, options).apply_chat_template(messages(CHATS[0]))
