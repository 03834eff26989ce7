"""The flags of tpu_run.sh, and the record of a run for later calls with its --name. Standard library only."""

import collections
import json
import pathlib
import re
from typing import Any

from launch.tpu import cloud as tpu_cloud
from launch.tpu import slice as tpu_slice
from molmo2_jax.cost import chips

_WORDS = ("status", "logs", "stop", "delete")
_VALUES = ("name", "type", "zone", "project", "version", "slices", "retries", "logs", "image", "local",
           "setup", "claim", "network", "subnetwork", "service_account", "valid_until", "labels")
_LISTS = ("env", "create_flag", "ssh_flag", "data_disk")
_SWITCHES = ("spot", "delete", "dry_run", "jobset", "internal_ips", "iap", "reserved", "best_effort")
# The flags of a run that status, logs, stop and delete need.
_KEPT = ("type", "zone", "project", "slices", "jobset", "iap", "internal_ips", "ssh_flag")


class Options(dict):
    """The flags by name, with underscores; "" or [] if not given. Also `action` and `command`."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def fail(text: str):
    raise tpu_cloud.Problem(text)


def parse(arguments: list[str]) -> Options:
    """Returns the flags.

    Raises:
      tpu_cloud.Problem: a flag is unknown, has a wrong value, or contradicts another one.
    """
    options = Options(dict.fromkeys((*_VALUES, *_SWITCHES), "") | {name: [] for name in _LISTS})
    options["logs"], options["retries"], rest = "runs/logs", "0", collections.deque(arguments)
    options["action"], options["command"] = "run", []
    if rest and rest[0] in _WORDS:
        options["action"] = rest.popleft()
    while rest:
        word = rest.popleft()
        if word == "--":
            options["command"] = list(rest)
            break
        flag, has_value, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name in _SWITCHES and not has_value:
            options[name] = "1"
            continue
        if name not in _VALUES + _LISTS:
            fail(f"unknown argument {word}; words are status, logs, stop and delete; see --help")
        if not has_value:
            value = rest.popleft() if rest else fail(f"{flag} must have a value")
        if name in _LISTS:
            options[name].append(value)
        else:
            options[name] = value
    _check(options)
    return options


def _check(options: Options) -> None:
    """Raises tpu_cloud.Problem for wrong or contradictory values."""
    command, number = options.command, re.compile(r"[1-9][0-9]*")
    if options.action == "run" and not command:
        fail("a command must follow --; see --help")
    if command and " " in command[0]:
        fail(f"the command must be separate words, not one quoted string; got '{command[0]}'")
    if options.jobset and options.setup:
        fail("a JobSet runs no --setup: put links into its image, and mount a disk with --claim")
    if options.slices and not number.fullmatch(options.slices):
        fail(f"--slices must be a number >= 1; got {options.slices}")
    if not re.fullmatch("[0-9]+", options.retries):
        fail(f"--retries must be a number; got {options.retries}")
    if options.local and not number.fullmatch(options.local):
        fail(f"--local must be a number >= 1; got {options.local}")
    if options.claim and not re.fullmatch(".+:/.*", options.claim):
        fail(f"--claim must be CLAIM:FOLDER; got {options.claim}")
    if options.claim and not options.jobset:
        fail("--claim is for --jobset only; without it, mount disks in --setup")
    kinds = [name for name in ("spot", "reserved", "best_effort") if options[name]]
    if len(kinds) > 1:
        fail(f"give at most one of --spot, --reserved and --best_effort; got {' and '.join(kinds)}")
    of_slices = [name for name in ("network", "subnetwork", "internal_ips", "iap", "reserved", "best_effort",
                                   "valid_until", "create_flag", "ssh_flag", "data_disk") if options[name]]
    if options.jobset and of_slices:
        fail(f"a JobSet takes no --{of_slices[0]}: the cluster and its node pools determine that")
    of_cloud = [name for name in ("type", "slices", "spot") if options[name]] + of_slices
    if options.local and of_cloud:
        fail(f"--local starts processes on this machine and takes no --{of_cloud[0]}")


def require(options: Options, *names: str) -> None:
    for name in names:
        if not options[name]:
            fail(f"--{name} must be given; see --help")


class Folder:
    """LOGS/NAME on this machine: the machines' output, the flags of the run, whether it was stopped."""

    def __init__(self, options: Options):
        self.path = pathlib.Path(options.logs) / options.name
        self._job, self._stopped = self.path / "job", self.path / "stopped"
        self._dry = options.dry_run

    def recall(self, options: Options) -> None:
        """Fills in flags that were not given from the recorded ones."""
        for name, value in self._read().items():
            options[name] = options[name] or value

    def _read(self) -> dict:
        try:
            return {name: value for name, value in json.loads(self._job.read_text()).items() if name in _KEPT}
        except (OSError, ValueError):
            return {}

    def remember(self, options: Options) -> None:
        """Records the flags that later calls need, and clears an earlier stop."""
        if self._dry:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._stopped.unlink(missing_ok=True)
        self._job.write_text(json.dumps({name: options[name] for name in _KEPT}) + "\n")

    def check_shape(self, options: Options) -> None:
        """Raises tpu_cloud.Problem if slices of this name exist with another type or number."""
        before = self._read()
        if before and (before["type"], before["slices"]) != (options.type, options.slices):
            fail(f"{options.name} was requested as {before['slices']} x {before['type']}; got "
                 f"{options.slices} x {options.type}: delete it first, or use another --name")

    def forget(self) -> None:
        self._job.unlink(missing_ok=True)

    def rotate(self) -> None:
        """Renames the output files of an earlier call to *.log.1."""
        for path in () if self._dry else self.path.glob("*.log"):
            path.replace(path.with_name(path.name + ".1"))

    def stop(self) -> None:
        """Tells a script on this machine that is waiting for the slice to end."""
        if not self._dry:
            self.path.mkdir(parents=True, exist_ok=True)
            self._stopped.touch()

    def is_stopped(self) -> bool:
        return self._stopped.exists()


