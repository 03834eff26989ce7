"""A folder with annotations.jsonl as a Source: a record is one line, read and parsed when it is asked for.

The offsets of the lines are found once, by a search for newlines that parses nothing, and kept in an index:
a memory-mapped file next to annotations.jsonl, or in the user's cache folder where the data folder is
read-only. An index belongs to one size, time of change and content (sampled) of the file; if one differs, the
index is made anew. Blank lines are no records.

Layout of an index, a uint64 vector in numpy's format: its version; size, mtime_ns and digest of the file; N
records; K blank lines; N offsets; for each blank line, the number of records before it.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import time
import weakref
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from data_pipelines import records
from molmo2_jax import files
from molmo2_jax import types
from molmo2_jax.inputs import text_file

FILE = "annotations.jsonl"
INDEX = f".{FILE}.index.npy"
CACHE = "~/.cache/molmo2_jax/indices"   # for read-only data folders
_VERSION, _HEADER = 1, 6                # of the layout; numbers before the offsets
_BLOCK = 1 << 23                        # bytes searched for newlines at a time
_SAMPLES, _SAMPLE = 16, 1 << 12         # parts of a file that its digest covers, and their bytes
_STALE_SECONDS = 24 * 3600              # after which a partial index was left behind by a process that died
_WHITESPACE = np.isin(np.arange(256), list(b" \t\n\r\x0b\x0c"))  # as bytes.strip


class Stamp(NamedTuple):
    """What an index belongs to. digest: of samples of the file's content."""
    size: int
    mtime_ns: int
    digest: int


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive records of a file: index and line of the first, their number, and where their bytes are."""
    first: int
    line: int
    count: int
    start: int
    stop: int


class Lines:
    """The records of a folder's annotations.jsonl; see sources.Source.

    Raises:
      ValueError: there is no such file, it has no record or is not UTF-8, or no index can be written.
    """

    def __init__(self, folder: str | os.PathLike, *, name: str = ""):
        self._path = pathlib.Path(folder) / FILE
        if not self._path.is_file():
            raise missing(self._path)
        text_file.check_start(self._path)
        self.name = name or self._path.resolve().parent.name
        self._opened: _Opened | None = _Opened(self._path)
        self._stamp, self._number = self._opened.stamp, len(self._opened.starts)
        if not self._number:
            raise empty(self._path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}  # a file and memory are of one process

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int, /) -> types.Example:
        """Returns a record.

        Raises:
          BrokenRecord: (a ValueError) it breaks the format, or its media are missing.
          IndexError: there is no such record.
          ValueError: the file has changed since the source was opened.
        """
        if not 0 <= index < self._number:
            raise IndexError(f"index must lie in [0, {self._number}); got {index}")
        line = self._open().line(index)
        return records.parse_line(line, self._path.parent, key=self.key(index), source=self.name)

    def key(self, index: int, /) -> str:
        """Returns file and line of a record."""
        return f"{FILE}:{self._open().line_number(index)}"

    def blocks(self, size: int) -> Iterator[Block]:
        """Yields all records in blocks of `size`; the last one may have fewer."""
        opened = self._open()
        for first in range(0, self._number, size):
            last = min(first + size, self._number)
            stop = int(opened.starts[last]) if last < self._number else self._stamp.size
            yield Block(first, opened.line_number(first), last - first, int(opened.starts[first]), stop)

    def _open(self) -> "_Opened":
        if self._opened is None:
            opened = _Opened(self._path)
            if opened.stamp != self._stamp:
                raise changed(self._path)
            self._opened = opened
        return self._opened


class _Opened:
    """An open annotation file and its index, in one process."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        self.stamp = _stamp(self._fd)
        index = _index(path, self._fd, self.stamp)
        number = int(index[_HEADER - 2])
        self.starts, self._blanks = index[_HEADER:_HEADER + number], index[_HEADER + number:]

    def line(self, index: int) -> bytes:
        """Returns the bytes of a record with its newline.

        Raises:
          ValueError: there is no line at its offset.
        """
        start = int(self.starts[index])
        end = int(self.starts[index + 1]) if index + 1 < len(self.starts) else self.stamp.size
        first = max(start - 1, 0)  # the newline before
        data = os.pread(self._fd, end - first, first)
        begins, line = data[:start - first], data[start - first:]
        if begins not in (b"", b"\n") or len(line) != end - start or (
                not line.endswith(b"\n") and end < self.stamp.size):
            raise changed(self._path)
        return line[:line.find(b"\n") + 1] or line  # without blank lines after it

    def line_number(self, index: int) -> int:
        """Returns the number of a record's line, from 1."""
        return index + 1 + int(np.searchsorted(self._blanks, index, side="right"))


def missing(path: pathlib.Path) -> ValueError:
    return ValueError(f"{path}: an annotation file must exist; found none")


