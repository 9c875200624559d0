"""Fixtures of the data tests."""

import pytest
from tiny_tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """A small tokenizer with ChatML's tokens and template; not to be changed."""
    return byte_tokenizer()