def read_type(options: Options) -> chips.Slice:
    """Returns the slice of --type. Raises tpu_cloud.Problem if it is unknown or needs --jobset."""
    try:
        found = chips.find(options.type)
    except ValueError as wrong:
        fail(str(wrong))
    if found.chip.name == "tpu7x" and not options.jobset:
        fail(f"TPU7x is available through GKE only: --jobset --image=...; got {found.cloud_name}")
    return found


def request(options: Options, found: chips.Slice | None) -> tpu_slice.Request:
    """Returns the request to the cloud; without `found`, only what is needed to reach an existing slice."""
    flags = [f"--{name.replace('_', '-')}={options[name]}"
             for name in ("network", "subnetwork", "service_account", "labels") if options[name]]
    flags += [f"--{name.replace('_', '-')}" for name in ("internal_ips", "reserved", "best_effort")
              if options[name]]
    flags += [f"--data-disk={disk}" for disk in options.data_disk]
    if options.valid_until:
        kind = "duration" if re.fullmatch(r"(\d+[smhdw]?)+", options.valid_until) else "time"
        flags.append(f"--valid-until-{kind}={options.valid_until}")
    where = dict(name=options.name, zone=options.zone, project=options.project,
                 slices=int(options.slices or 1), ssh_flags=tuple(options.ssh_flag), iap=bool(options.iap),
                 internal=bool(options.internal_ips))
    if found is None:
        return tpu_slice.Request(**where)
    shape = f"{found.chip.name} {found.topology}, {found.chips} chips on {found.hosts} machines"
    if options.spot:
        flags.insert(0, "--spot")
    return tpu_slice.Request(
        **where, type=found.cloud_name, shape=shape, hosts=found.hosts, version=options.version,
        is_spot=bool(options.spot or options.best_effort), gives_up=bool(options.valid_until),
        create_flags=(*flags, *options.create_flag))
