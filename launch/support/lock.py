"""A lock on a work directory, so that two runs never write to it at once.

`lock.json` names its holder. A holder on this host is alive if its process is: the lock of a killed process
is taken over at once. A holder on another host rewrites the file every few seconds: if the file does not
change while it is watched, the lock is taken over. No clock of another machine is read. In a run of several
processes only process 0 takes the lock.
"""

import contextlib
import functools
import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from molmo2_jax import files
from molmo2_jax.monitor import periodic

NAME = "lock.json"
BEAT = 10.0     # seconds between two writes of the holder
_MISSES = 4     # beats that the file of another host must stay unchanged to be taken over
_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of a work directory inside the block; all processes of a run must enter it.

    Raises:
      ValueError: another run holds the lock. OSError: the work directory cannot be written.
    """
    refusal, path, own = "", files.path(workdir) / NAME, _own()
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        refusal = _take(path, own)
    if jax.process_count() > 1:
        is_refused = multihost_utils.broadcast_one_to_all(np.int32(bool(refusal)))
        refusal = refusal or ("another run holds it; process 0 names it" if is_refused else "")
    if refusal:
        raise ValueError(f"a work directory must be used by one run at a time; got {workdir}: {refusal}")
    if jax.process_index():
        yield
        return
    try:
        with periodic.calls(functools.partial(_renew, path, own), BEAT, "lock of the workdir"):
            yield
    finally:
        with contextlib.suppress(OSError):
            if _read(path).get("token") == own["token"]:
                path.unlink()


def holder(workdir: str | os.PathLike) -> int | None:
    """Returns the process of this host that holds the lock of a work directory; None if there is none."""
    found = _read(files.path(workdir) / NAME)
    return int(found["pid"]) if _is_ours(found) and _lives(found) else None


def _is_ours(found: dict[str, Any]) -> bool:
    return (found.get("host"), found.get("boot")) == (socket.gethostname(), _boot())


def _lives(found: dict[str, Any]) -> bool:
    return bool(found.get("started")) and _started(int(found.get("pid", 0))) == found["started"]


def _own() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), "token": secrets.token_hex(8), "beat": 0}


def _boot() -> str:
    return _BOOT.read_text().strip() if _BOOT.exists() else ""


def _started(pid: int) -> str:
    """Returns when a process of this host started, in ticks after boot; "" if it does not exist."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _read(path) -> dict[str, Any]:
    """Returns the content of a lock; {} if there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _take(path, own: dict[str, Any]) -> str:
    """Takes the lock; returns why it cannot be taken, "" if it was. Of several newcomers one takes it."""
    found, exists = _read(path), path.exists()
    if found and _is_alive(path, found):
        return (f"process {found.get('pid')} on {found.get('host')} has used it since "
                f"{found.get('since')}; stop that run, or use another folder")
    if exists:
        logging.warning("taking over %s, left by process %s on %s", path, found.get("pid"), found.get("host"))
    if files.is_remote(path):   # a bucket cannot create a file only if there is none
        files.write_json(path, own)
        time.sleep(BEAT / 10)
    else:
        if exists:
            _remove_stale(path, found, own)
        _create(path, own)
    winner = _read(path)
    return "" if winner.get("token") == own["token"] else (
        f"process {winner.get('pid')} on {winner.get('host')} has just begun to use it")


def _remove_stale(path, found: dict[str, Any], own: dict[str, Any]) -> None:
    """Removes the lock with the content `found`, but not one that a newcomer has created since."""
    aside = path.with_name(f"{NAME}.{own['token']}.old")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != found:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def _create(path, own: dict[str, Any]) -> None:
    """Creates the lock with all its content, unless there is one."""
    new = path.with_name(f"{NAME}.{own['token']}.new")
    new.write_text(json.dumps(own), encoding="utf-8")
    try:
        os.link(new, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.rename(new, path)
            return
    new.unlink()


def _is_alive(path, found: dict[str, Any]) -> bool:
    """Returns whether the holder of a lock lives; one on another host is watched for several beats."""
    if _is_ours(found):
        return _lives(found)
    logging.warning("%s is held by process %s of %s; watching whether it lives", path, found.get("pid"),
                    found.get("host"))
    end = time.monotonic() + _MISSES * BEAT
    while time.monotonic() < end:
        time.sleep(BEAT / 10)
        now = _read(path)
        if not now:
            return False
        if now != found:
            return True
    return False


def _renew(path, own: dict[str, Any]) -> bool:
    """Rewrites the lock; returns whether another run has taken it."""
    try:
        found = _read(path)
        if found and found.get("token") != own["token"]:
            logging.error("%s was taken over by process %s of %s", path, found.get("pid"), found.get("host"))
            return True
        own["beat"] += 1
        files.write_json(path, own)
    except OSError as error:  # a full disk ends the run elsewhere
        logging.warning("%s could not be written: %s", path, error)
    return False
