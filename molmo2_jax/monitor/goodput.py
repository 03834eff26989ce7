"""How the time of a run was spent, over all its attempts: `goodput.json` in the work directory.

productive: devices compute steps that count. compile: until the first step is dispatched. data: they are
idle because the next batch is not ready. checkpoint: they wait for saving or restoring. evaluation: they
answer questions (train.EvalsConfig). lost: productive time whose steps had to be repeated after a kill. away:
between two attempts; not part of the others.
"""

import contextlib
import json
import math
import queue
import threading
import time

import jax

from molmo2_jax import files

NAME = "goodput.json"
PARTS = ("productive", "compile", "data", "checkpoint", "evaluation", "lost")
_BEAT = 30.0  # seconds between writes, apart from those after a checkpoint
_MARKS = 50   # checkpoints whose productive time is kept


class Devices:
    """Tracks since when the devices have been idle: a thread waits for the results of every step."""

    def __init__(self, clock=time.monotonic):
        self._clock, self._given, self._done, self._idle_since = clock, 0, 0, -math.inf
        self._results = queue.SimpleQueue()
        threading.Thread(target=self._wait, daemon=True, name="devices").start()

    def work_on(self, results) -> None:
        """Registers the results of a dispatched step; they must not be donated."""
        self._given += 1
        self._results.put(results)

    def idle_since(self) -> float:
        """Returns the time at which all dispatched steps had finished; infinity while any is running."""
        return self._idle_since if self._done == self._given else math.inf

    def close(self) -> None:
        self._results.put(None)

    def _wait(self):
        while (results := self._results.get()) is not None:
            with contextlib.suppress(Exception):  # the loop sees the error too
                jax.block_until_ready(results)
            self._idle_since = self._clock()
            self._done += 1


class Goodput:
    """Assigns every second of the loop to one part. `workdir` is None for hosts that do not write."""

    def __init__(self, workdir: str | None, devices: Devices, clock=time.monotonic, wall=time.time):
        self._path = workdir and files.path(workdir) / NAME
        self._devices, self._clock, self._wall = devices, clock, wall
        kept = json.loads(self._path.read_text()) if self._path and self._path.exists() else {}
        self.seconds = dict.fromkeys((*PARTS, "away"), 0.0) | kept.get("seconds", {})
        self._marks, self._attempts = kept.get("productive_at", {}), kept.get("attempts", 0) + 1
        self.seconds["away"] += max(0.0, wall() - kept["time"]) if kept else 0.0
        self._rest, self._booked, self._written = "compile", clock(), -math.inf

    def go_on_behind(self, step: int) -> None:
        """Counts as lost the productive time that earlier attempts spent after `step`."""
        before = self.seconds["productive"]
        kept = self._marks.get(str(step), before) if step else 0.0
        self.seconds["productive"], self.seconds["lost"] = kept, self.seconds["lost"] + before - kept

    def run(self) -> None:
        """From now on, time is productive unless assigned otherwise."""
        self._book(self._rest)
        self._rest = "productive"

    @contextlib.contextmanager
    def during(self, part: str):
        """Assigns to `part` the time inside the block during which the devices are idle."""
        self._book(self._rest)
        try:
            yield
        finally:
            busy_until = min(max(self._devices.idle_since(), self._booked), self._clock())
            self.seconds[self._rest] += busy_until - self._booked
            self._booked = busy_until
            self._book(part)

    def _book(self, part):
        now = self._clock()
        self.seconds[part] += now - self._booked
        self._booked = now

    def shares(self) -> dict[str, float]:
        """Returns the shares (0 to 1) of the time so far that were productive and spent waiting for data."""
        self._book(self._rest)
        total = max(sum(self.seconds[part] for part in PARTS), 1e-9)
        return {"goodput": self.seconds["productive"] / total, "data_stall": self.seconds["data"] / total}

    def saved(self, step: int) -> None:
        """Records that all work up to `step` is saved."""
        self._book(self._rest)
        self._marks = dict([*self._marks.items(), (str(step), self.seconds["productive"])][-_MARKS:])
        self.write()

    def write(self) -> None:
        """Writes the file atomically."""
        self._book(self._rest)
        self._written = self._clock()
        if self._path:
            files.write_json(self._path, {
                "attempts": self._attempts, "seconds": self.seconds, **self.shares(),
                "productive_at": self._marks, "time": self._wall()})

    def write_now_and_then(self) -> None:
        if self._clock() - self._written > _BEAT:
            self.write()

    def __str__(self):
        parts = ", ".join(f"{part} {self.seconds[part]:.0f} s" for part in PARTS
                          if part != "evaluation" or self.seconds[part])
        again = f"; {self._attempts} attempts, {self.seconds['away']:.0f} s between them"
        return f"goodput {self.shares()['goodput']:.0%}: {parts}" + (again if self._attempts > 1 else "")
