"""Where the seconds of a run went, over all its attempts: `goodput.json` in the work directory.

productive: devices work on steps that count. compile: until the first step is given to them. data: they are
idle, the next batch is not there. checkpoint: saving or restoring holds them up. lost: what had been
productive, but was done again after a kill. away: between two attempts; no part of the others.
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
PARTS = ("productive", "compile", "data", "checkpoint", "lost")
_BEAT = 30.0  # seconds between two writings, apart from those behind a checkpoint
_MARKS = 50   # checkpoints whose time is remembered


class Devices:
    """Knows since when the devices are idle: a thread waits for the results of every step."""

    def __init__(self, clock=time.monotonic):
        self._clock, self._given, self._done, self._idle_since = clock, 0, 0, -math.inf
        self._results = queue.SimpleQueue()
        threading.Thread(target=self._wait, daemon=True, name="devices").start()

    def work_on(self, results) -> None:
        """Announces the results of a step; they must not be donated."""
        self._given += 1
        self._results.put(results)

    def idle_since(self) -> float:
        """Returns the time at which they finished all they were given; infinity while they work."""
        return self._idle_since if self._done == self._given else math.inf

    def close(self) -> None:
        self._results.put(None)

    def _wait(self):
        while (results := self._results.get()) is not None:
            with contextlib.suppress(Exception):  # the loop meets it too
                jax.block_until_ready(results)
            self._idle_since = self._clock()
            self._done += 1


class Goodput:
    """Books every second of the loop on one part. `workdir` is None for hosts that do not write."""

    def __init__(self, workdir: str | None, devices: Devices, clock=time.monotonic, wall=time.time):
        self._path = workdir and files.path(workdir) / NAME
        self._devices, self._clock, self._wall = devices, clock, wall
        kept = json.loads(self._path.read_text()) if self._path and self._path.exists() else {}
        self.seconds = dict.fromkeys((*PARTS, "away"), 0.0) | kept.get("seconds", {})
        self._marks, self._attempts = kept.get("productive_at", {}), kept.get("attempts", 0) + 1
        self.seconds["away"] += max(0.0, wall() - kept["time"]) if kept else 0.0
        self._rest, self._booked, self._written = "compile", clock(), -math.inf

    def go_on_behind(self, step: int) -> None:
        """Takes what was productive behind `step`, in attempts before this one, as lost."""
        before = self.seconds["productive"]
        kept = self._marks.get(str(step), before) if step else 0.0
        self.seconds["productive"], self.seconds["lost"] = kept, self.seconds["lost"] + before - kept

    def run(self) -> None:
        """From now on, time is productive unless it is booked otherwise."""
        self._book(self._rest)
        self._rest = "productive"

    @contextlib.contextmanager
    def during(self, part: str):
        """Books the time inside the block during which the devices are idle on `part`."""
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
        """Returns the productive share of all seconds so far, and that of waiting for data."""
        self._book(self._rest)
        total = max(sum(self.seconds[part] for part in PARTS), 1e-9)
        return {"goodput": self.seconds["productive"] / total, "data_stall": self.seconds["data"] / total}

    def saved(self, step: int) -> None:
        """Remembers that all work up to `step` is safe."""
        self._book(self._rest)
        self._marks = dict([*self._marks.items(), (str(step), self.seconds["productive"])][-_MARKS:])
        self.write()

    def write(self) -> None:
        """Writes the file, whole or not at all."""
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
        parts = ", ".join(f"{part} {self.seconds[part]:.0f} s" for part in PARTS)
        again = f"; {self._attempts} attempts, {self.seconds['away']:.0f} s between them"
        return f"goodput {self.shares()['goodput']:.0%}: {parts}" + (again if self._attempts > 1 else "")
