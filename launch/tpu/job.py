"""Runs one command on the machines of a queued resource: copies, installs, starts, follows and repeats it."""

import gzip
import hashlib
import io
import pathlib
import subprocess
import sys
import tarfile
import time

from launch.tpu import cloud as tpu_cloud
from launch.tpu import flags as tpu_flags
from launch.tpu import follow as tpu_follow
from launch.tpu import slice as tpu_slice

ROOT = pathlib.Path(__file__).resolve().parents[2]
_SAVES = 10            # most restarts after status 75 in a row that each ran for less than
_SHORT = 40            # polls: ten minutes
# The message when this script is ended, by Run.phase.
_ENDED = {"wait": "this script was ended; its request for the slice remains: call it again, or with delete",
          "prepare": "this script was ended before the command began; call it again, or with delete",
          "start": "this script was ended while it started the command, which continues where it began: "
                   "call it again, or with stop or delete",
          "run": "this script was ended; the command continues: call it again, or with stop or delete"}
_INSTALLS = 3          # attempts at a failing installation or --setup
_SPOT_LOOKS = 5        # checks for lost machines after a command failed: the cloud reports them late


class Code:
    """The archive of this repository: the files that git tracks or would add. `hash` also depends on `salt`.

    Raises:
      tpu_cloud.Problem: this folder is not a git repository.
    """

    def __init__(self, folder: pathlib.Path, salt: str):
        self.path, self._buffer = folder / "code.tar.gz", io.BytesIO()
        done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others",
                               "--exclude-standard"], capture_output=True, check=False)
        if done.returncode:
            tpu_flags.fail(f"the files that git lists are copied, so {ROOT} must be a git repository")
        names = sorted(set(filter(None, done.stdout.decode().split("\0"))))
        with tarfile.open(fileobj=self._buffer, mode="w") as archive:
            for name in names:
                if (ROOT / name).is_dir():
                    tpu_cloud.say(f"not copied: {name}, a link to a folder")
                elif (ROOT / name).is_file():
                    archive.add(ROOT / name, name, recursive=False, filter=_anonymous)
        self.path.write_bytes(gzip.compress(self._buffer.getvalue(), mtime=0))
        self.hash = hashlib.sha256(self._buffer.getvalue() + salt.encode()).hexdigest()[:16]


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime = info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


