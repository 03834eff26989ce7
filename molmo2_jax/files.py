"""Paths of a work directory, on this machine or in a bucket ("gs://..."), through one interface."""

import json
import os
from typing import Any

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


def write_json(target: epath.Path, value: Any) -> None:
    """Writes a file that is there whole or not at all, and the folders around it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(target)
