"""Slices of TPU machines as one queued resource: requests, awaits, reaches and deletes them."""

import contextlib
import dataclasses
import enum
import re
import threading
from collections.abc import Callable, Sequence

from launch.tpu import cloud as tpu_cloud
from launch.tpu.cloud import Kind

_AT_ONCE = 64        # machines per call; with more, gcloud's own connections interfere with each other
_FAILURES = 3        # requests that the cloud may fail in a row before the script gives up; with --spot:
_SPOT_FAILURES = 20
_LAG = 20            # checks until a queued resource in state ACTIVE must reflect that its machines are gone
STOPPED = 253        # status of a job that was stopped by hand
_GONE = {"PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "SUSPENDED", "SUSPENDING", "DELETING", "HIDDEN",
         "HIDING"}
_LOST = {"FAILED", "SUSPENDING", "SUSPENDED"}
_MARK = re.compile(r"== (\w+) ended with status (\d+)")
_KEEP_ALIVE = ("-oServerAliveInterval=30", "-oServerAliveCountMax=6")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The slices to request, and how their machines are reached.

    hosts: machines per slice. is_spot: machines may be taken away. gives_up: the request has its own time
    limit (--valid_until). create_flags, ssh_flags: passed to gcloud. iap, internal: how ssh reaches the
    machines.
    """
    name: str
    zone: str
    project: str
    type: str = ""
    shape: str = ""
    version: str = ""
    slices: int = 1
    hosts: int = 0
    is_spot: bool = False
    gives_up: bool = False
    create_flags: tuple[str, ...] = ()
    ssh_flags: tuple[str, ...] = ()
    iap: bool = False
    internal: bool = False


class Life(enum.Enum):
    """The state of a node according to the cloud."""
    READY = enum.auto()
    GONE = enum.auto()
    OTHER = enum.auto()     # starting, or under repair
    UNKNOWN = enum.auto()   # the cloud gave no answer


class Lost(Exception):
    """Machines are gone according to the cloud."""


class Failed(Exception):
    """A line run on a machine ended with `status`; the message is the end of its output."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Slice:
    """The queued resource of a request and its nodes, one node per slice."""

    def __init__(self, request: Request, caller: tpu_cloud.Caller, dry: bool = False,
                 is_stopped: Callable[[], bool] = lambda: False):
        self.request, self.caller, self.dry = request, caller, dry
        self.exists = False         # this script has seen or created it and has not deleted it
        self.may_exist = False      # the same, or a request was sent whose answer is unknown
        self._is_stopped = is_stopped
        self._is_ours = False       # this script requested it
        self.assumed = False        # dry run: the slice is assumed to exist
        only = request.slices == 1
        self.nodes = [request.name] if only else [f"{request.name}-{i}" for i in range(request.slices)]

    # ---- calls ----

    def _words(self, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", *words, f"--zone={self.request.zone}",
                f"--project={self.request.project}", "--quiet"]

    def _ask(self, what: str, *words: str, patience: float | None = None) -> tpu_cloud.Answer:
        if self.dry:
            tpu_cloud.show(tpu_cloud.quoted(self._words(*words)))
            return tpu_cloud.Answer(0, "", "")
        return self.caller.ask(self._words(*words), what, patience)

    # ---- the queued resource ----

    def state(self, patience: float | None = None) -> str:
        """Returns the state of the queued resource, "NONE" if there is none.

        Raises:
          tpu_cloud.Problem: the cloud gave no clear answer within `patience` seconds.
        """
        name = self.request.name
        answer = self._ask(f"the status check of the queued resource {name}", "queued-resources", "describe",
                           name, "--format=value(state.state)", patience=patience)
        if self.dry:
            return "ACTIVE" if self.assumed else "NONE"
        return "NONE" if answer.kind is Kind.ABSENT else answer.out.strip()

    def _reason(self) -> str:
        """Returns the cloud's reason why the queued resource failed, "" if it gives none."""
        answer = self.caller.run(self._words("queued-resources", "describe", self.request.name,
                                             "--format=value(state.failedData.error.message)"), seconds=120)
        text = " ".join(answer.out.split())
        return "" if answer.status or text in _LOST else text

    def create(self) -> None:
        """Requests the slices.

        Raises:
          tpu_cloud.Problem: the request was refused, or the zone had no capacity for a long time.
        """
        one = self.request
        which = [f"--node-id={one.name}"] if one.slices == 1 else [
            f"--node-count={one.slices}", f"--node-prefix={one.name}"]
        what = f"{one.slices} x {one.type}"
        tpu_cloud.say(f"requesting {what} ({one.shape})")
        self.may_exist = self.assumed = True
        try:
            answer = self._ask(
                f"the request for {what} in {one.zone}", "queued-resources", "create", one.name, *which,
                f"--accelerator-type={one.type}", f"--runtime-version={one.version}", *one.create_flags)
            if answer.kind is Kind.QUOTA:
                raise tpu_cloud.Problem(f"the project has no quota for {what} in {one.zone}: "
                                        f"{answer.sentence}")
            if answer.kind is Kind.ABSENT:
                raise tpu_cloud.Problem(f"the request for {what} was refused: {answer.sentence}")
        except tpu_cloud.Problem:
            with contextlib.suppress(tpu_cloud.Problem):  # a failed call may still have created it
                self.may_exist = self.state(patience=0) != "NONE"
            raise
        self.exists = self._is_ours = True

    def delete(self) -> None:
        """Deletes the queued resource with its machines and returns when it is gone.

        Raises:
          tpu_cloud.Problem: the cloud refused, or the resource still existed after a long time.
        """
        name, trials = self.request.name, None
        while self.state() != "NONE":
            if trials:
                trials.failed(tpu_cloud.Answer(1, "", "it is still there: unavailable"))
            trials = trials or tpu_cloud.Trials(self.caller, f"the deletion of {name}")
            self._ask(f"the deletion of {name}", "queued-resources", "delete", name, "--force")
            if self.dry:
                return
            for _ in range(_LAG):  # deletion takes minutes; repeat the call only after that
                if self.state() == "NONE":
                    break
                self.caller.wait(self.caller.pace.poll)
        self.exists = self.may_exist = False

    def ensure(self) -> None:
        """Returns when all machines are ready; requests them if there are none.

        Raises:
          tpu_cloud.Problem: the request failed permanently, was deleted, the job was stopped, or the machines
            are of another type than requested.
        """
        seen, failures, absences, looks = "", 0, 0, 0
        while True:
            if self._is_stopped():
                raise tpu_cloud.Problem("the job was stopped by hand before it began; the same call of this "
                                        "script will start it")
            now = self.state()
            if now != seen and not self.dry:
                tpu_cloud.say(f"queued resource {self.request.name}: {now}")
            seen = now
            absences = absences + 1 if now in ("NONE", "DELETING") else 0
            looks = looks + 1 if now == "ACTIVE" else 0
            if now == "ACTIVE":
                if self._is_ready(looks):
                    return
                self.caller.wait(self.caller.pace.poll)
                continue
            if now == "NONE" and not self.exists:
                self.create()
                continue
            if self.exists and (now == "DELETING" or absences > 2):  # a new one may not be visible at once
                raise tpu_cloud.Problem(f"the queued resource {self.request.name} was deleted by another "
                                        "script or user; the same call of this script requests it again")
            if now in _LOST:
                failures += 1
                self._ask_again(failures, now)
                continue
            if not absences:
                self.exists = self.may_exist = True
            self.caller.wait(self.caller.pace.poll)

    def _is_ready(self, looks: int) -> bool:
        """Returns whether all nodes are ready, after `looks` checks of an active resource.

        The cloud's state of the resource lags minutes behind its state of the nodes.
        """
        self.exists = self.may_exist = True
        missing = self._missing()
        if missing is None:
            return True
        gone, others = missing
        if gone and looks > _LAG:
            self._replace(f"its machines are gone ({gone})")
        if looks * self.caller.pace.poll > self.caller.pace.patience:
            raise tpu_cloud.Problem(f"the machines of {self.request.name} do not start: {others}")
        return False

    def _ask_again(self, failures: int, now: str) -> None:
        """Deletes a request that the cloud failed, or whose machines it took away."""
        if self._is_ours:   # one left by an earlier call is only deleted
            self._give_up_after(failures, now)
        self.delete()
        if failures > 1:
            pauses = self.caller.pace.pauses()
            self.caller.wait([next(pauses) for _ in range(failures)][-1])

    def _give_up_after(self, failures: int, now: str) -> None:
        """Prints why the cloud failed the request. Raises Problem if requesting again is pointless."""
        reason = self._reason() if now == "FAILED" else ""
        if reason:
            tpu_cloud.say(f"the queued resource {self.request.name} failed: {reason}")
        told = f": {reason}" if reason else ""
        kind = tpu_cloud.classify(reason) if reason else Kind.UNCLEAR
        if now == "FAILED" and (self.request.gives_up or kind in (Kind.QUOTA, Kind.REFUSED)):
            raise tpu_cloud.Problem(f"the queued resource {self.request.name} failed"
                                    f"{told or ', as its time limit has passed'}")
        if failures > (_SPOT_FAILURES if self.request.is_spot else _FAILURES):
            raise tpu_cloud.Problem(f"the queued resource {self.request.name} failed {failures} times{told}")

    def _replace(self, why: str) -> None:
        if not self.request.is_spot:
            raise tpu_cloud.Problem(f"machines were lost: {why}; delete the slice and call again for others")
        tpu_cloud.say(f"{self.request.name}: {why}; deleting it and requesting others")
        self.delete()

    def _missing(self) -> tuple[str, str] | None:
        """Returns None if all nodes are ready, else (nodes that are gone, all that are not ready) as text.

        Raises:
          tpu_cloud.Problem: the nodes are of another type than requested.
        """
        if self.dry:
            return None
        lives = tpu_cloud.in_parallel([lambda node=node: self.life(node) for node in self.nodes])
        for node, (life, text) in zip(self.nodes, lives):
            found = text.split()[1:]
            if life is Life.READY and found and found[0].rpartition("/")[2] != self.request.type:
                raise tpu_cloud.Problem(f"{node} is a {found[0]}, but {self.request.type} was requested; "
                                        "delete it first, or use another --name")
        if all(life is Life.READY for life, _ in lives):
            return None
        told = [(life, f"{node} is {text}") for node, (life, text) in zip(self.nodes, lives)]
        return (", ".join(text for life, text in told if life is Life.GONE),
                ", ".join(text for life, text in told if life is not Life.READY))

    # ---- machines ----

    def life(self, node: str) -> tuple[Life, str]:
        """Returns the state of a node and the cloud's own text; asks once, without retries.

        Raises:
          tpu_cloud.Problem: the cloud refuses to answer this user.
        """
        answer = self.caller.run(self._words("tpu-vm", "describe", node,
                                             "--format=value(state,acceleratorType)"), seconds=120)
        if answer.kind is Kind.REFUSED:
            raise tpu_cloud.Problem(f"the status check of {node} was refused: {answer.sentence}")
        if answer.kind is Kind.ABSENT:
            return Life.GONE, "absent"
        text = answer.out.strip()
        if answer.status or not text:
            return Life.UNKNOWN, answer.sentence
        if text.split()[0] == "READY":
            return Life.READY, text
        return (Life.GONE if text.split()[0] in _GONE else Life.OTHER), text

    def is_lost(self, node: str) -> str:
        """Returns why a node that ssh did not reach is gone; "" unless the cloud clearly says that it is."""
        life, text = self.life(node)
        if life is Life.GONE:
            return f"{node} is {text}"
        if life is Life.READY:
            return ""
        answer = self.caller.run(self._words("queued-resources", "describe", self.request.name,
                                             "--format=value(state.state)"), seconds=120)
        now = "NONE" if answer.kind is Kind.ABSENT else answer.out.strip()
        return f"the queued resource is {now}" if now in _LOST | {"NONE", "DELETING"} else ""

    def lost_nodes(self, looks: int) -> str:
        """Returns which machines the cloud clearly says are gone; "" if it names none in `looks` checks."""
        for look in range(looks):
            if look:
                self.caller.wait(self.caller.pace.poll)
            try:
                now = self.state()
            except tpu_cloud.Problem as problem:
                tpu_cloud.say(str(problem))
                return ""
            if now != "ACTIVE":
                return f"the queued resource is {now}"
            lives = tpu_cloud.in_parallel([lambda node=node: self.life(node) for node in self.nodes])
            gone = [f"{node} is {text}" for node, (life, text) in zip(self.nodes, lives) if life is Life.GONE]
            if gone:
                return ", ".join(gone)
        return ""

    def ssh(self, node: str, workers: str, line: str) -> list[str]:
        """Returns the call that runs a shell line on machines of a node; workers: "all", "3", "0-63"."""
        return self._reach("ssh", [node], f"--worker={workers}", f"--command={line}",
                           *(f"--ssh-flag={flag}" for flag in (*_KEEP_ALIVE, *self.request.ssh_flags)))

    def _reach(self, verb: str, places: list[str], *flags: str) -> list[str]:
        one, *files = self.request, *places[:-1]
        node, colon, path = places[-1].partition(":")
        internal = ["--internal-ip"] if one.internal else []
        if not one.iap:
            return self._words("tpu-vm", verb, *files, node + colon + path, *flags, *internal)
        # Only the commands of queued resources support the tunnel.
        return self._words("queued-resources", verb, *files, one.name + colon + path,
                           f"--node={self.nodes.index(node)}", *flags, "--tunnel-through-iap",
                           f"--batch-size={_AT_ONCE}")

    def _batches(self) -> list[str]:
        if self.request.iap or self.request.hosts <= _AT_ONCE:
            return ["all"]
        return [f"{first}-{min(first + _AT_ONCE, self.request.hosts) - 1}"
                for first in range(0, self.request.hosts, _AT_ONCE)]

    def run_on(self, node: str, line: str, what: str, patience: float | None = None, workers: str = "",
               on_line: Callable[[str], None] = tpu_cloud.show) -> str:
        """Runs a shell line on all machines of a node, retrying until it has run; returns its output.

        Raises:
          Failed: it ended with a status other than 0 on a machine.
          Lost: the machines are gone.
          tpu_cloud.Problem: the call was refused, or the machines were unreachable for a long time.
        """
        calls = [self.ssh(node, batch, line) for batch in ([workers] if workers else self._batches())]
        return "".join(self._reliably(node, call, what, patience, on_line) for call in calls)

    def copy(self, node: str, files: Sequence[str], folder: str, patience: float | None = None) -> None:
        """Copies files to all machines of a node. Raises as run_on does."""
        for batch in self._batches():
            flags = (f"--scp-flag={flag}" for flag in self.request.ssh_flags)
            call = self._reach("scp", [*files, f"{node}:{folder}/"], f"--worker={batch}", *flags)
            self._reliably(node, call, f"copying to {node}", patience, tpu_cloud.show)

    def _reliably(self, node, call, what, patience, on_line) -> str:
        if self.dry:
            tpu_cloud.show(tpu_cloud.quoted(call))
            return ""
        trials = tpu_cloud.Trials(self.caller, what, patience)
        while True:
            lock, lines, statuses = threading.Lock(), [], []

            def take(text, lock=lock, lines=lines, statuses=statuses):
                mark = _MARK.fullmatch(text)
                with lock:
                    statuses += [int(mark[2])] if mark else []
                    lines += [] if mark else [text]
                if not mark and on_line:
                    on_line(text)

            answer = self.caller.run(call, on_line=take)
            failed = [status for status in statuses if status]
            if failed:
                raise Failed(failed[0], tpu_cloud.sentence(answer.error) if answer.error.strip() else
                             "".join(lines[-1:]))
            if answer.status == 0:
                return "".join(line + "\n" for line in lines)
            why = self.is_lost(node)
            if why:
                raise Lost(why)
            trials.failed(answer, _kind_of_ssh(answer))


def _kind_of_ssh(answer: tpu_cloud.Answer) -> Kind:
    """Returns the kind of a failed ssh call.

    Status 255 is ssh's own and always worth a retry: keys and sshd are ready later than the machine.
    """
    is_of_gcloud = re.search(r"^ERROR: \(gcloud", answer.error, re.MULTILINE)
    is_refused = answer.kind is Kind.REFUSED and is_of_gcloud
    return answer.kind if answer.status != 255 or is_refused else Kind.TRANSIENT
