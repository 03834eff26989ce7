"""Adapters: what they change, what stays frozen, and that they work with everything a run may use."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax import checkpoint
from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import finetune
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax.model import molmo2
from molmo2_jax.model import quantized
from tests import packs
from tests import tiny

MERGED_TOLERANCE = 1e-5   # of logits near 1, float32; measured 1e-6
MESH_TOLERANCE = 1e-5     # relative to the largest change of a parameter; float32, measured 2e-6
MODEL = molmo2.Molmo2(tiny.MODEL, attention="dense", remat="none")
LORA = finetune.LoraConfig(targets="all", rank=2, alpha=4.0, dropout=0.0)
TOWER = optim.Tower(lr=1e-2, warmup=1)
OPTIM = optim.OptimConfig(vit=TOWER, connector=TOWER, llm=TOWER)


@functools.cache
def base():
    return jax.tree.map(jnp.asarray, packs.random_params(tiny.MODEL))


def moved(lora, seed=0, model=MODEL, params=None):
    """Returns trained parameters of which B is random too."""
    boxed = state_lib.boxed_trained(model, lora)
    fresh = finetune.create(lora, jax.random.key(seed), boxed, params or base())
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), fresh)


def logits(params, number=0):
    return jax.jit(MODEL.apply)({"params": params}, tiny.batch(number))


def config_of(**fields):
    return train.TrainConfig(**{"steps": 4, "dtype": "float32", "loss_chunk": 16, "log_every": 1,
                                "save_every": 2, "keep": 10, "remat": "none", "attention": "dense",
                                "residual_dropout": 0.0, "lora": LORA, **fields})


def fit(workdir, batches, mesh=None, optimiser=OPTIM, params=None, **fields):
    return train.fit(model_config=tiny.MODEL, config=config_of(**fields), optimiser=optimiser,
                     mesh=mesh or tiny.mesh(), batches=batches, workdir=str(workdir), quiet=True,
                     params=base() if params is None else params)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# What an adapter computes

LORAS = {"all": LORA, "shared A": dataclasses.replace(LORA, share_a=True),
         "rsLoRA of q and v": dataclasses.replace(LORA, targets="text/layers/attn/[qv]/kernel", rslora=True),
         "decoder, connector in full": dataclasses.replace(LORA, targets="decoder", full=("connector",))}
# One quick case of each test; the others are slow.
NAMES = [name if name == "all" else pytest.param(name, marks=pytest.mark.slow(6)) for name in LORAS]


@pytest.mark.parametrize("name", NAMES)
def test_a_new_adapter_changes_no_bit_of_the_logits(name):
    lora = LORAS[name]
    fresh = finetune.create(lora, jax.random.key(1), state_lib.boxed_trained(MODEL, lora), base())
    joined = finetune.joined(lora, finetune.frozen(lora, base(), "float32"), fresh)
    assert np.asarray(logits(joined)).tobytes() == np.asarray(logits(base())).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_merged_equals_unmerged(name):
    lora = LORAS[name]
    trained, frozen = moved(lora), finetune.frozen(lora, base(), "float32")
    apart, plain = logits(finetune.joined(lora, frozen, trained)), logits(base())
    whole = finetune.merged(lora, frozen, trained)
    assert sorted(finetune.flat(whole)) == sorted(finetune.flat(base()))
    together = logits(whole)
    assert np.abs(np.asarray(apart) - plain).max() > 0.05
    np.testing.assert_allclose(together, apart, rtol=0, atol=MERGED_TOLERANCE)


def test_one_kernel_changes_by_the_scaled_product():
    lora = dataclasses.replace(LORA, rslora=True)
    trained = moved(lora)
    whole = finetune.merged(lora, finetune.frozen(lora, base(), "float32"), trained)
    for module in ("attn/q", "attn/o", "mlp/down"):
        kernel, part = base()["text"]["layers"], trained["text"]["layers"]
        after = whole["text"]["layers"]
        for name in module.split("/"):
            kernel, part, after = kernel[name], part[name], after[name]
        for layer, before in enumerate(kernel["kernel"]):
            a, b = part["lora"]["a"][layer].reshape(-1, 2), part["lora"]["b"][layer].reshape(2, -1)
            change = (4.0 / 2 ** 0.5) * (np.asarray(a) @ np.asarray(b)).reshape(before.shape)
            np.testing.assert_allclose(after["kernel"][layer], before + change, rtol=0, atol=1e-5)


def test_a_shared_a_is_held_once():
    lora = dataclasses.replace(LORA, targets="decoder", share_a=True)
    held = finetune.flat(state_lib.boxed_trained(MODEL, lora))
    assert sorted(path for path in held if path.endswith("/a")) == [
        f"text/layers/{module}/lora/a" for module in ("attn/o", "attn/q", "mlp/down", "mlp/up")]
    only = dataclasses.replace(lora, targets="text/layers/attn/[kv]/kernel")  # without q
    assert [path for path in finetune.flat(state_lib.boxed_trained(MODEL, only)) if path.endswith("/a")] == [
        "text/layers/attn/k/lora/a"]


@pytest.mark.slow(6)
def test_dropout_acts_on_the_inputs_of_the_adapter_and_keeps_the_mean():
    lora = dataclasses.replace(LORA, targets="text/layers/mlp/down/kernel", dropout=0.5)
    trained, frozen = moved(lora), finetune.frozen(lora, base(), "float32")

    @jax.jit
    def mean(keys):
        one = lambda key: MODEL.apply({"params": finetune.joined(lora, frozen, trained, key)}, tiny.batch(0),
                                      method="hidden")
        return jax.vmap(one)(keys).mean(0), one(keys[0])

    average, first = mean(jax.random.split(jax.random.key(0), 100))
    plain = MODEL.apply({"params": finetune.joined(lora, frozen, trained)}, tiny.batch(0), method="hidden")
    assert np.abs(first - plain).max() > 4 * np.abs(average - plain).max() > 0


# What is trained

TARGETS = {"decoder": 7, "connector": 7, "vision": 6, "all": 20, "text/layers/attn/[qv]/kernel": 2}


@pytest.mark.parametrize("targets", TARGETS)
def test_a_pattern_reaches_its_modules_and_no_other(targets):
    lora = dataclasses.replace(LORA, targets=targets)
    boxed = finetune.flat(state_lib.boxed_trained(MODEL, lora))
    modules = {path.rpartition("/lora/")[0] for path in boxed}
    assert len(modules) == TARGETS[targets] and len(boxed) == 2 * len(modules)
    prefix = {"all": ("text/layers/", "connector/", "vision/layers/"), "decoder": "text/layers/"}.get(
        targets, targets.split("/")[0])
    assert all(module.startswith(prefix) for module in modules)


@pytest.mark.slow(15)
def test_a_hundred_steps_change_what_is_trained_and_no_bit_of_what_is_frozen(tmp_path):
    lora = dataclasses.replace(LORA, targets="decoder", full=("connector",), dropout=0.1)
    given = jax.tree.map(jnp.array, base())
    result = fit(tmp_path, tiny.Batches(), params=given, lora=lora, steps=100, save_every=100, log_every=100)
    assert_equal(given, base())
    start = finetune.create(lora, jax.random.key(0), state_lib.boxed_trained(MODEL, lora), base())
    trained = finetune.flat(result.state.params)
    assert sorted(trained) == sorted(finetune.flat(start))
    for path, value in trained.items():
        if path.endswith("/b") and "/lora/" in path:
            assert np.abs(value).max() > 0, path
        elif "connector" in path:
            assert (np.asarray(value) != finetune.flat(base())[path]).any(), path
    moments = {jax.tree_util.keystr(path) for path, leaf in
               jax.tree_util.tree_leaves_with_path(result.state.opt_state) if leaf.ndim}
    assert len(moments) == 2 * len(trained)   # of Adam, and none of what is frozen
    assert not any("vision" in path or "embedding" in path or "head" in path for path in moments)


def test_rates_of_towers_hold_for_their_adapters():
    lora = dataclasses.replace(LORA, targets="all")
    slow = dataclasses.replace(OPTIM, vit=optim.Tower(lr=0.0), connector=optim.Tower(lr=1e-3, warmup=1))
    trained = moved(lora)
    tx = optim.make(slow, 4)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), trained)
    updates, _ = jax.jit(tx.update)(grads, tx.init(trained), trained)
    size = {tower: max(np.abs(leaf).max() for leaf in jax.tree.leaves(updates[tower])) for tower in updates}
    assert size["vision"] == 0 and size["text"] == pytest.approx(10 * size["connector"], rel=1e-3)


# With everything a run may use


@functools.cache
def stepped(sizes=(1, 1, 1, 1), **fields):
    """Returns the changes that one update makes, on a mesh, from an adapter that is not zero."""
    mesh = tiny.mesh(*sizes)
    config = config_of(**{"remat": "full", "attention": None} | fields)
    model, tx = config.model(tiny.MODEL), optim.make(OPTIM, 4)
    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda x: x.sharding, state_lib.abstract(model, tx, mesh, config.lora))
        start = state_lib.create(model, tx, mesh, 0, base(), layout, config.lora)
        params = jax.device_put(moved(config.lora), layout.params)
        frozen = finetune.frozen(config.lora, base(), config.dtype)
        placed = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), frozen,
                              state_lib.abstract_base(model, mesh, config.lora, config.dtype))
        grads = jax.jit(lambda state, batch, base: train.gradients(model, config, state, batch, base=base)
                        if config.accumulate == 1 else
                        train.accumulated_gradients(model, config, state, batch, base))
        measured, found = grads(start._replace(params=params),
                                sharding.put(tiny.batch(0), mesh, config.accumulate), placed)
    return float(measured["loss"]), jax.tree.map(np.asarray, found)


def assert_close(got, wanted, tolerance=MESH_TOLERANCE):
    assert got[0] == pytest.approx(wanted[0], rel=1e-5)
    for (path, want), have in zip(jax.tree_util.tree_leaves_with_path(wanted[1]), jax.tree.leaves(got[1]),
                                  strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-3),
                                   err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name, sizes, fields", [
    ("no remat", (1, 1, 1, 1), {"remat": "none", "attention": "dense"}),
    ("micro-batches", (1, 1, 1, 1), {"accumulate": 2}),
    ("two devices", (1, 2, 1, 1), {}), ("four devices", (1, 2, 2, 1), {}), ("context", (1, 2, 1, 2), {})])
@pytest.mark.slow(18)
def test_gradients_are_the_same_with_remat_meshes_and_micro_batches(name, sizes, fields):
    assert_close(stepped(sizes, **fields), stepped())


@pytest.mark.slow(25)
def test_dropout_of_an_adapter_is_the_same_on_a_mesh():
    lora = dataclasses.replace(LORA, dropout=0.3)
    assert_close(stepped((1, 2, 2, 1), lora=lora), stepped(lora=lora))
    assert abs(stepped(lora=lora)[0] - stepped()[0]) > 1e-4


@pytest.mark.slow(20)
def test_a_run_is_continued_bit_for_bit_and_its_checkpoints_hold_no_base(tmp_path):
    lora = dataclasses.replace(LORA, dropout=0.2)
    straight = fit(tmp_path / "straight", tiny.Batches(), lora=lora)

    def terminate(number, batch):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    stopped = fit(tmp_path / "resumed", tiny.Batches(terminate), lora=lora)
    assert int(stopped.state.step) == 2 and straight.finished
    batches = tiny.Batches()
    resumed = fit(tmp_path / "resumed", batches, lora=lora)
    assert batches.given == [2, 3]
    assert_equal(resumed.state.params, straight.state.params)
    assert_equal(resumed.state.opt_state, straight.state.opt_state)
    held = checkpoint.load_params(str(tmp_path / "resumed"), MODEL, tiny.mesh(), lora=lora)
    assert_equal(held, straight.state.params)
    sums = json.loads((tmp_path / "resumed" / "checkpoints" / "2" / "sums" / "metadata").read_text())
    assert all("/lora/" in path or path.endswith("count") or path in ("step", "rng") for path in sums)


def test_the_adapters_of_the_8b_take_less_than_200_mb():
    boxed = state_lib.boxed_trained(molmo2.Molmo2(config_lib.molmo2_8b()), finetune.LoraConfig(rank=16))
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(boxed))
    assert 150e6 < size < 200e6   # 175 MB; Adam's moments take twice as much


def test_a_fingerprint_tells_weights_apart_and_not_dtypes():
    params = jax.tree.map(np.asarray, base())
    own = finetune.fingerprint(params)
    assert own == finetune.fingerprint(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    params["text"]["layers"]["attn"]["q"]["kernel"] = params["text"]["layers"]["attn"]["q"]["kernel"] * 1.01
    assert own != finetune.fingerprint(params)


@pytest.mark.slow(12)
def test_an_answer_with_an_adapter_beside_its_kernel_is_that_of_the_merged_model():
    """Decoding takes the layers as a list, and multiplies in place."""
    trained, frozen = moved(LORA), finetune.frozen(LORA, base(), "float32")
    questions = decode.Questions(*(np.full((tiny.B, 1), value, np.int32) for value in (9, 6, 0)))
    answers = [decode.generate(MODEL, decode.ready(params, "float32"), tiny.batch(0), questions, eos=-1,
                               num_new=6)
               for params in (finetune.joined(LORA, frozen, trained), finetune.merged(LORA, frozen, trained))]
    np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)
    np.testing.assert_allclose(answers[0].logprob, answers[1].logprob, rtol=0, atol=1e-4)


@pytest.mark.slow(6)
def test_an_adapter_of_a_base_in_8_bits_is_that_of_the_matrices_it_stands_for():
    lora = dataclasses.replace(LORA, base="int8")
    trained, frozen = moved(lora), finetune.frozen(lora, base(), "float32")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), base())
    announced = finetune.frozen(lora, abstract, "float32")
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), frozen,
                 announced)
    assert frozen["text"]["layers"]["attn"]["q"]["kernel"].values.dtype == jnp.int8
    whole = finetune.nested({
        path: quantized.dequantize(leaf, quantized.summed_axes(path)) if quantized.is_int8(leaf) else leaf
        for path, leaf in finetune.flat(frozen).items()})

    def value(trained, base):
        logits = MODEL.apply({"params": finetune.joined(lora, base, trained)}, tiny.batch(0))
        return (logits ** 2).mean()

    grad = jax.jit(jax.value_and_grad(value))
    (ours, found), (wanted, expected) = grad(trained, frozen), grad(trained, whole)
    assert float(ours) == pytest.approx(float(wanted), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=0, atol=1e-5 * max(float(np.abs(b).max()), 1e-3)), found, expected)


# Mistakes


@pytest.mark.parametrize("fields, message", [
    ({"rank": 0}, "rank of an adapter must be >= 1; got 0"), ({"alpha": 0.0}, "alpha must be > 0"),
    ({"dropout": 1.0}, r"dropout of an adapter must lie in \[0, 1\)"),
    ({"full": ("decoder",)}, "full must name parameters among .*'text'.*; got .'decoder'"),
    ({"targets": "text/(layers"}, "targets must be one of .*'decoder'.* or a regular expression; got 'text/"),
    ({"targets": "q_proj"}, "targets must match the whole path of a kernel, such as .*/kernel.*; got "
     "'q_proj', which matches none of 21"),
    ({"targets": "connector", "full": ("connector",)}, "must not have an adapter and be trained in full as "),
    ({"rank": 10}, "rank of an adapter must be at most 8, the smaller side of .*; got 10")])
def test_mistakes_are_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        state_lib.boxed_trained(MODEL, finetune.LoraConfig(**{"targets": "all", "rank": 2} | fields))
    assert "\n" not in str(caught.value)


def test_a_tower_that_is_frozen_cannot_have_adapters_as_well():
    tx = optim.make(dataclasses.replace(OPTIM, frozen=("vision", "base_embedding")), 4)
    with pytest.raises(ValueError, match="must not be in OptimConfig.frozen; got vision"):
        state_lib.abstract(MODEL, tx, tiny.mesh(), LORA)


def test_adapters_without_a_base_are_refused(tmp_path):
    with pytest.raises(ValueError, match="adapters need a base: --init_from must name it"):
        train.fit(model_config=tiny.MODEL, config=config_of(), optimiser=OPTIM, mesh=tiny.mesh(),
                  batches=tiny.Batches(), workdir=str(tmp_path))
