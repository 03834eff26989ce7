"""Reads the rows of published files: parquet, JSON, JSON lines, CSV, TSV and lines of text -> dictionaries.

Files, local or in a bucket, are cut into pieces, which workers read one row at a time; only a few rows of a
parquet file are in memory at once. Images and videos inside rows are written to files in the folder of the
task, and the row then names the file. What cannot be read is yielded as an error in its place. Text must be
UTF-8; a byte order mark, as written by Excel, is dropped.

Parquet needs the extra `prepare` (pyarrow).
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from molmo2_jax import files
from molmo2_jax.inputs import file_kind
from molmo2_jax.inputs import text_file

BATCH_ROWS = 16         # rows of a parquet file in memory at a time; each may have images of megabytes
MEDIA = "media"
PIECE_BYTES = 1 << 26   # of JSON lines, or of a parquet file's uncompressed columns; row groups stay whole
_LARGEST_CELL = 1 << 27


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows that one worker reads; small, whatever they hold.

    number: its place among all. start, stop: bytes of JSON lines, or row groups of a parquet file; None: to
    the end. line: number of its first line. columns: names of the columns of a table without a header, or in
    the first line of JSON lines of lists.
    """
    number: int
    path: str
    start: int = 0
    stop: int | None = None
    line: int = 1
    columns: tuple[str, ...] = ()


def pieces(paths: Sequence[str | os.PathLike], columns: Sequence[str] = ()) -> Iterator[Piece]:
    """Yields the pieces of all files, in order; names may contain wildcards.

    Args:
      columns: names of the first columns of tables without a header (schemas.Schema.columns).

    Raises:
      ValueError: a name matches no file or has an unknown suffix; a file is a Git LFS pointer or has other
        content than its suffix says; a text file is not UTF-8 (of JSON lines only the start is checked here;
        later lines become errors in their place); or pyarrow is not installed. Of all files, before the first
        piece.
    """
    found = []
    for name in paths:
        matching = files.matching(os.fspath(name))
        if not matching:
            raise ValueError(f"{name}: rows must be in files that exist; found none")
        found += matching
    for path in found:
        if _suffix(path) not in _READERS:
            raise ValueError(f"{path}: rows must be in files {', '.join(_READERS)}; got {_suffix(path)!r}")
        file = files.path(path)
        what = file_kind.describe(file, is_binary=_suffix(path) == ".parquet")
        if what and file.stat().length:  # an empty file has no rows, which is allowed
            raise ValueError(f"{path} is {what}")
        if _suffix(path) in _CHECKS:
            _CHECKS[_suffix(path)](file)
    return _pieces(found, tuple(columns))


def _pieces(paths: Sequence[str], columns: tuple[str, ...]) -> Iterator[Piece]:
    number = 0
    for path in paths:
        for piece in _cut(path, columns):
            yield dataclasses.replace(piece, number=number)
            number += 1


def _cut(path: str, columns: tuple[str, ...]) -> Iterator[Piece]:
    """Yields the pieces of a file, all with number 0."""
    match _suffix(path):
        case ".parquet":
            for start, stop in _row_groups(path):
                yield Piece(0, path, start, stop)
        case ".jsonl":
            yield from _cut_lines(path)
        case ".csv" | ".tsv":
            yield Piece(0, path, columns=columns)
        case _:
            yield Piece(0, path)


def _cut_lines(path: str) -> Iterator[Piece]:
    with files.path(path).open("rb") as file:
        first = file.readline()
        columns, start, line = _header(first), 0, 1
        file.seek(0)
        while block := file.read(PIECE_BYTES) + file.readline():
            yield Piece(0, path, start, start + len(block), line, columns)
            start, line = start + len(block), line + block.count(b"\n")


def _header(line: bytes) -> tuple[str, ...]:
    """Returns the columns that the first line of JSON lines lists; () if it is a row."""
    value = _parsed(line, "")
    is_header = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    return tuple(value) if is_header else ()


def _row_groups(path: str) -> Iterator[tuple[int, int | None]]:
    """Yields (first, past the last) row groups of the pieces of a parquet file."""
    pyarrow, parquet = _arrow()
    try:
        with files.path(path).open("rb") as file:
            metadata = parquet.ParquetFile(file).metadata
            sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
        yield 0, None  # whoever reads the piece meets the error
        return
    start, size = 0, 0
    for group, more in enumerate(sizes):
        if size and size + more > PIECE_BYTES:
            yield start, group
            start, size = group, 0
        size += more
    yield start, len(sizes)


def _arrow():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError("parquet files need pyarrow: pip install -e '.[prepare]'") from None
    return pyarrow, parquet


def read(piece: Piece, folder: str | os.PathLike) -> Iterator[dict[str, Any] | ValueError]:
    """Yields the rows of a piece, in order, and an error in place of what cannot be read.

    folder: of the task; media inside rows become folder/media/SHA256.SUFFIX.
    """
    for row in _READERS[_suffix(piece.path)](piece):
        yield row if isinstance(row, ValueError) else {
            name: _in_file(value, folder) for name, value in row.items()}


