"""The window of steps to profile, parsed from a flag."""

import pytest

from molmo2_jax.monitor import profiling


def test_a_window_is_read_from_text():
    assert profiling.parse("100:110") == (100, 110) and profiling.parse("3:3") == (3, 3)
    assert profiling.parse(None) is None


@pytest.mark.parametrize("text", ["5", "5:", "9:5", "0:3", "a:b", "-1:3"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="FIRST:LAST"):
        profiling.parse(text)
