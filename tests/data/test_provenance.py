"""Tracked strings are the same strings, and what they say about their characters is true."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.provenance import Source, TrackedStr, concat, mark

SOURCE = Source(0, "content")
TEXT = st.text(alphabet="ab <|\n", max_size=12)


def true(value: TrackedStr, original: str) -> bool:
    """Every span shows the characters of the original that it says it shows."""
    return all(str.__getitem__(value, slice(a, b)) == original[o : o + b - a] for a, b, _, o in value.spans)


OPERATIONS = {
    "strip": lambda text: text.strip(),
    "lstrip": lambda text: text.lstrip("a"),
    "rstrip": lambda text: text.rstrip("\n "),
    "cut": lambda text: text[1:-1],
    "from": lambda text: text[2:],
    "first": lambda text: text[:1],
    "add": lambda text: "<x>" + text + "<y>",
    "prefix": lambda text: text.removeprefix("a"),
    "suffix": lambda text: text.removesuffix("b"),
    "replace": lambda text: text.replace("a", "--"),
    "replace once": lambda text: text.replace("b", "", 1),
    "last of split": lambda text: text.split("<")[-1],
    "first of split": lambda text: text.split("<", 1)[0],
    "words": lambda text: (text.split() or [text])[-1],
    "rsplit": lambda text: (text.rsplit(None, 1) or [text])[-1],
    "lines": lambda text: (text.splitlines() or [text])[-1],
    "partition": lambda text: text.partition("a")[2],
    "rpartition": lambda text: text.rpartition("b")[0],
    "join": lambda text: text.join(["1", "2"]),
    "upper": lambda text: text.upper(),
    "multiply": lambda text: text * 2,
}


@given(TEXT, st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=4))
def test_same_text_and_true_marks_after_any_operations(original, names):
    plain, marked = original, mark(original, SOURCE)
    for name in names:
        plain, marked = OPERATIONS[name](plain), OPERATIONS[name](marked)
    assert marked == plain and hash(marked) == hash(plain)
    if isinstance(marked, TrackedStr):
        assert true(marked, original)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"upper", "multiply"}))
def test_operations_keep_the_marks(name):
    result = OPERATIONS[name](mark(" aab<a b\nba b", SOURCE))
    assert isinstance(result, TrackedStr) and result.spans


@pytest.mark.parametrize("name", ["upper", "multiply"])
def test_text_that_is_no_longer_the_messages_is_not_marked(name):
    assert not isinstance(OPERATIONS[name](mark("ab", SOURCE)), TrackedStr)


def test_an_empty_message_keeps_its_place():
    assert concat(["<a>", mark("", SOURCE), "<b>"]).spans == ((3, 3, SOURCE, 0),)


def test_containers_are_marked_at_every_depth():
    call = mark({"name": "f", "arguments": {"x": ["y"]}}, SOURCE)
    assert call["arguments"]["x"][0].spans[0][2] == SOURCE._replace(path=("arguments", "x", 0))
    assert call["arguments"].source == SOURCE._replace(path=("arguments",))
