"""A run that is stopped, killed and resumed makes the same updates as an uninterrupted one."""

import dataclasses
import errno
import functools
import json
import math
import os
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import pipeline
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from molmo2_jax import checkpoint
from molmo2_jax import config as config_lib
from molmo2_jax import optim
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax import types
from molmo2_jax.aot import step as aot_step
from molmo2_jax.cost import chips
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import layers
from molmo2_jax.model import molmo2
from molmo2_jax.monitor import guard
from molmo2_jax.monitor import metrics
from tests import packs
from tests import tiny

TOWER = optim.Tower(lr=2e-2, warmup=1)
OPTIM = optim.OptimConfig(vit=TOWER, connector=TOWER, llm=TOWER)


def train_config(**fields):
    return train.TrainConfig(**{"steps": 6, "dtype": "float32", "loss_chunk": 16, "log_every": 1,
                                "save_every": 2, "keep": 10, "remat": "none", "attention": "dense", **fields})


def fit(workdir, batches, model=tiny.MODEL, profile=None, **fields):
    return train.fit(model_config=model, config=train_config(**fields), optimiser=OPTIM, mesh=tiny.mesh(),
                     batches=batches, workdir=str(workdir), quiet=True, profile=profile)


def losses(workdir):
    """Returns {step: values that do not depend on the clock}."""
    return {line["step"]: {name: value for name, value in line.items() if not metrics.is_timed(name)}
            for line in metrics.read(str(pathlib.Path(workdir) / "metrics.jsonl"))}


