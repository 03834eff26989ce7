"""A work directory may be in a bucket; here, a bucket in memory."""

import dataclasses
import errno
import json
import logging
import os

import av
import fsspec
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from fsspec.implementations import memory
from orbax.checkpoint._src.path import gcs_utils

from launch import convert
from launch import run
from launch.support import record
from launch.support import trained
from molmo2_jax import checkpoint
from molmo2_jax import files
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.hf import remote_code
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.monitor import exits
from molmo2_jax.monitor import goodput
from molmo2_jax.monitor import guard
from molmo2_jax.monitor import metrics
from tests import packs
from tests import tiny


class Bucket(memory.MemoryFileSystem):
    """Names objects as a bucket does."""
    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def glob(self, path, **options):
        return [found.lstrip("/") for found in super().glob(path, **options)]


@pytest.fixture
def bucket(monkeypatch):
    # Orbax would ask the cloud whether the bucket has real folders.
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    files.path("gs://bucket/run").mkdir(parents=True)
    yield "gs://bucket/run"
    fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)


def test_local_paths_become_absolute_and_remote_ones_are_unchanged(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert str(files.path("run")) == str(tmp_path / "run")
    assert str(files.path("gs://bucket/run") / "1") == "gs://bucket/run/1"
    assert files.is_remote("gs://bucket") and not files.is_remote("/tmp/a")


@pytest.mark.parametrize("place", ["here", "bucket"])
def test_a_file_appears_whole_or_not_at_all(place, tmp_path, bucket):
    folder = files.path(tmp_path if place == "here" else bucket) / "new"
    with files.whole(folder / "a.txt") as file:
        file.write("one é\n")
        assert not (folder / "a.txt").exists()
    with pytest.raises(KeyboardInterrupt), files.whole(folder / "a.txt") as file:
        file.write("two")
        raise KeyboardInterrupt
    assert (folder / "a.txt").read_text() == "one é\n"
    assert [path.name for path in folder.iterdir()] == ["a.txt"]


def raised_from(error, *causes):
    """Returns the error with a chain of causes."""
    for outer, inner in zip((error, *causes), causes):
        outer.__cause__ = inner
    return error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("error", "cause"), [
    (FULL, "No space left on device"),
    (OSError(errno.EROFS, "read-only", "/a"), "Read-only file system"),
    (ValueError('RESOURCE_EXHAUSTED: Error writing "a": Failed to write 9 bytes: No space left on device'),
     "No space left on device"),
    (raised_from(RuntimeError("saving failed"), TypeError(), FULL), "No space left on device"),
    (raised_from(ValueError("a.mp4 cannot be read"), OSError(errno.EIO, "")), ""),
    (ValueError("a.mp4: Input/output error"), ""),
    (av.error.OSError(errno.EIO, "Input/output error", "a.mp4"), ""),
    (FileNotFoundError(errno.ENOENT, "none", "/a"), ""), (RuntimeError(), ""), (None, "")])
def test_disk_faults_are_distinguished_from_other_errors(error, cause):
    assert files.storage_cause(error) == cause


def test_json_has_null_for_nan_and_infinities(tmp_path):
    value = {"a": [1.5, float("nan"), (np.inf, "NaN")],
             "b": {"c": -np.inf, "d": np.float64("nan"), "e": True}}
    wanted = {"a": [1.5, None, [None, "NaN"]], "b": {"c": None, "d": None, "e": True}}
    assert json.loads(files.to_json(value), parse_constant=pytest.fail) == wanted
    files.write_json(files.path(tmp_path / "a.json"), value)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == wanted


def test_metrics_in_a_bucket_are_copied_and_continued(bucket):
    writer = metrics.Writer(bucket, 1)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 7})
    assert metrics.read(f"{bucket}/metrics.jsonl") == []
    writer.publish()
    assert [line["step"] for line in metrics.read(f"{bucket}/metrics.jsonl")] == [1, 2, 3]
    writer.close()
    again = metrics.Writer(bucket, 3)
    again.write(3, {"loss": 3.0})
    again.close()
    assert metrics.read(f"{bucket}/metrics.jsonl") == [
        {"step": 1, "loss": 1 / 7}, {"step": 2, "loss": 2 / 7}, {"step": 3, "loss": 3.0}]
    assert list((files.path(bucket) / "tensorboard").iterdir())


