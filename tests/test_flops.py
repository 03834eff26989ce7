"""Operations by formula are those that XLA counts where it can count: one layer, no kernels."""

import jax
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax import flops
from molmo2_jax import loss
from molmo2_jax import types
from molmo2_jax.model import molmo2
from tests import packs

# Elementwise work, softmax and norms, which XLA counts and the formulas do not: 1.4 % measured.
TOLERANCE = 0.025
MODEL = config_lib.Molmo2Config(
    vision=config_lib.VisionConfig(image_size=28, patch_size=4, width=128, num_layers=1, num_heads=4,
                                   head_dim=32, mlp_width=384),
    connector=config_lib.ConnectorConfig(taps=(0,), num_heads=4, head_dim=32, mlp_width=256),
    text=config_lib.TextConfig(vocab_size=512, width=192, num_layers=1, num_heads=6, num_kv_heads=2,
                               head_dim=32, mlp_width=512, max_positions=256))
B, T, M, R, W = 2, 128, 4, 32, 9
SHAPE = dict(rows=B, shape=types.RowShape(T=T, M=M, R=R, W=W), density=1.0)


@pytest.fixture(scope="module")
def params():
    return packs.random_params(MODEL)


def counted(function, params):
    return jax.jit(function).lower(params).cost_analysis()["flops"]


def objective(remat, vision_remat=None):
    """Returns params -> loss, its head in one chunk, which is recomputed."""
    batch = packs.random_rows(0, MODEL, B, T, M, R)
    module = molmo2.Molmo2(MODEL, remat=remat, attention="dense", vision_remat=vision_remat)

    def value(params):
        apply = lambda *args, method: module.apply({"params": params}, *args, method=method)
        head = lambda hidden, kernel: apply(hidden, kernel, method="logits")
        sums = loss.chunked_sums(apply(batch, method="hidden"), head, apply(method="head_kernel"),
                                 batch.targets, batch.weights, T, "float32")
        return loss.objective(sums, 0.0)[0]

    return value


def test_a_forward_pass(params):
    expected = flops.forward(MODEL, tokens=B * T, crops=B * M, windows=B * R, slots=W, pairs=B * T * T)
    assert expected.total == pytest.approx(counted(objective("none"), params), rel=TOLERANCE)


@pytest.mark.parametrize("remat, vision_remat", [("none", None), ("dots", None), ("full", None),
                                                 ("full", "dots")])
def test_a_step_with_what_is_recomputed(remat, vision_remat, params):
    again = flops.recomputed(MODEL, remat, vision_remat, **SHAPE)
    step = jax.value_and_grad(objective(remat, vision_remat))
    assert flops.train_step(MODEL, **SHAPE).plus(again).total == pytest.approx(counted(step, params),
                                                                               rel=TOLERANCE)


def test_each_tower_recomputes_by_its_own_policy():
    full, mixed, dots = (flops.recomputed(MODEL, *policies, **SHAPE)
                         for policies in (("full",), ("full", "dots"), ("dots",)))
    assert mixed.vit == dots.vit < full.vit and mixed[1:] == full[1:]


def test_a_kernel_whose_result_is_kept_is_not_run_again():
    full, kept = (flops.recomputed(MODEL, remat, **SHAPE) for remat in ("full", "attention"))
    assert kept.attention == 0 < full.attention and kept[:3] == full[:3]


def test_the_gradient_of_a_frozen_head_is_no_work():
    tied = config_lib.Molmo2Config(vision=MODEL.vision, connector=MODEL.connector,
                                   text=config_lib.TextConfig(**{**vars(MODEL.text), "tied_head": True}))
    spared = flops.train_step(MODEL, **SHAPE).total - flops.train_step(tied, **SHAPE).total
    assert spared == 2 * B * T * MODEL.text.width * MODEL.text.vocab_size
