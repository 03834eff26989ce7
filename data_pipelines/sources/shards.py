"""A folder of prepared shards as a Source: ArrayRecord files, read record by record as they are asked for."""

import bisect
import collections
import itertools
import json
import os
import pathlib
import threading
from typing import Any

from array_record.python import array_record_module

from data_pipelines import records
from data_pipelines.sources import shard_format
from molmo2_jax import files
from molmo2_jax import types

# Without these options a reader decompresses what follows a record as well.
_READ_ALONE = "readahead_buffer_size:0,max_parallelism:0"
_MOST_OPEN = 16   # shards of a source at a time; each holds an index of its records


def is_prepared(folder: str | os.PathLike) -> bool:
    """Returns whether a folder holds prepared shards, all of them."""
    return (files.path(folder) / shard_format.MANIFEST).is_file()


class Shards:
    """The records of a prepared folder on a local or mounted disk; see sources.Source.

    Shards are opened when they are needed. One that is not as long as the manifest says, because a process
    ended while it was written or copied, is refused by name: ArrayRecord reads it as one without records.

    Raises:
      ValueError: there is no manifest or it is of another version, a shard is missing or not whole, or there
        is no record.
    """

    def __init__(self, folder: str | os.PathLike, *, name: str = ""):
        self._folder = pathlib.Path(folder)
        manifest = read_manifest(self._folder)
        self._entries = shard_format.entries(manifest)
        self._ends = list(itertools.accumulate(entry.count for entry in self._entries))
        self._media_folder = os.path.normpath(self._folder / manifest["media_folder"])
        self.name = name or self._folder.resolve().name
        for entry in self._entries:
            _check_size(self._folder, entry)
        if not len(self):
            raise ValueError(f"{self._folder}: a prepared folder must hold at least one record; got none")
        self._open = _Readers()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}  # open files are of one process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_open": _Readers()}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int, /) -> types.Example:
        """Returns a record.

        Raises:
          BrokenRecord: (a ValueError) its media are no longer there.
          IndexError: there is no such record.
          ValueError: its shard is not whole.
        """
        entry, place = self._find(index)
        data = self._open.read(self._folder, entry, place)
        key = f"{entry.file}:{place}"
        try:
            _, record, media = shard_format.decode(data)
            return records.parse_record(record, self._media_folder, key=key, source=self.name, held=media)
        except ValueError as error:
            raise records.BrokenRecord(self._folder, key, str(error)) from error

    def key(self, index: int, /) -> str:
        """Returns the shard and the place of a record in it, counted from 0."""
        entry, place = self._find(index)
        return f"{entry.file}:{place}"

    def _find(self, index: int) -> tuple[shard_format.Entry, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self)}); got {index}")
        shard = bisect.bisect_right(self._ends, index)
        return self._entries[shard], index - (self._ends[shard - 1] if shard else 0)


class _Readers:
    """The shards that one process has open: the last few that were used."""

    def __init__(self):
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, folder: pathlib.Path, entry: shard_format.Entry, place: int) -> bytes:
        with self._lock:
            if entry.file not in self._readers:
                self._readers[entry.file] = open_whole(folder, entry)
            self._readers.move_to_end(entry.file)
            while len(self._readers) > _MOST_OPEN:
                self._readers.popitem(last=False)[1].close()
            try:
                return self._readers[entry.file].read([place])[0]
            except (RuntimeError, IndexError) as error:
                raise ValueError(f"{folder / entry.file}: record {place} cannot be read: {error}") from error


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the manifest of a prepared folder.

    Raises:
      ValueError: there is none, or it is not JSON.
    """
    path = folder / shard_format.MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: a prepared folder must hold a manifest, which launch.prepare writes last; "
                         "found none") from None
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON: {error}") from error


def _check_size(folder: pathlib.Path, entry: shard_format.Entry) -> None:
    path = folder / entry.file
    size = path.stat().st_size if path.is_file() else None
    if size != entry.bytes:
        found = "none" if size is None else f"{size}"
        raise ValueError(f"{path}: a shard must have the {entry.bytes} bytes of the manifest; got {found}: "
                         "prepare it again, or copy it whole")


def open_whole(folder: pathlib.Path, entry: shard_format.Entry) -> Any:
    """Returns a reader of a shard that holds as many records as the manifest says.

    Raises:
      ValueError: it is missing, of another length, or of another number of records.
    """
    _check_size(folder, entry)
    path = folder / entry.file
    reader = array_record_module.ArrayRecordReader(str(path), _READ_ALONE)
    found = reader.num_records() if reader.ok() else 0
    if found != entry.count:
        raise ValueError(f"{path}: a shard must have the {entry.count} records of the manifest; got {found}: "
                         "prepare it again, or copy it whole")
    return reader
