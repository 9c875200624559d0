"""What a rank finds in its environment."""

import stat

import pytest

from posttrain.errors import UserError
from posttrain.launch.rank_process import kernel_cache


def test_compiled_kernels_are_kept_for_this_user_alone(tmp_path):
    directory = kernel_cache(str(tmp_path / "cache"), "triton")
    assert directory.is_relative_to(tmp_path / "cache")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.parent.chmod(0o777)
    with pytest.raises(UserError, match="others may write to it"):
        kernel_cache(str(tmp_path / "cache"), "triton")
