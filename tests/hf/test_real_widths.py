"""The widths of the released models, two layers of each tower: logits equal those of transformers."""

import dataclasses
import shutil

import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax.hf import checkpoint
from tests import packs
from tests.hf import test_transformers

TOLERANCE = 2e-5  # float32; measured 9e-6 on logits of size 6


def shallow(preset):
    """Two layers of each tower, and a small vocabulary."""
    config = getattr(config_lib, preset)()
    text = dataclasses.replace(config.text, num_layers=2, vocab_size=1000)
    if text.yarn:
        text = dataclasses.replace(text, yarn=dataclasses.replace(text.yarn, layers=(1,)))
    return dataclasses.replace(
        config, text=text, vision=dataclasses.replace(config.vision, num_layers=2),
        connector=dataclasses.replace(config.connector, taps=(1, 0)))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["molmo2_4b", "molmo2_o_7b"])
def test_logits_at_real_widths_equal_those_of_transformers(preset, tmp_path):
    config = shallow(preset)
    params = packs.random_params(config)
    folder = checkpoint.export_checkpoint(params, config, config_lib.InputConfig(), None, tmp_path / "m")
    model = test_transformers.load(folder)
    shutil.rmtree(folder)  # over 1 GB, which pytest would keep for three runs
    rng = np.random.default_rng(0)
    visual = packs.images(rng, config, 1, num_tiles=1)
    case = packs.sequence(rng, config, visual, (20,)), visual
    ours = test_transformers.our_logits(config, params, [case[0]], 64, 2, 10)
    theirs = test_transformers.their_logits(model, [case])
    assert ours[0].std() > 0.3
    np.testing.assert_allclose(ours[0], theirs[0], atol=TOLERANCE, rtol=0)
