"""Megatron on a CPU in this process, as the command sets it up, and tiny models with a tokenizer."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "models"), str(TESTS / "data")]  # families, the small tokenizer


@pytest.fixture(scope="session")
def megatron():
    """Megatron in this process."""
    from posttrain.convert import single_process

    single_process.start()
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path):
    """Write a random model of a family, with a tokenizer, to a directory; return the directory."""
    from families import save_random
    from tiny_tokenizer import byte_tokenizer

    def write(family: str, **more) -> Path:
        save_random(family, tmp_path / "base", **more)
        byte_tokenizer().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return write
