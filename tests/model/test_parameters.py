"""Path, shape and logical axes of every parameter of the presets, as listed in tests/parameters/*.txt.

After a deliberate change: `python -m tests.model.test_parameters` writes the listings anew.
"""

import math
import pathlib

import pytest

from molmo2_jax import config as config_lib
from molmo2_jax.hf import weights

GOLDEN = pathlib.Path(__file__).parent.parent / "parameters"
# Sums over the shapes of the released checkpoints, the head of the 4B not counted twice.
COUNTS = {"molmo2_4b": 4_461_913_040, "molmo2_8b": 8_661_703_120, "molmo2_o_7b": 7_760_786_896}
PRESETS = (*COUNTS, "nano")


def listing(name: str) -> str:
    boxed = weights.abstract_params(getattr(config_lib, name)(), boxed=True)
    lines = [f"{path} {list(box.value.shape)} {list(box.names)}" for path, box in sorted(boxed.items())]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_listing(name):
    assert listing(name) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_exactly_the_released_number_of_parameters(name):
    shapes = weights.abstract_params(getattr(config_lib, name)()).values()
    assert sum(math.prod(leaf.shape) for leaf in shapes) == COUNTS[name]


if __name__ == "__main__":
    for preset in PRESETS:
        (GOLDEN / f"{preset}.txt").write_text(listing(preset))
