"""Records why each host's process ended: `hosts/<index>.json` in the work directory.

A file that still says "running" belongs to a process that was killed, or crashed inside a library.
"""

import contextlib
import os
import socket
import time
import traceback

import jax
from absl import logging

from molmo2_jax import files


def say(workdir: str | os.PathLike, status: str, reason: str = "") -> None:
    """Writes the status of this process, and the reason for it."""
    files.write_json(files.path(workdir) / "hosts" / f"{jax.process_index()}.json", {
        "status": status, "reason": reason, "host": socket.gethostname(), "pid": os.getpid(),
        "processes": jax.process_count(), "time": time.strftime("%Y-%m-%d %H:%M:%S %z")})


@contextlib.contextmanager
def spoken(workdir: str | os.PathLike):
    """Records "running", then how the block ended.

    If that cannot be written, as on a full disk, the original error is still the one raised.
    """
    say(workdir, "running")
    try:
        yield
    except SystemExit as end:
        kind = "failed" if isinstance(end.code, str) else "stopped" if end.code else "finished"
        reason = f"exit status {end.code}" if kind == "stopped" else str(end.code or "")
        _try_to_say(workdir, kind, reason)
        raise
    except BaseException as error:
        _try_to_say(workdir, "failed", "".join(traceback.format_exception(error)))
        raise
    say(workdir, "finished")


def _try_to_say(workdir: str | os.PathLike, status: str, reason: str) -> None:
    try:
        say(workdir, status, reason)
    except OSError as error:
        logging.error("hosts/%d.json could not be written: %s", jax.process_index(), error)
