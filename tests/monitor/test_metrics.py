"""Metrics of a killed and resumed run equal those of an uninterrupted one."""

import importlib.machinery
import io
import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from molmo2_jax.monitor import metrics
from tests import packs

MODEL = packs.random_config("qwen3", 0)


def write(workdir, first_step, steps, **values):
    writer = metrics.Writer(str(workdir), first_step)
    for step in steps:
        writer.write(step, {"loss": step / 7, **values})
    writer.close()


def logged_pictures(workdir):
    """Returns [(step, name, uint8[h, w, 3])] of the pictures in the TensorBoard files of a work directory."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):   # a record: length, checksum, an event, checksum
            (length,) = struct.unpack_from("<Q", data, place)
            event = event_pb2.Event.FromString(data[place + 12:place + 12 + length])
            for one in event.summary.value:
                if one.HasField("image"):
                    pixels = np.asarray(Image.open(io.BytesIO(one.image.encoded_image_string)))
                    found.append((event.step, one.tag, pixels))
            place += 16 + length
    return found


def steps_of(workdir):
    return [line["step"] for line in metrics.read(str(workdir / "metrics.jsonl"))]


def test_lines_are_read_with_every_bit_of_their_numbers(tmp_path):
    write(tmp_path, 1, (1, 2), examples=3)
    assert metrics.read(str(tmp_path / "metrics.jsonl")) == [
        {"step": step, "loss": step / 7, "examples": 3} for step in (1, 2)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_picture_is_in_the_log_with_every_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    writer = metrics.Writer(str(tmp_path), 1)
    writer.picture(0, "rows", pixels)
    writer.close()
    ((step, name, found),) = logged_pictures(tmp_path)
    assert (step, name) == (0, "rows")
    np.testing.assert_array_equal(found, pixels)


def test_steps_that_will_be_repeated_are_dropped(tmp_path):
    write(tmp_path, 1, range(1, 8))
    write(tmp_path, 5, range(5, 7))
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_last_line_that_a_kill_cut_off_is_left_out_and_overwritten(tmp_path):
    write(tmp_path, 1, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert steps_of(tmp_path) == [1, 2]
    write(tmp_path, 3, (3, 4))
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


class Wandb:
    """A stub of the module that records its calls."""

    def __init__(self):
        self.opened, self.lines, self.closed = [], [], 0

    def init(self, **settings):
        self.opened.append(settings)
        return self

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        self.closed += 1


@pytest.mark.parametrize("environment, mode", [
    ({}, "offline"), ({"WANDB_API_KEY": "1"}, "online"), ({"WANDB_MODE": "disabled"}, "disabled")])
def test_wandb_gets_every_line_if_it_is_installed(environment, mode, tmp_path, monkeypatch):
    stub = Wandb()
    stub.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="here")
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write(tmp_path, 1, (1, 2), examples=3)
    write(tmp_path, 3, (3,))
    assert stub.lines == [(1, {"loss": 1 / 7, "examples": 3}), (2, {"loss": 2 / 7, "examples": 3}),
                          (3, {"loss": 3 / 7})]
    first, second = stub.opened
    assert first == second and first["mode"] == mode and first["resume"] == "allow"
    assert first["dir"] == str(tmp_path) and stub.closed == 2


def test_wandb_gets_the_picture_too(tmp_path, monkeypatch):
    stub = Wandb()
    stub.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="here")
    stub.Image = np.mean
    monkeypatch.setitem(sys.modules, "wandb", stub)
    writer = metrics.Writer(str(tmp_path), 1)
    writer.picture(0, "rows", np.full((3, 4, 3), 7, np.uint8))
    writer.close()
    assert stub.lines == [(0, {"rows": 7.0})]


def test_a_missing_file_has_no_lines(tmp_path):
    assert metrics.read(str(tmp_path / "metrics.jsonl")) == []


def test_counts_are_those_of_the_packed_examples():
    rng = np.random.default_rng(0)
    rows = [[packs.sequence(rng, MODEL, packs.video(rng, MODEL, 3), (4, 2, 6)),
             packs.sequence(rng, MODEL, None, (5,))],
            [packs.sequence(rng, MODEL, packs.images(rng, MODEL, 1), (3, 3))]]
    batch = packs.rows_lib.stack([packs.row(row, MODEL, 64, 5, 20) for row in rows])
    # A row's last crop may be one that no window happens to touch: count up to the last that is used.
    crops = sum(max(int(one.pooled.max()) // MODEL.vision.num_patches + 1 for one in row if len(one.pooled))
                for row in rows)
    tokens = sum(len(one.tokens) for row in rows for one in row)
    assert metrics.batch_counts(batch) == {
        "examples": 3, "branches": 6, "tokens": tokens, "token_fill": tokens / 128, "crop_fill": crops / 10}


def test_a_batch_of_text_alone_has_no_crops_to_fill():
    rng = np.random.default_rng(0)
    batch = packs.row([packs.sequence(rng, MODEL, None, (5,))], MODEL, 16, 0, 0)
    assert metrics.batch_counts(batch)["crop_fill"] == 0
    assert metrics.batch_counts(batch)["examples"] == 1


def test_progress_reports_smoothed_rates():
    progress = metrics.Progress(0, 2, disable=True)
    counts = {"examples": 4, "tokens": 100, "token_fill": 0.5, "crop_fill": 0.25}
    first = progress.update(counts, 1.0)
    second = progress.update(counts | {"tokens": 0}, 1.0)
    progress.close()
    assert first["tokens_per_second"] / first["examples_per_second"] == pytest.approx(25)
    assert 0 < second["tokens_per_second"] < first["tokens_per_second"]
