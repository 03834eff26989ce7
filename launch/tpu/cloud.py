"""Calls of gcloud and kubectl: the meaning of answers, and how long a call without an answer is retried.

One rule for all calls: retry with growing pauses until the cloud gives a clear answer; nothing else counts as
an answer. Standard library only: this runs on a machine that has only Python and gcloud.
"""

import contextlib
import dataclasses
import enum
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any


class Kind(enum.Enum):
    """What an answer means for the caller."""
    OK = enum.auto()
    TRANSIENT = enum.auto()   # no answer now: retry
    ABSENT = enum.auto()      # the resource does not exist
    EXISTS = enum.auto()      # a resource of this name exists already
    QUOTA = enum.auto()       # the project's quota is exceeded
    CAPACITY = enum.auto()    # the zone has no free machines: retry
    REFUSED = enum.auto()     # a retry does not help: permission, login, a wrong argument
    UNCLEAR = enum.auto()     # none of the above: retry, but for a shorter time


# The first pattern that matches the error text decides. The order matters: errors about a rate limit mention
# a quota, and the cloud uses RESOURCE_EXHAUSTED and 429 both for quota and for a zone without machines.
_PATTERNS = (
    (Kind.REFUSED, r"localhost:8080|no (current )?context"),   # kubectl knows no cluster
    (Kind.TRANSIENT, r"per[ _-]?(minute|second)|rate.?limit|too many requests"),
    (Kind.QUOTA, r"\bquotas?\b(?! project)|quota_?exceeded|'\w+Per(Project|Zone)\w*'.{0,40}exceeded"),
    (Kind.CAPACITY, r"(no|more|available|out of|enough|insufficient|sufficient) (capacity|resources)|stockout"
                    r"|resource_pool_exhausted|resource_exhausted"),
    (Kind.TRANSIENT, r"connection (was )?(refused|reset|aborted|closed|timed out)|timed? ?out|broken pipe"
                     r"|network is unreachable|no route to host|could not resolve|name resolution"
                     r"|name or service not known|unable to find the server|max retries exceeded"
                     r"|failed to establish|remote end closed|remotedisconnected|connectionerror|sslerror"
                     r"|kex_exchange_identification|\bEOF\b|bad gateway|try again|backend ?error"
                     r"|(http\w*|code|status|error|<)\W{0,4}(error )?\W{0,3}(429|50[0234])\b"
                     r"|\bunavailable\b|deadline_exceeded|\baborted\b|\bcancelled\b|failed_precondition"
                     r"|internal (server )?error|\binternal\b:"),
    (Kind.REFUSED, r"permission_denied|permission '|required .{0,60}permission|forbidden|not authorized"
                   r"|unauthorized|unauthenticated|invalid_grant|login|reauth|credential|service_disabled"
                   r"|not been used in project|invalid_argument|invalid (value|choice)|unrecognized argument"
                   r"|argument -|must be specified|(code|status|<)\W{0,3}(400|401|403)\b"),
    (Kind.EXISTS, r"already.?exists"),
    (Kind.ABSENT, r"not.?found|does not exist|no such resource"),
)


def classify(error: str) -> Kind:
    """Returns the kind of a failed call from its error text."""
    for kind, pattern in _PATTERNS:
        if re.search(pattern, error, re.IGNORECASE):
            return kind
    return Kind.UNCLEAR