def empty(path: pathlib.Path) -> ValueError:
    return ValueError(f"{path}: an annotation file must hold at least one record; "
                      f"got {path.stat().st_size} bytes")


def changed(path: pathlib.Path) -> ValueError:
    return ValueError(f"{path}: an annotation file must not change while it is in use; it has changed since "
                      "it was opened")


def _stamp(fd: int) -> Stamp:
    found, digest = os.fstat(fd), hashlib.blake2b(digest_size=8)
    for offset in np.linspace(0, max(found.st_size - _SAMPLE, 0), _SAMPLES).astype(int).tolist():
        digest.update(os.pread(fd, _SAMPLE, offset))
    return Stamp(found.st_size, found.st_mtime_ns, int.from_bytes(digest.digest(), "little"))


def _index(path: pathlib.Path, fd: int, stamp: Stamp) -> np.ndarray:
    """Returns the memory-mapped index of a file, made first unless there is one for `stamp`.

    Raises:
      ValueError: it cannot be written, or the file changes meanwhile.
    """
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    targets = path.with_name(INDEX), pathlib.Path(CACHE).expanduser() / f"{key}.npy"
    for target in targets:
        if (found := _load(target, stamp)) is not None:
            return found
    problems = []
    for target in targets:
        try:
            _write(target, fd, stamp)
        except OSError as error:
            problems.append(f"{target}: {error.strerror}")
            continue
        if _stamp(fd) != stamp:
            target.unlink(missing_ok=True)
            raise changed(path)
        found = _load(target, stamp)
        if found is not None:
            return found
        raise changed(path)  # and another process has indexed the new file
    raise ValueError(f"{path}: an index must be written next to it or into the cache folder; got "
                     + "; ".join(problems))


def _load(target: pathlib.Path, stamp: Stamp) -> np.ndarray | None:
    """Returns an index that fits `stamp`, or None."""
    try:
        found = np.load(target, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    found = np.asarray(found)
    is_index = found.dtype == np.uint64 and found.ndim == 1 and len(found) >= _HEADER
    if not is_index or found[:4].tolist() != [_VERSION, *stamp]:
        return None
    return found if len(found) == _HEADER + int(found[4]) + int(found[5]) else None


def _write(target: pathlib.Path, fd: int, stamp: Stamp) -> None:
    """Writes an index, whole or not at all; several processes may do so at once."""
    with contextlib.suppress(OSError):
        for partial in target.parent.glob(f".{target.name}.*.partial"):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                partial.unlink(missing_ok=True)
    number, blanks = 0, [np.empty(0, np.uint64)]
    with files.whole_bytes(target) as file:
        header = _begin(file, 0, [0] * _HEADER)
        for starts, is_blank in _lines(fd, stamp.size):
            before = number + np.cumsum(~is_blank)
            blanks.append(before[is_blank].astype(np.uint64))
            file.write(starts[~is_blank].astype(np.uint64).tobytes())
            number += len(starts) - int(is_blank.sum())
        last = np.concatenate(blanks)
        file.write(last.tobytes())
        file.seek(0)
        values = [_VERSION, *stamp, number, len(last)]
        assert _begin(file, _HEADER + number + len(last), values) == header
        file.flush()
        os.fsync(file.fileno())


def _begin(file: IO[bytes], length: int, values: list[int]) -> int:
    """Writes numpy's header of a vector and the numbers of ours; returns their bytes.

    numpy leaves room in its header for a length of any number of digits.
    """
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<u8", "fortran_order": False, "shape": (length,)})
    file.write(np.asarray(values, np.uint64).tobytes())
    return file.tell()


def _lines(fd: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields offsets int64[L] of consecutive lines, and whether each is blank, bool[L]."""
    begin = offset = 0
    while offset < size:
        block = np.frombuffer(os.pread(fd, min(_BLOCK, size - offset), offset), np.uint8)
        if not len(block):  # the file has become shorter
            return
        ends = np.flatnonzero(block == ord("\n")) + (offset + 1)
        if len(ends):
            starts = np.append(begin, ends[:-1])
            # The first line may begin in an earlier block.
            is_suspect = np.append(True, _WHITESPACE[block[starts[1:] - offset]])
            is_blank = is_suspect & (ends - starts == 1)
            for place in np.flatnonzero(is_suspect & ~is_blank).tolist():
                is_blank[place] = _is_blank(fd, int(starts[place]), int(ends[place]))
            yield starts, is_blank
            begin = int(ends[-1])
        offset += len(block)
    if begin < size:  # the last line has no newline
        yield np.asarray([begin]), np.asarray([_is_blank(fd, begin, size)])


def _is_blank(fd: int, start: int, end: int) -> bool:
    while start < end:
        part = os.pread(fd, min(_SAMPLE, end - start), start)
        if not part or part.strip():
            return False
        start += len(part)
    return True
