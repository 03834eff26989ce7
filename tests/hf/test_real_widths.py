"""The widths of the released models, two layers of each tower: logits equal those of transformers."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax.hf import checkpoint
from molmo2_jax.model import molmo2
from tests import packs
from tests.hf import test_transformers

peer = pytest.importorskip("molmo2_jax.hf.peer")

TOLERANCE = 2e-5  # float32; measured 9e-6 on logits of size 6


WHOLE_PICTURES = "molmo2_4b"  # all have one ViT: its 729 patches are compared once, otherwise 81 of its


def shallow(preset):
    """Returns two layers of each tower, a small vocabulary, and small pictures except in one preset."""
    config = getattr(config_lib, preset)()
    text = dataclasses.replace(config.text, num_layers=2, vocab_size=1000)
    if text.yarn:
        text = dataclasses.replace(text, yarn=dataclasses.replace(text.yarn, layers=(1,)))
    vision = dataclasses.replace(config.vision, num_layers=2)
    if preset != WHOLE_PICTURES:
        assert config.vision == getattr(config_lib, WHOLE_PICTURES)().vision
        vision = dataclasses.replace(vision, image_size=9 * vision.patch_size)
    return dataclasses.replace(
        config, text=text, vision=vision,
        connector=dataclasses.replace(config.connector, taps=(1, 0)))


@pytest.mark.slow(75)
@pytest.mark.parametrize("preset", ["molmo2_4b", "molmo2_8b", "molmo2_o_7b"])
def test_logits_at_real_widths_equal_those_of_transformers(preset, tmp_path):
    config = shallow(preset)
    params = packs.random_params(config)
    folder = checkpoint.export_checkpoint(params, config, config_lib.InputConfig(), None, tmp_path / "m")
    model = peer.load(folder)
    shutil.rmtree(folder)  # over 1 GB, which pytest would keep for three runs
    cases = test_transformers.examples(config, frames=2)
    ends = np.cumsum([len(one.tokens) for one in cases.values()])
    batch = packs.row(list(cases.values()), config, int(ends[-1]), 11, 44)  # packed, each sees itself only
    logits = np.asarray(jax.jit(molmo2.Molmo2(config, remat="none").apply)({"params": params}, batch))[0]
    ours = dict(zip(cases, np.split(logits, ends[:-1])))
    test_transformers.assert_theirs(model, config, cases, ours, TOLERANCE)
