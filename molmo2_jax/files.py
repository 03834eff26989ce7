"""Paths of a work directory, on this machine or in a bucket ("gs://..."), through one interface."""

import contextlib
import errno
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

# What a file system answers when the fault is its own: full, over quota, read-only, broken, gone.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENOTCONN)


class StorageError(OSError):
    """A disk could not be written; the message is a sentence with the cause, the place and the remedy."""


def storage_cause(error: BaseException | None) -> str:
    """Returns which fault of a disk an error or one of its causes reports, in the system's words; else "".

    TensorStore reports such faults as "STATUS: ..." in a ValueError. Any other ValueError was raised by code
    that knew what it read, such as a broken film, and its causes do not count; nor do errors of libraries
    that reuse OSError, as PyAV does.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = getattr(error, "errno", None) if type(error).__module__ == "builtins" else None
        if number in _STORAGE:
            return os.strerror(number)
        if isinstance(error, ValueError):
            words = map(os.strerror, _STORAGE) if re.match("[A-Z_]{4,}: ", str(error)) else ()
            return next((cause for cause in words if cause in str(error)), "")
        error = error.__cause__ or error.__context__
    return ""


def free_space(name: str | os.PathLike) -> str:
    """Returns how much of a local path's disk is free, in words; "" for a bucket or a path that is gone."""
    try:
        usage = None if is_remote(name) else shutil.disk_usage(name)
    except OSError:
        usage = None
    return f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB are free" if usage else ""


def path(name: str | os.PathLike) -> epath.Path:
    """Returns an absolute path; those with a scheme stay as they are."""
    text = os.fspath(name)
    return epath.Path(text if is_remote(text) else os.path.abspath(text))


def is_remote(name: str | os.PathLike) -> bool:
    return "://" in os.fspath(name)


def has_content(folder: epath.Path) -> bool:
    """Returns whether there is a folder with something in it."""
    return folder.is_dir() and any(True for _ in folder.iterdir())


def copy(source: epath.Path, target: epath.Path) -> None:
    """Copies the files of a folder and of those in it, over what is there."""
    for one in source.iterdir():
        if one.is_dir():
            copy(one, target / one.name)
        else:
            target.mkdir(parents=True, exist_ok=True)
            one.copy(target / one.name, overwrite=True)


@contextlib.contextmanager
def whole(target: pathlib.Path | epath.Path) -> Iterator[IO[str]]:
    """Returns a text file to write that has its name only once the block has ended without an error.

    Makes the folders around it. After an error nothing is left of it, and an earlier file stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def to_json(value: Any, **how) -> str:
    """Returns json.dumps(value, **how) with null for NaN and infinities, which JSON does not know."""
    return json.dumps(_finite(value), allow_nan=False, **how)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(target: pathlib.Path | epath.Path, value: Any) -> None:
    """Writes a file that is there whole or not at all, and the folders around it."""
    with whole(target) as file:
        file.write(to_json(value, indent=1))
