"""Towers are clipped, warmed up and updated separately; frozen tables and unused rows do not change."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from molmo2_jax import optim
from molmo2_jax.hf import weights
from molmo2_jax.model import molmo2
from tests import packs
from tests import tiny

MODEL = packs.random_config("qwen3", 0)
TOTAL = 40
PEAKS = {"vit": 1e-3, "connector": 2e-3, "llm": 4e-3}
WARMUPS = {"vit": 5, "connector": 2, "llm": 3}


def config(**fields):
    towers = {name: optim.Tower(lr=PEAKS[name], warmup=WARMUPS[name]) for name in PEAKS}
    return optim.OptimConfig(**{**towers, **fields})


@functools.cache
def all_params():
    return packs.random_params(MODEL)


@functools.cache
def params():
    """Returns a few parameters of each tower, one of each kind: less to compile than all of them."""
    kept = ("vision/layers/fc1/kernel", "vision/layers/norm1/scale", "vision/position", "connector/pool/o",
            "new_embedding", "text/layers/attn/q/kernel", "text/layers/mlp_norm", "base_embedding", "head")
    return weights.unflatten({path: x for path, x in flat(all_params()).items() if path.startswith(kept)})


def random_grads(seed=1, scale=1e-3, like=params):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(np.float32), like())


@functools.cache
def _program(optimiser):
    """Returns a function from parameters and stacked gradients to what the updates change, compiled."""
    tx = optim.make(optimiser, TOTAL)

    @jax.jit
    def run(start, grads_of_steps):
        def step(carry, grads):
            now, state = carry
            change, state = tx.update(grads, state, now)
            return (optax.apply_updates(now, change), state), None
        (now, _), _ = jax.lax.scan(step, (start, tx.init(start)), grads_of_steps)
        return jax.tree.map(jnp.subtract, now, start)
    return run


def updates(optimiser, grads_of_steps, like=params):
    """Returns the sum of the updates of some steps."""
    stacked = jax.tree.map(lambda *grads: np.stack(grads), *grads_of_steps)
    return jax.tree.map(np.asarray, _program(optimiser)(like(), stacked))


def flat(tree):
    return {"/".join(key.key for key in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def tower_of(path):
    return optim.TOWER_OF[path.split("/")[0]]


# Learning rate


@pytest.mark.parametrize("warmup", [200, 2000])
def test_the_rate_warms_up_from_the_first_update_and_falls_to_a_tenth(warmup):
    total, peak = 10_000, 2e-5
    tower = optim.Tower(lr=peak, warmup=warmup)

    def rate(step):
        return float(optim.learning_rate(tower, 0.1, total, step)) / peak

    assert rate(1) == pytest.approx(1 / warmup, rel=1e-5)
    assert rate(warmup - 1) == pytest.approx(1 - 1 / warmup, rel=1e-5)
    assert rate(warmup) == pytest.approx(1, rel=1e-5)
    assert rate((warmup + total) / 2) == pytest.approx(0.55, rel=1e-4)
    assert rate(total) == pytest.approx(0.1, rel=1e-5)
    assert rate(2 * total) == pytest.approx(0.1, rel=1e-5)


def test_the_first_update_uses_a_warming_rate_in_each_tower():
    """Adam's first update is the rate times the sign of the gradient."""
    change = flat(updates(config(eps=1e-12, frozen=()), [random_grads()]))
    for path, value in change.items():
        tower = tower_of(path)
        assert np.median(np.abs(value)) == pytest.approx(PEAKS[tower] / WARMUPS[tower], rel=1e-3), path


# Updates


def test_moments_in_the_hosts_memory_are_updated_and_returned_there():
    plain, tx = (optim.make(config(offload=offload), TOTAL) for offload in (False, True))
    waiting = jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(tx.memory_kind))
                           if x.ndim else x, plain.init(params()))
    layout = jax.tree.map(lambda x: x.sharding, waiting)
    change, after = jax.jit(tx.update, out_shardings=(None, layout))(random_grads(), waiting, params())
    expected = jax.jit(plain.update)(random_grads(), plain.init(params()), params())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (change, after), expected)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(after) if x.ndim} == {"pinned_host"}


