"""A time limit for calls into decoders, which check no clock."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_threads = threading.local()


class _Helper:
    """A thread that runs one call at a time; it is kept, and with it what decoders cache per thread."""

    def __init__(self):
        self._calls, self._results = queue.SimpleQueue(), queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="media", daemon=True)
        self._thread.start()

    def is_usable(self) -> bool:
        return self._thread.is_alive()  # threads do not survive a fork

    def start(self, function: Callable) -> None:
        self._calls.put(function)

    def result(self, seconds: float):
        return self._results.get(timeout=seconds)

    def leave(self) -> None:
        self._calls.put(None)

    def _work(self) -> None:
        while (function := self._calls.get()) is not None:
            try:
                result = function(), None
            except BaseException as error:  # noqa: BLE001, raised in the caller
                result = None, error
            self._results.put(result)
            del function, result


def within(seconds: float, function: Callable[[], T], error: Exception) -> T:
    """Returns function(), or raises `error` if that takes longer than `seconds`.

    The call runs in a helper thread. A late call is abandoned and its result discarded: a call stuck inside a
    decoder cannot be stopped, but it no longer blocks the caller or the exit of the process.
    """
    helper = getattr(_threads, "helper", None)
    if helper is None or not helper.is_usable():
        helper = _threads.helper = _Helper()
    helper.start(function)
    finished = False
    try:
        result, raised = helper.result(min(seconds, threading.TIMEOUT_MAX))
        finished = True
    except queue.Empty:
        raise error from None
    finally:
        if not finished:  # late, or interrupted (Ctrl-C)
            helper.leave()
            _threads.helper = None
    if raised is not None:
        raise raised
    return result
