"""Something small done every few seconds in a thread, while a block of code runs."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def calls(function: Callable[[], bool | None], seconds: float, name: str = "") -> Iterator[None]:
    """Calls a function every `seconds` until the block ends, or a call returns True; then waits for the last.

    The first call is made after `seconds`. `name` is that of the thread.
    """
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds) and not function():
            pass

    thread = threading.Thread(target=repeat, daemon=True, name=name or None)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