def rows(paths: Sequence[str | os.PathLike], folder: str | os.PathLike, columns: Sequence[str] = (),
         ) -> Iterator[dict[str, Any] | ValueError]:
    """Returns the rows of all files, in order; arguments and errors of `pieces` and `read`."""
    found = pieces(paths, columns)  # which looks at all files
    return itertools.chain.from_iterable(read(piece, folder) for piece in found)


def _suffix(path: str) -> str:
    return pathlib.PurePath(path).suffix.lower()


def _in_file(value, folder: str | os.PathLike):
    """Returns the value; bytes and {bytes, path} are written to a file and replaced by its name."""
    if isinstance(value, list) and value and isinstance(value[0], (bytes, dict)):
        return [_in_file(one, folder) for one in value]
    name, content = "", value
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        name, content = value["path"] or "", value["bytes"]
        if content is None:
            return f"{MEDIA}/{name}"
    if not isinstance(content, bytes):
        return value
    suffix = pathlib.Path(name).suffix or ".jpg"  # readers detect the format from the content
    path = files.path(folder) / MEDIA / (hashlib.sha256(content).hexdigest() + suffix)
    if not path.exists():
        with files.whole_bytes(path) as file:
            file.write(content)
    return f"{MEDIA}/{path.name}"


def _parquet(piece: Piece) -> Iterator[dict | ValueError]:
    pyarrow, parquet = _arrow()
    try:
        with files.path(piece.path).open("rb") as raw, parquet.ParquetFile(raw) as file:
            groups = range(file.metadata.num_row_groups)[piece.start:piece.stop]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=list(groups)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield ValueError(f"{piece.path}: cannot be read to its end: {' '.join(str(error).split())}")


def _json_lines(piece: Piece) -> Iterator[dict | ValueError]:
    """Yields the object of each line; or the lists of a table whose first line is the list of its columns."""
    with files.path(piece.path).open("rb") as file:
        file.seek(piece.start)
        place = piece.start
        for number, line in enumerate(file, start=piece.line):
            place += len(line)
            if line.strip() and not (number == 1 and piece.columns):
                row = _parsed(line, f"{piece.path}:{number}")
                if piece.columns and isinstance(row, list) and len(row) == len(piece.columns):
                    yield dict(zip(piece.columns, row, strict=True))
                else:
                    yield _object(row, f"{piece.path}:{number}")
            if place == piece.stop:
                return


def _parsed(text: bytes, where: str) -> Any:
    """Returns the value, or the error of what is no JSON."""
    try:
        return json.loads(text_file.decode(text, "its encoding"))
    except (ValueError, RecursionError) as error:
        return ValueError(f"{where}: must be JSON: {error}")


def _object(row: Any, where: str) -> dict | ValueError:
    if isinstance(row, ValueError):
        return row
    return row if isinstance(row, dict) else ValueError(f"{where}: must be an object; got {str(row)[:80]}")


def _json(piece: Piece) -> Iterator[dict | ValueError]:
    """Yields the objects of a list, or the values of an object with their keys as `id`.

    What the keys "database", "data" or "annotations" hold is read in place of the file's own object.
    """
    try:
        content = json.loads(text_file.read(files.path(piece.path)))
    except (ValueError, RecursionError) as error:
        yield ValueError(f"{piece.path}: must be JSON: {error}")
        return
    if isinstance(content, dict):
        content = next((content[name] for name in ("database", "data", "annotations") if name in content),
                       content)
    if isinstance(content, dict):
        content = [{"id": name} | row if isinstance(row, dict) else row for name, row in content.items()]
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        yield row if isinstance(row, dict) else ValueError(
            f"{piece.path}: entry {number} must be an object; got {str(row)[:80]}")


def _table(piece: Piece) -> Iterator[dict | ValueError]:
    """Yields the lines below the header; tabs separate columns if the first line has one, else commas.

    Columns of a table without a header that have no name are ignored.
    """
    csv.field_size_limit(_LARGEST_CELL)
    columns = piece.columns
    with (files.path(piece.path).open("rb") as raw,
          io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file):
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        reader = csv.DictReader(file, columns or None, delimiter=delimiter)
        for number, row in enumerate(reader, start=1 if columns else 2):
            if columns:
                row.pop(None, None)  # type: ignore[call-overload]  # the key of further columns
            is_whole = None not in row and None not in row.values()
            yield row if is_whole else ValueError(
                f"{piece.path}: row {number} must have the columns of the header")


def _text(piece: Piece) -> Iterator[dict | ValueError]:
    for line in text_file.read(files.path(piece.path)).splitlines():
        if line.strip():
            yield {"line": line}


_READERS = {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table,
            ".txt": _text}
_CHECKS = {".jsonl": text_file.check_start, ".json": text_file.check, ".csv": text_file.check,
           ".tsv": text_file.check, ".txt": text_file.check}
