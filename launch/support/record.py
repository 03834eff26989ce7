"""The record of a run: its configuration written as gin text, including every default."""

import dataclasses
import math
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from molmo2_jax import files

NAME = "config.gin"  # in a work directory


def gin_text(root: Any) -> str:
    """Returns gin text that builds an object equal to `root`, a tree of dataclasses and literals.

    A class that occurs once is bound without a scope. Other classes get the path of each occurrence as scope:
    `optim_vit/optim.Tower.lr`.

    Raises:
      ValueError: a value cannot be written in gin (infinity, arrays, functions).
    """
    nodes = {id(node): (scope, node) for scope, node in _nodes(root, "")}
    counts = Counter(type(node) for _, node in nodes.values())
    scopes = {key: f"{scope}/" if counts[type(node)] > 1 else ""
              for key, (scope, node) in nodes.items()}
    modules = sorted({type(node).__module__ for _, node in nodes.values()})
    lines = ["from __gin__ import dynamic_registration"]
    lines += [f"from {module.rpartition('.')[0]} import {module.rpartition('.')[2]}"
              for module in modules]
    for _, node in nodes.values():
        lines.append("")
        name = scopes[id(node)] + _name(node)
        lines += [f"{name}.{field.name} = {_spelling(getattr(node, field.name), scopes)}"
                  for field in dataclasses.fields(node) if field.init]
    return "\n".join(lines) + "\n"


def save(workdir: str | pathlib.Path, text: str) -> list[str]:
    """Writes workdir/config.gin; returns the lines in which it differs from the file it replaces.

    If it differs, the old file is kept as config.gin.1, config.gin.2, ...
    """
    path = files.path(workdir) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else text
    if before != text:
        count = len(list(path.parent.glob(f"{NAME}.*")))
        path.rename(path.with_name(f"{NAME}.{count + 1}"))
    path.write_text(text, encoding="utf-8")
    old, new = before.splitlines(), text.splitlines()
    return [f"- {line}" for line in old if line not in new] + [
        f"+ {line}" for line in new if line not in old]


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Returns a line "path: VALUE, now VALUE" for every field in which two trees of dataclasses differ."""
    if dataclasses.is_dataclass(before) and type(before) is type(now):
        return [line for field in dataclasses.fields(before) for line in differences(
            getattr(before, field.name), getattr(now, field.name), f"{path}.{field.name}".lstrip("."))]
    return [] if before == now else [f"{path}: {before!r}, now {now!r}"]


def _nodes(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields (scope, dataclass) for every dataclass in the tree, parents first; the scope is its path."""
    if isinstance(value, tuple):
        children = enumerate(value)
    elif isinstance(value, dict):
        children = value.items()
    elif dataclasses.is_dataclass(value):
        yield path, value
        children = ((field.name, getattr(value, field.name))
                    for field in dataclasses.fields(value))
    else:
        return
    for key, child in children:
        yield from _nodes(child, re.sub(r"\W", "_", f"{path}_{key}").lstrip("_"))


def _name(node: Any) -> str:
    return f"{type(node).__module__.rpartition('.')[2]}.{type(node).__name__}"


def _spelling(value: Any, scopes: dict[int, str]) -> str:
    if dataclasses.is_dataclass(value):
        return f"@{scopes[id(value)]}{_name(value)}()"
    if isinstance(value, tuple):
        items = [_spelling(item, scopes) for item in value]
        return f"({', '.join(items)}{',' * (len(items) == 1)})"
    if isinstance(value, dict):
        items = (f"{key!r}: {_spelling(item, scopes)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    is_literal = value is None or isinstance(value, (bool, int, str)) or (
        isinstance(value, float) and math.isfinite(value))
    if not is_literal:
        raise ValueError("a configuration must consist of dataclasses, tuples, dictionaries, "
                         f"strings, finite numbers, booleans and None; got {value!r}")
    return repr(value)
