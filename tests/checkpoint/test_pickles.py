"""What a checkpoint may hold besides tensors."""

import io
import pickle

import pytest
import torch

from posttrain.checkpoint import pickles
from posttrain.errors import UserError


def test_the_random_numbers_of_a_captured_step(tmp_path):
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    file = io.BytesIO()
    torch.save({"states": [generator]}, file)
    expected = torch.rand(5, generator=generator)
    file.seek(0)
    with pickles.reading(tmp_path):
        (loaded,) = torch.load(file, weights_only=False)["states"]
    assert torch.equal(torch.rand(5, generator=loaded), expected)


def test_a_name_beside_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    with pytest.raises(UserError, match=r"builtins\.print"), pickles.reading(tmp_path):
        pickle.loads(pickle.dumps(Evil()))
