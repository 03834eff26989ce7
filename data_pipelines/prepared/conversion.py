"""Published rows -> the annotations.jsonl of a task's folder, in parts that any number of workers write.

A part holds what became of some groups of rows, in the order of their first rows: of the rows of a piece
(published.Piece) where every row is a group, else of those groups whose names share a remainder. `finish`
merges the parts, so that records are in the order of the rows, whoever converted them and when.

A line of a part is "[piece, row, kind]<TAB>JSON": the place of the group's first row, and a record or
[reason, names of the list of media to leave out].
"""

import collections
import dataclasses
import heapq
import itertools
import json
import pickle
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from data_pipelines import schemas
from data_pipelines.schemas import published
from data_pipelines.sources import lines
from molmo2_jax import files

LEFT_OUT = "left_out.txt"
SHOWN = 3          # reasons in a Summary
_PARTS = 256       # of rows in groups: one is in memory at a time
_BATCH = 10_000    # rows that are packed together, of all parts
_RECORD, _REASON, _UNFIT, _EXCLUDED = range(4)   # kinds of lines

Place = tuple[int, int]    # of a row: piece, and number in it


class Located(NamedTuple):
    """A row, or the error in place of one. group: "" where every row is one."""
    place: Place
    group: str
    row: schemas.Row | ValueError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What all workers know. folder: of the task. how: further arguments of the schema.

    token: keeps the parts of two runs apart.
    """
    schema: str
    folder: str
    exclude: frozenset[str] = frozenset()
    how: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    token: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))

    @property
    def has_groups(self) -> bool:
        return schemas.SCHEMAS[self.schema].of is not None

    @property
    def parts(self) -> epath.Path:
        """The folder of the parts."""
        return files.path(self.folder) / f".{lines.FILE}.{self.token}.partial"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Numbers of records, and of rows, records and annotations left out; the first reasons; names that match
    no medium of any record."""
    records: int
    left_out: int
    excluded: int
    reasons: tuple[str, ...]
    unmatched: frozenset[str]


def read(plan: Plan, piece: published.Piece) -> Iterator[Located]:
    """Yields the rows of a piece."""
    yield from locate(plan, piece.number, published.read(piece, plan.folder))


def locate(plan: Plan, piece: int, rows: Iterable[schemas.Row | ValueError]) -> Iterator[Located]:
    """Yields rows with their places and groups."""
    for number, row in enumerate(rows):
        group = ""
        if plan.has_groups and not isinstance(row, ValueError):
            try:
                group = schemas.group(plan.schema, row)
            except schemas.Unfit as error:
                row = error
        yield Located((piece, number), group, row)


def by_part(rows: Iterator[Located]) -> Iterator[tuple[int, bytes]]:
    """Yields (part, some rows of groups in it), packed, of which a runner may have to hold a whole set."""
    while batch := list(itertools.islice(rows, _BATCH)):
        parts = collections.defaultdict(list)
        for row in batch:
            parts[zlib.crc32(row.group.encode()) % _PARTS].append(row)
        for part, some in parts.items():
            yield part, zlib.compress(pickle.dumps(some), 1)


def write_groups(plan: Plan, part: int, packed: Iterable[bytes]) -> None:
    """Writes a part of whole groups; what by_part yields may come in any order."""
    groups: dict[str | Place, list[Located]] = collections.defaultdict(list)
    rows = [row for some in packed for row in pickle.loads(zlib.decompress(some))]
    for row in sorted(rows, key=lambda one: one.place):
        groups[row.place if isinstance(row.row, ValueError) else row.group].append(row)
    _write(plan, part, groups.values())


def write_rows(plan: Plan, part: int, rows: Iterable[Located]) -> None:
    """Writes a part of rows that are converted alone, in their order."""
    _write(plan, part, ([row] for row in rows))


def _write(plan: Plan, part: int, groups: Iterable[list[Located]]) -> None:
    with files.whole_bytes(plan.parts / f"{part:06}") as file:
        for group in groups:
            for kind, value in _results(plan, group):
                text = json.dumps(value, ensure_ascii=False)
                file.write(f"{json.dumps((*group[0].place, kind))}\t{text}\n".encode())


def _results(plan: Plan, group: list[Located]) -> Iterator[tuple[int, Any]]:
    """Yields kinds and values of the lines of a group."""
    found: list[schemas.Record | ValueError] = [one.row for one in group if isinstance(one.row, ValueError)]
    rows = [one.row for one in group if not isinstance(one.row, ValueError)]
    for one in found or schemas.convert(plan.schema, rows, plan.folder, plan.exclude, plan.how):
        if not isinstance(one, ValueError):
            yield _RECORD, one
        else:
            names = one.names if isinstance(one, schemas.Excluded) else ()
            kind = _EXCLUDED if names else _UNFIT if isinstance(one, schemas.Unfit) else _REASON
            yield kind, [str(one), sorted(names)]


def finish(plan: Plan) -> Summary:
    """Writes annotations.jsonl and left_out.txt of the parts.

    Raises:
      ValueError: no row fits the schema; an earlier annotations.jsonl then stays.
    """
    folder, kinds = files.path(plan.folder), collections.Counter[int]()
    reasons: list[str] = []
    used: set[str] = set()
    with files.whole_bytes(folder / lines.FILE) as records, files.whole_bytes(folder / LEFT_OUT) as left_out:
        for _, kind, text in _merged(plan):
            kinds[kind] += 1
            if kind == _RECORD:
                records.write(text)
                continue
            reason, names = json.loads(text)
            left_out.write(f"{reason}\n".encode())
            used.update(names)
            if len(reasons) < SHOWN:
                reasons.append(reason)
        if kinds.keys() == {_UNFIT}:
            raise ValueError(reasons[0])
    return Summary(records=kinds.pop(_RECORD, 0), left_out=kinds.total(), excluded=kinds[_EXCLUDED],
                   reasons=tuple(reasons), unmatched=plan.exclude - used)


def _merged(plan: Plan) -> Iterator[tuple[Place, int, bytes]]:
    """Yields (place, kind, rest) of the lines of all parts, in the order of the places."""
    parts = [_lines(path) for path in sorted(plan.parts.glob("*"))]
    yield from heapq.merge(*parts, key=lambda line: line[0]) if plan.has_groups else (
        itertools.chain.from_iterable(parts))


def _lines(path: epath.Path) -> Iterator[tuple[Place, int, bytes]]:
    with path.open("rb") as file:
        for line in file:
            head, _, text = line.partition(b"\t")
            piece, row, kind = json.loads(head)
            yield (piece, row), kind, text


def clear(plan: Plan) -> None:
    """Removes the parts."""
    if plan.parts.exists():
        plan.parts.rmtree()
