"""Formulas agree with XLA's count of operations where it is exact: one layer, no kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax import finetune
from molmo2_jax import loss
from molmo2_jax import state
from molmo2_jax import types
from molmo2_jax.cost import flops
from molmo2_jax.model import molmo2
from tests import packs

# XLA also counts elementwise operations, softmax and norms: 1.4 % measured.
TOLERANCE = 0.025
ADAPTERS_TOLERANCE = 0.05   # the adapters' own products are not counted
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
    return jax.tree.map(jnp.asarray, packs.random_params(MODEL))


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


@pytest.mark.parametrize("targets, full", [("decoder", ()), ("decoder", ("connector",)), ("all", ())])
def test_a_step_that_trains_adapters_computes_no_gradient_of_a_frozen_kernel(targets, full, params):
    lora = finetune.LoraConfig(targets=targets, full=full, rank=1, dropout=0.0)
    boxed = state.boxed_trained(molmo2.Molmo2(MODEL), lora)
    start = finetune.create(lora, jax.random.key(0), boxed, params)
    base, value = finetune.frozen(lora, params, "float32"), objective("none")
    step = jax.value_and_grad(lambda trained: value(finetune.joined(lora, base, trained)))
    trained = finetune.trained_parts(boxed)
    total = flops.train_step(MODEL, **SHAPE, trained=trained).plus(
        flops.recomputed(MODEL, "none", **SHAPE, trained=trained)).total
    assert total < 0.85 * flops.train_step(MODEL, **SHAPE).total
    assert total == pytest.approx(counted(step, start), rel=ADAPTERS_TOLERANCE)


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


def test_a_kernel_whose_result_is_kept_is_not_repeated():
    full, kept = (flops.recomputed(MODEL, remat, **SHAPE) for remat in ("full", "attention"))
    assert kept.attention == 0 < full.attention and kept[:3] == full[:3]


def test_the_gradient_of_a_frozen_head_is_not_counted():
    tied = config_lib.Molmo2Config(vision=MODEL.vision, connector=MODEL.connector,
                                   text=config_lib.TextConfig(**{**vars(MODEL.text), "tied_head": True}))
    spared = flops.train_step(MODEL, **SHAPE).total - flops.train_step(tied, **SHAPE).total
    assert spared == 2 * B * T * MODEL.text.width * MODEL.text.vocab_size


# What a chip computes beyond the model's operations


@pytest.mark.parametrize("policies", [("none",), ("dots",), ("full",), ("attention",), ("full", "dots")])
@pytest.mark.parametrize("text", [{}, {"tied_head": True}, {"norm_after": True}])
def test_a_chip_that_wastes_nothing_executes_the_step_and_what_is_recomputed(policies, text):
    model = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, **text))
    shape = SHAPE | {"density": 0.5}
    once = flops.executed(model, *policies, rows=B, shape=SHAPE["shape"], how=flops.Execution())
    again = flops.recomputed(model, *policies, **shape)
    assert once == pytest.approx(flops.train_step(model, **shape).plus(again))


def test_widths_are_those_of_the_matrix_unit():
    """By hand, for units of 128 x 128: 48 values of a patch, heads of 32, widths of 192 and 64 are padded."""
    spent = flops.executed(MODEL, "none", rows=B, shape=SHAPE["shape"], how=flops.Execution(side=128))
    patches, tokens, windows = B * M * 49, B * T, B * R
    vit = patches * 128 * (128 + 4 * 128 + 2 * 384) + 2 * B * M * 49 * 49 * 4 * 128
    connector = windows * (19 * 128 * 128 + 18 * 128 + 128 * 128 + 2 * 128 * 256 + 256 * 256)
    decoder = tokens * 256 * (2 * 256 + 2 * 128 + 3 * 512)
    # The loss always repeats the head's product.
    head = tokens * 256 * 512 * 4 / 3
    assert spent.vit == 3 * 2 * vit and spent.connector == 3 * 2 * connector
    assert spent.decoder == 3 * 2 * (decoder + head)
    assert spent.attention == 3 * 4 * (B * T * T / 2) * 6 * 128


def test_released_widths_on_both_sizes_of_matrix_units():
    widths = {size: [flops.Execution(side=side).width(size) for side in (128, 256)]
              for size in (72, 128, 588, 1152, 4304, 4096, 12288)}
    assert widths == {72: [128, 256], 128: [128, 256], 588: [640, 768], 1152: [1152, 1280],
                      4304: [4352, 4352], 4096: [4096, 4096], 12288: [12288, 12288]}


def test_a_device_pads_its_own_part_of_a_width():
    how = flops.Execution(side=128, tensor=4)
    assert how.width(256, shared=True) == 4 * 128 and how.width(256) == 256
    assert how.width(255, shared=True) == 256   # not divided


def test_attention_computes_whole_tiles():
    assert flops.causal_pairs(1024, None) == 1024 * 1024 / 2
    assert flops.causal_pairs(1024, (256, 512)) == 256 * (512 + 512 + 1024 + 1024)
    assert flops.causal_pairs(16384, (256, 512)) / (16384 * 16384) == pytest.approx(0.5 + 1 / 64)
    assert flops.all_pairs(729, (512, 512)) == 1024 * 1024   # of a crop's 729 patches
    assert flops.all_pairs(729, None) == 729 * 729


def test_a_backward_pass_that_repeats_scores_takes_two_and_a_half_times_the_forward_pass():
    four, five = (flops.executed(MODEL, "attention", "dots", rows=B, shape=SHAPE["shape"],
                                 how=flops.Execution(backward=products)) for products in (4, 5))
    assert five.attention == pytest.approx(four.attention * 3.5 / 3)
    once = 4 * B * M * 49 * 49 * 4 * 32   # of the ViT: forward, again, gradients
    assert five.vit - four.vit == pytest.approx(once / 2)
    assert five[1:3] == four[1:3]
