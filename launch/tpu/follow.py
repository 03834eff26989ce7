"""Follows the output of a job on its machines until it ends there, across broken connections."""

import os
import pathlib
import queue
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Callable

from launch.tpu import cloud as tpu_cloud
from launch.tpu import slice as tpu_slice

AGAIN = 75        # status of a command that saved and asks to be restarted
LOST = 254        # a machine is gone
_OPEN, _CLOSE = b"\x1e", b"\x1f"   # around marks of tpu_worker.sh within the bytes of the log
_SHOWN = 64       # machines whose output is shown; the others are only polled for their status
_BAR = 10.0       # seconds between two shown lines that end with a carriage return


class Log:
    """The bytes of one machine's log in order, each exactly once, even if connections repeat some.

    gcloud itself repeats a broken call with the same arguments. The machine therefore sends the number of
    the byte at which it begins, and bytes already seen are dropped. `seen` counts the bytes of `run`, one
    start of the job.
    """

    def __init__(self):
        self.nonce, self.run, self.seen, self.status, self.word = secrets.token_hex(8), "", 0, None, ""
        self._head, self._buffer, self._at = _OPEN + self.nonce.encode() + b" ", b"", None

    def connect(self) -> None:
        """Begins a new connection; drops an incomplete mark of the last one, which will be sent again."""
        self._buffer, self._at, self.word = b"", None, ""

    def feed(self, chunk: bytes) -> bytes:
        """Returns the new log bytes in a chunk received from a connection."""
        self._buffer += chunk
        new = []
        while self._buffer:
            start = self._buffer.find(_OPEN)
            if start:
                text = self._buffer if start < 0 else self._buffer[:start]
                new.append(self._take(text))
                self._buffer = self._buffer[len(text):]
            elif not self._read_mark():
                if self._is_incomplete():
                    break
                new.append(self._take(_OPEN))   # the job itself printed this byte
                self._buffer = self._buffer[1:]
        return b"".join(new)

    def _read_mark(self) -> bool:
        """Removes a mark, or the part of one before a broken connection, from the front of the buffer.

        Returns whether there was one.
        """
        mark, rest = self._split()
        end = mark.find(_CLOSE)
        if mark.startswith(self._head) and end >= 0:
            self._read(mark[len(self._head):end].decode())
            self._buffer = self._buffer[end + 1:]
        elif self._may_be(mark) and rest.startswith(self._head + b"f"):  # "from": a connection begins
            self._buffer = rest
        else:
            return False
        return True

    def _is_incomplete(self) -> bool:
        """Returns whether the front of the buffer may be a mark whose rest has not arrived yet."""
        mark, rest = self._split()
        return self._may_be(mark) and (self._head + b"f").startswith(rest)

    def _split(self) -> tuple[bytes, bytes]:
        """Returns the buffer up to the next mark, and the rest."""
        mark, another, rest = self._buffer[1:].partition(_OPEN)
        return _OPEN + mark, another + rest

    def _may_be(self, mark: bytes) -> bool:
        return self._head.startswith(mark) or mark.startswith(self._head)

    def _take(self, text: bytes) -> bytes:
        if self._at is None:
            return b""
        begin, self._at = self._at, self._at + len(text)
        new = text[max(0, self.seen - begin):]
        self.seen = max(self.seen, self._at)
        return new

    def _read(self, mark: str) -> None:
        self.word, *values = mark.split()
        if self.word == "from":
            self._at = int(values[0])
            if values[1] != self.run:
                self.run, self.seen = values[1], 0
        elif self.word == "ended":
            self.status = int(values[0])


