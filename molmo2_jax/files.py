"""Paths of a work directory, on this machine or in a bucket ("gs://..."), through one interface."""

import contextlib
import errno
import glob
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

# Errors for which the file system itself is at fault: full, over quota, read-only, broken, gone.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENOTCONN)


class StorageError(OSError):
    """A disk could not be written; the message is one sentence: cause, path and remedy."""


def storage_cause(error: BaseException | None) -> str:
    """Returns the disk fault that an error or one of its causes reports, as the system words it; "" if none.

    TensorStore reports such faults as "STATUS: ..." in a ValueError. Any other ValueError is about the
    content of a file, such as a broken video, so its causes are ignored; so are the errors of libraries that
    reuse OSError, as PyAV does.
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
    """Returns the free space on a local path's disk, as text; "" for a bucket or a path that is gone."""
    try:
        usage = None if is_remote(name) else shutil.disk_usage(name)
    except OSError:
        usage = None
    return f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB are free" if usage else ""


def path(name: str | os.PathLike) -> epath.Path:
    """Returns an absolute path; paths with a scheme are unchanged."""
    text = os.fspath(name)
    return epath.Path(text if is_remote(text) else os.path.abspath(text))


def is_remote(name: str | os.PathLike) -> bool:
    return "://" in os.fspath(name)


def matching(pattern: str) -> list[str]:
    """Returns the names of the files that match a pattern, here or in a bucket, in order."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    parts = pathlib.PurePath(pattern.partition("://")[2]).parts
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    folder = epath.Path(f"{pattern.partition('://')[0]}://{'/'.join(fixed)}")
    if len(fixed) == len(parts):
        return [pattern] if folder.exists() else []
    return sorted(map(os.fspath, folder.glob("/".join(parts[len(fixed):]))))


def has_content(folder: epath.Path) -> bool:
    """Returns whether `folder` is a folder that is not empty."""
    return folder.is_dir() and any(True for _ in folder.iterdir())


def copy(source: epath.Path, target: epath.Path) -> None:
    """Copies a folder recursively, overwriting existing files."""
    for one in source.iterdir():
        if one.is_dir():
            copy(one, target / one.name)
        else:
            target.mkdir(parents=True, exist_ok=True)
            one.copy(target / one.name, overwrite=True)


@contextlib.contextmanager
def whole(target: pathlib.Path | epath.Path) -> Iterator[IO[str]]:
    """Returns a text file to write, which gets its name only when the block ends without an error.

    Creates parent folders. After an error the partial file is removed and an earlier file is kept.
    """
    with (_renamed(target, f".{target.name}.partial") as partial,
          partial.open("w", encoding="utf-8") as file):
        yield file


@contextlib.contextmanager
def whole_bytes(target: pathlib.Path | epath.Path) -> Iterator[IO[bytes]]:
    """As `whole`, of a binary file. Several processes may write one target at once; the last one wins."""
    with whole_path(target) as partial, partial.open("wb") as file:
        yield file


@contextlib.contextmanager
def whole_path(target: pathlib.Path | epath.Path) -> Iterator[Any]:
    """As `whole_bytes`, but returns the path of the file to write."""
    with _renamed(target, f".{target.name}.{secrets.token_hex(8)}.partial") as partial:
        yield partial


@contextlib.contextmanager
def _renamed(target, name: str) -> Iterator[Any]:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(name)
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def to_json(value: Any, **how) -> str:
    """Returns json.dumps(value, **how) with null for NaN and infinities, which JSON lacks."""
    return json.dumps(_finite(value), allow_nan=False, **how)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(target: pathlib.Path | epath.Path, value: Any) -> None:
    """Writes a JSON file atomically, and creates its parent folders."""
    with whole(target) as file:
        file.write(to_json(value, indent=1))
