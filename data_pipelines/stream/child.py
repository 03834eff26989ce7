"""A process of its own in which a function reads media, so that a decoder that crashes costs one record.

`Child` is the parent's side; the process runs `main`. It ends with its parent, also with a killed one.
"""

import contextlib
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[2]   # holds the package
_TRIES = 2             # a process may also be killed for what another one does with the memory
_SLACK_SECONDS = 60.0  # beyond the limits on reading, which hold inside the process
COMMAND = (sys.executable, "-m", "data_pipelines.stream.child")


class Crashed(Exception):
    """The process ended or hung in a call, as often as it was tried; the message says how."""


class Child:
    """Calls a function in a process that is started when it is needed, and anew after it died.

    function: pickled, as are its arguments and results. seconds: limit on reading one medium, which the
      function keeps. command: starts Python with `main`, given the number of a file; by default COMMAND.
    tries: of a call that ends the process. slack: seconds beyond twice the limit until the process hangs.
    """

    def __init__(self, function: Callable, seconds: float, command: Sequence[str] = (), *,
                 tries: int = _TRIES, slack: float = _SLACK_SECONDS):
        self._function, self._tries = function, tries
        self._limit = 2 * seconds + slack
        self._command = command or COMMAND
        self._process: subprocess.Popen | None = None
        self._pipe: connection.Connection

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __call__(self, *arguments: Any) -> Any:
        """Returns function(*arguments); what it raises is raised here, with its stack trace as a note.

        Raises:
          Crashed: the process ends or hangs, each time it is tried.
          RuntimeError: the process cannot start.
        """
        how = ""
        for _ in range(self._tries):
            self.start()
            try:
                self._pipe.send(arguments)
                if not self._pipe.poll(self._limit):
                    how = "hangs"
                    self.close()
                    continue
                result, error = self._pipe.recv()
            except (EOFError, OSError):
                how = self._end()
                continue
            if error is not None:
                raise error
            return result
        raise Crashed(f"the process that decodes it {how}, {self._tries} times")

    def start(self) -> None:
        """Starts the process, unless it runs.

        Raises:
          RuntimeError: it cannot start.
        """
        if self._process is not None:
            return
        ours, theirs = multiprocessing.Pipe()
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [*self._command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"})
        theirs.close()
        self._pipe = ours
        try:
            self._pipe.send(self._function)
            if self._pipe.recv() is None:
                return
        except (EOFError, OSError):
            pass
        raise RuntimeError(f"the process that decodes media must start; it {self._end()}")

    def _end(self) -> str:
        """Returns how the process ended."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SLACK_SECONDS)
        status = self._process.poll()
        self.close()
        if status is not None and status < 0:
            return f"ends by {signal.Signals(-status).name}"
        return f"ends with status {status}"

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._process = None


def main(file: int) -> None:
    """Calls a function for each message of a connection, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    pipe = connection.Connection(file)
    with contextlib.suppress(EOFError, OSError):
        function = pipe.recv()
        pipe.send(None)
        while True:
            pipe.send(_answer(function, pipe.recv()))


def _answer(function: Callable, arguments: Sequence) -> tuple[Any, Exception | None]:
    try:
        return function(*arguments), None
    except Exception as error:  # noqa: BLE001, raised again in the parent
        error.add_note(traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # noqa: BLE001, what an error of a library needs is not known
            return None, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        return None, error


if __name__ == "__main__":
    main(int(sys.argv[1]))
