"""Shards on a disk or in a bucket: each is there whole or not at all, whatever ends the process.

A shard is written under a name of its own, closed, read again and compared, renamed, and then its JSON
written, which marks it as done. Runs over the same input with the same settings write the same bytes, so
that it does not matter which of two runs at once is the last to rename.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from array_record.python import array_record_module
from etils import epath

from data_pipelines.prepared import making
from data_pipelines.schemas import published
from data_pipelines.sources import lines
from data_pipelines.sources import shard_format
from data_pipelines.stream import child as children
from data_pipelines.stream import ledger
from molmo2_jax import files

_OPTIONS = "group_size:1"   # each record can be read alone
_SETTINGS, _LOCK = "settings.json", ".lock"
_READ = 1 << 24             # bytes read at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What all workers know. output: the prepared folder. number: of shards. command: of child.Child."""
    maker: making.Maker
    output: str
    number: int
    command: tuple[str, ...] = ()

    def stem(self, shard: int) -> str:
        return shard_format.shard_name(self.maker.settings.name, shard, self.number)


# One shard


def write_shard(plan: Plan, block: lines.Block, child: children.Child) -> shard_format.Shard:
    """Returns the shard of a block of records, written unless it is there already.

    Raises:
      OSError: what was written cannot be read again.
    """
    settings = plan.maker.settings
    stem = plan.stem(block.first // settings.records_per_shard)
    folder = files.path(plan.output)
    done = finished(folder, stem, settings.digest)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with _local(folder / f"{stem}.array_record") as path:
        writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
        content, left_out, numbers = hashlib.sha256(), [], collections.defaultdict(list)
        count = 0
        for key, line in _lines(plan.maker.folder, block):
            made = _made(child, line, key)
            if isinstance(made, making.Refused):
                left_out.append(shard_format.LeftOut(id=key, source=settings.name, stage=made.stage,
                                                reason=made.reason))
                continue
            writer.write(made.data)
            content.update(made.data)
            count += 1
            for name, number in made.numbers.items():
                numbers[name].append(number)
        writer.close()
        _compare(path, count, content.digest())
        shard = shard_format.Shard(
            file=f"{stem}.array_record", first=block.first, given=block.count, count=count,
            bytes=path.stat().st_size, sha256=sha256(path), settings=settings.digest,
            left_out=tuple(left_out),
            numbers={name: shard_format.Numbers.of(found) for name, found in sorted(numbers.items())})
    _write(folder / f"{stem}.json", files.to_json(shard.to_json(), indent=1, ensure_ascii=False))
    return shard


def _made(child: children.Child, line: bytes, key: str) -> making.Made | making.Refused:
    try:
        return child(line, key)
    except children.Crashed as crash:
        return making.Refused(ledger.WORKER, str(crash))
    except Exception as error:
        error.add_note(f"of {key}")
        raise


def finished(folder: epath.Path, stem: str, digest: str) -> shard_format.Shard | None:
    """Returns a shard that was written with these settings and has its length, or None."""
    try:
        shard = shard_format.Shard.from_json(json.loads((folder / f"{stem}.json").read_text()))
        size = (folder / shard.file).stat().length
    except (OSError, ValueError):
        return None
    return shard if (shard.settings, shard.bytes) == (digest, size) else None


def _lines(folder: str, block: lines.Block) -> Iterator[tuple[str, bytes]]:
    """Yields (key, line) of the records of a block; blank lines are counted and left out."""
    with (files.path(folder) / lines.FILE).open("rb") as file:
        file.seek(block.start)
        data = file.read(block.stop - block.start)
    found = 0
    for number, line in enumerate(data.split(b"\n"), start=block.line):
        if line.strip():
            found += 1
            yield f"{lines.FILE}:{number}", line
    if found != block.count:
        raise lines.changed(pathlib.Path(folder) / lines.FILE)


@contextlib.contextmanager
def _local(target: epath.Path) -> Iterator[pathlib.Path]:
    """Returns a local file to write, which becomes `target` if the block ends without an error."""
    if files.is_remote(target):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / target.name
            yield path
            with files.whole_bytes(target) as out, path.open("rb") as file:
                shutil.copyfileobj(file, out, _READ)
        return
    with files.whole_path(pathlib.Path(target)) as path:
        yield path
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _compare(path: pathlib.Path, count: int, content: bytes) -> None:
    """Raises OSError unless a file has `count` records, whose bytes have this SHA-256."""
    reader = array_record_module.ArrayRecordReader(str(path))
    found, again = reader.num_records(), hashlib.sha256()
    for place in range(found):
        again.update(reader.read([place])[0])
    reader.close()
    if found != count or again.digest() != content:
        raise OSError(f"{path}: must read as it was written, {count} records; got {found}: the disk is full "
                      "or broken")


def sha256(path: pathlib.Path | epath.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            found.update(block)
    return found.hexdigest()


def _write(target: epath.Path, text: str) -> None:
    with files.whole_bytes(target) as file:
        file.write(text.encode())


# The folder


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Keeps a second run on this machine from writing to a folder while the block lasts.

    In a bucket, and from other machines, runs are not kept apart; they write the same bytes.

    Raises:
      ValueError: another run is writing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if files.is_remote(folder):
        yield
        return
    with open(folder / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: one run at a time may prepare a folder; another one does") from None
        _remove_partial(pathlib.Path(folder))
        yield


def _remove_partial(folder: pathlib.Path) -> None:
    """Removes what a killed run left; not an index that a reader of the folder writes (sources.lines)."""
    for place in (folder, folder / published.MEDIA):
        for partial in place.glob(".[!.]*.partial"):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)


def begin(folder: epath.Path, settings: shard_format.Settings) -> None:
    """Records the settings of a folder.

    Raises:
      ValueError: it was begun with others; the message names them.
    """
    path = folder / _SETTINGS
    if not path.is_file():
        _write(path, json.dumps(settings.to_json(), indent=1))
        return
    different = settings.differences(json.loads(path.read_text()))
    if different:
        raise ValueError(f"{folder} must be prepared further with the settings it was begun with, or anew "
                         f"with --overwrite; got {'; '.join(different)}")


def clear(folder: epath.Path) -> None:
    """Removes what a run wrote, the manifest first."""
    for pattern in (shard_format.MANIFEST, shard_format.BROKEN, "*-of-*.json", "*-of-*.array_record",
                    _SETTINGS):
        for path in folder.glob(pattern):
            path.unlink()


def finish(plan: Plan) -> dict[str, Any]:
    """Returns the manifest, written after the list of what was left out.

    Raises:
      ValueError: a shard is missing.
    """
    folder, settings = files.path(plan.output), plan.maker.settings
    shards = [finished(folder, plan.stem(number), settings.digest) for number in range(plan.number)]
    missing = [plan.stem(number) for number, shard in enumerate(shards) if shard is None]
    if missing:
        raise ValueError(f"{folder}: all shards must be written before the manifest; missing {missing[:5]}")
    known = [shard for shard in shards if shard is not None]
    left_out = [one for shard in known for one in shard.left_out]
    _write(folder / shard_format.BROKEN, "".join(
        json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in left_out))
    manifest = shard_format.manifest(settings, _relative(plan.maker.folder, plan.output), known)
    _write(folder / shard_format.MANIFEST, files.to_json(manifest, indent=1))
    return manifest


def _relative(folder: str, output: str) -> str:
    """Returns the folder as seen from the output, or as it is if one of them is in a bucket."""
    if files.is_remote(folder) or files.is_remote(output):
        return folder
    return os.path.relpath(folder, output)
