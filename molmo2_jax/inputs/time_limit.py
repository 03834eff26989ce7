"""A limit on how long a call may take, for calls into decoders that look at no clock."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_threads = threading.local()


class _Helper:
    """A thread that does one call at a time, and is kept: what decoders cache per thread stays."""

    def __init__(self):
        self._calls, self._results = queue.SimpleQueue(), queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="media", daemon=True)
        self._thread.start()

    def is_usable(self) -> bool:
        return self._thread.is_alive()  # not in a process that was forked off

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
            except BaseException as error:  # noqa: BLE001, handed to the caller
                result = None, error
            self._results.put(result)
            del function, result


def within(seconds: float, function: Callable[[], T], error: Exception) -> T:
    """Returns function(), or raises `error` if that takes longer than `seconds`.

    The call runs in a helper thread. One that is late is left to itself, and its result thrown away: a call
    stuck inside a decoder cannot be ended, but it no longer holds up the caller, nor the end of the process.
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
        if not finished:  # late, or interrupted by the keyboard
            helper.leave()
            _threads.helper = None
    if raised is not None:
        raise raised
    return result