def sentence(error: str) -> str:
    """Returns the cloud's error message on one line of at most 400 characters."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), max(0, len(lines) - 3))
    text = re.sub(r"^ERROR: (\(gcloud\S*\) )?", "", " ".join(lines[first:]))
    return text[:400] or "no reason was given"


@dataclasses.dataclass(frozen=True)
class Answer:
    """Exit status, output and error output of a call."""
    status: int
    out: str
    error: str

    @property
    def kind(self) -> Kind:
        return Kind.OK if self.status == 0 else classify(self.error)

    @property
    def sentence(self) -> str:
        return sentence(self.error or self.out)


class Problem(Exception):
    """The script cannot continue; the message is one sentence with the reason."""


class Ended(BaseException):
    """This script received SIGTERM or Ctrl-C."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """Polling and retry times in seconds.

    poll: between two checks of a state that is expected to change.
    patience: until a call without a clear answer fails.
    """
    poll: float = 15.0
    patience: float = 3600.0

    @classmethod
    def of_environment(cls) -> "Pace":
        poll = float(os.environ.get("TPU_RUN_POLL_SECONDS", cls.poll))
        return cls(poll, float(os.environ.get("TPU_RUN_PATIENCE_SECONDS", 240 * poll)))

    def pauses(self) -> Iterator[float]:
        """Yields pauses in seconds that double from poll / 3 up to 20 * poll."""
        pause = self.poll / 3
        while True:
            yield pause
            pause = min(2 * pause, 20 * self.poll)


printing = threading.Lock()


def say(text: str) -> None:
    """Prints a message of the script itself."""
    with printing:
        print(f"== {text}", file=sys.stderr, flush=True)


def show(line: str) -> None:
    """Prints a line of output of a machine, or of a dry run."""
    with printing:
        print(line, flush=True)


class Caller:
    """Runs cloud commands; after `end`, running commands are ended and no other one starts."""

    def __init__(self, pace: Pace):
        self.pace, self.ended = pace, threading.Event()
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def start(self, words: Sequence[str], **options) -> subprocess.Popen:
        """Starts a command in its own process group, so that it can be ended together with its children.

        Raises:
          Problem: the program is not installed. Ended: `end` was called.
        """
        with self._lock:
            if self.ended.is_set():
                raise Ended
            try:
                process = subprocess.Popen(words, start_new_session=True, **options)
            except FileNotFoundError:
                raise Problem(f"{words[0]} must be installed on this machine; it was not found") from None
            self._running.add(process)
        return process

    def finish(self, process: subprocess.Popen) -> int:
        """Waits for a command from `start`; returns its exit status, 128 + N if signal N ended it."""
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status if status >= 0 else 128 - status

    def run(self, words: Sequence[str], text: str | None = None, on_line: Callable[[str], None] | None = None,
            seconds: float | None = None) -> Answer:
        """Runs a command once and returns its answer.

        text: its input. on_line: called with each line of output as it is printed. seconds: time limit.
        """
        process = self.start(words, stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
        errors, lines = [], []
        reader = threading.Thread(target=lambda: errors.append(process.stderr.read()), daemon=True)
        reader.start()
        timed_out = threading.Event()
        timer = threading.Timer(seconds or 0, lambda: (timed_out.set(), _end(process)))
        timer.daemon = True
        if seconds:
            timer.start()
        if text is not None:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(text)
        for line in process.stdout:
            lines.append(line)
            if on_line:
                on_line(line.rstrip("\n"))
        status = self.finish(process)
        timer.cancel()
        reader.join()
        error = f"timed out after {seconds} s" if timed_out.is_set() else "".join(errors)
        return Answer(status, "".join(lines), error)

    def ask(self, words: Sequence[str], what: str, patience: float | None = None,
            text: str | None = None) -> Answer:
        """Returns the first clear answer: OK, ABSENT, EXISTS or QUOTA.

        Raises:
          Problem: the call was refused, or there was no clear answer for `patience` seconds.
        """
        trials = Trials(self, what, patience)
        while True:
            answer = self.run(words, text=text, seconds=600)
            if answer.kind in (Kind.OK, Kind.ABSENT, Kind.EXISTS, Kind.QUOTA):
                return answer
            trials.failed(answer)

    def wait(self, seconds: float) -> None:
        """Sleeps. Raises Ended if the script ends in the meantime."""
        if self.ended.wait(seconds):
            raise Ended

    def end(self) -> None:
        """Ends all running commands."""
        with self._lock:
            self.ended.set()
            running = list(self._running)
        for process in running:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        if number == signal.SIGTERM:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
                return


class Trials:
    """Retries of one call: reports each new error once, waits, and gives up after `patience` seconds."""

    def __init__(self, caller: Caller, what: str, patience: float | None = None):
        self._caller, self._what, self._told = caller, what, None
        self._patience = caller.pace.patience if patience is None else patience
        self._pauses, self._start = caller.pace.pauses(), time.monotonic()

    def failed(self, answer: Answer, kind: Kind | None = None) -> None:
        """Waits before the next retry. `kind` overrides the kind of the answer.

        Raises:
          Problem: another retry is pointless.
        """
        kind, reason = kind or answer.kind, answer.sentence
        if kind is Kind.REFUSED:
            raise Problem(f"{self._what} was refused: {reason}")
        patience = self._patience / 6 if kind is Kind.UNCLEAR else self._patience
        passed = time.monotonic() - self._start
        if passed >= patience:
            tried = f" for {passed / 60:.0f} minutes" if passed > 60 else ""
            raise Problem(f"{self._what} failed{tried}: {reason}")
        if reason != self._told:
            say(f"{self._what}: {reason}; trying again")
        self._told = reason
        self._caller.wait(next(self._pauses))


def quoted(words: Iterable[str]) -> str:
    """Returns the words as one shell command line."""
    return " ".join(shlex.quote(word) for word in words)


def in_parallel(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Returns the results of all functions, each called in its own thread.

    Raises:
      BaseException: an exception of a function, after all have ended; preferably a Problem.
    """
    if len(functions) == 1:
        return [functions[0]()]
    results: queue.SimpleQueue = queue.SimpleQueue()

    def call(index):
        try:
            results.put((index, functions[index](), None))
        except BaseException as error:
            results.put((index, None, error))

    for index in range(len(functions)):
        threading.Thread(target=call, args=(index,), daemon=True).start()
    found = sorted((results.get() for _ in functions), key=lambda one: one[0])
    errors = [error for *_, error in found if error]
    if errors:
        raise next((error for error in errors if isinstance(error, Problem)), errors[0])
    return [result for _, result, _ in found]
