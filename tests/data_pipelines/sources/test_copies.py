"""Shards in a bucket: their copies are whole or not there, checked, and made once for all that read them."""

import concurrent.futures
import errno
import json
import os
import shutil

import pytest

from data_pipelines import pipeline
from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines.sources import copies
from data_pipelines.sources import shards
from molmo2_jax import files
from tests import test_files
from tests.data_pipelines import drawn

bucket = test_files.bucket
RECORDS = 12
NAMES = [f"drawn-0000{number}-of-00003.array_record" for number in range(3)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared folder of three shards, on a disk."""
    return drawn.texts(tmp_path_factory.mktemp("prepared"), RECORDS, records_per_shard=4)


@pytest.fixture
def remote(prepared, bucket):
    files.copy(files.path(prepared), files.path("gs://bucket/drawn"))
    return "gs://bucket/drawn"


@pytest.fixture
def opened(monkeypatch):
    """The names of the objects that are opened to be read."""
    names, open_object = [], test_files.Bucket._open

    def look(self, path, mode="rb", **options):
        if mode == "rb":
            names.append(path.rpartition("/")[2])
        return open_object(self, path, mode, **options)
    monkeypatch.setattr(test_files.Bucket, "_open", look)
    return names


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_folder_in_a_bucket_has_the_records_of_the_folder_itself(prepared, remote, tmp_path):
    source = sources.open_source(remote, cache=tmp_path)
    assert source.name == "drawn" and len(source) == RECORDS == sources.count(remote)
    here = sources.open_source(prepared, name="drawn")
    assert list(sources.each(source)) == list(sources.each(here))
    [copy] = tmp_path.iterdir()
    assert names_in(copy) == [*NAMES, "manifest.json"]
    for name in NAMES:
        assert (copy / name).read_bytes() == (prepared / name).read_bytes()


def test_a_copy_is_made_once_for_all_readers_at_once(remote, tmp_path, opened):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = {str(one) for one in pool.map(lambda _: copies.local(remote, tmp_path), range(4))}
    assert len(found) == 1
    copies.local(remote, tmp_path)
    assert sorted(name for name in opened if name != "manifest.json") == NAMES


def test_a_folder_that_is_prepared_anew_gets_a_copy_of_its_own(remote, tmp_path):
    before = copies.local(remote, tmp_path)
    path = files.path(remote) / "manifest.json"
    path.write_text(path.read_text().replace('"left_out": {}', '"left_out": {"line": 1}'))
    assert copies.local(remote, tmp_path) != before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_copy_that_was_interrupted_is_no_copy_and_is_continued(remote, tmp_path, opened, monkeypatch):
    monkeypatch.setattr(copies, "_AT_ONCE", 1)
    copy_one = copies._copy_one

    def interrupted(remote, target, entry):
        if entry.file == NAMES[1]:
            (target / f".{NAMES[1]}.12ab.partial").write_bytes(b"killed")
            raise KeyboardInterrupt
        return copy_one(remote, target, entry)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(copies, "_copy_one", interrupted)
        copies.local(remote, tmp_path)
    [copy] = tmp_path.iterdir()
    assert NAMES[0] in names_in(copy) and "manifest.json" not in names_in(copy)
    assert not shards.is_prepared(copy)
    kept = len(names_in(copy)) - 1  # without the partial file
    opened.clear()
    assert copies.local(remote, tmp_path) == copy
    assert names_in(copy) == [*NAMES, "manifest.json"]
    assert len([name for name in opened if name in NAMES]) == 3 - kept


def test_a_copy_that_has_lost_a_shard_is_completed(remote, tmp_path, opened):
    copy = copies.local(remote, tmp_path)
    (copy / NAMES[2]).unlink()
    os.truncate(copy / NAMES[0], 9)
    opened.clear()
    assert len(list(sources.each(sources.open_source(remote, cache=tmp_path)))) == RECORDS
    assert sorted(name for name in opened if name in NAMES) == [NAMES[0], NAMES[2]]


def test_a_shard_with_other_content_is_refused_by_name(remote, tmp_path):
    path = files.path(remote) / NAMES[1]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"gs://bucket/drawn/{NAMES[1]}: a shard must have the SHA-256"):
        copies.local(remote, tmp_path)
    assert NAMES[1] not in names_in(next(tmp_path.iterdir()))
    assert "manifest.json" not in names_in(next(tmp_path.iterdir()))


def test_a_disk_without_room_is_reported_before_anything_is_copied(remote, tmp_path, opened, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(files.StorageError, match="could not be copied to .*GB are to be copied.*0.0 of .* MB "
                       "are free.*--cache"):
        copies.local(remote, tmp_path)
    assert not set(NAMES) & set(opened)


def test_a_disk_that_becomes_full_is_reported_and_what_is_whole_is_kept(remote, tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch, pytest.raises(
            files.StorageError, match="gs://bucket/drawn could not be copied to .*: No space left on device"):
        patch.setattr(os, "fsync", fail)
        copies.local(remote, tmp_path)
    assert names_in(next(tmp_path.iterdir())) == []
    assert len(sources.open_source(remote, cache=tmp_path)) == RECORDS


def test_a_bucket_without_cache_is_refused_with_the_room_that_it_needs(remote, prepared):
    size = sum((prepared / name).stat().st_size for name in NAMES) / 1e9
    with pytest.raises(ValueError, match=f"--cache must name a folder with room for the {size:.3f} GB of"):
        sources.open_source(remote)


def test_annotations_and_media_must_not_be_left_in_a_bucket(remote, tmp_path):
    path = files.path(remote) / "manifest.json"
    manifest = json.loads(path.read_text())
    for place, is_refused in (("../data", True), ("gs://bucket/data", True), ("/mnt/data", False)):
        statistics = {"images": {"count": 2}}
        path.write_text(json.dumps(manifest | {"media_folder": place, "statistics": statistics}))
        if is_refused:
            with pytest.raises(ValueError, match=f"must hold their media .*; got '{place}"):
                sources.open_source(remote, cache=tmp_path)
        else:
            assert len(sources.open_source(remote, cache=tmp_path)) == RECORDS
    path.unlink()
    with pytest.raises(ValueError, match="a data folder in a bucket must hold shards .*; got 'gs://bucket/drawn'"):
        sources.open_source(remote, cache=tmp_path)


def test_a_run_reads_a_folder_in_a_bucket(prepared, remote, tmp_path):
    here = drawn.batches((str(prepared),), count=3)
    drawn.assert_equal(drawn.batches((remote,), count=3, cache=str(tmp_path)), here)
    with pytest.raises(ValueError, match="data folders must hold .*got \\['gs://bucket/none'\\]"):
        drawn.batches((remote, "gs://bucket/none"), cache=str(tmp_path))


def test_the_folders_of_a_mixture_may_be_in_a_bucket():
    _, known = pipeline.DataConfig(train="sft", seed=0, row_tokens=1, row_crops=0, batch_rows=1,
                                   root="gs://bucket/all").mixtures()
    assert known["tulu"].folder == "gs://bucket/all/data/tulu"
    assert tasks.mixtures_of("sft")[1]["tulu"].folder == "data/tulu"
    (_,), known = tasks.mixtures_of(("my_data",), 1, "gs://bucket")
    assert known["my_data"].folder == "my_data"
