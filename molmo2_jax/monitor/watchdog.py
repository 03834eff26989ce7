"""Kills a hung process after writing every thread's stack."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

HUNG = 70  # exit status


def stacks() -> str:
    """Returns the stacks of all threads, as faulthandler prints them."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()


class Watchdog:
    """Calls `tell(reason with stacks)` and exits if `beat` is not called for `seconds`.

    It is a Python thread: it runs while the main thread waits for devices, files or other hosts, all of which
    release the interpreter lock.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None], leave: Callable[[int], None] = os._exit):
        self._seconds, self._tell, self._leave = seconds, tell, leave
        self._over, self._last, self._doing = threading.Event(), time.monotonic(), "starting"

    def beat(self, doing: str) -> None:
        """Records that the process is alive, and what it does next."""
        self._last, self._doing = time.monotonic(), doing

    def __enter__(self):
        self.beat(self._doing)
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_):
        self._over.set()

    def _watch(self):
        while not self._over.wait(min(self._seconds / 4, 10.0)):
            waited = time.monotonic() - self._last
            if waited > self._seconds:
                reason = f"nothing happened for {waited:.0f} s; last known: {self._doing}\n{stacks()}"
                print(f"error: {reason}", file=sys.stderr, flush=True)
                self._tell(reason)
                self._leave(HUNG)
                return
