"""Unsloth's LoRA on one GPU: a peer of bench/peers.py. It loads from a directory, which is written first."""

import os
import tempfile

os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
import unsloth  # noqa: F401  (before Transformers, which it changes)

# isort: split
import torch
from peer_work import Clock, Work, run, train_loop
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from unsloth import FastLanguageModel

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_random(work: Work, directory: str) -> None:
    """Write a model with random weights, and the tokenizer."""
    fields = dict(work.architecture)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with work.device:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(work.tokenizer).save_pretrained(directory)


def train(work: Work) -> Clock:
    """Load the model as Unsloth's notebooks do, in bf16 rather than 4 bits, and train it."""
    if not work.tokenizer:
        raise ValueError("Unsloth requires a tokenizer: model.tokenizer=DIR")
    checkpointing = "unsloth" if work.checkpointing else False
    with tempfile.TemporaryDirectory() as directory:
        write_random(work, directory)
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            model_name=directory,
            max_seq_length=work.seq_length,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            local_files_only=True,
            use_gradient_checkpointing=checkpointing,
        )
    model = FastLanguageModel.get_peft_model(
        model,
        r=work.rank,
        lora_alpha=work.alpha,
        lora_dropout=0.0,
        target_modules=LINEAR,
        use_gradient_checkpointing=checkpointing,
        random_state=0,
    )
    return train_loop(work, model, model.config.vocab_size)


if __name__ == "__main__":
    run(train)