class Run:
    """One command on the machines of a queued resource, repeated until it succeeds."""

    def __init__(self, options: tpu_flags.Options, slice_: tpu_slice.Slice, folder: tpu_flags.Folder,
                 temporary: pathlib.Path):
        self._options, self._slice, self._folder, self.phase = options, slice_, folder, "wait"
        self._environment = ["env", "MOLMO2_HOSTS=auto", *options.env, *options.command]
        self._code = Code(temporary, f"{options.slices} {options.type}")
        words = "".join(word + "\0" for word in self._environment)
        self._identity = f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.{self._code.hash}"
        self._is_new = True

    def run(self) -> None:
        """Returns when the command has succeeded on all machines.

        Raises:
          tpu_cloud.Problem: the command cannot be run.
          tpu_slice.Failed: the command failed more than --retries times.
        """
        failures = saves = 0
        pauses = self._slice.caller.pace.pauses()
        while True:
            self.phase = "wait"
            self._slice.ensure()
            self.phase = "prepare"
            start = time.monotonic()
            status = self._attempt()
            is_short = time.monotonic() - start < _SHORT * self._slice.caller.pace.poll
            if status == 0:
                return
            if status == tpu_follow.AGAIN:
                saves = saves + 1 if is_short else 0
                if saves == 0:
                    pauses = self._slice.caller.pace.pauses()
                if saves > _SAVES:
                    tpu_flags.fail(f"the command saved and asked to be restarted {saves} times in a row, "
                                   "each time soon after its start; its last output says why")
                tpu_cloud.say("the command saved and asks to be restarted")
                self._slice.caller.wait(next(pauses))
                continue
            failures = self._fail_or_repeat(status, failures)
            self._slice.caller.wait(self._slice.caller.pace.poll)

    def _fail_or_repeat(self, status: int, failures: int) -> int:
        """Returns how often the command has failed so far. Raises as `run` does if that is too often."""
        if status == tpu_slice.STOPPED:
            tpu_flags.fail("the command was stopped; the same call of this script resumes it")
        why = "" if status == tpu_follow.LOST else self._slice.lost_nodes(
            _SPOT_LOOKS if self._slice.request.is_spot else 1)
        if why or status == tpu_follow.LOST:
            if not self._slice.request.is_spot:
                tpu_flags.fail("machines were lost; the same command requests others "
                               "(with --spot this is automatic)")
            tpu_cloud.say(f"machines were taken away{f' ({why})' if why else ''}; requesting others")
            return failures
        if failures >= int(self._options.retries):
            raise tpu_slice.Failed(status, f"the command failed with status {status}")
        tpu_cloud.say(f"the command failed with status {status}; restarting it ({failures + 1} of "
                      f"{self._options.retries})")
        return failures + 1

    def _attempt(self) -> int:
        """Starts the command unless it is running, and follows it. Returns its status."""
        try:
            if not self._runs_already():
                self._prepare()
                if self._folder.is_stopped():
                    return tpu_slice.STOPPED
                self.phase = "start"
                self._start()
            self.phase = "run"
            return tpu_follow.follow_all(self._slice, self._folder.path,
                                         lambda: stop_all(self._slice, patience=0))
        except tpu_slice.Lost as lost:
            tpu_cloud.say(str(lost))
            return tpu_follow.LOST
        except tpu_slice.Failed as failed:
            if failed.status == tpu_slice.STOPPED:
                return tpu_slice.STOPPED
            tpu_flags.fail(f"{failed} (status {failed.status})")

    def _each(self, line: str, what: str, **options) -> str:
        """Runs a line on all machines of all slices in parallel; returns their output."""
        calls = [lambda node=node: self._slice.run_on(node, line, f"{what} on {node}", **options)
                 for node in self._slice.nodes]
        return "".join([call() for call in calls] if self._slice.dry else tpu_cloud.in_parallel(calls))

    def _worker(self, *words: str) -> str:
        return f"bash {self._options.name}/tpu_worker.sh {' '.join(words)}"

    def _runs_already(self) -> bool:
        """Returns whether exactly this command is running on all machines.

        Raises:
          tpu_cloud.Problem: another command is running, or this one with other code.
        """
        if self._slice.dry:
            return False
        look = self._worker("look", "new") if self._is_new else self._worker("look")
        found = self._each(f"{look} 2>/dev/null || echo nothing", "the status check",
                           on_line=None).splitlines()
        self._is_new = False
        running = [line.split(" ", 2)[1:] for line in found if line.startswith("running ")]
        name = self._options.name
        for identity, command in running:
            if identity != self._identity:
                is_same = identity.partition(".")[0] == self._identity.partition(".")[0]
                what = "the same command runs with other code" if is_same else "another command runs"
                tpu_flags.fail(f"{what} as {name}: {command.strip()}; \"tpu_run.sh logs --name={name}\" "
                               f"follows it, \"tpu_run.sh stop --name={name}\" makes it save and end")
        if running and len(running) == len(found):
            tpu_cloud.say("the command runs already")
            return True
        return False

    def _prepare(self) -> None:
        """Copies the code to all machines and installs it. Raises as run_on does."""
        calls = [lambda node=node: self._prepare_node(node) for node in self._slice.nodes]
        if self._slice.dry:
            for call in calls:
                call()
        else:
            tpu_cloud.in_parallel(calls)

    def _prepare_node(self, node: str) -> None:
        name, slice_ = self._options.name, self._slice
        tpu_cloud.say(f"copying the code to {node} and installing it")
        slice_.run_on(node, f"mkdir -p {name}", f"the connection to {node}")
        slice_.copy(node, [str(self._code.path), str(ROOT / "launch" / "tpu_worker.sh")], name)
        lines = [("the installation", self._worker("unpack", f"$HOME/{name}/code.tar.gz", self._code.hash))]
        if self._options.setup:
            lines.append(("--setup", self._worker("setup", tpu_cloud.quoted([self._options.setup]))))
        for what, line in lines:
            for trial in range(1, _INSTALLS + 1):
                try:
                    slice_.run_on(node, line, f"{what} on {node}")
                    break
                except tpu_slice.Failed as failed:
                    text = f"{what} on {node} failed with status {failed.status}: {failed}"
                    if trial == _INSTALLS:
                        tpu_flags.fail(text)
                    tpu_cloud.say(f"{text}; trying again")
                    slice_.caller.wait(slice_.caller.pace.poll)

    def _start(self) -> None:
        """Starts the command on all machines; stops it first where it runs, as all must start together."""
        self._each(self._worker("stop"), "a stop")
        self._each(self._worker("start", tpu_cloud.quoted(self._environment)), "the start")


