"""The train step and the loop around it.

B rows, T positions, D width of the decoder.

Source: paper, section 3.3; reference: olmo/train/trainer.py.
"""

import contextlib
import dataclasses
import functools
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.experimental import multihost_utils

from molmo2_jax import checkpoint
from molmo2_jax import config as config_lib
from molmo2_jax import loss
from molmo2_jax import optim
from molmo2_jax import report as report_lib
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax.model import layers
from molmo2_jax.model import molmo2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how precise, and what is saved when."""
    steps: int
    seed: int = 6198
    z_weight: float = 1e-4
    residual_dropout: float = 0.1      # on all positions
    response_dropout: float = 0.0      # instead of it on positions that predict an answer; 0: no difference
    loss_chunk: int = 1024             # positions whose logits exist at once
    dtype: str = "bfloat16"            # of the computation; parameters and moments are float32
    remat: str = "full"                # of decoder and connector, see layers.REMAT_POLICIES
    vision_remat: str | None = None    # of the ViT; None: as remat
    attention: str | None = None       # implementation, see attention.attend
    log_every: int = 20
    save_every: int = 2000
    keep: int = 1
    spike: float | None = None         # deviations above the usual loss at which to stop, see guard.Guard
    hang_seconds: float = 1800.0       # without a step, compiling included, after which a process ends itself

    def __post_init__(self):
        if min(self.steps, self.log_every, self.save_every, self.keep, self.loss_chunk) < 1:
            raise ValueError(f"steps, log_every, save_every, keep and loss_chunk must be >= 1; got {self}")
        if self.hang_seconds <= 0 or (self.spike is not None and self.spike <= 0):
            raise ValueError(f"hang_seconds and spike must be > 0; got {self.hang_seconds}, {self.spike}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16'; got {self.dtype!r}")
        for remat in (self.remat, self.vision_remat or self.remat):
            layers.check_remat(remat)

    def model(self, config: config_lib.Molmo2Config) -> molmo2.Molmo2:
        """Returns the model as it is trained."""
        return molmo2.Molmo2(config, self.dtype, self.remat, self.attention, self.vision_remat)


def drop_rates(config: TrainConfig, weights_BT):
    """Returns float32[B, T] residual dropout per position, or None where nothing is dropped.

    A response rate of 0 does not exempt responses: the residual rate then holds everywhere
    (reference: olmo/nn/llm.py, Dropout).
    """
    if config.residual_dropout == config.response_dropout == 0:
        return None
    response = config.response_dropout or config.residual_dropout
    return jnp.where(weights_BT > 0, response, config.residual_dropout)


def train_step(model: molmo2.Molmo2, tx, config: TrainConfig, state: state_lib.TrainState, batch):
    """Returns (new state, metrics) after one optimiser update. Pure; jitted and donated by the caller."""
    rates = drop_rates(config, batch.weights)
    rng = None if rates is None else jax.random.fold_in(state.rng, state.step)

    def objective(params):
        apply = functools.partial(model.apply, {"params": params})
        hidden_BTD = apply(batch, rates, rng, method="hidden")
        head = functools.partial(apply, method="logits")
        sums = loss.chunked_sums(hidden_BTD, head, apply(method="head_kernel"), batch.targets, batch.weights,
                                 config.loss_chunk, config.dtype)
        return loss.objective(sums, config.z_weight)

    (_, measured), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state, {**measured, **optim.grad_norms(grads, tx.frozen)}


class StopRequest:
    """Becomes true on SIGINT or SIGTERM, so that the loop can save and leave; a second SIGINT interrupts.

    With several processes SIGTERM to any of them stops all behind the same step, as jax.distributed arranges.
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
        logging.warning("%s: saving after this step, then leaving", signal.Signals(number).name)
        self._event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def at(self, step: int) -> bool:
        """Returns whether to stop behind this step; all processes ask about the same steps."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._event.set()
        return self._event.is_set()


@dataclasses.dataclass(frozen=True)
class Result:
    """What `fit` leaves: the state, whether all steps were made, and how often the step was compiled."""
    state: state_lib.TrainState
    finished: bool
    compilations: int


def fit(*, model_config, config: TrainConfig, optimiser: optim.OptimConfig, mesh: jax.sharding.Mesh,
        batches: Any, workdir: str, params=None, quiet: bool = False,
        profile: tuple[int, int] | None = None) -> Result:
    """Trains to `config.steps`, continuing from the newest checkpoint in `workdir` if there is one.

    Args:
      batches: iterator of host types.Batch with get_state/set_state (a grain iterator), this process's rows.
      params: where to start instead of from scratch, when there is no checkpoint.
      profile: first and last step of which to record a profile, in `workdir`/profile.

    Raises:
      guard.Divergence: the loss or a gradient is not finite, or the loss leapt; the step is named, its batch
        kept, and nothing is saved over older checkpoints.
    """
    model = config.model(model_config)
    tx = optim.make(optimiser, config.steps)
    manager = checkpoint.Manager(workdir, config.keep)
    with (contextlib.closing(manager), jax.set_mesh(mesh), StopRequest() as stop,
          report_lib.Report(workdir, mesh, model_config, config, quiet, profile) as report):
        abstract = state_lib.abstract(model, tx, mesh)
        layout = jax.tree.map(lambda x: x.sharding, abstract)
        with report.during("checkpoint"):
            state = manager.restore(abstract, batches)
        if state is None:
            state = state_lib.create(model, tx, mesh, config.seed, params, layout)
        first = int(state.step)
        report.begin(first)
        step_fn = jax.jit(functools.partial(train_step, model, tx, config), donate_argnums=0,
                          out_shardings=(layout, None))
        for step in range(first + 1, config.steps + 1):
            report.before(step, state)
            with report.during("data"):
                batch = next(batches)
            state, measured = step_fn(state, sharding.put(batch, mesh))
            report.step(step, batch, measured)
            stops = stop.at(step)
            if step % config.save_every == 0 or step == config.steps or stops:
                report.previous()
                with report.during("checkpoint"):
                    manager.save(step, state, batches)
                report.saved(step)
            if stops:
                break
        report.previous()
        with report.during("checkpoint"):
            manager.wait()
        report.end()
        return Result(state, int(state.step) >= config.steps, step_fn._cache_size())  # type: ignore[attr-defined]  # unknown to jax's stubs
