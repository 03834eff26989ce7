"""Packing and trees change nothing: each branch and each example has the same logits as alone."""

import dataclasses
import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax import decode
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax import types
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.model import layers
from molmo2_jax.model import molmo2
from tests import packs
from tests import tiny

TOLERANCE = 1e-5  # float32; measured 3e-6 on logits of size 4
MEMORY_TOLERANCE = 1.1  # of the bytes of tapped layers; measured 1.002
T, M, R = 128, 16, 64


def run(config, batch, attention=None):
    model = molmo2.Molmo2(config, remat="none", attention=attention)
    apply = jax.jit(model.apply)
    return np.asarray(apply({"params": packs.random_params(config)}, batch))


def only(sequence, branch):
    """Returns the root and one branch of a message tree."""
    kept = (sequence.branch < 0) | (sequence.branch == branch)
    per_token = {name: getattr(sequence, name)[kept]
                 for name in ("tokens", "targets", "weights", "positions", "image")}
    return dataclasses.replace(sequence, **per_token, branch=np.minimum(sequence.branch[kept], 0))


@pytest.mark.parametrize("style", ["qwen3", "olmo"])
def test_a_branch_has_the_logits_it_has_alone_with_the_root(style):
    config = packs.random_config(style, 0)
    rng = np.random.default_rng(0)
    tree = packs.sequence(rng, config, packs.video(rng, config, 4), (5, 9, 3, 7, 1))
    rows = [packs.row([s], config, T, M, R) for s in [tree] + [only(tree, n) for n in range(5)]]
    together, *alone = run(config, rows_lib.stack(rows))
    root = int((tree.branch < 0).sum())
    for number, logits in enumerate(alone):
        here = np.flatnonzero(tree.branch == number)
        np.testing.assert_allclose(together[:root], logits[:root], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(together[here], logits[root:root + len(here)], atol=TOLERANCE, rtol=0)
    assert together[:root + 20].std() > 0.3


@pytest.mark.parametrize("style", ["qwen3", "olmo"])
def test_a_packed_example_has_the_logits_it_has_alone(style):
    config = packs.random_config(style, 1)
    rng = np.random.default_rng(0)
    examples = [packs.sequence(rng, config, packs.images(rng, config, 1), (6,)),
                packs.sequence(rng, config, None, (9, 4)),
                packs.sequence(rng, config, packs.video(rng, config, 5), (3, 8)),
                packs.sequence(rng, config, packs.images(rng, config, 2, num_tiles=1), (4,))]
    length = sum(len(one.tokens) for one in examples)
    rows = [packs.row(group, config, max(T, length), M, R) for group in (examples, *([e] for e in examples))]
    together, *alone = run(config, rows_lib.stack(rows))
    first = 0
    for one, logits in zip(examples, alone):
        here = slice(first, first + len(one.tokens))
        np.testing.assert_allclose(together[here], logits[:len(one.tokens)], atol=TOLERANCE, rtol=0)
        first = here.stop


def test_blocked_and_dense_attention_give_the_same_model():
    config = packs.random_config("olmo", 2)
    batch = packs.random_rows(0, config, 2, T)
    valid = batch.example >= 0
    np.testing.assert_allclose(run(config, batch, "blocked")[valid], run(config, batch, "dense")[valid],
                               atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("setting", "changes_first"), [
    ("image_tokens", True), ("within_image", False), ("causal", False)])
def test_later_frames_change_earlier_ones_only_where_the_setting_says_so(setting, changes_first):
    config = dataclasses.replace(packs.random_config("qwen3", 0), visual_attention=setting)
    rng = np.random.default_rng(0)
    base = packs.row([packs.sequence(rng, config, packs.video(rng, config, 3), (4,))], config, 32, 3, 6)
    other = base._replace(patches=base.patches.copy())
    other.patches[0, 2] += 90
    before, after = run(config, rows_lib.stack([base, other]), "dense")
    frames = base.image[0]
    assert (np.abs(before - after)[frames == 0].max() > 1e-3) == changes_first
    assert np.abs(before - after)[frames == 2].max() > 1e-3
    text = np.flatnonzero((frames < 0) & (base.example[0] >= 0))
    assert np.abs(before - after)[text[:3]].max() == 0  # BOS and the first time text precede every frame


def frozen(config):
    return dataclasses.replace(config, freeze_patch_row=True)


def drawn(config):
    """Returns parameters as drawn for training from scratch."""
    model = molmo2.Molmo2(config, remat="none", attention="dense")
    batch = packs.random_rows(0, config, 1, T)
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), batch)["params"])


