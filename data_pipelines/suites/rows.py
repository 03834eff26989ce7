"""Rows of a benchmark's files -> questions. Media inside rows are read when the media are looked at.

A parquet file is read once from end to end, a few rows at a time. Images inside it, and columns named as
`later`, stay in the file: `Later` knows where they are. Other files are read by schemas.published.

Parquet needs the extra `prepare` (pyarrow).
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from data_pipelines.schemas import published
from data_pipelines.suites import benchmark
from molmo2_jax.inputs import held_file

_HELD = 64     # images in memory that were read last
_GROUPS = 2    # row groups of parquet files in memory that were read last
# What a reader raises for a row that lacks a column or has a value of another type.
BAD_ROW = (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError)


class Place(NamedTuple):
    """Where a row is: its file, its number in it, and the benchmark's media."""
    file: pathlib.Path
    number: int
    media: "Media"

    @property
    def name(self) -> str:
        """Returns a name of the row, unique in the benchmark if its files have different names."""
        return f"{self.file.stem}_{self.number}"


Make = Callable[[dict[str, Any], Place], Iterable[benchmark.Item]]


def each(make: Make, *patterns: str, later: Collection[str] = (),
         ) -> Callable[[pathlib.Path], Iterator[benchmark.Item | ValueError]]:
    """Returns the `rows` of a Benchmark: `make` turns every row of the files into questions.

    Args:
      patterns: of the files; those of the first pattern that matches any are read, in order.
      later: columns of parquet files that become a Later.
    """
    def read(folder: pathlib.Path) -> Iterator[benchmark.Item | ValueError]:
        media = Media(folder)
        for path in matching(folder, patterns):
            for number, row in enumerate(_rows(path, folder, later)):
                if isinstance(row, ValueError):
                    yield row
                    continue
                try:
                    yield from make(row, Place(path, number, media))
                except BAD_ROW as error:
                    yield misfit(path, number, row, error)
    return read


def matching(folder: pathlib.Path, patterns: Iterable[str]) -> list[pathlib.Path]:
    """Returns the files of the first pattern that matches any, sorted."""
    return next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])


def misfit(path: pathlib.Path, number: int, row: dict, error: Exception) -> ValueError:
    """Returns the error of a row that a reader cannot use."""
    what = f"it lacks the column {error}" if isinstance(error, KeyError) else f"{error}"
    return ValueError(f"{path.name}: row {number} does not fit: {what}; got {str(row)[:160]}")


def _rows(path: pathlib.Path, folder: pathlib.Path, later: Collection[str]) -> Iterator[Any]:
    return _parquet(path, later) if path.suffix == ".parquet" else published.rows([path], folder)


def _parquet(path: pathlib.Path, later: Collection[str]) -> Iterator[dict[str, Any] | ValueError]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: parquet files need pyarrow: pip install -e '.[prepare]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                first = 0
                for batch in file.iter_batches(batch_size=published.BATCH_ROWS, row_groups=[group]):
                    kept = [name for name in batch.schema.names if name not in later]
                    for place, row in enumerate(batch.select(kept).to_pylist(), first):
                        found = {name: _kept(value, Later(path, group, place, name))
                                 for name, value in row.items()}
                        yield found | {name: Later(path, group, place, name) for name in later
                                       if name in batch.schema.names}
                    first += batch.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield ValueError(f"{path}: cannot be read to its end: {' '.join(str(error).split())}")


@dataclasses.dataclass(frozen=True)
class Later:
    """A cell of a parquet file: calling it reads its value."""
    path: pathlib.Path
    group: int
    place: int
    column: str

    def __call__(self) -> Any:
        return _column(self.path, self.group, self.column)[self.place].as_py()


@functools.lru_cache(maxsize=_GROUPS)
def _column(path: pathlib.Path, group: int, column: str):
    from pyarrow import parquet
    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def _is_media(value: Any) -> bool:
    return isinstance(value, bytes) or isinstance(value, dict) and set(value) == {"bytes", "path"}


def _kept(value: Any, cell: Later) -> Any:
    """Returns the value of a cell, with an Embedded in place of each image in it."""
    if _is_media(value):
        is_named = isinstance(value, dict) and value["bytes"] is None
        return value["path"] if is_named else Embedded(cell)
    if isinstance(value, list) and value and _is_media(value[0]):
        return [Embedded(cell, number) for number in range(len(value))]
    return value


@dataclasses.dataclass(frozen=True)
class Embedded(os.PathLike):
    """An image inside a parquet file; as a path it is a copy, which exists while it is in use.

    number: of the image, in a cell that holds a list.
    """
    cell: Later
    number: int | None = None

    def __str__(self) -> str:
        number = "" if self.number is None else f"[{self.number}]"
        return f"{self.cell.path.name}, group {self.cell.group}, row {self.cell.place}, " \
               f"{self.cell.column}{number}"

    def __fspath__(self) -> str:
        return os.fspath(_held(self))


@functools.lru_cache(maxsize=_HELD)
def _held(image: Embedded) -> held_file.HeldFile:
    value = image.cell()
    value = value if image.number is None else value[image.number]
    return held_file.HeldFile(str(image), value["bytes"] if isinstance(value, dict) else value)


class Media:
    """The files of a benchmark's folder, listed once."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    @functools.cached_property
    def _names(self) -> set[str]:
        return {os.path.relpath(os.path.join(where, name), self.folder)
                for where, _, names in os.walk(self.folder, followlinks=True) for name in names}

    @functools.cached_property
    def _by_end(self) -> dict[str, str]:
        """Returns file name, with and without suffix -> path in the folder; of several the first."""
        found: dict[str, str] = {}
        for name in sorted(self._names, reverse=True):
            pure = pathlib.PurePath(name)
            found[pure.name] = found[pure.stem] = name
        return found

    def find(self, *names: str) -> str:
        """Returns the path of the first of these files that exists, else the path of the first.

        A name is a path in the folder, or the name of a file anywhere in it, with or without suffix.
        """
        for name in names:
            known = os.path.normpath(name)
            if known in self._names:
                return str(self.folder / known)
            if known in self._by_end:
                return str(self.folder / self._by_end[known])
        return str(self.folder / names[0])

    def image(self, value: Any) -> Any:
        """Returns an image of a row: embedded, or the file that a text names."""
        return self.find(value, pathlib.PurePath(value).name) if isinstance(value, str) else value