def test_each_tower_is_plain_adamw_with_its_own_schedule():
    grads = [random_grads(seed) for seed in range(4)]
    ours = flat(updates(config(weight_decay=0.2, frozen=(), clip_norm=1e9), grads))
    spared = ("norm", "embedding", "position")

    @jax.jit
    def reference(start, grads):
        total = {}
        for path, now in start.items():
            tower = tower_of(path)
            rate = optax.warmup_cosine_decay_schedule(
                0.0, PEAKS[tower], WARMUPS[tower], TOTAL, 0.1 * PEAKS[tower])
            decay = 0.0 if any(word in path for word in spared) else 0.2
            tx = optax.adamw(lambda count, rate=rate: rate(count + 1), 0.9, 0.95, 1e-6, weight_decay=decay)
            state = tx.init(now)
            for one in grads:
                change, state = tx.update(one[path], state, now)
                now = now + change
            total[path] = now - start[path]
        return total

    expected = reference(flat(params()), [flat(one) for one in grads])
    for path, change in ours.items():
        np.testing.assert_allclose(change, expected[path], rtol=1e-3, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("muon", [None, optim.Muon()], ids=["adamw", "muon"])
@pytest.mark.parametrize("loud", ["vit", "connector", "llm"])
def test_a_loud_tower_leaves_the_updates_of_the_others_alone(loud, muon):
    grads = [random_grads(seed) for seed in (1, 2)]
    louder = [jax.tree_util.tree_map_with_path(
        lambda path, x: x * (1000 if optim.TOWER_OF[path[0].key] == loud else 1), grads[0]), grads[1]]
    before, after = (flat(updates(config(muon=muon), g)) for g in (grads, louder))
    for path, change in before.items():
        if tower_of(path) != loud:
            np.testing.assert_array_equal(change, after[path], err_msg=path)
    assert any((before[path] != after[path]).any() for path in before if tower_of(path) == loud)


def test_a_tower_is_clipped_to_its_norm_which_is_reported_unclipped():
    grads = random_grads(scale=1.0)
    norms = {name: math.sqrt(sum(float(np.square(x).sum()) for path, x in flat(grads).items()
                                 if tower_of(path) == name)) for name in PEAKS}
    reported = optim.grad_norms(grads)
    for name, norm in norms.items():
        assert norm > 2 and float(reported[f"grad_norm_{name}"]) == pytest.approx(norm, rel=1e-5)
    clipped = jax.tree_util.tree_map_with_path(
        lambda path, x: x / norms[optim.TOWER_OF[path[0].key]], grads)
    quiet = random_grads(2)  # clipping a single gradient would not show: Adam divides by its size
    before, after = (updates(config(frozen=()), [g, quiet]) for g in (grads, clipped))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), before, after)


@pytest.mark.parametrize("muon", [None, optim.Muon()], ids=["adamw", "muon"])
def test_frozen_tables_stay_bit_identical_and_carry_no_state(muon):
    change = updates(config(muon=muon), [random_grads(seed) for seed in range(2)])
    assert (change["base_embedding"] == 0).all()
    assert all(np.abs(value).max() > 0 for path, value in flat(change).items() if path != "base_embedding")
    state = optim.make(config(muon=muon), TOTAL).init(params())
    assert not any("base_embedding" in jax.tree_util.keystr(path)
                   for path, _ in jax.tree_util.tree_leaves_with_path(state))