def stop_all(slice_: tpu_slice.Slice, how: str = "", patience: float | None = None) -> bool:
    """Stops the job on all machines, where it saves; see tpu_worker.sh. Returns whether all were reached."""
    line = f"bash {slice_.request.name}/tpu_worker.sh stop {how}".strip()

    def stop(node):
        try:
            slice_.run_on(node, line, f"the stop on {node}", patience)
        except (tpu_slice.Lost, tpu_slice.Failed, tpu_cloud.Problem) as error:
            tpu_cloud.say(str(error))
            return False
        return True

    calls = [lambda node=node: stop(node) for node in slice_.nodes]
    return all([call() for call in calls] if slice_.dry else tpu_cloud.in_parallel(calls))


def run_on_tpu(options: tpu_flags.Options, caller: tpu_cloud.Caller, temporary: pathlib.Path) -> int:
    """Runs the command on queued resources; returns the exit status of the script."""
    tpu_flags.require(options, "zone", "project", "type", "version")
    found, folder = tpu_flags.read_type(options), tpu_flags.Folder(options)
    options["type"], options["slices"] = found.cloud_name, options.slices or "1"
    slice_ = tpu_slice.Slice(tpu_flags.request(options, found), caller, bool(options.dry_run),
                             folder.is_stopped)
    if not slice_.dry and slice_.state() != "NONE":
        folder.check_shape(options)
    folder.remember(options)
    folder.rotate()
    run = Run(options, slice_, folder, temporary)
    stays = (f"the slice {options.name} still exists and costs money until you run: "
             f"tpu_run.sh delete --name={options.name}")
    try:
        run.run()
    except tpu_cloud.Ended:
        tpu_flags.fail(_ENDED[run.phase])
    except tpu_slice.Failed as failed:
        tpu_cloud.say(stays)
        print(f"error: {failed}", file=sys.stderr)
        return failed.status
    except tpu_cloud.Problem:
        if slice_.may_exist:
            tpu_cloud.say(stays)
        raise
    if not slice_.dry:
        tpu_cloud.say("the command has succeeded on all machines")
    if options.delete:
        try:
            slice_.delete()
        except tpu_cloud.Problem as problem:
            tpu_flags.fail(f"{problem}; {stays}")
        folder.forget()
    return 0


def do_word(options: tpu_flags.Options, caller: tpu_cloud.Caller) -> int:
    """Carries out status, logs, stop or delete for queued resources; returns the exit status."""
    tpu_flags.require(options, "zone", "project", *(["type"] if options.action == "logs" else []))
    # Without --type the number of machines is unknown, but it is not needed.
    found = tpu_flags.read_type(options) if options.type else None
    folder = tpu_flags.Folder(options)
    slice_ = tpu_slice.Slice(tpu_flags.request(options, found), caller, bool(options.dry_run))
    slice_.assumed = True
    if options.action in ("stop", "delete"):
        folder.stop()
    if options.action == "delete":
        slice_.delete()
        folder.forget()
        return 0
    now = slice_.state()
    if not slice_.dry:
        tpu_cloud.say(f"queued resource {options.name}: {now}")
    if options.action == "status":
        return _status(slice_) if now == "ACTIVE" else 0
    if options.action == "stop":
        return _stop(slice_, now)
    if now != "ACTIVE":
        tpu_flags.fail(f"there is no machine to read from; the queued resource {options.name} is {now}")
    folder.rotate()
    return tpu_follow.follow_all(slice_, folder.path, lambda: None)


def _status(slice_: tpu_slice.Slice) -> int:
    """Prints the command's state on each machine; "lost" if that is gone, "unreachable" if it is unknown."""
    result = 0
    for node in slice_.nodes:
        line = f"bash {slice_.request.name}/tpu_worker.sh status 2>/dev/null || echo nothing"
        try:
            slice_.run_on(node, line, f"the status check of {node}", patience=0)
        except (tpu_slice.Lost, tpu_cloud.Problem) as error:
            tpu_cloud.show("lost" if isinstance(error, tpu_slice.Lost) else "unreachable")
            tpu_cloud.say(str(error))
            result = 1
    return result


def _stop(slice_: tpu_slice.Slice, now: str) -> int:
    """Stops the job, or withdraws a waiting request; a script that waits for the slice then ends too."""
    if now == "ACTIVE":
        return int(not stop_all(slice_, "by_hand"))
    if now in ("NONE", "DELETING"):
        tpu_cloud.say("nothing is running")
        return 0
    tpu_cloud.say("there are no machines yet; withdrawing the request")
    slice_.delete()
    return 0