def test_replacing_a_row_of_zeros_equals_adding_to_it():
    config = packs.random_config("qwen3", 0)
    batch = packs.random_rows(1, config, 2, T)
    row = config.special_id("<im_patch>") - config.text.vocab_size
    logits = {}
    for is_zero in (True, False):
        params = packs.random_params(config)
        params["new_embedding"][row] *= not is_zero
        for how in ("add", "replace"):
            model = molmo2.Molmo2(dataclasses.replace(config, visual_merge=how), remat="none")
            logits[is_zero, how] = np.asarray(jax.jit(model.apply)({"params": params}, batch))
    np.testing.assert_array_equal(logits[True, "add"], logits[True, "replace"])
    np.testing.assert_array_equal(logits[True, "add"], logits[False, "replace"])
    assert np.abs(logits[False, "add"] - logits[False, "replace"]).max() > 1e-2


@pytest.mark.slow(8)
def test_only_the_patch_row_starts_at_zero_if_configured():
    config = packs.random_config("qwen3", 0)
    row = config.special_id("<im_patch>") - config.text.vocab_size
    usual, zeroed = (np.asarray(drawn(one)["new_embedding"]) for one in (config, frozen(config)))
    assert not zeroed[row].any() and usual[row].all()
    np.testing.assert_array_equal(np.delete(zeroed, row, 0), np.delete(usual, row, 0))


@pytest.mark.slow(7)
def test_a_frozen_row_gets_no_gradient_and_the_logits_are_the_same():
    config = packs.random_config("qwen3", 0)
    params, batch = packs.random_params(config), packs.random_rows(0, config, 1, T)
    row = config.special_id("<im_patch>") - config.text.vocab_size

    def grads(config):
        model = molmo2.Molmo2(config, remat="none", attention="dense")
        loss = lambda params: jnp.square(model.apply({"params": params}, batch)).sum()
        return jax.jit(jax.value_and_grad(loss))(params)

    (usual, free), (same, held) = grads(config), grads(frozen(config))
    assert usual == same
    free, held = (np.asarray(x["new_embedding"]) for x in (free, held))
    assert np.abs(free[row]).max() > 0 and not held[row].any()
    np.testing.assert_array_equal(np.delete(held, row, 0), np.delete(free, row, 0))


def test_a_time_text_reaches_its_own_frame_but_no_earlier_one():
    config = packs.random_config("qwen3", 0)
    # In one layer: with more, the earlier frame sees the later one, which saw the text.
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=1))
    rng = np.random.default_rng(0)
    base = packs.row([packs.sequence(rng, config, packs.video(rng, config, 3), (4,))], config, 32, 3, 6)
    other = base._replace(tokens=base.tokens.copy())
    at = np.flatnonzero(base.image[0] == 1)[0] - 1  # the text before the second frame
    other.tokens[0, at] = (base.tokens[0, at] + 1) % config.text.vocab_size
    before, after = run(config, rows_lib.stack([base, other]), "dense")
    frames = base.image[0]
    assert np.abs(before - after)[frames == 0].max() == 0
    assert np.abs(before - after)[frames == 1].max() > 1e-3


def test_padding_crops_and_empty_windows_change_no_gradient():
    config = packs.random_config("qwen3", 0)
    rng = np.random.default_rng(0)
    one = packs.sequence(rng, config, packs.video(rng, config, 3), (4,))
    black = packs.row([one], config, 32, 5, 10)
    assert (black.pooled[0, 6:] == -1).all()
    grey = black._replace(patches=black.patches.copy())
    grey.patches[0, 3:] = 200

    @jax.jit
    def grads(batch):
        def loss(params):
            model = molmo2.Molmo2(config, remat="none", attention="dense")
            logits = model.apply({"params": params}, batch)
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
            return -(picked * batch.weights).sum()
        return jax.grad(loss)(packs.random_params(config))

    for a, b in zip(*(jax.tree.leaves(grads(batch)) for batch in (black, grey))):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def cut(config, params, num_layers):
    """Returns a model of the first layers of the decoder, and its parameters."""
    text = params["text"] | {"layers": jax.tree.map(lambda leaf: leaf[:num_layers], params["text"]["layers"])}
    shorter = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=num_layers))
    return molmo2.Molmo2(shorter, remat="none"), params | {"text": text}


