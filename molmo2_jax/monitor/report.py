"""Reports of the training loop: metrics of each step once ready, use of time, and why a run ended.

Nothing here waits for a step before the next one is dispatched, and little is written.
"""

import jax

from molmo2_jax import sharding
from molmo2_jax.cost import flops as flops_lib
from molmo2_jax.cost import throughput
from molmo2_jax.monitor import bars
from molmo2_jax.monitor import exits
from molmo2_jax.monitor import goodput
from molmo2_jax.monitor import guard
from molmo2_jax.monitor import metrics
from molmo2_jax.monitor import profiling
from molmo2_jax.monitor import watchdog


class Report:
    """Reports of one run. All hosts run the guard and the watchdog; host 0 writes and prints.

    draw: makes a picture uint8[h, w, 3] of the first batch of a run, which is logged at step 0.
    """

    def __init__(self, workdir, mesh, model_config, config, quiet=False, profile=None, draw=None,
                 trained=flops_lib.EVERYTHING):
        host = jax.process_index()
        self._workdir, self._mesh, self._model, self._config = workdir, mesh, model_config, config
        self._trained = trained
        self._is_first, self._quiet, self._shares = host == 0, quiet or host > 0, sharding.row_share(mesh)[1]
        self._devices = goodput.Devices()
        self._time = goodput.Goodput(workdir if self._is_first else None, self._devices)
        self._guard = guard.Guard(workdir, host, config.spike)
        self._dog = watchdog.Watchdog(config.hang_seconds,
                                      lambda reason: exits.say(workdir, "hung", reason))
        self._window = profiling.Window(str(workdir) + "/profile", profile if self._is_first else None)
        self._writer = self._progress = self._waiting = None
        self._draw = draw
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
        """Prints the step the run resumes from, and discards log lines that will be rewritten."""
        if first and not self._quiet:
            print(f"restored; resuming after step {first} of {self._workdir}", flush=True)
        self._time.go_on_behind(first)
        self._writer = metrics.Writer(self._workdir, first + 1) if self._is_first else None
        self._draw = self._draw if self._writer and not first else None
        self._progress = metrics.Progress(first, self._config.steps, disable=self._quiet)

    def before(self, step: int, state) -> None:
        self._dog.beat(f"step {step} begins")
        self._window.before(step, state)

    def step(self, step: int, batch, measured) -> None:
        """Registers the step that was just dispatched, and reports the previous one."""
        self._devices.work_on(measured)
        self._time.run()
        self.previous()
        self._waiting = step, batch, measured
        if self._draw:
            self._writer.picture(0, "first_batch", self._draw(batch))
            self._draw = None

    def previous(self) -> None:
        """Reports the last dispatched step, if that has not happened yet.

        Raises:
          guard.Divergence: its loss spiked, or a value is not finite.
        """
        if self._waiting is None:
            return
        (step, batch, measured), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in measured.items()}
        self._guard.check(step, values, batch)
        # An estimate from host 0: the rows of the other hosts hold about as much.
        flops = throughput.batch_flops(self._model, batch, self._trained) * self._shares
        counts = metrics.batch_counts(batch) | {"flops": flops}
        shares = self._time.shares()
        note = f", {shares['data_stall']:.0%} waiting for data"
        rates = self._progress.update(counts, values["loss"], note)
        rates |= throughput.rates(rates["flops_per_second"], list(self._mesh.devices.flat))
        if self._writer and (step % self._config.log_every == 0 or step in (1, self._config.steps)):
            self._writer.write(step, {**values, **counts, **rates, **shares})
            self._time.write_now_and_then()

    def alive(self, doing: str) -> None:
        """Tells the watchdog what the run is doing, if that is no step."""
        self._dog.beat(doing)

    def evaluated(self, step: int, scores: dict[str, float], text: str) -> None:
        """Reports the scores after a step; `text` is printed."""
        self._progress.leave_out_time()
        if self._writer:
            self._writer.write_scores(step, scores)
        if not self._quiet:
            bars.write(text)

    def saved(self, step: int) -> None:
        self._time.saved(step)
        if self._writer:
            self._writer.publish()

    def end(self) -> None:
        """Prints how the time was spent."""
        self._progress.close()
        if not self._quiet:
            print(self._time, flush=True)
