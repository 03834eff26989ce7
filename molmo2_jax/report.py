"""What the loop tells: metrics of every step once they are ready, where time goes, and why a run ended.

Nothing here waits for a step before the next one is given to the devices, and little is written.
"""

import jax

from molmo2_jax import goodput
from molmo2_jax import guard
from molmo2_jax import last_words
from molmo2_jax import metrics
from molmo2_jax import profiling
from molmo2_jax import sharding
from molmo2_jax import throughput
from molmo2_jax import watchdog


class Report:
    """The loop's own account. All hosts guard and watch; host 0 writes and shows."""

    def __init__(self, workdir, mesh, model_config, config, quiet=False, profile=None):
        host = jax.process_index()
        self._workdir, self._mesh, self._model, self._config = workdir, mesh, model_config, config
        self._is_first, self._quiet, self._shares = host == 0, quiet or host > 0, sharding.row_share(mesh)[1]
        self._devices = goodput.Devices()
        self._time = goodput.Goodput(workdir if self._is_first else None, self._devices)
        self._guard = guard.Guard(workdir, host, config.spike)
        self._dog = watchdog.Watchdog(config.hang_seconds,
                                      lambda reason: last_words.say(workdir, "hung", reason))
        self._window = profiling.Window(str(workdir) + "/profile", profile if self._is_first else None)
        self._writer = self._progress = self._waiting = None
        self.during = self._time.during

    def __enter__(self):
        self._dog.__enter__()
        return self

    def __exit__(self, *_):
        self._dog.__exit__()
        self._devices.close()
        self._window.close()
        self._time.write()
        for one in (self._writer, self._progress):
            if one:
                one.close()

    def begin(self, first: int) -> None:
        """Says behind which step the run goes on, and drops what will be written again."""
        if first and not self._quiet:
            print(f"restored; going on behind step {first} of {self._workdir}", flush=True)
        self._time.go_on_behind(first)
        self._writer = metrics.Writer(self._workdir, first + 1) if self._is_first else None
        self._progress = metrics.Progress(first, self._config.steps, disable=self._quiet)

    def before(self, step: int, state) -> None:
        self._dog.beat(f"step {step} begins")
        self._window.before(step, state)

    def step(self, step: int, batch, measured) -> None:
        """Takes the step that was just given to the devices, and tells about the one before."""
        self._devices.work_on(measured)
        self._time.run()
        self.previous()
        self._waiting = step, batch, measured

    def previous(self) -> None:
        """Tells about the step that waits to be told of, if there is one.

        Raises:
          guard.Divergence: it must be the last one.
        """
        if self._waiting is None:
            return
        (step, batch, measured), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in measured.items()}
        self._guard.check(step, values, batch)
        # Host 0 speaks for all: their rows hold about as much.
        flops = throughput.batch_flops(self._model, batch) * self._shares
        counts = metrics.batch_counts(batch) | {"flops": flops}
        shares = self._time.shares()
        note = f", {shares['data_stall']:.0%} waiting for data"
        rates = self._progress.update(counts, values["loss"], note)
        rates |= throughput.rates(rates["flops_per_second"], list(self._mesh.devices.flat))
        if self._writer and (step % self._config.log_every == 0 or step in (1, self._config.steps)):
            self._writer.write(step, {**values, **counts, **rates, **shares})
            self._time.write_now_and_then()

    def saved(self, step: int) -> None:
        self._time.saved(step)
        if self._writer:
            self._writer.publish()

    def end(self) -> None:
        """Says where the time went."""
        self._progress.close()
        if not self._quiet:
            print(self._time, flush=True)
