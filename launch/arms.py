"""The arms of a sweep: what each changes, what it is called, and the command that trains it."""

import ast
import dataclasses
import itertools
import math
import pathlib
import re
import shlex
from collections.abc import Sequence

LONGEST_NAME = 120  # characters; file systems and clouds end somewhere above


@dataclasses.dataclass(frozen=True)
class Arm:
    """One run: its folder's name, gin files (later ones win) and bindings."""
    name: str
    gin_files: tuple[str, ...]
    bindings: tuple[str, ...] = ()

    def command(self, python: str, workdir: str, through: str = "",
                init_from: str | None = None) -> list[str]:
        """Returns the command line; behind `through`, in which {name} stands for the name with dashes."""
        train = [python, "-m", "launch.train", *(f"--gin_file={path}" for path in self.gin_files),
                 *(f"--gin={binding}" for binding in self.bindings), f"--workdir={workdir}",
                 *([f"--init_from={init_from}"] if init_from else [])]
        if not through:
            return train
        dashed = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return [*shlex.split(through.replace("{name}", dashed)), "--", "python", *train[1:]]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A field and the values that it takes: "train.TrainConfig.seed", (0, 1, 2)."""
    field: str
    values: tuple

    @property
    def short(self) -> str:
        return self.field.rpartition(".")[2]


def parse_axis(text: str) -> Axis:
    """Returns the axis written as FIELD=[VALUE, VALUE, ...], values in Python's (and gin's) spelling.

    Raises:
      ValueError: it is not written like that.
    """
    field, _, values = text.partition("=")
    try:
        parsed = ast.literal_eval(values.strip())
    except (ValueError, SyntaxError):
        parsed = None
    if not re.fullmatch(r"[\w./]+", field.strip()) or not isinstance(parsed, list) or not parsed:
        raise ValueError("an axis must be FIELD=[VALUE, ...], such as train.TrainConfig.seed=[0, 1]; "
                         f"got {text!r}")
    return Axis(field.strip(), tuple(parsed))


def of_axes(gin_files: Sequence[str], axes: Sequence[Axis], bindings: Sequence[str] = (), *,
            is_zipped: bool = False) -> list[Arm]:
    """Returns an arm for each combination of values, the last axis fastest; zipped: for each place.

    Raises:
      ValueError: zipped axes differ in length, or two arms would have one name.
    """
    if is_zipped and len({len(axis.values) for axis in axes}) > 1:
        raise ValueError("axes that are zipped must have as many values each; got "
                         + ", ".join(f"{axis.field}: {len(axis.values)}" for axis in axes))
    rows = zip(*(axis.values for axis in axes)) if is_zipped else itertools.product(
        *(axis.values for axis in axes))
    short = [axis.short for axis in axes]
    names = [axis.short if short.count(axis.short) == 1 else axis.field for axis in axes]
    return _distinct([Arm("_".join(f"{_safe(name)}-{_safe(value)}" for name, value in zip(names, row)),
                          tuple(gin_files), (*bindings, *(f"{axis.field} = {value!r}"
                                                          for axis, value in zip(axes, row))))
                      for row in rows])


def of_files(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> list[Arm]:
    """Returns an arm for each file, named after it.

    Raises:
      ValueError: two files have one name.
    """
    return _distinct([Arm(pathlib.Path(path).stem, (path,), tuple(bindings)) for path in gin_files])


def product(arms: Sequence[Arm], axes: Sequence[Axis], *, is_zipped: bool = False) -> list[Arm]:
    """Returns every arm with every combination of the axes' values."""
    return _distinct([Arm(f"{arm.name}_{one.name}", arm.gin_files, one.bindings) for arm in arms
                      for one in of_axes(arm.gin_files, axes, arm.bindings, is_zipped=is_zipped)])


def _safe(value) -> str:
    """Returns the value in characters that fit a file name: (2, 2) becomes 2x2."""
    if isinstance(value, (tuple, list)):
        return "x".join(map(_safe, value))
    if isinstance(value, float) and math.isfinite(value):
        value = f"{value:g}"
    return re.sub(r"[^\w.+]+", "-", str(value)).strip("-")


def _distinct(arms: list[Arm]) -> list[Arm]:
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    too_long = [name for name in names if len(name) > LONGEST_NAME]
    if twice or too_long:
        raise ValueError("names of arms must be distinct and of at most "
                         f"{LONGEST_NAME} characters; got {(twice or too_long)[:5]}")
    return arms
