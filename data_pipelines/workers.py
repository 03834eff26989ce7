"""A stream of numbers, mapped by worker processes that end when they should."""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable
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


def read(function: Callable[[int], Any], numbers: Numbers, num_workers: int, prefetch: int
         ) -> grain.DatasetIterator:
    """Returns an iterator over function(number) in order, whatever the number of processes.

    Processes start with the first `next`, and each works `prefetch` results ahead; with 0 of them the
    caller's thread does the work. One that dies makes `next` raise an error for which `is_death` holds.
    """
    if not flags.FLAGS.is_parsed():  # grain reads absl flags, which tests and notebooks do not parse
        flags.FLAGS.mark_as_parsed()
    in_turn = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.source(numbers).map(function).to_iter_dataset(in_turn)
    dataset = grain.experimental.WithOptionsIterDataset(
        dataset, grain.experimental.DatasetOptions(min_shm_size=_SHARED_MEMORY_BYTES))
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=prefetch)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start)
    return iter(dataset)


def is_death(error: BaseException) -> bool:
    """Returns whether the error tells of a worker process that died."""
    return isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error)


def _start(worker: int, count: int) -> None:
    """Leaves Ctrl-C to the main process, and ends with it even where it is killed."""
    del worker, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    connection.wait([process.parent_process().sentinel])
    os._exit(1)
