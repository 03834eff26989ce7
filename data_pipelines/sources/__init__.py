"""Data sets with random access: a Source reads record i when it is asked for, and holds none in memory.

`open_source` decides which kind of source a folder is. Records are parsed and validated where they are used,
in the worker processes; a broken one raises records.BrokenRecord there. `each`, `examples` and `read_folder`
read from the first record to the last.
"""

import os
from collections.abc import Iterator
from typing import Protocol

from data_pipelines import records
from data_pipelines.sources import copies
from data_pipelines.sources import lines
from data_pipelines.sources import shard_format
from data_pipelines.sources import shards
from molmo2_jax import config
from molmo2_jax import files
from molmo2_jax import types


class Source(Protocol):
    """Records 0 ... len(source) - 1 of a data set; broken ones have a number, too.

    A source is pickled into every worker process. It therefore holds paths, not records, and its memory is
    bounded whatever the number of records. Indices may be asked for in any order and from several threads.
    """
    name: str  # of the data set, in counts and reports; Example.source

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> types.Example:
        """Returns a record; Example.key is key(index).

        Raises:
          records.BrokenRecord: (a ValueError) the record breaks the format, or its media are missing.
          IndexError: there is no such record.
          ValueError: the files of the data set have changed since the source was opened.
        """

    def key(self, index: int, /) -> str:
        """Returns file and place of a record, such as "annotations.jsonl:17", without reading it."""


def open_source(folder: str | os.PathLike, *, name: str = "", cache: str | os.PathLike | None = None,
                ) -> Source:
    """Returns the source of a data folder, of its prepared shards if it has any.

    Args:
      name: of the data set; by default the folder's.
      cache: local folder for copies of shards that are in a bucket; see copies.local.

    Raises:
      ValueError: the folder has neither annotations.jsonl nor a manifest of shards, or what it has cannot be
        read: it has no record, is not UTF-8, a shard is not whole, or it is in a bucket without shards or
        without `cache`.
      files.StorageError: the disk of `cache` has too little room.
    """
    if files.is_remote(folder):
        config.require(shards.is_prepared(folder), "a data folder in a bucket must hold shards and their "
                       "manifest.json (launch.prepare)", os.fspath(folder))
        return shards.Shards(copies.local(folder, cache), name=name or files.path(folder).name)
    return shards.Shards(folder, name=name) if shards.is_prepared(folder) else lines.Lines(folder, name=name)


def is_data(folder: str | os.PathLike) -> bool:
    """Returns whether a folder holds annotations.jsonl or prepared shards."""
    return shards.is_prepared(folder) or (files.path(folder) / lines.FILE).is_file()


def count(folder: str | os.PathLike) -> int:
    """Returns the number of records of a data folder; shards in a bucket need not be copied for that.

    Raises:
      ValueError: open_source refuses the folder.
    """
    if files.is_remote(folder) and shards.is_prepared(folder):
        return sum(entry.count for entry in shard_format.entries(shards.read_manifest(files.path(folder))))
    return len(open_source(folder))


def each(source: Source) -> Iterator[types.Example | records.BrokenRecord]:
    """Yields every record in order, and the error in place of a broken one."""
    for index in range(len(source)):
        try:
            yield source[index]
        except records.BrokenRecord as error:
            yield error


def examples(folder: str | os.PathLike) -> list[types.Example]:
    """Returns all records of a data folder, in order.

    Raises:
      ValueError: a record is broken, or open_source refuses the folder.
    """
    source = open_source(folder)
    return [source[index] for index in range(len(source))]


def read_folder(folder: str | os.PathLike, *, limit: int | None = None,
                cache: str | os.PathLike | None = None,
                ) -> tuple[list[types.Example], list[records.BrokenRecord]]:
    """Returns the good examples of a data folder, and one error per broken record.

    limit: read no further than this number of good examples. cache: as in open_source.

    Raises:
      ValueError: the folder has no usable record, or open_source refuses it.
    """
    examples: list[types.Example] = []
    errors: list[records.BrokenRecord] = []
    for found in each(open_source(folder, cache=cache)):
        if isinstance(found, records.BrokenRecord):
            errors.append(found)
            continue
        examples.append(found)
        if len(examples) == limit:
            break
    if not examples:
        raise unusable(folder, errors[0])
    return examples, errors


def check_usable(source: Source, most: int) -> None:
    """Checks that one of the first `most` records of a source can be used.

    Raises:
      ValueError: all of them are broken.
    """
    first = None
    for index in range(min(len(source), most)):
        try:
            source[index]
            return
        except records.BrokenRecord as error:
            first = first or error
    if first:
        raise unusable(first.folder, first)


def unusable(folder: str | os.PathLike, first: Exception) -> ValueError:
    """Returns the error of a folder whose records are all broken."""
    return ValueError(f"a data folder must have a usable record; got none in {folder}; first error: {first}")