def saved_steps(workdir):
    return sorted(int(path.name) for path in (pathlib.Path(workdir) / "checkpoints").glob("[0-9]*"))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(Result, work directory) of six steps without interruption."""
    workdir = tmp_path_factory.mktemp("straight")
    return fit(workdir, tiny.Batches()), workdir


# The step


def test_a_run_compiles_once_reports_every_step_and_learns(straight):
    result, workdir = straight
    assert result.finished and result.compilations == 1 and int(result.state.step) == 6
    lines = losses(workdir)
    assert list(lines) == [1, 2, 3, 4, 5, 6] and lines[6]["loss"] < lines[1]["loss"] - 0.1
    assert {"loss", "z_loss", "accuracy", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm",
            "examples", "tokens", "token_fill", "crop_fill", "flops"} <= set(lines[1])
    last = metrics.read(str(workdir / "metrics.jsonl"))[-1]
    assert last["flops_per_second"] > 0 and 0 <= last["data_stall"] < 1 and 0 < last["goodput"] < 1
    assert "mfu" not in last  # the peak of a CPU is unknown
    spent = json.loads((workdir / "goodput.json").read_text())
    assert spent["seconds"]["lost"] == 0 and all(spent["seconds"][part] > 0 for part in (
        "productive", "compile", "checkpoint"))
    assert saved_steps(workdir) == [2, 4, 6]


def test_the_base_table_and_spare_rows_of_the_added_one_never_change(straight):
    result, _ = straight
    start = state_lib.create(molmo2.Molmo2(tiny.MODEL), optim.make(OPTIM, 6), tiny.mesh(), 6198).params
    used = np.unique(np.concatenate([tiny.batch(number).tokens.ravel() for number in range(2)]))
    used = used[used >= tiny.MODEL.text.vocab_size] - tiny.MODEL.text.vocab_size
    spare = np.setdiff1d(np.arange(tiny.MODEL.text.additional_vocab_size), used)
    before, after = (np.asarray(params["new_embedding"]) for params in (start, result.state.params))
    np.testing.assert_array_equal(before[spare], after[spare])
    assert len(spare) > 2 and (before[used] != after[used]).any(axis=1).all()
    assert_equal(start["base_embedding"], result.state.params["base_embedding"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(start):
        if path[0].key not in ("base_embedding", "new_embedding"):
            trained = functools.reduce(lambda tree, key: tree[key.key], path, result.state.params)
            assert (np.asarray(trained) != np.asarray(leaf)).any(), path


# Dropout


@pytest.mark.parametrize("residual, response, expected", [
    (0.1, 0.0, (0.1, 0.1)), (0.0, 0.1, (0.0, 0.1)), (0.2, 0.3, (0.2, 0.3))])
def test_dropout_rates_of_other_positions_and_of_those_that_predict_an_answer(residual, response, expected):
    config = train_config(residual_dropout=residual, response_dropout=response)
    rates = train.drop_rates(config, jnp.asarray([[0.0, 0.5, 2.0, 0.0]]))
    other, answer = expected
    np.testing.assert_allclose(rates, [[other, answer, answer, other]], rtol=1e-6)


def test_without_rates_nothing_is_dropped():
    config = train_config(residual_dropout=0.0, response_dropout=0.0)
    assert train.drop_rates(config, jnp.ones((1, 2))) is None


def test_dropout_touches_only_rows_with_a_rate_and_keeps_the_mean():
    x = jnp.ones((1, 3, 20_000))
    dropped = np.asarray(layers.dropout(x, jnp.asarray([[0.0, 0.1, 0.5]]), jax.random.key(0)))[0]
    assert (dropped[0] == 1).all()
    for row, rate in ((1, 0.1), (2, 0.5)):
        np.testing.assert_allclose(np.unique(dropped[row]), [0, 1 / (1 - rate)], rtol=1e-6)
        assert (dropped[row] == 0).mean() == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize("stage_one", [True, False])
def test_the_first_stage_drops_at_answers_only_and_later_ones_everywhere(stage_one):
    rates = {"residual_dropout": 0.0, "response_dropout": 0.3} if stage_one else {"residual_dropout": 0.3}
    model, batch = molmo2.Molmo2(tiny.MODEL, remat="none", attention="dense"), tiny.batch(0)
    rows = train.drop_rates(train_config(**rates), batch.weights)

    @jax.jit
    def change(params, rng):
        plain, dropped = (model.apply({"params": params}, batch, rows, key, method="hidden")
                          for key in (None, rng))
        return jnp.abs(plain - dropped).max(axis=-1)

    difference = np.asarray(change(packs.random_params(tiny.MODEL), jax.random.key(1)))
    answers, real = batch.weights > 0, batch.example >= 0
    assert (difference[answers] > 1e-4).all()
    roots = real & (batch.branch < 0)  # they attend to no answer, so dropped positions do not affect them
    assert roots.any() and (difference[roots] < 1e-6).all() == stage_one  # two programs round differently


# Stopping and resuming


@pytest.mark.slow(12)
def test_sigterm_saves_and_the_next_run_resumes_with_the_next_batch(straight, tmp_path):
    def terminate(number, batch):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped = fit(tmp_path, tiny.Batches(terminate))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert not stopped.finished and int(stopped.state.step) == 3 and saved_steps(tmp_path) == [2, 3]
    batches = tiny.Batches()
    resumed = fit(tmp_path, batches, profile=(5, 5))
    assert resumed.finished and batches.given == [3, 4, 5] and resumed.compilations == 1
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert_equal(resumed.state.params, straight[0].state.params)
    assert_equal(resumed.state.opt_state, straight[0].state.opt_state)
    assert losses(tmp_path) == losses(straight[1])


def test_a_finished_run_has_nothing_left_to_do(straight):
    result, workdir = straight
    batches, before = tiny.Batches(), losses(workdir)
    again = fit(workdir, batches)
    assert again.finished and batches.given == [] and losses(workdir) == before
    assert_equal(again.state.params, result.state.params)


@pytest.mark.slow(17)
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(straight, tmp_path):
    fit(tmp_path, tiny.Batches(), steps=6)
    for path in (tmp_path / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    resumed = fit(tmp_path, tiny.Batches())
    assert resumed.finished and losses(tmp_path) == losses(straight[1])
    assert_equal(resumed.state.params, straight[0].state.params)
    loaded = checkpoint.load_params(str(tmp_path), molmo2.Molmo2(tiny.MODEL), tiny.mesh())
    assert_equal(loaded, straight[0].state.params)


@pytest.mark.parametrize("bad, saved", [(3, [2]), (4, [2])])
@pytest.mark.slow(7)
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(bad, saved, tmp_path):
    def spoil(number, batch):
        factor = np.nan if number == bad - 1 else 1
        return batch._replace(weights=(batch.weights * factor).astype(np.float32))

    with pytest.raises(FloatingPointError, match=f"step {bad} must be finite"):
        fit(tmp_path, tiny.Batches(spoil))
    assert saved_steps(tmp_path) == saved
    assert list(losses(tmp_path)) == list(range(1, bad))
    kept = guard.load(tmp_path / "evidence" / f"step_{bad}" / "host_0.npz")
    np.testing.assert_array_equal(kept.tokens, tiny.batch((bad - 1) % 2).tokens)


@pytest.mark.slow(7)
def test_a_loss_spike_ends_the_run_if_the_config_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(guard.Guard, "limit", lambda self: 0.0)
    with pytest.raises(guard.Divergence, match="the loss of step 1 must be below 0"):
        fit(tmp_path, tiny.Batches(), spike=5.0)


@pytest.mark.slow(6)
def test_gradients_that_are_not_finite_end_the_run_too(tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "grad_norms", lambda grads, frozen: {"grad_norm_llm": jnp.float32(np.inf)})
    with pytest.raises(FloatingPointError, match="step 1 must be finite"):
        fit(tmp_path, tiny.Batches(), save_every=1)
    assert saved_steps(tmp_path) == []


# With the real pipeline

VIDEO_MODEL = config_lib.Molmo2Config(
    vision=config_lib.VisionConfig(image_size=24, patch_size=4, width=8, num_layers=2, num_heads=1,
                                   head_dim=8, mlp_width=8),
    connector=config_lib.ConnectorConfig(taps=(1,), num_heads=1, head_dim=8, mlp_width=8),
    text=dataclasses.replace(tiny.MODEL.text, vocab_size=400, max_positions=1024))


@pytest.mark.slow(9)
def test_a_run_and_its_step_compiled_ahead_have_the_compiler_options_of_the_chip(tmp_path, monkeypatch):
    """The compiler of CPUs names the option as one that it does not know."""
    monkeypatch.setattr(chips, "of_device", lambda kind: chips.CHIPS["tpu7x"])
    option = chips.CHIPS["tpu7x"].compiler_options[0][0]
    with pytest.raises(jax.errors.JaxRuntimeError, match=option):
        fit(tmp_path, tiny.Batches(), steps=1)
    shape = types.RowShape(tiny.T, tiny.M, tiny.R, math.prod(tiny.MODEL.connector.video_window))
    lowered, *_ = aot_step.lower(tiny.MODEL, train_config(), OPTIM, shape, tiny.B, tiny.mesh())
    with pytest.raises(jax.errors.JaxRuntimeError, match=option):
        aot_step.compile_lowered(lowered, list)


@pytest.mark.slow(6)
def test_a_failed_save_ends_the_run_before_the_next_save(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(checkpoint, "Manager",
                        lambda *args, kind=checkpoint.Manager: made.append(kind(*args)) or made[-1])

    def fail(self, timeout=None):
        self._failures.append(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        raise self._failures[0]

    def wait_for_the_save(number, batch):
        while number == 2 and not made[0]._failures:
            time.sleep(0.01)
        return batch

    monkeypatch.setattr(checkpoint._Write, "result", fail)
    batches = tiny.Batches(wait_for_the_save)
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, batches, steps=1000, save_every=2, keep=1)
    assert batches.given in ([0, 1], [0, 1, 2])   # the next save would follow batch 3


@pytest.fixture(scope="module")
def video_batches(tmp_path_factory):
    """Returns a function that makes iterators over a drawn world of 20 examples."""
    world = dataclasses.replace(world_config.quickstart_world(), frame_side=(32, 40))
    path = world_write.write(tmp_path_factory.mktemp("world"), world, 0, 20, "train", progress=False)
    tokenizer = tokenizers.train_small(path.read_text().splitlines(), 400)
    data = pipeline.DataConfig(train=(str(path.parent),), seed=5, row_tokens=512, row_crops=16, batch_rows=1,
                               row_visual_tokens=128, packer=packers.OldestFirst(buffer=4),
                               num_workers=0)
    inputs = config_lib.InputConfig(max_crops=1, high_res_crops=1, overlap_margins=(1, 1), max_frames=8)
    return lambda: pipeline.make_iterator(data, VIDEO_MODEL, inputs, tokenizer)


def stop_at(batches, step, monkeypatch):
    """Sends this process SIGTERM when the batch of `step` is taken."""
    take = type(batches).__next__

    def next_batch(iterator):
        batch = take(iterator)
        if iterator is batches and iterator.counters()["rows"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    monkeypatch.setattr(type(batches), "__next__", next_batch)


@pytest.mark.slow(40)
def test_a_resumed_run_over_videos_equals_an_uninterrupted_one_bit_for_bit(
        video_batches, tmp_path, monkeypatch):
    results = []
    for workdir, stops in ((tmp_path / "straight", (8,)), (tmp_path / "resumed", (3, 5, 8))):
        for stop in stops:
            batches = video_batches()
            stop_at(batches, stop, monkeypatch)
            try:
                result = fit(workdir, batches, VIDEO_MODEL, steps=8, save_every=100)
            finally:
                batches.close()
        results.append(result)
    straight, resumed = results
    assert straight.finished and resumed.finished
    assert saved_steps(tmp_path / "resumed") == [3, 5, 8]
    lines = losses(tmp_path / "straight")
    assert len({values["loss"] for values in lines.values()}) == 8
    assert losses(tmp_path / "resumed") == lines
    assert_equal(resumed.state.params, straight.state.params)
    assert_equal(jax.random.key_data(resumed.state.rng), jax.random.key_data(straight.state.rng))

