"""The embedding's rows under tensor parallelism: every token has one, in equal parts."""

import re

import pytest

from posttrain.config.composition import CONF_DIR
from posttrain.models.padding import padded_rows

SIZES = {
    int(size)
    for file in CONF_DIR.glob("model/**/*.yaml")
    for size in re.findall(r"vocab_size: (\d+)", file.read_text())
}


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_equal_parts_and_no_row_short(tensor):
    assert {50257, 32000, 151936} <= SIZES
    for vocabulary in SIZES | {size + 1 for size in SIZES}:
        rows = padded_rows(vocabulary, tensor)
        assert rows % tensor == 0 and rows // tensor % 8 == 0
        assert vocabulary <= rows < vocabulary + 16 * tensor
        assert rows == vocabulary or vocabulary % (8 * tensor)
