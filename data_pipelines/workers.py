"""A stream of numbers, mapped by worker processes that start cheaply and end when they should."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing import process
from typing import Any

import grain
from absl import flags

_ENDLESS = 2**62
_SHARED_MEMORY_BYTES = 2**16  # arrays from this size on travel through shared memory


@dataclasses.dataclass(frozen=True)
class Numbers:
    """As a grain source: the numbers `again`, then start, start + step, ... without end."""
    again: tuple[int, ...]
    start: int
    step: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, place: int) -> int:
        if place < len(self.again):
            return self.again[place]
        return self.start + (place - len(self.again)) * self.step


class Reader:
    """Iterates over function(number) in order, whatever the number of processes.

    Processes start with the first `next`, and each works `prefetch` results ahead; with 0 of them the
    caller's thread does the work. `function` and its results must pickle; large arrays in dictionaries and
    tuples come back through shared memory. A process that dies makes `next` raise an error for which
    `is_death` holds; after any error the reader is of no more use.
    """

    def __init__(self, function: Callable[[int], Any], numbers: Numbers, num_workers: int, prefetch: int):
        if not flags.FLAGS.is_parsed():  # grain reads absl flags, which tests and notebooks do not parse
            flags.FLAGS.mark_as_parsed()
        in_turn = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        dataset = grain.MapDataset.source(numbers).map(function).to_iter_dataset(in_turn)
        dataset = grain.experimental.WithOptionsIterDataset(
            dataset, grain.experimental.DatasetOptions(min_shm_size=_SHARED_MEMORY_BYTES))
        if num_workers:
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=prefetch)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_start)
        self._iterator = iter(dataset)
        self._needs_start = num_workers > 0

    def __next__(self) -> Any:
        if self._needs_start:
            with hidden_main():
                result = next(self._iterator)
            self._needs_start = False
            return result
        return next(self._iterator)

    def close(self) -> None:
        self._iterator.close()


def is_death(error: BaseException) -> bool:
    """Returns whether the error tells of a worker process that died."""
    return isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error)


_hiding = threading.Lock()


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Keeps processes started meanwhile from importing the main module again.

    They need nothing of it; the training main would cost each of them seconds and some 200 MB.
    """
    with _hiding:
        main = sys.modules["__main__"]
        names = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
        for name in names:
            setattr(main, name, None)
        try:
            yield
        finally:
            for name, value in names.items():
                setattr(main, name, value)


def _start(worker: int, count: int) -> None:
    """Leaves Ctrl-C to the main process, and ends with it even where it is killed."""
    del worker, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    connection.wait([process.parent_process().sentinel])
    os._exit(1)