@pytest.mark.slow(8)
def test_training_changes_the_added_rows_and_no_bit_of_a_base_table_that_is_also_the_head():
    model = dataclasses.replace(tiny.MODEL, text=dataclasses.replace(tiny.MODEL.text, tied_head=True))
    module, tx = molmo2.Molmo2(model, attention="dense", remat="none"), optim.make(config(), TOTAL)
    start = packs.random_params(model)

    def loss(params, batch):
        logits = module.apply({"params": params}, batch)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
        return -(batch.weights * picked).sum()

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        change, state = tx.update(grads, state, params)
        return optax.apply_updates(params, change), state, grads

    trained, state = start, tx.init(start)
    for number in range(3):
        trained, state, grads = step(trained, state, tiny.batch(number % 2))
    assert np.abs(grads["base_embedding"]).max() > 0 and "head" not in start
    for path, value in flat(trained).items():
        is_same = np.asarray(value).tobytes() == flat(start)[path].tobytes()
        assert is_same == (path == "base_embedding"), path


@pytest.mark.slow(6)
@pytest.mark.parametrize("muon", [None, optim.Muon()], ids=["adamw", "muon"])
def test_training_leaves_a_frozen_row_of_patches_at_zero(muon):
    model = dataclasses.replace(tiny.MODEL, freeze_patch_row=True)
    module = molmo2.Molmo2(model, attention="dense", remat="none")
    tx = optim.make(config(muon=muon, weight_decay=0.5), TOTAL)
    start = packs.random_params(model)
    start["new_embedding"][molmo2.PATCH_ROW] = 0

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(lambda p: jnp.square(module.apply({"params": p}, batch)).mean())(params)
        change, state = tx.update(grads, state, params)
        return optax.apply_updates(params, change), state

    trained, state = start, tx.init(start)
    for number in range(3):
        trained, state = step(trained, state, tiny.batch(number % 2))
    table = np.asarray(trained["new_embedding"])
    assert not table[molmo2.PATCH_ROW].any()
    visual = model.special_id("<frame_start>") - model.text.vocab_size
    assert (table[visual] != start["new_embedding"][visual]).any()


@pytest.mark.parametrize("muon", [None, optim.Muon()], ids=["adamw", "muon"])
def test_rows_of_the_added_table_without_gradient_do_not_change(muon):
    grads = [random_grads(seed) for seed in range(2)]
    for one in grads:
        one["new_embedding"][14:] = 0
    change = updates(config(muon=muon), grads)["new_embedding"]
    assert (change[14:] == 0).all() and np.abs(change[:14]).min() > 0


# Muon


def matrices(path, value):
    """Returns a parameter as float[layers or 1, inputs, outputs]: how it multiplies activations."""
    value = value if "/layers/" in path else value[None]
    num_inputs = 2 if path.split("/")[-2] == "o" else 1
    return value.reshape(value.shape[0], math.prod(value.shape[1:1 + num_inputs]), -1)


def test_muon_orthogonalises_every_kernel_and_nothing_else():
    peak = 0.02
    muon = config(muon=optim.Muon(lr=peak), eps=1e-12, frozen=())
    grads = random_grads(like=all_params)
    change = flat(updates(muon, [grads], like=all_params))
    kernels = [path for path in change if path.endswith("kernel")]
    assert len(kernels) == 7 + 7 + 7  # connector, text, vision
    for path in kernels:
        for matrix in matrices(path, change[path]):
            scale = peak / WARMUPS[tower_of(path)] * max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5
            singular = np.linalg.svd(matrix, compute_uv=False) / scale
            # Five Newton-Schulz steps bring them near 1; a gradient of random numbers is far from it.
            assert singular.max() < 1.3 and np.median(singular) > 0.5, (path, singular)
    signs, of_grads = {path: np.sign(change[path]) for path in set(change) - set(kernels)}, flat(grads)
    for path, sign in signs.items():  # Adam's first update
        np.testing.assert_array_equal(sign, -np.sign(of_grads[path]), err_msg=path)
        assert np.abs(change[path]).std() < 0.01 * np.abs(change[path]).mean(), path



# Settings


@pytest.mark.parametrize("make, rule", [
    (lambda: optim.Tower(lr=-1.0), "lr must be >= 0"), (lambda: optim.Tower(lr=1.0, warmup=0), "warmup"),
    (lambda: config(frozen=("embedding",)), "frozen must name"), (lambda: config(floor=1.5), "floor")])
def test_settings_that_make_no_sense_are_refused(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()
