"""Rows of files as data sets are published: parquet, JSON, JSON lines, CSV and TSV -> dictionaries.

Rows come one at a time; of a parquet file no more is held than a few rows of its columns. Images and films
inside rows are written into the folder of the task and the row names the file instead. What cannot be read is
yielded as an error in its place, so that schemas.convert counts it. Text must be UTF-8; a byte order mark, as
Excel writes one, is dropped.

Parquet needs the extra `prepare` (pyarrow).
"""

import csv
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from molmo2_jax.inputs import file_kind
from molmo2_jax.inputs import text_file

BATCH_ROWS = 16         # rows of a parquet file held at a time: each may have images of megabytes
MEDIA = "media"
_LARGEST_CELL = 1 << 27


def rows(paths: Sequence[str | os.PathLike], folder: str | os.PathLike,
         ) -> Iterator[dict[str, Any] | ValueError]:
    """Returns the rows of all files, in order; names may hold wildcards.

    Args:
      folder: of the task; media inside rows become folder/media/SHA256.SUFFIX.

    Raises:
      ValueError: a name matches no file, or ends in none of the known suffixes; a file is a Git LFS pointer
        or otherwise not what its name says; a file of text is not UTF-8 (of JSON lines only the beginning is
        looked at; later lines are errors in their place).
    """
    files = []
    for name in paths:
        found = sorted(glob.glob(str(name)))
        if not found:
            raise ValueError(f"{name}: rows must lie in files that exist; found none")
        files += [(path, pathlib.Path(path).suffix.lower()) for path in found]
    for path, suffix in files:
        if suffix not in _READERS:
            raise ValueError(f"{path}: rows must lie in files {', '.join(_READERS)}; got {suffix!r}")
        what = file_kind.describe(path, is_binary=suffix == ".parquet")
        if what and os.path.getsize(path):  # without rows is no fault
            raise ValueError(f"{path} is {what}")
        if suffix in _CHECKS:
            _CHECKS[suffix](path)
    return _rows(files, pathlib.Path(folder))


def _rows(files: Sequence[tuple[str, str]], folder: pathlib.Path) -> Iterator[dict[str, Any] | ValueError]:
    for path, suffix in files:
        for row in _READERS[suffix](path):
            yield row if isinstance(row, ValueError) else {
                name: _in_file(value, folder) for name, value in row.items()}


def _in_file(value, folder: pathlib.Path):
    """Returns the value; bytes, and structures {bytes, path}, as the name of a file with that content."""
    if isinstance(value, list) and value and isinstance(value[0], (bytes, dict)):
        return [_in_file(one, folder) for one in value]
    name, content = "", value
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        name, content = value["path"] or "", value["bytes"]
        if content is None:
            return f"{MEDIA}/{name}"
    if not isinstance(content, bytes):
        return value
    suffix = pathlib.Path(name).suffix or ".jpg"  # readers look at the content
    path = folder / MEDIA / (hashlib.sha256(content).hexdigest() + suffix)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return f"{MEDIA}/{path.name}"


def _parquet(path: str) -> Iterator[dict | ValueError]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: parquet files need pyarrow: pip install -e '.[prepare]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield ValueError(f"{path}: cannot be read to its end: {' '.join(str(error).split())}")


def _json_lines(path: str) -> Iterator[dict | ValueError]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _object(line, f"{path}:{number}")


def _object(text: bytes, where: str) -> dict | ValueError:
    try:
        row = json.loads(text_file.decode(text, "its encoding"))
    except (ValueError, RecursionError) as error:
        return ValueError(f"{where}: must be JSON: {error}")
    return row if isinstance(row, dict) else ValueError(f"{where}: must be an object; got {str(row)[:80]}")


def _json(path: str) -> Iterator[dict | ValueError]:
    """Yields the objects of a list, or of an object by name, the name being `id`; of "database" its own."""
    try:
        content = json.loads(text_file.read(path))
    except (ValueError, RecursionError) as error:
        yield ValueError(f"{path}: must be JSON: {error}")
        return
    if isinstance(content, dict):
        content = content.get("database", content)
        content = [{"id": name} | row if isinstance(row, dict) else row for name, row in content.items()]
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        yield row if isinstance(row, dict) else ValueError(
            f"{path}: entry {number} must be an object; got {str(row)[:80]}")


def _table(path: str) -> Iterator[dict | ValueError]:
    """Yields the lines below the header of a table whose columns are parted by tabs or else commas."""
    csv.field_size_limit(_LARGEST_CELL)
    with open(path, encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        for number, row in enumerate(csv.DictReader(file, delimiter=delimiter), start=2):
            is_whole = None not in row and None not in row.values()
            yield row if is_whole else ValueError(f"{path}: row {number} must have the columns of the header")


_READERS = {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table}
_CHECKS = {".jsonl": text_file.check_start, ".json": text_file.check, ".csv": text_file.check,
           ".tsv": text_file.check}
