"""The steps of a longer job: announces them, times them over all attempts, and skips finished ones.

The record is a small JSON file in the work directory. It is rewritten every few seconds, so the time of a
killed attempt is kept.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import resource
import time
from collections.abc import Callable, Iterator

from molmo2_jax import files
from molmo2_jax.monitor import periodic

NAME = "progress.json"
_BEAT = 2.0  # seconds between writes


def fingerprint(*parts: object) -> str:
    """Returns a short hash of the inputs that determine the result of a step."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def peak_bytes(workers: int) -> int:
    """Returns an upper bound on the bytes of memory in use at one time.

    It is the peak of this process plus `workers` times the peak of its largest child that has ended. Shared
    pages are counted several times.
    """
    kib = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, child = kib
    return 1024 * (own + workers * child)


class Progress:
    """The finished steps of a work directory, the time they took, and the peak memory."""

    def __init__(self, workdir: str | os.PathLike, workers: int):
        self._path, self._workers = pathlib.Path(workdir) / NAME, workers
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else "{}"
        self._kept = {"seconds": {}, "finished": {}, "peak_bytes": 0} | json.loads(text)

    def run(self, name: str, sentence: str, key: str, work: Callable[[], None],
            *results: pathlib.Path) -> None:
        """Calls `work` unless it was finished with this key and its results still exist."""
        if self.is_finished(name, key) and all(result.exists() for result in results):
            print(f"-- {sentence}: done before, in {self.seconds(name):.0f} s", flush=True)
            return
        print(f"-- {sentence}", flush=True)
        start = time.monotonic()
        self._kept["finished"].pop(name, None)
        with self._timed(name):
            work()
        self._kept["finished"][name] = key
        self._save()
        print(f"-- done in {time.monotonic() - start:.0f} s", flush=True)

    def is_finished(self, name: str, key: str) -> bool:
        """Returns whether a step was finished with this key."""
        return self._kept["finished"].get(name) == key

    def seconds(self, name: str | None = None) -> float:
        """Returns the seconds of a step over all attempts; without a name, those of all steps."""
        seconds = self._kept["seconds"]
        return sum(seconds.values()) if name is None else seconds.get(name, 0.0)

    def peak_gib(self) -> float:
        """Returns the largest `peak_bytes` of all attempts, in GiB."""
        return max(self._kept["peak_bytes"], peak_bytes(self._workers)) / 2**30

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Adds the time inside the block to the step's time, and writes it every few seconds."""
        before, start = self.seconds(name), time.monotonic()

        def note() -> None:
            self._kept["seconds"][name] = before + time.monotonic() - start
            self._save()

        try:
            with periodic.calls(note, _BEAT):
                yield
        finally:
            note()

    def _save(self) -> None:
        self._kept["peak_bytes"] = max(self._kept["peak_bytes"], peak_bytes(self._workers))
        files.write_json(self._path, self._kept)
