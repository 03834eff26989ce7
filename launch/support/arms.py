"""The arms of a sweep: the settings that each changes, its name, and the command that trains it."""

import ast
import dataclasses
import itertools
import math
import pathlib
import re
import shlex
from collections.abc import Sequence

LONGEST_NAME = 120  # characters; file systems and clouds allow little more


@dataclasses.dataclass(frozen=True)
class Arm:
    """One run: its folder's name, gin files (later ones win) and bindings."""
    name: str
    gin_files: tuple[str, ...]
    bindings: tuple[str, ...] = ()

    def command(self, python: str, workdir: str, through: str = "",
                init_from: str | None = None) -> list[str]:
        """Returns the command line that trains the arm.

        With `through` it is the argument of that command, in which {name} is replaced by the arm's name in
        lower case with dashes.
        """
        train = [python, "-m", "launch.train", *(f"--gin_file={path}" for path in self.gin_files),
                 *(f"--gin={binding}" for binding in self.bindings), f"--workdir={workdir}",
                 *([f"--init_from={init_from}"] if init_from else [])]
        if not through:
            return train
        dashed = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return [*shlex.split(through.replace("{name}", dashed)), "--", "python", *train[1:]]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A field and its values: "train.TrainConfig.seed", (0, 1, 2)."""
    field: str
    values: tuple

    @property
    def short(self) -> str:
        return self.field.rpartition(".")[2]


def parse_axis(text: str) -> Axis:
    """Returns the axis written as FIELD=[VALUE, VALUE, ...], with values in Python's (and gin's) syntax.

    Raises:
      ValueError: the text has another form.
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
    """Returns an arm for each combination of values, the last axis varying fastest; zipped: for each index.

    Raises:
      ValueError: zipped axes differ in length, two arms have the same name, or a name is too long.
    """
    if is_zipped and len({len(axis.values) for axis in axes}) > 1:
        raise ValueError("zipped axes must have equally many values; got "
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
      ValueError: two files have the same name, or a name is too long.
    """
    return _distinct([Arm(pathlib.Path(path).stem, (path,), tuple(bindings)) for path in gin_files])


def product(arms: Sequence[Arm], axes: Sequence[Axis], *, is_zipped: bool = False) -> list[Arm]:
    """Returns every arm combined with every combination of the axes' values.

    Raises:
      ValueError: zipped axes differ in length, two arms have the same name, or a name is too long.
    """
    return _distinct([Arm(f"{arm.name}_{one.name}", arm.gin_files, one.bindings) for arm in arms
                      for one in of_axes(arm.gin_files, axes, arm.bindings, is_zipped=is_zipped)])


def with_seeds(arms: Sequence[Arm], fields: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
    """Returns every arm once with each seed, to which all `fields` are set.

    Raises:
      ValueError: a seed occurs twice, or a name is too long.
    """
    return _distinct([Arm("_".join(filter(None, (arm.name, f"seed-{seed}"))), arm.gin_files,
                          (*arm.bindings, *(f"{field} = {seed}" for field in fields)))
                      for arm in arms for seed in seeds])


def _safe(value) -> str:
    """Returns the value in characters that are safe in a file name: (2, 2) becomes 2x2."""
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
        raise ValueError("names of arms must be distinct and at most "
                         f"{LONGEST_NAME} characters long; got {(twice or too_long)[:5]}")
    return arms