@pytest.mark.parametrize("style", ["qwen3", "olmo"])
@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.slow(11)
def test_a_tapped_layer_equals_the_end_of_a_model_cut_after_it(style, remat):
    config = packs.random_config(style, 0)
    params, batch = packs.random_params(config), packs.random_rows(0, config, 2, T)
    last = config.text.num_layers - 1
    look = functools.partial(molmo2.Molmo2(config, remat=remat).apply, taps=(last, 0), method="hidden")
    hidden, inside = jax.jit(look)({"params": params}, batch)
    unrolled = look({"params": decode.ready(params, "float32", unroll=True)}, batch)[1]
    assert list(inside.layers) == list(unrolled.layers) == [0, last]
    for layer, tapped in inside.layers.items():
        model, shorter = cut(config, params, layer + 1)
        wanted = model.apply({"params": shorter}, batch, method="hidden")
        for one in (tapped, unrolled.layers[layer]):
            normed = layers.rms_norm(one, params["text"]["final_norm"]["scale"], config.text.norm_eps)
            np.testing.assert_allclose(normed, wanted, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(hidden, wanted, atol=TOLERANCE, rtol=0)  # the whole model
    assert inside.features.shape[:2] == batch.patches.shape[:2]
    assert inside.visual.shape[:2] == batch.pooled.shape[:2]


def test_text_alone_has_nothing_visual_inside():
    config = packs.random_config("qwen3", 0)
    batch = packs.random_rows(0, config, 1, T)._replace(pooled=np.zeros((1, 0, 4), np.int32))
    look = functools.partial(molmo2.Molmo2(config).apply, {"params": packs.random_params(config)}, batch)
    assert look(taps=(), method="hidden")[1] == (None, None, {})
    with pytest.raises(ValueError, match=r"taps must name layers 0 ... \d+; got \(99,\)"):
        look(taps=(99,), method="hidden")


def test_the_documented_lines_look_inside():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "model.md").read_text()
    [lines] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    config = packs.random_config("qwen3", 0)
    batch = packs.random_rows(0, config, 2, T)
    known = {"jax": jax, "functools": functools, "molmo2": molmo2, "config": config, "batch": batch,
             "params": packs.random_params(config)}
    exec(lines.replace("12", "1"), known)
    assert known["inside"].layers[1].shape == known["hidden"].shape == (2, T, config.text.width)


@pytest.mark.parametrize("is_learning", [False, True])
@pytest.mark.slow(10)
def test_only_tapped_layers_are_kept_and_each_device_keeps_its_part(is_learning):
    config = dataclasses.replace(tiny.MODEL, text=dataclasses.replace(tiny.MODEL.text, num_layers=16))
    model, mesh, rows, length = molmo2.Molmo2(config, attention="blocked"), tiny.mesh(2, 2, 1, 2), 4, 512
    one = rows * length * config.text.width * 4 / mesh.size  # bytes of a layer's output on a device

    def program(params, batch, taps):
        def score(params):
            hidden, inside = model.apply({"params": params}, batch, taps=taps, method="hidden")
            return (hidden ** 2).sum() + sum((tapped ** 3).sum() for tapped in inside.layers.values())

        def look(params):
            return model.apply({"params": params}, batch, taps=taps, method="hidden")[1].layers
        return jax.grad(score)(params) if is_learning else look(params)

    with jax.set_mesh(mesh):
        shape = types.RowShape(T=length, M=2, R=8, W=9)
        batch = types.batch_shapes(rows, shape, config.vision.patch_shape)
        batch = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch,
                             sharding.of_batch(mesh, batch))
        args = state.abstract_params(model, mesh), batch
        compiled = {taps: jax.jit(program, static_argnums=2).lower(*args, taps).compile()
                    for taps in ((12,), (3, 12, 15))}
    memory = [program.memory_analysis() for program in compiled.values()]
    used = [found.temp_size_in_bytes + found.output_size_in_bytes for found in memory]
    assert 0 < used[1] - used[0] < 2 * one * MEMORY_TOLERANCE  # two more taps, of 16 layers
