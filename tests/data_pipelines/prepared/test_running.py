"""Prepared folders: what is in them, and that training reads them as it reads the folder they came from."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import io
import json
import pickle
import re
import shutil
import sys
from concurrent import futures

import fsspec
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from benchmarks import prepare as benchmark
from data_pipelines import pipeline
from data_pipelines import prepared as package
from data_pipelines import records
from data_pipelines import sources
from data_pipelines.prepared import making
from data_pipelines.prepared import running
from data_pipelines.prepared import writing
from data_pipelines.sources import shard_format
from data_pipelines.sources import shards
from launch import prepare as command
from molmo2_jax import files
from molmo2_jax.inputs import tokenizer as tokenizers
from tests import test_files
from tests.data_pipelines import test_pipeline
from tests.launch import commands

flags_as_before = commands.flags_as_before

NUM_EXAMPLES = 20
RECORDS = 6        # of a shard
FRAMES = {"max_side": 378, "quality": 95}
MEAN_ERROR = 1.5   # of 255, of patches after JPEG; measured: 0.9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return benchmark.draw(tmp_path_factory.mktemp("world"), NUM_EXAMPLES)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.train_small((folder / "annotations.jsonl").read_text().splitlines(), 400)


@pytest.fixture(scope="module")
def prepare(folder, tokenizer):
    """Returns a function that prepares the folder."""
    def run(output, data=folder, **how):
        checker = running.Checker(model=test_pipeline.MODEL, inputs=test_pipeline.INPUTS,
                                  tokenizer=tokenizer, digest="")
        settings = {"name": "world", "records_per_shard": RECORDS, "max_frames": (8,), **how}
        return running.prepare(str(data), str(output), checker, **settings)
    return run


@pytest.fixture(scope="module")
def prepared(prepare, tmp_path_factory):
    """{media: folder} of all kinds."""
    outputs = {}
    for media in ("reference", "copy", "frames"):
        outputs[media] = tmp_path_factory.mktemp("prepared") / media
        prepare(outputs[media], media=media, **(FRAMES if media == "frames" else {}))
    return outputs


def batches(folder, tokenizer, count=6, **fields):
    iterator = pipeline.make_iterator(test_pipeline.data_config(folder, **fields), test_pipeline.MODEL,
                                      test_pipeline.INPUTS, tokenizer)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


@pytest.mark.parametrize("media, num_workers", [("reference", 0), ("copy", 0), ("copy", 2)])
@pytest.mark.slow(10)
def test_batches_from_shards_equal_those_from_the_folder_to_the_bit(folder, prepared, tokenizer, media,
                                                                    num_workers):
    for one, other in zip(batches(prepared[media], tokenizer, num_workers=num_workers),
                          batches(folder, tokenizer), strict=True):
        for name, array in other._asdict().items():
            np.testing.assert_array_equal(getattr(one, name), array, err_msg=name)


def test_batches_from_kept_frames_differ_in_pixels_alone_and_little(folder, prepared, tokenizer):
    for one, other in zip(batches(prepared["frames"], tokenizer), batches(folder, tokenizer), strict=True):
        for name, array in other._asdict().items():
            if name != "patches":
                np.testing.assert_array_equal(getattr(one, name), array, err_msg=name)
        error = np.abs(one.patches.astype(int) - other.patches)
        assert 0 < error.mean() < MEAN_ERROR


def test_copies_and_frames_need_no_files(prepared, prepare, folder, tokenizer, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    prepare(tmp_path / "copy", tmp_path / "data", media="copy")
    prepare(tmp_path / "reference", tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    assert len(batches(tmp_path / "copy", tokenizer)) == 6
    with pytest.raises(records.BrokenRecord, match="must be a file"):
        sources.open_source(tmp_path / "reference")[0]


def test_a_manifest_counts_what_its_shards_hold(prepared):
    for media, folder in prepared.items():
        manifest = shards.read_manifest(folder)
        assert manifest["count"] == NUM_EXAMPLES and manifest["left_out"] == {}
        assert [shard["count"] for shard in manifest["shards"]] == [6, 6, 6, 2]
        assert manifest["settings"]["media"] == media
        statistics = manifest["statistics"]
        assert statistics["tokens"]["count"] == NUM_EXAMPLES == sum(statistics["tokens"]["bins"].values())
        assert statistics["seconds"]["least"] > 0 and statistics["crops"]["most"] <= 8
        assert (folder / "broken.jsonl").read_text() == ""


def test_tokens_and_crops_are_those_that_training_packs(folder, prepared, tokenizer):
    manifest = shards.read_manifest(prepared["copy"])
    dataset = pipeline.make_dataset(test_pipeline.data_config(folder, row_tokens=10**5, row_crops=100),
                                    test_pipeline.MODEL, test_pipeline.INPUTS, tokenizer)
    crops = [len(dataset.preparer(number)[1]["patches"]) for number in range(NUM_EXAMPLES)]
    assert manifest["statistics"]["crops"]["total"] == sum(crops)


def test_a_source_is_small_whatever_it_holds_and_can_be_pickled(prepared):
    source = sources.open_source(prepared["copy"], name="task")
    assert isinstance(source, shards.Shards) and len(source) == NUM_EXAMPLES
    first = source[0]
    assert len(pickle.dumps(source)) < 2000
    again = pickle.loads(pickle.dumps(source))
    assert again[0] == first and first.source == "task"
    assert [source[i].key for i in range(len(source))] == [source.key(i) for i in range(len(source))]
    for index in (-1, NUM_EXAMPLES):
        with pytest.raises(IndexError):
            source[index]


def test_many_shards_are_not_all_open_at_once(prepare, tmp_path, monkeypatch):
    prepare(tmp_path / "many", records_per_shard=2)
    monkeypatch.setattr(shards, "_MOST_OPEN", 3)
    source = shards.Shards(tmp_path / "many")
    for index in (*range(NUM_EXAMPLES), 0):
        assert source[index].key == source.key(index)
    assert len(source._open._readers) == 3


@pytest.mark.parametrize("damage, found", [
    ("unclosed", "a shard must have the 131072 bytes of the manifest; got 0"),
    ("cut", "a shard must have the 131072 bytes of the manifest; got 65536"),
    ("missing", "a shard must have the 131072 bytes of the manifest; got none"),
    ("zeros", "a shard must have the 6 records of the manifest; got 0")])
def test_a_shard_that_is_not_whole_is_refused_by_name(prepared, tokenizer, tmp_path, damage, found):
    shutil.copytree(prepared["reference"], tmp_path / "broken")
    path = tmp_path / "broken" / "world-00001-of-00004.array_record"
    content = path.read_bytes()
    path.write_bytes({"unclosed": b"", "cut": content[:65536], "missing": b"",
                      "zeros": content[:65536] + bytes(65536)}[damage])
    if damage == "missing":
        path.unlink()
    with pytest.raises(ValueError, match=f"world-00001-of-00004.array_record: {found}"):
        batches(tmp_path / "broken", tokenizer)


def test_a_folder_without_manifest_is_no_prepared_folder(prepared, tokenizer, tmp_path):
    shutil.copytree(prepared["reference"], tmp_path / "unfinished")
    (tmp_path / "unfinished/manifest.json").unlink()
    with pytest.raises(ValueError, match="must hold annotations.jsonl, or shards and their manifest.json"):
        batches(tmp_path / "unfinished", tokenizer)


@pytest.mark.parametrize("how, name", [
    ({"records_per_shard": 5}, "records_per_shard = 6, now 5"), ({"max_frames": (8, 16)}, "max_frames"),
    ({"media": "copy"}, "media = 'reference', now 'copy'"), ({"exclude": {"a"}}, "exclude"),
    ({"max_fps": 1.0}, "max_fps = 2.0, now 1.0")])
def test_a_changed_setting_is_refused_by_name_and_nothing_is_written(prepare, prepared, how, name):
    folder = prepared["reference"]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=name):
        prepare(folder, **how)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_changed_input_is_refused_and_overwrite_begins_anew(prepare, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    prepare(tmp_path / "shards", tmp_path / "data")
    path = tmp_path / "data/annotations.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:7]))
    with pytest.raises(ValueError, match="input = "):
        prepare(tmp_path / "shards", tmp_path / "data")
    assert prepare(tmp_path / "shards", tmp_path / "data", overwrite=True)["count"] == 7
    assert len(list((tmp_path / "shards").glob("*.array_record"))) == 2


def test_a_second_run_at_once_is_refused(prepare, tmp_path):
    (tmp_path / "shards").mkdir()
    with (tmp_path / "shards/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="one run at a time may prepare a folder"):
            prepare(tmp_path / "shards")
    assert prepare(tmp_path / "shards")["count"] == NUM_EXAMPLES


def test_only_what_is_missing_is_written_again(prepare, prepared, tmp_path):
    shutil.copytree(prepared["copy"], tmp_path / "shards")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    kept = (tmp_path / "shards/world-00000-of-00004.array_record").stat().st_mtime_ns
    for name in ("manifest.json", "world-00001-of-00004.json", "world-00002-of-00004.array_record"):
        (tmp_path / "shards" / name).unlink()
    (tmp_path / "shards/.world-00001-of-00004.array_record.abc.partial").write_bytes(b"")
    prepare(tmp_path / "shards", media="copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()} == wanted
    assert (tmp_path / "shards/world-00000-of-00004.array_record").stat().st_mtime_ns == kept


def test_a_bucket_gets_the_same_files(prepare, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(test_files.Bucket, "store", {})
    monkeypatch.setattr(test_files.Bucket, "pseudo_dirs", [""])
    fsspec.register_implementation("gcs", test_files.Bucket, clobber=True)
    try:
        prepare("gs://bucket/shards", media="copy")
        found = {path.name: path.read_bytes() for path in files.path("gs://bucket/shards").iterdir()}
        with pytest.raises(ValueError, match="--cache must name a folder"):
            sources.open_source("gs://bucket/shards")
    finally:
        fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)
    for path in prepared["copy"].iterdir():
        if path.name not in ("manifest.json", ".lock"):  # the manifest says where the media are
            assert found[path.name] == path.read_bytes()
    assert "manifest.json" in found


def test_media_in_a_bucket_are_read_into_memory(folder, prepare, tokenizer, prepared, monkeypatch):
    """The process that decodes would not see this bucket, so that the maker is called here."""
    settings = shard_format.Settings(name="world", input="", records_per_shard=RECORDS, max_frames=(8,),
                                     media="copy")
    maker = making.Maker(folder=str(folder), settings=settings, model=test_pipeline.MODEL,
                         inputs=test_pipeline.INPUTS, tokenizer=tokenizer)
    line = (folder / "annotations.jsonl").read_bytes().splitlines()[0]
    here = maker(line, "1")
    monkeypatch.setattr(test_files.Bucket, "store", {})
    monkeypatch.setattr(test_files.Bucket, "pseudo_dirs", [""])
    fsspec.register_implementation("gcs", test_files.Bucket, clobber=True)
    try:
        files.copy(files.path(folder), files.path("gs://bucket/data"))
        assert dataclasses.replace(maker, folder="gs://bucket/data")(line, "1") == here
        missing = json.dumps(json.loads(line) | {"video": "media/none.mp4"}).encode()
        assert dataclasses.replace(maker, folder="gs://bucket/data")(missing, "1").stage == "line"
    finally:
        fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)


def test_a_task_becomes_shards_in_one_command(tmp_path, capsys):
    stream = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stream, "png")
    rows = [{"image": {"bytes": stream.getvalue(), "path": "a.png"}, "query": f"Max {number}?",
             "label": ["7"], "human_or_machine": 0} for number in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist([*rows, {"query": "no image"}]), tmp_path / "a.parquet")
    assert commands.start(
        command.main, "--task=chart_qa", f"--published={tmp_path}/*.parquet", "--media=copy",
        "--format=shards", "--records_per_shard=2", f"--output={tmp_path}/charts") == 0
    told = capsys.readouterr().out
    assert "annotations.jsonl: 5 records; left out: 1 rows" in told and "5 records in 3 shards" in told
    source = sources.open_source(tmp_path / "charts")
    assert isinstance(source, shards.Shards) and source[4].annotations[0].question == "Max 4?"


def test_options_of_dataflow_are_beams_and_keep_its_runner():
    from data_pipelines.prepared import pipeline as beams  # Beam takes a second to import
    text = (benchmark.ROOT / "docs/data.md").read_text(encoding="utf-8")
    options = re.search(r'^DATAFLOW="(.*?)"$', text, re.MULTILINE | re.DOTALL)[1].split()
    assert len(options) == 6 and beams._checked(options)[:6] == options
    assert not [one for one in beams._checked(options)[6:] if one.startswith("--runner")]
    assert f"--runner={beams._EMBEDDED}" in beams._checked([])


def test_a_full_disk_ends_the_run_with_its_own_error(prepare, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "shard")
    monkeypatch.setattr(writing, "_compare", full)
    with pytest.raises(OSError, match="No space left on device: 'shard'$") as caught:
        prepare(tmp_path / "shards")
    assert caught.value.errno == errno.ENOSPC


def test_beam_refuses_what_it_does_not_know(prepare, tmp_path):
    with pytest.raises(ValueError, match="must be Apache Beam's; got --workers=2"):
        prepare(tmp_path / "shards", arguments=["--workers=2"])


def test_a_folder_without_a_usable_record_is_refused_with_the_first_reason(prepare, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/annotations.jsonl").write_text("{}\n{]\n")
    with pytest.raises(ValueError, match="must have the fields annotations"):
        prepare(tmp_path / "shards", tmp_path / "data")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_two_runs_that_no_lock_keeps_apart_write_the_same_bytes(prepare, prepared, tmp_path, monkeypatch):
    """As on two machines, or into a bucket."""
    monkeypatch.setattr(writing, "locked", contextlib.nullcontext)
    with futures.ThreadPoolExecutor(2) as pool:
        manifests = list(pool.map(lambda _: prepare(tmp_path / "shards", media="copy"), range(2)))
    assert manifests[0] == manifests[1]
    wanted = contents(prepared["copy"])
    found = contents(tmp_path / "shards")
    for name in ("manifest.json",):   # it says where the media are, relative to it
        assert found.pop(name) and wanted.pop(name)
    assert found == wanted


def test_the_commands_without_beam_say_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "data_pipelines.prepared.pipeline", raising=False)
    monkeypatch.delattr(package, "pipeline", raising=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    for arguments in ([f"--data={folder}"], ["--task=chart_qa", f"--published={rows}"]):
        assert commands.start(command.main, *arguments, f"--output={tmp_path}/out") == 2
        assert "error: published rows and shards need Apache Beam: pip install -e '.[prepare]'" in (
            capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow(60)
def test_of_two_commands_at_once_one_wins(folder, tmp_path):
    alone, both = (benchmark.Run.of_data(folder, tmp_path / name) for name in ("alone", "both"))
    alone.finish()
    statuses = sorted(process.wait(benchmark.LIMIT) for process in [both.start(), both.start()])
    assert statuses == [0, 2], both.log.read_text()
    assert "one run at a time may prepare a folder" in both.log.read_text()
    assert both.content() == alone.content()


@pytest.mark.slow(120)
@pytest.mark.parametrize("what", ["shards", "records"])
def test_killed_runs_end_with_the_bytes_of_one_left_alone(folder, tmp_path, what):
    make = functools.partial(benchmark.Run.of_data, folder) if what == "shards" else functools.partial(
        benchmark.Run.of_rows, benchmark.points(tmp_path / "rows", 2000))
    alone = make(tmp_path / "alone")
    alone.finish()
    assert not benchmark.kill_often(make, tmp_path, kills=3, seed=0, wanted=alone.content())
