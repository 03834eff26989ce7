"""A stream of numbers, mapped by worker processes that start cheaply and end when they should."""

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing import process
from multiprocessing import util
from typing import Any

import grain
from absl import flags
from grain._src.python.dataset.transformations import process_prefetch

_ENDLESS = 2**62
_SHARED_MEMORY_BYTES = 2**16  # arrays from this size on travel through shared memory
_CLOSE_SECONDS = 20.0  # after which close returns whatever the processes do

_log = logging.getLogger(__name__)


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
        self._token, self._is_killed = secrets.token_hex(8), False
        if not flags.FLAGS.is_parsed():  # grain reads absl flags, which tests and notebooks do not parse
            flags.FLAGS.mark_as_parsed()
        in_turn = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        dataset = grain.MapDataset.source(numbers).map(function).to_iter_dataset(in_turn)
        dataset = grain.experimental.WithOptionsIterDataset(
            dataset, grain.experimental.DatasetOptions(min_shm_size=_SHARED_MEMORY_BYTES))
        if num_workers:
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=prefetch)
            start = functools.partial(_start, self._token)
            dataset = dataset.mp_prefetch(options, worker_init_fn=start)
            # At exit, after grain has closed what it can (priority 1) and before multiprocessing waits for
            # processes that it sent SIGTERM, which they ignore.
            util.Finalize(None, _kill, args=(self._token,), exitpriority=0)
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
        """Ends the processes, within about `_CLOSE_SECONDS`.

        Where a process died while it was sending a result, grain waits without end for the rest of it.
        """
        thread = threading.Thread(target=self._close, daemon=True)
        thread.start()
        thread.join(_CLOSE_SECONDS)
        if thread.is_alive():
            _log.warning("the worker processes do not end by themselves; killing them")
            self._is_killed = True
            _kill(self._token)

    def _close(self) -> None:
        try:
            self._iterator.close()
        except Exception:
            if not self._is_killed:
                raise


def _kill(token: str) -> None:
    """Kills the processes of a reader, and makes grain forget them: it would wait for them again at exit."""
    found = [one for one in gc.get_objects() if type(one) is process_prefetch.ProcessPrefetchDatasetIterator]
    for one in found:
        if token in repr(one._worker_init_fn):
            child, one._prefetch_process = one._prefetch_process, None
            if child:
                child.kill()


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


def _start(token: str, worker: int, count: int) -> None:
    """Makes a worker process end with the main process, even a killed one, and only then.

    Ctrl-C and a SIGTERM to the whole process group are for the main process, which saves, and needs its data
    until it has.
    """
    del token, worker, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    connection.wait([process.parent_process().sentinel])
    os._exit(1)