def test_goodput_and_evidence_may_be_in_a_bucket(bucket):
    time = goodput.Goodput(bucket, goodput.Devices())
    time.saved(4)
    assert "4" in json.loads((files.path(bucket) / goodput.NAME).read_text())["productive_at"]
    exits.say(bucket, "failed", "why")
    assert json.loads((files.path(bucket) / "hosts" / "0.json").read_text())["reason"] == "why"
    with pytest.raises(guard.Divergence, match="gs://bucket/run/evidence/step_3"):
        guard.Guard(bucket, 0, None).check(3, {"loss": np.nan}, tiny.batch(0))
    kept = guard.load(f"{bucket}/evidence/step_3/host_0.npz")
    np.testing.assert_array_equal(kept.tokens, tiny.batch(0).tokens)


def test_settings_in_a_bucket_are_kept_when_they_change(bucket):
    assert record.save(bucket, "a = 1\n") == []
    assert record.save(bucket, "a = 2\n") == ["- a = 1", "+ a = 2"]
    names = {path.name for path in files.path(bucket).iterdir()}
    assert {"config.gin", "config.gin.1"} <= names


def test_a_run_may_start_from_a_run_in_a_bucket(bucket, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "load_params", lambda path, *_: asked.append(path) or {"w": 1})
    saved = run.resolve(["gin_configs/models/nano.gin"])
    record.save(bucket, record.gin_text(saved))
    tokenizers.Tokenizer.from_file(run.ROOT / "assets/nano").save(tmp_path)
    (tmp_path / "remote_code").mkdir()
    (tmp_path / "remote_code" / "config.json").write_text("{}")
    files.copy(files.path(tmp_path), files.path(bucket))
    found = trained.load(bucket)
    assert asked == [bucket] and found.params == {"w": 1} and found.model == saved.model
    assert found.tokenizer.vocab_size == saved.model.text.vocab_size
    assert (found.code / "config.json").read_text() == "{}"
    with pytest.raises(ValueError, match="got gs://bucket/nothing, which does not exist"):
        trained.load("gs://bucket/nothing")


def test_remote_code_goes_through_a_run_in_a_bucket_and_out_by_export(bucket, tmp_path, monkeypatch):
    given, kept = tmp_path / "given", files.path(bucket) / remote_code.NAME
    given.mkdir()
    (given / "modeling.py").write_text("# theirs\n")
    auto_map = {"AutoConfig": "modeling.Config"}
    (given / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    remote_code.write(remote_code.read(given), kept)
    assert (kept / "modeling.py").read_text() == "# theirs\n"
    assert remote_code.read(kept).auto_maps == {"config.json": auto_map}

    saved = run.resolve(["gin_configs/models/nano.gin"])
    record.save(bucket, record.gin_text(saved))
    tokenizers.Tokenizer.from_file(run.ROOT / "assets/nano").save(tmp_path / "tokenizer")
    files.copy(files.path(tmp_path / "tokenizer"), files.path(bucket))
    params = packs.random_params(saved.model)
    monkeypatch.setattr(checkpoint, "load_params", lambda path, *_: params)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(model=bucket, output=str(tmp_path / "hf"), dtype="float32"):
        convert.export_model()
    assert (tmp_path / "hf" / "modeling.py").read_text() == "# theirs\n"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"] == auto_map
    again, model, _ = hf_checkpoint.import_checkpoint(tmp_path / "hf")
    np.testing.assert_array_equal(again["head"], params["head"])
    assert model.vision == dataclasses.replace(saved.model.vision, position_init_std=None)


def test_the_complete_steps_of_a_bucket_are_found_and_others_named(bucket, caplog):
    for step, items in ((3, ("state", "data", "sums")), (6, ("state", "sums"))):
        for item in items:
            folder = files.path(bucket) / "checkpoints" / str(step) / item
            folder.mkdir(parents=True)
            (folder / "file").write_text("x")
        (files.path(bucket) / "checkpoints" / str(step) / "commit_success.txt").write_text("done")
    manager = checkpoint.Manager(bucket)
    with caplog.at_level(logging.WARNING):
        assert manager.steps() == [3]
    assert "checkpoint 6 is incomplete" in caplog.text
    manager.close()
