"""Paths of a work directory, on this machine or in a bucket ("gs://..."), through one interface."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any

from etils import epath


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


def write_json(target: pathlib.Path | epath.Path, value: Any) -> None:
    """Writes a file that is there whole or not at all, and the folders around it."""
    with whole(target) as file:
        file.write(json.dumps(value, indent=1))
