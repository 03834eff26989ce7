"""Maps a stream of numbers in worker processes that start cheaply and end with the main process."""

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import queue
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
_SHARED_MEMORY_BYTES = 2**16  # arrays of at least this size use shared memory
_CLOSE_SECONDS = 20.0  # after which close kills the processes
_LOOK_SECONDS = 10.0   # without a result, after which next looks whether a process has died

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A grain source: the numbers `again`, then start, start + step, ... without end."""
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
    """Iterates over function(number) in order, for any number of processes.

    The first `next` starts the processes, each of which works `prefetch` results ahead; with 0 processes the
    caller's thread does the work. `function` and its results must be picklable; large arrays in dictionaries
    and tuples return through shared memory. If a process dies, `next` raises an error for which `is_death`
    holds. After any error the reader must only be closed.
    """

    def __init__(self, function: Callable[[int], Any], numbers: Numbers, num_workers: int, prefetch: int):
        self._token, self._is_killed = secrets.token_hex(8), False
        self._asked: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
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
            # At exit, after grain has closed what it can (priority 1), and before multiprocessing waits for
            # the processes: it sends them SIGTERM, which they ignore.
            util.Finalize(None, _kill, args=(self._token,), exitpriority=0)
        self._iterator = iter(dataset)
        self._num_workers = num_workers
        self._needs_start = num_workers > 0

    def __next__(self) -> Any:
        if not self._num_workers:
            return next(self._iterator)
        if self._needs_start:
            threading.Thread(target=self._pump, daemon=True).start()
            with hidden_main():
                result = self._next_of_processes()
            self._needs_start = False
            return result
        return self._next_of_processes()

    def _next_of_processes(self) -> Any:
        """Returns the next result.

        If a process died while it was sending a result, grain would wait for the rest forever. So a thread
        waits for grain, and the caller looks from time to time whether a process has died.
        """
        self._asked.put(None)
        was_dead = False
        while True:
            try:
                result, error = self._results.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                is_dead = any(one._process_failed() for one in _prefetchers(self._token))
                if is_dead and was_dead:  # looked twice: grain has had time to report it
                    raise RuntimeError(
                        "Worker process was terminated unexpectedly while it was sending a result") from None
                was_dead = is_dead
                continue
            if error is not None:
                raise error
            return result

    def _pump(self) -> None:
        error = None
        while error is None:
            self._asked.get()
            result = None
            try:
                result = next(self._iterator)
            except BaseException as raised:
                error = raised
            self._results.put((result, error))

    def close(self) -> None:
        """Stops the processes, within about `_CLOSE_SECONDS`.

        If a process died while it was sending a result, grain would wait for the rest forever.
        """
        thread = threading.Thread(target=self._close, daemon=True)
        thread.start()
        thread.join(_CLOSE_SECONDS)
        if thread.is_alive():
            _log.warning("the worker processes did not stop; killing them")
            self._is_killed = True
            _kill(self._token)

    def _close(self) -> None:
        try:
            self._iterator.close()
        except Exception:
            if not self._is_killed:
                raise


def _kill(token: str) -> None:
    """Kills the processes of a reader, and removes them from grain, which would wait for them at exit."""
    for one in _prefetchers(token):
        child, one._prefetch_process = one._prefetch_process, None
        if child:
            child.kill()


def _prefetchers(token: str) -> list[process_prefetch.ProcessPrefetchDatasetIterator]:
    """Returns grain's owners of the processes of a reader; grain has no public way to them."""
    found = [one for one in gc.get_objects() if type(one) is process_prefetch.ProcessPrefetchDatasetIterator]
    return [one for one in found if token in repr(one._worker_init_fn)]


def is_death(error: BaseException) -> bool:
    """Returns whether the error reports the death of a worker process."""
    return isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error)


_hiding = threading.Lock()


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Prevents processes started in the block from importing the main module.

    They do not need it; the training script would cost each of them seconds and some 200 MB.
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
    """Makes a worker process end with the main process, even if that is killed, and not before.

    The worker ignores Ctrl-C and a SIGTERM to the process group: the main process reacts to them by saving,
    and needs its data until then.
    """
    del token, worker, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    connection.wait([process.parent_process().sentinel])
    os._exit(1)
