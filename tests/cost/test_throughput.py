"""The operations of a batch are those of its content, the ViT's included."""

import types

import numpy as np
import pytest

from molmo2_jax import types as molmo2_types
from molmo2_jax.cost import chips
from molmo2_jax.cost import flops
from molmo2_jax.cost import throughput
from tests import packs
from tests import tiny

MODEL = packs.random_config("qwen3", 0)


def row(visual, seed=0):
    rng = np.random.default_rng(seed)
    frames = visual and packs.video(rng, MODEL, visual)
    return packs.row([packs.sequence(rng, MODEL, frames, (4, 5))], MODEL, 64, 8, 20)


def test_a_full_row_is_a_full_step():
    batch = tiny.batch(0)
    full = batch._replace(example=np.zeros_like(batch.example), pooled=np.full_like(
        batch.pooled, tiny.M * batch.patches.shape[2] - 1))
    shape = molmo2_types.RowShape(T=tiny.T, M=tiny.M, R=tiny.R, W=batch.pooled.shape[-1])
    wanted = flops.train_step(tiny.MODEL, rows=tiny.B, shape=shape)
    assert throughput.batch_flops(tiny.MODEL, full) == wanted.total


def test_padding_does_not_count_and_frames_do():
    text, one, two = (throughput.batch_flops(MODEL, row(frames)) for frames in (None, 1, 2))
    tokens = int((row(None).example >= 0).sum())
    once = flops.forward(MODEL, tokens=tokens, crops=0, windows=0, slots=4, pairs=tokens**2 / 2)
    assert text == 3 * once.total
    vit = 3 * flops.forward(MODEL, tokens=0, crops=1, windows=0, slots=4, pairs=0).vit
    assert one > text + vit / 2 and two - one > vit / 2


def test_a_share_of_the_peak_needs_a_known_chip():
    v5p = [types.SimpleNamespace(device_kind="TPU v5")] * 4
    assert throughput.rates(459e12, v5p) == {"mfu": pytest.approx(0.25)}
    assert chips.of_device("cpu") is None
    assert throughput.rates(1e9, [types.SimpleNamespace(device_kind="cpu")]) == {}
