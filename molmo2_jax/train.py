"""The train step and the loop around it.

B rows, T positions, D width of the decoder.

Source: paper, section 3.3; reference: olmo/train/trainer.py.
"""

import contextlib
import dataclasses
import functools
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils

from molmo2_jax import checkpoint
from molmo2_jax import config as config_lib
from molmo2_jax import finetune
from molmo2_jax import loss
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import types
from molmo2_jax.cost import chips
from molmo2_jax.model import layers
from molmo2_jax.model import molmo2
from molmo2_jax.monitor import report as report_lib

_ADAPTERS = 2**31 - 1   # folded into a step's key for the dropout of adapters


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and precision of a run, and how often it logs and saves."""
    steps: int
    seed: int = 6198
    z_weight: float = 1e-4
    residual_dropout: float = 0.1      # on all positions
    response_dropout: float = 0.0      # instead of it on positions that predict an answer; 0: no difference
    accumulate: int = 1                # micro-batches of an update, computed in turn to need less memory
    loss_chunk: int = 1024             # positions whose logits are computed at once
    dtype: str = "bfloat16"            # of activations and products; parameters and moments are float32
    remat: str = "full"                # of decoder and connector, see layers.REMAT_POLICIES
    vision_remat: str | None = None    # of the ViT; None: as remat
    attention: str | None = None       # implementation, see attention.attend
    log_every: int = 20
    save_every: int = 2000
    keep: int = 1
    spike: float | None = None         # deviations above the usual loss that stop the run, see guard.Guard
    hang_seconds: float = 1800.0       # without a step, compilation included, before the process kills itself
    lora: finetune.LoraConfig | None = None   # adapters; None: all parameters are trained but the frozen ones

    def __post_init__(self):
        if min(self.steps, self.log_every, self.save_every, self.keep, self.loss_chunk, self.accumulate) < 1:
            raise ValueError("steps, log_every, save_every, keep, loss_chunk and accumulate must be >= 1; "
                             f"got {self}")
        if self.hang_seconds <= 0 or (self.spike is not None and self.spike <= 0):
            raise ValueError(f"hang_seconds and spike must be > 0; got {self.hang_seconds}, {self.spike}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16'; got {self.dtype!r}")
        for remat in (self.remat, self.vision_remat or self.remat):
            layers.check_remat(remat)

    def model(self, config: config_lib.Molmo2Config) -> molmo2.Molmo2:
        """Returns the model with the settings of training."""
        return molmo2.Molmo2(config, self.dtype, self.remat, self.attention, self.vision_remat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalsConfig:
    """Evaluation while a run trains: every `every` steps and after the last, as launch.evaluate does.

    With a `metric`, the weights with its highest value so far are kept (the mean over the folders and
    benchmarks that have it). With `patience`, the run ends after that many evaluations without a new highest
    value.
    """
    folders: tuple[str, ...] = ()      # with annotations.jsonl, best of examples that are not trained on
    suites: tuple[str, ...] = ()       # and single benchmarks, by the names of launch.evaluate --suite
    benchmarks: str = "data/benchmarks"   # folder with a folder for each benchmark
    every: int                         # steps
    limit: int | None = None           # records of each folder, questions of each benchmark; None: all
    rows: int = 8                      # answered at a time, rounded up to a multiple of data x fsdp devices
    max_new_tokens: int | None = None  # None: 256 about folders, each benchmark's own number
    metric: str | None = None          # such as "video_point_f1", or "score" of benchmarks; larger is better
    patience: int | None = None

    def __post_init__(self):
        counts = [self.limit, self.max_new_tokens, self.patience]
        if min(self.every, self.rows, *(1 if count is None else count for count in counts)) < 1:
            raise ValueError(f"every, rows, max_new_tokens, limit and patience must be >= 1; got {self}")
        if not self.folders and not self.suites:
            raise ValueError("folders and suites must name at least one folder with annotations.jsonl or one "
                             "benchmark; got neither")
        if self.patience and not self.metric:
            raise ValueError("patience needs the metric that it waits for; got patience = "
                             f"{self.patience} and no metric")


def drop_rates(config: TrainConfig, weights_BT):
    """Returns float32[B, T] residual dropout per position, or None where nothing is dropped.

    A response rate of 0 does not exempt responses: the residual rate then applies everywhere
    (reference: olmo/nn/llm.py, Dropout).
    """
    if config.residual_dropout == config.response_dropout == 0:
        return None
    response = config.response_dropout or config.residual_dropout
    return jnp.where(weights_BT > 0, response, config.residual_dropout)


def gradients(model: molmo2.Molmo2, config: TrainConfig, state: state_lib.TrainState, batch, micro=None,
              total: loss.Total | None = None, base=None):
    """Returns (metrics, float32 gradients) of the loss of a batch.

    micro, total: if `batch` is a micro-batch, its index and the weights and choices of all micro-batches.
      Results of all micro-batches add up to those of the batch.
    base: the frozen parameters, if `config` has adapters.
    """
    rates = drop_rates(config, batch.weights)
    key = jax.random.fold_in(state.rng, state.step)
    if micro is not None:
        key = jax.random.fold_in(key, micro)
    rng = None if rates is None else key

    def objective(params):
        if config.lora is not None:
            params = finetune.joined(config.lora, base, params, jax.random.fold_in(key, _ADAPTERS))
        apply = functools.partial(model.apply, {"params": params})
        taps = None if batch.choice is None else (model.config.text.num_layers - 1,)
        result: Any = apply(batch, rates, rng, taps, method="hidden")
        hidden_BTD, inside = (result, None) if taps is None else result
        head = functools.partial(apply, method="logits")
        sums = loss.chunked_sums(hidden_BTD, head, apply(method="head_kernel"), batch.targets, batch.weights,
                                 config.loss_chunk, config.dtype)
        of_tokens, measured = loss.objective(sums, config.z_weight, total)
        if inside is None or inside.features is None:
            return of_tokens, measured
        scored: Any = apply(inside, method="choices")
        choices = loss.choice_sums(scored, batch, model.config)
        of_choices, about_choices = loss.choice_objective(choices, sums, total)
        return of_tokens + of_choices, measured | about_choices

    (_, measured), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    return measured, grads


def accumulated_gradients(model: molmo2.Molmo2, config: TrainConfig, state: state_lib.TrainState, batch,
                          base=None):
    """Returns what `gradients` does, from `config.accumulate` micro-batches one after the other.

    Only dropout depends on their number: each has random numbers of its own.
    """
    total, split = loss.total_of(batch, model.config), sharding.split(batch, config.accumulate)

    def add(so_far, micro):
        measured, grads = gradients(model, config, state, sharding.micro_batch(split, micro), micro, total,
                                    base)
        return jax.tree.map(jnp.add, so_far, grads), measured

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, measured = jax.lax.scan(add, zeros, jnp.arange(config.accumulate))
    return jax.tree.map(jnp.sum, measured), grads


def train_step(model: molmo2.Molmo2, tx, config: TrainConfig, state: state_lib.TrainState, batch, base=None):
    """Returns (new state, metrics) after one optimiser update. Pure; jitted and donated by the caller.

    base: the frozen parameters, if `config` has adapters.
    """
    compute = gradients if config.accumulate == 1 else accumulated_gradients
    measured, grads = compute(model, config, state, batch, base=base)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state, {**measured, **optim.grad_norms(grads, tx.frozen)}


def jitted_step(model: molmo2.Molmo2, tx, config: TrainConfig, layout, mesh: jax.sharding.Mesh):
    """Returns the jitted step; `fit` and aot.step compile this one. `layout`: shardings of the state."""
    chip = chips.of_device(mesh.devices.flat[0].device_kind)
    options = dict(chip.compiler_options) if chip else None
    return jax.jit(functools.partial(train_step, model, tx, config), donate_argnums=0,
                   out_shardings=(layout, None), compiler_options=options)


class StopRequest:
    """Becomes true on SIGINT or SIGTERM, so that the loop can save and exit; a second SIGINT interrupts.

    With several processes, SIGTERM to any of them stops all after the same step, through jax.distributed.
    """

    def __init__(self):
        self._event = threading.Event()
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ():
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _):
        logging.warning("%s: saving after this step, then exiting", signal.Signals(number).name)
        self._event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def at(self, step: int) -> bool:
        """Returns whether to stop after this step. Every process must ask at the same steps."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._event.set()
        return self._event.is_set()


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of `fit`: the state, whether the run is over, and the number of compilations of the step."""
    state: state_lib.TrainState
    finished: bool
    compilations: int


def fit(*, model_config, config: TrainConfig, optimiser: optim.OptimConfig, mesh: jax.sharding.Mesh,
        batches: Any, workdir: str, params=None, quiet: bool = False,
        profile: tuple[int, int] | None = None,
        draw: Callable[[types.Batch], np.ndarray] | None = None,
        evaluate: Callable[[int, Any, Any, report_lib.Report], bool] | None = None) -> Result:
    """Trains to `config.steps`, continuing from the newest checkpoint in `workdir` if there is one.

    Args:
      batches: iterator of host types.Batch with get_state/set_state (a grain iterator), this process's rows.
      params: where to start instead of from scratch, when there is no checkpoint. With adapters, the
        parameters of the base, always.
      profile: first and last step of which to record a profile, in `workdir`/profile.
      draw: makes a picture uint8[h, w, 3] of the first batch of a run, for its log.
      evaluate: (step, parameters of the model, those of the state, report) -> whether the run ends here.
        Called for the step that was restored, and after every step once it is saved, if it is to be.

    Raises:
      guard.Divergence: the loss or a gradient is not finite, or the loss spiked. The message names the step;
        its batch is kept, and no checkpoint is saved after it.
      ValueError: the batch cannot be split across the mesh, or the checkpoint does not fit this run, or there
        is no base for adapters.
    """
    model, lora = config.model(model_config), config.lora
    config_lib.require(lora is None or params is not None, "adapters need a base: --init_from must name it",
                       None)
    tx = optim.make(optimiser, config.steps)
    manager = checkpoint.Manager(workdir, config.keep)
    with (contextlib.closing(manager), jax.set_mesh(mesh), StopRequest() as stop,
          report_lib.Report(workdir, mesh, model_config, config, quiet, profile, draw,
                            state_lib.trained_parts(model, lora)) as report):
        abstract = state_lib.abstract(model, tx, mesh, lora)
        layout = jax.tree.map(lambda x: x.sharding, abstract)
        with report.during("checkpoint"):
            state = manager.restore(abstract, batches)
        if state is None:
            state = state_lib.create(model, tx, mesh, config.seed, params, layout, lora)
        base = None if lora is None else jax.tree.map(   # the leaves of a quantized.Int8 are arrays, too
            lambda x, to: sharding.distribute(x, to.sharding), finetune.frozen(lora, params, config.dtype),
            state_lib.abstract_base(model, mesh, lora, config.dtype))
        first = int(state.step)
        report.begin(first)
        step_fn = jitted_step(model, tx, config, layout, mesh)

        def save(step):
            report.previous()
            with report.during("checkpoint"):
                manager.save(step, state, batches)
            report.saved(step)

        def ends(step):
            if evaluate is None:
                return False
            params = state.params if lora is None else finetune.joined(lora, base, state.params)
            return evaluate(step, params, state.params, report)

        is_over = ends(first)
        for step in () if is_over else range(first + 1, config.steps + 1):
            manager.check()
            report.before(step, state)
            with report.during("data"):
                batch = next(batches)
            state, measured = step_fn(state, sharding.put(batch, mesh, config.accumulate), base)
            report.step(step, batch, measured)
            stops = stop.at(step)
            is_saved = step % config.save_every == 0 or step == config.steps or stops
            if is_saved:
                save(step)
            is_over = not stops and ends(step)
            if is_over and not is_saved:
                save(step)
            if stops or is_over:
                break
        report.previous()
        with report.during("checkpoint"):
            manager.wait()
        report.end()
        return Result(state, is_over or int(state.step) >= config.steps, step_fn._cache_size())  # type: ignore[attr-defined]  # unknown to jax's stubs
