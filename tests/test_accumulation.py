"""Micro-batches change the memory of a step, not its loss, gradients or update."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from molmo2_jax import loss
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax.model import molmo2
from tests import packs
from tests import tiny

TOLERANCE = 1e-5   # relative to the largest gradient of a parameter; float32, measured 2e-6
MODEL = molmo2.Molmo2(tiny.MODEL)
ROWS = packs.random_rows(0, tiny.MODEL, 8, tiny.T, tiny.M, tiny.R)
RATE = 2.0**20    # so large that changes of parameters near 1 are gradients without rounding
DESCENT = optim.Optimiser(*optax.sgd(RATE))
ADAM = optim.make(optim.OptimConfig(vit=optim.Tower(lr=1e-2, warmup=1), llm=optim.Tower(lr=1e-2, warmup=1),
                                    connector=optim.Tower(lr=1e-2, warmup=1)), 4)


def config_of(accumulate, **fields):
    return train.TrainConfig(**{"steps": 4, "dtype": "float32", "loss_chunk": 10, "residual_dropout": 0.0,
                                "accumulate": accumulate} | fields)


def lowered(accumulate, mesh, tx=DESCENT, **fields):
    """Returns (a step lowered for ROWS, the shardings of its state)."""
    with jax.set_mesh(mesh):
        state = state_lib.abstract(MODEL, tx, mesh)
        layout = jax.tree.map(lambda x: x.sharding, state)
        batch = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), ROWS,
                             sharding.of_batch(mesh, ROWS))
        step = functools.partial(train.train_step, MODEL, tx, config_of(accumulate, **fields))
        return jax.jit(step, out_shardings=(layout, None)).lower(state, batch), layout


@functools.cache
def started(tx):
    return state_lib.create(MODEL, tx, tiny.mesh(), 0)


@functools.cache
def stepped(accumulate, sizes=(1, 1, 1, 1), tx=DESCENT, **fields):
    """Returns (metrics, changes of the parameters or with DESCENT gradients, compiled program) of a step over
    ROWS."""
    mesh = tiny.mesh(*sizes)
    program, layout = lowered(accumulate, mesh, tx, **fields)
    compiled, start = program.compile(), started(tx)
    after, measured = compiled(jax.device_put(start, layout),
                               jax.device_put(ROWS, sharding.of_batch(mesh, ROWS)))
    rate = RATE if tx is DESCENT else 1
    change = jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / rate, start.params, after.params)
    return {name: float(value) for name, value in measured.items()}, change, compiled


def assert_same(got, expected, tolerance=TOLERANCE):
    for name, value in expected[0].items():
        assert got[0][name] == pytest.approx(value, rel=TOLERANCE, abs=1e-7), name
    for (path, wanted), change in zip(jax.tree_util.tree_leaves_with_path(expected[1]),
                                      jax.tree.leaves(got[1]), strict=True):
        np.testing.assert_allclose(change, wanted, rtol=0, atol=tolerance * max(np.abs(wanted).max(), 1e-3),
                                   err_msg=jax.tree_util.keystr(path))


def test_rows_differ_in_weight_so_that_a_mean_of_means_would_be_wrong():
    weights = ROWS.weights.sum(axis=1)
    parts = [weights[number::4].sum() for number in range(4)]
    assert max(parts) > min(parts) == 0   # one micro-batch without loss tokens


# data, fsdp, tensor, context
@pytest.mark.slow(13)
@pytest.mark.parametrize("accumulate, sizes", [
    (2, (1, 1, 1, 1)), (4, (1, 1, 1, 1)), (4, (2, 1, 1, 1)), (2, (2, 2, 1, 1)), (2, (1, 2, 1, 1)),
    (4, (1, 2, 1, 2)), (2, (1, 4, 1, 1))])
def test_loss_and_gradients_of_micro_batches_equal_those_of_one_batch(accumulate, sizes):
    assert_same(stepped(accumulate, sizes), stepped(1))


@pytest.mark.slow(14)
def test_an_update_of_the_real_optimiser_with_micro_batches_equals_one_of_one_batch():
    one, four = stepped(1, tx=ADAM), stepped(4, tx=ADAM)
    # The first update of Adam is the rate times the sign of a gradient: near zero, rounding decides the sign.
    sizes = jax.tree.leaves(jax.tree.map(np.abs, stepped(1)[1]))
    for before, after, size in zip(jax.tree.leaves(one[1]), jax.tree.leaves(four[1]), sizes, strict=True):
        clear = size > 1e-4
        np.testing.assert_allclose(after[clear], before[clear], rtol=0, atol=1e-2 * 1e-3)
    assert four[0]["grad_norm_llm"] == pytest.approx(one[0]["grad_norm_llm"], rel=TOLERANCE)


@pytest.mark.slow(20)
def test_an_update_with_micro_batches_and_moments_in_the_hosts_memory_is_that_of_one_batch():
    """Moments move once per update, not in every micro-batch, and stay where they are stored."""
    sizes, waiting = (1, 2, 1, 1), optim.offloaded(ADAM)
    plain, moved = stepped(1, sizes, tx=ADAM), stepped(4, sizes, tx=waiting)
    clear = jax.tree.map(lambda change: np.abs(change) > 1e-4, stepped(1)[1])   # see above
    for before, after, where in zip(*map(jax.tree.leaves, (plain[1], moved[1], clear)), strict=True):
        np.testing.assert_allclose(after[where], before[where], rtol=0, atol=1e-2 * 1e-3)
    assert moved[0]["loss"] == pytest.approx(plain[0]["loss"], rel=TOLERANCE)
    mesh = tiny.mesh(*sizes)
    state = state_lib.abstract(MODEL, waiting, mesh)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert moments and {leaf.sharding.memory_kind for leaf in moments} == {waiting.memory_kind}
    given, returned = moved[2].input_shardings[0][0].opt_state, moved[2].output_shardings[0].opt_state
    for shardings in (given, returned):
        kinds = [one.memory_kind for one in jax.tree.leaves(shardings)]
        assert kinds.count(waiting.memory_kind) == len(moments)


@pytest.mark.slow(8)
def test_no_rows_move_between_devices():
    """A step with micro-batches has the collectives of one without, on arrays with fewer rows."""
    def of_batch(accumulate):
        text = stepped(accumulate, (2, 2, 1, 1))[2].as_text()
        found = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute)\(", text)
        return collections.Counter((dtype, kind) for dtype, _, kind in found if dtype in ("s32", "u8", "pred")
                                   or kind != "all-gather")

    assert of_batch(2) == of_batch(1)


def test_a_micro_batch_is_every_nth_row_on_any_mesh():
    for sizes in ((1, 1, 1, 1), (2, 2, 1, 1)):
        mesh = tiny.mesh(*sizes)
        placed = jax.device_put(ROWS, sharding.of_batch(mesh, ROWS))
        with jax.set_mesh(mesh):
            part = jax.jit(lambda batch: sharding.micro_batch(sharding.split(batch, 2), jnp.int32(1)))(placed)
        for value, host in zip(jax.tree.leaves(part), jax.tree.leaves(ROWS), strict=True):
            np.testing.assert_array_equal(value, host[1::2])


@pytest.mark.slow(6)
def test_temporary_memory_falls():
    one, four = (stepped(number)[2].memory_analysis().temp_size_in_bytes for number in (1, 4))
    gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(started(DESCENT).params))
    assert four < one / 2 + gradients


@pytest.mark.slow(7)
def test_dropout_differs_between_micro_batches_and_repeats():
    same = jax.tree.map(lambda x: np.repeat(x[:1], 2, axis=0), ROWS)
    state, config = started(DESCENT), config_of(2, residual_dropout=0.5, remat="none", attention="dense")
    total = loss.Total(same.weights.sum(), None)
    one = jax.jit(lambda number: train.gradients(
        MODEL, config, state, jax.tree.map(lambda x: x[:1], same), number, total)[0]["loss"])
    first, second, again = (float(one(number)) for number in (0, 1, 0))
    assert first == again and abs(first - second) > 1e-3
    both, _ = jax.jit(lambda batch: train.accumulated_gradients(MODEL, config, state, batch))(same)
    assert float(both["loss"]) == pytest.approx(first + second, rel=TOLERANCE)


def test_rows_that_micro_batches_cannot_share_are_refused():
    with pytest.raises(ValueError, match=r"accumulate x data x fsdp = 2 x 4; got 4"):
        sharding.put(tiny.batch(0), tiny.mesh(data=2, fsdp=2), 2)
    with pytest.raises(ValueError, match="accumulate must be >= 1"):
        config_of(0)


@pytest.mark.slow(20)
def test_a_run_with_micro_batches_trains(tmp_path):
    result = train.fit(model_config=tiny.MODEL, config=config_of(2, steps=2, log_every=1),
                       optimiser=optim.OptimConfig(), mesh=tiny.mesh(data=2), batches=tiny.Batches(),
                       workdir=str(tmp_path), quiet=True)
    assert result.finished and result.compilations == 1