class Lines:
    """Prints bytes as lines with a label; of lines that overwrite each other, one every ten seconds."""

    def __init__(self, label: str):
        self._label, self._rest, self._last_bar = label, b"", 0.0

    def feed(self, new: bytes) -> None:
        *lines, self._rest = re.split(rb"(?<=\n)|(?<=\r)(?!\n)", self._rest + new) or [b""]
        if self._rest.endswith(b"\n"):
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            if line.endswith(b"\r"):
                if time.monotonic() < self._last_bar + _BAR:
                    continue
                self._last_bar = time.monotonic()
            self._show(line)

    def end(self) -> None:
        """Prints the last line if it has no newline."""
        if self._rest:
            self._show(self._rest)
        self._rest = b""

    def _show(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip("\r\n")
        if text or line.endswith(b"\n"):
            tpu_cloud.show(f"[{self._label}] {text}")


class Follower:
    """Follows the job on one machine. After the time `give_up_at`, an unreachable machine counts as lost."""

    def __init__(self, slice_: tpu_slice.Slice, node: str, worker: int, folder: pathlib.Path):
        self._slice, self._node, self._worker, self.label = slice_, node, worker, f"{node}/{worker}"
        self._path = folder / f"{node}-{worker}.log"
        self._errors = self._path.with_name(self._path.name + ".ssh")
        self.log, self._lines, self.give_up_at = Log(), Lines(self.label), None

    def call(self) -> list[str]:
        """Returns the call that prints the rest of the log."""
        log, script = self.log, f"bash {self._slice.request.name}/tpu_worker.sh"
        line = f"{script} attach {log.seen} {log.nonce} {log.run}".strip()
        return self._slice.ssh(self._node, str(self._worker), line)

    def follow(self) -> int:
        """Returns the command's status on this machine, or LOST.

        Raises:
          tpu_cloud.Problem: the cloud refuses to answer this user.
        """
        absences, pauses = 0, self._slice.caller.pace.pauses()
        while True:
            seen = self.log.seen
            error = self._connect()
            if self.log.status is not None:
                self._lines.end()
                return self.log.status
            if self.log.seen > seen:
                pauses = self._slice.caller.pace.pauses()
            absences = absences + 1 if self.log.word == "nothing" else 0
            why = "its job is gone" if absences > 3 else self._slice.is_lost(self._node)
            if self.give_up_at and time.monotonic() > self.give_up_at:
                why = why or "it is unreachable"
            if why:
                tpu_cloud.say(f"{self.label} is lost: {why}")
                return LOST
            tpu_cloud.say(f"the connection to {self.label} broke; reconnecting "
                          f"({tpu_cloud.sentence(error)})")
            self._slice.caller.wait(next(pauses))

    def _connect(self) -> str:
        """Prints the output received through one connection; returns its error output.

        Raises:
          tpu_cloud.Problem: the connection was refused.
        """
        self.log.connect()
        caller = self._slice.caller
        with open(self._errors, "ab") as errors, open(self._path, "ab") as copy:
            before = errors.tell()
            process = caller.start(self.call(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=errors)
            while chunk := os.read(process.stdout.fileno(), 2**16):
                new = self.log.feed(chunk)
                copy.write(new)
                copy.flush()
                self._lines.feed(new)
            process.stdout.close()
            answer = tpu_cloud.Answer(caller.finish(process), "", self._errors.read_bytes()[before:].decode(
                errors="replace"))
        is_refused = answer.status not in (0, 255) and answer.kind is tpu_cloud.Kind.REFUSED
        if self.log.status is None and is_refused:
            raise tpu_cloud.Problem(f"the connection to {self.label} was refused: {answer.sentence}")
        return answer.error


class Rest:
    """Polls up to 64 machines of a node, starting at number `first`, whose output is not shown."""

    def __init__(self, slice_: tpu_slice.Slice, node: str, first: int):
        last = min(first + _SHOWN, slice_.request.hosts) - 1
        self._slice, self._node = slice_, node
        self._workers = f"{first}-{last}" if last > first else str(first)
        self.label, self.give_up_at = f"{node}/{self._workers}", None
        self._line = f"bash {slice_.request.name}/tpu_worker.sh poll"

    def call(self) -> list[str]:
        """Returns the call that polls these machines."""
        return self._slice.ssh(self._node, self._workers, self._line)

    def follow(self) -> int:
        """Returns the first status that is neither 0 nor AGAIN, else the largest once all have ended; LOST if
        the machines are gone."""
        pace = self._slice.caller.pace
        while True:
            found, others = [], []
            try:
                text = self._slice.run_on(self._node, self._line, f"the status check of {self.label}",
                                          workers=self._workers, on_line=None)
            except tpu_slice.Lost as lost:
                tpu_cloud.say(f"{self.label} is lost: {lost}")
                return LOST
            except tpu_slice.Failed:
                text = ""
            for line in text.splitlines():
                match = re.fullmatch(r"(\S+) (running|nothing|ended (\d+))", line)
                (found if match else others).append(match or line)
            statuses = [int(match[3]) for match in found if match[3]]
            failed = [status for status in statuses if status not in (0, AGAIN)]
            if failed or (found and len(statuses) == len(found)):
                for line in others:
                    tpu_cloud.show(line)
                return failed[0] if failed else max(statuses)
            self._slice.caller.wait(2 * pace.poll)


def watch(members: dict[str, Callable[[], int]], give_up: Callable[[int], None], is_stopping=lambda: False,
          seconds: float = 60.0) -> int:
    """Calls all members, each in a thread, and returns the first status that is neither 0 nor AGAIN.

    Without such a status it returns the largest. LOST takes precedence: if a machine is gone, the others fail
    too. After the first such status, or once is_stopping(), give_up(1) is called in its own thread, and
    give_up(2) `seconds` later.

    Raises:
      BaseException: an exception of a member.
    """
    results: queue.SimpleQueue = queue.SimpleQueue()

    def call(label, member):
        try:
            results.put((label, member(), None))
        except BaseException as error:
            results.put((label, None, error))

    for label, member in members.items():
        threading.Thread(target=call, args=(label, member), daemon=True).start()
    waiting, result, calls, deadline = len(members), 0, 0, 0.0
    while waiting:
        try:
            label, status, error = results.get(timeout=0.1)
        except queue.Empty:
            pass
        else:
            if error:
                raise error
            waiting -= 1
            tpu_cloud.say(f"{label} ended with status {status}")
            if status == LOST or result == 0 or (result == AGAIN and status):
                result = status
        must = is_stopping() or calls or result not in (0, AGAIN)
        if waiting and must and calls < 2 and time.monotonic() >= deadline:
            calls, deadline = calls + 1, time.monotonic() + seconds
            threading.Thread(target=give_up, args=(calls,), daemon=True).start()
    return result


def follow_all(slice_: tpu_slice.Slice, folder: pathlib.Path, stop_all: Callable[[], None]) -> int:
    """Shows the output of all machines and returns the job's status; see `watch`.

    stop_all ends the job on the other machines after it failed on one.
    """
    members = []
    shown = max(1, _SHOWN // len(slice_.nodes))
    for node in slice_.nodes:
        hosts = slice_.request.hosts
        members += [Follower(slice_, node, worker, folder) for worker in range(min(hosts, shown))]
        members += [Rest(slice_, node, first) for first in range(shown, hosts, _SHOWN)]
    if slice_.dry:
        for member in members:
            tpu_cloud.show(tpu_cloud.quoted(member.call()))
        return 0
    folder.mkdir(parents=True, exist_ok=True)

    def give_up(_):
        limit = time.monotonic() + slice_.caller.pace.patience
        for member in members:
            member.give_up_at = member.give_up_at or limit
        stop_all()

    return watch({member.label: member.follow for member in members}, give_up,
                 seconds=float(os.environ.get("STOP_SECONDS", 60)))
