"""Local copies of prepared folders that are in a bucket: ArrayRecord opens no other files.

A copy is a folder of the cache, named after the prepared folder and the hash of its manifest, so that a
folder that is prepared anew gets a new copy. A shard gets its name when all of it is written and has the
SHA-256 of the manifest; the manifest comes last. Processes of one host share a copy: one makes it while the
others wait. A copy that was interrupted is continued.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.sources import shard_format
from data_pipelines.sources import shards
from molmo2_jax import config
from molmo2_jax import files
from molmo2_jax.monitor import bars

_AT_ONCE = 8       # shards that are copied at a time
_READ = 1 << 24    # bytes of each in memory
_LOCK = ".lock"
_MEDIA_COUNTS = ("images", "frames")   # statistics of records that have media


def local(folder: str | os.PathLike, cache: str | os.PathLike | None) -> pathlib.Path:
    """Returns the local copy of a prepared folder in a bucket, made first unless it is there.

    Raises:
      ValueError: there is no cache, no manifest or one of another version, the media of its records are not
        in its shards, or a shard does not have the SHA-256 of the manifest.
      files.StorageError: the disk of the cache has too little room.
    """
    remote = files.path(folder)
    manifest = shards.read_manifest(remote)
    entries = shard_format.entries(manifest)
    _check_media(folder, manifest)
    size = sum(entry.bytes for entry in entries)
    config.require(bool(cache), f"shards in a bucket are read from a local copy: --cache must name a folder "
                   f"with room for the {_gigabytes(size)} of {folder}", cache)
    text = (remote / shard_format.MANIFEST).read_bytes()
    target = (pathlib.Path(os.fspath(cache)).expanduser()
              / f"{remote.name}-{hashlib.sha256(text).hexdigest()[:16]}")
    if _is_whole(target, entries):
        return target
    try:
        with _locked(target):
            if not _is_whole(target, entries):
                _copy(remote, target, entries)
                with files.whole_bytes(target / shard_format.MANIFEST) as file:
                    file.write(text)
        return target
    except OSError as error:
        cause = files.storage_cause(error)
        if not cause:
            raise
    raise _full(folder, target, cause)


def _check_media(folder: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError if records refer to files that are not on a disk of this host."""
    statistics, place = manifest["statistics"], manifest["media_folder"]
    is_needed = manifest["settings"]["media"] == shard_format.REFERENCE and any(
        statistics.get(name, {}).get("count") for name in _MEDIA_COUNTS)
    config.require(not is_needed or os.path.isabs(place),
                   f"{folder}: shards in a bucket must hold their media (launch.prepare --media=copy or "
                   "frames), or refer to an absolute folder of every host", place)


def _is_whole(target: pathlib.Path, entries: Sequence[shard_format.Entry]) -> bool:
    return (target / shard_format.MANIFEST).is_file() and not _missing(target, entries)


def _missing(target: pathlib.Path, entries: Sequence[shard_format.Entry]) -> list[shard_format.Entry]:
    sizes = {one.name: one.stat().st_size for one in os.scandir(target)}
    return [entry for entry in entries if sizes.get(entry.file) != entry.bytes]


@contextlib.contextmanager
def _locked(target: pathlib.Path) -> Iterator[None]:
    """Waits until no other process makes this copy, and keeps others out while the block lasts."""
    target.mkdir(parents=True, exist_ok=True)
    with open(target / _LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for partial in target.glob(".*.partial"):  # of a process that was killed
            partial.unlink()
        yield


def _copy(remote, target: pathlib.Path, entries: Sequence[shard_format.Entry]) -> None:
    """Copies the shards that are missing.

    Raises:
      ValueError: a shard does not have the SHA-256 of the manifest.
      files.StorageError: there is too little room for all of them.
    """
    missing = _missing(target, entries)
    size = sum(entry.bytes for entry in missing)
    if shutil.disk_usage(target).free < size:
        raise _full(remote, target, f"{_gigabytes(size)} are to be copied")
    with (bars.bar(total=size, desc=f"copying {remote.name}", unit="B", unit_scale=True) as bar,
          concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool):
        copying = [pool.submit(_copy_one, remote, target, entry) for entry in missing]
        try:
            for done in concurrent.futures.as_completed(copying):
                bar.update(done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _copy_one(remote, target: pathlib.Path, entry: shard_format.Entry) -> int:
    """Copies a shard; returns its bytes."""
    found = hashlib.sha256()
    with files.whole_bytes(target / entry.file) as out, (remote / entry.file).open("rb") as file:
        while block := file.read(_READ):
            found.update(block)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
        config.require(found.hexdigest() == entry.sha256,
                       f"{remote / entry.file}: a shard must have the SHA-256 of the manifest, "
                       f"{entry.sha256}: prepare it again", found.hexdigest())
    return entry.bytes


def _full(folder, target: pathlib.Path, cause: str) -> files.StorageError:
    free = files.free_space(target)
    return files.StorageError(
        f"{folder} could not be copied to {target}: {cause}" + (f" ({free})" if free else "")
        + f"; remove copies in {target.parent} that no run reads, or name a folder on another disk with "
        "--cache. What is copied is kept")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3f} GB"
