"""From published rows to a folder that transformers loads: every command as a user calls it, each on what the
one before wrote."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch import run
from launch.support import trained

pytest.importorskip("transformers", reason="loads what is exported")
pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

STAGES = ("pretrain", "sft", "long_context")
STEPS, ROWS = 2, 2
MOVED = 1e-3   # how far few steps at the recipe's rates take a parameter; drawn parameters differ by 1
SMALL = [  # the recipe's stage at nano size
    "run.RunConfig.tokenizer = 'assets/nano'", "config.InputConfig.max_crops = 1",
    "config.InputConfig.high_res_crops = 1", "config.InputConfig.overlap_margins = (1, 1)",
    "config.InputConfig.use_frame_special_tokens = True", "pipeline.DataConfig.row_tokens = 1024",
    "pipeline.DataConfig.row_crops = 16", "pipeline.DataConfig.row_visual_tokens = 320",
    f"pipeline.DataConfig.batch_rows = {ROWS}", "pipeline.DataConfig.num_workers = 0",
    f"train.TrainConfig.steps = {STEPS}", "train.TrainConfig.dtype = 'float32'",
    "train.TrainConfig.log_every = 1"]


def command(module, *arguments):
    """Runs a command on one device; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(run.ROOT), "XLA_FLAGS": os.environ["XLA_FLAGS"]
                                + " --xla_force_host_platform_device_count=1"}
    done = subprocess.run([sys.executable, "-m", f"launch.{module}", *map(str, arguments)], cwd=run.ROOT,
                          env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def published(root):
    """Writes rows of three data sets in the published columns, and their media; returns {task: file of rows}.

    Pictures and films are drawn; what is pointed to in them is known.
    """
    drawn = world_write.write(root / "drawn", world_config.quickstart_world(), 0, 40, "train", progress=False)
    images, videos, media = [], [], root / "all" / "data"
    for number, line in enumerate(drawn.read_text().splitlines()):
        record = json.loads(line)
        for points in (one for one in record["annotations"] if one["type"] == "points"):
            if "video" in record:
                name = f"clip{number}"
                _copy(drawn.parent / record["video"], media / f"molmo2_video_point_0_5/media/{name}_2fps.mp4")
                videos.append(_video_row(record, points, name))
            elif len(record["images"]) == 1:
                _copy(drawn.parent / record["images"][0], media / f"pixmo_points/media/{number:064}.jpg")
                images.append(_image_row(record, points, f"{number:064}"))
    assert len(images) > 3 and len(videos) > 3
    texts = [{"id": str(number), "messages": [{"role": "user", "content": f"Say {number}."},
                                              {"role": "assistant", "content": f"{number}."}],
              "category": "chat", "source": "wild", "first_message_qwen3_tokens": 4, "empty_messages": False,
              "has_special_token": False} for number in range(30)]
    files = {"pixmo_points": root / "points.jsonl", "molmo2_video_point_0_5": root / "object.jsonl",
             "tulu_short": root / "train-00000.parquet"}
    for task, rows in (("pixmo_points", images), ("molmo2_video_point_0_5", videos)):
        files[task].write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(texts), files["tulu_short"])
    return files


def _copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def _percent(record, point):
    width, height = record["size"] if "video" in record else record["size"][0]
    return {"x": 100 * point["x"] / width, "y": 100 * point["y"] / height}


def _image_row(record, points, name):
    places = [_percent(record, point) for point in points["points"]]
    return {"image_url": f"https://example.org/{name}", "image_sha256": name, "label": points["label"],
            "points": places, "count": len(places), "collection_method": "pointing"}


def _video_row(record, points, name):
    at = {}
    for point in points["points"]:
        at.setdefault(round(2 * point["time"]) / 2, []).append(_percent(record, point))
    return {"video_id": name, "video_source": "generated", "video_duration": 3.0, "clip_start": None,
            "clip_end": None, "category": "object", "label": points["label"], "count": len(points["points"]),
            "question": f"How many {points['label']} are there?", "two_fps_timestamps": list(at),
            "points": list(at.values()), "annotator_unsure": False}


MEDIA = {"pixmo_points": ["--media=copy"], "tulu_short": [],
         "molmo2_video_point_0_5": ["--media=frames", "--max_frames=128", "--max_frames=384"]}


@pytest.mark.slow(100)
def test_published_rows_become_shards_three_stages_and_a_model_that_transformers_loads(tmp_path):
    for task, rows in published(tmp_path).items():
        folder = tmp_path / "all/data" / task
        told = command("prepare", f"--task={task}", f"--published={rows}", f"--output={folder}",
                       "--format=shards", *MEDIA[task])
        assert "left out: 0 rows" in told and "left out: none" in told
        shutil.rmtree(folder / "media", ignore_errors=True)  # the shards hold what training reads
    before, models = "assets/nano", [trained.load("assets/nano")]
    for stage, used in zip(STAGES, ({"pixmo_points", "tulu_short"}, *[
            {"pixmo_points", "molmo2_video_point_0_5"}] * 2), strict=True):
        workdir = tmp_path / stage
        command("train", "--gin_file=gin_configs/models/nano.gin",
                f"--gin_file=gin_configs/stages/{stage}.gin", f"--workdir={workdir}",
                f"--init_from={before}", "--allow_missing",
                f"--gin=pipeline.DataConfig.root = '{tmp_path / 'all'}'", *(f"--gin={one}" for one in SMALL))
        counted = json.loads((workdir / "data_counters.json").read_text())
        assert set(counted["examples_by_task"]) == used and counted["skipped"] == {}
        assert counted["rows"] == STEPS * ROWS
        assert run.resolve([workdir / "config.gin"]).data.allow_missing
        models.append(trained.load(workdir))
        before = workdir
    for one, other in zip(models, models[1:], strict=False):
        moved = [float(np.abs(after - start).max()) for start, after in zip(
            jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)]
        assert 0 < max(moved) < MOVED
    told = command("convert", "export", f"--model={before}", f"--output={tmp_path / 'hf'}")
    assert f"wrote {tmp_path / 'hf'}" in told
    checks = command("convert", "verify", f"--hf={tmp_path / 'hf'}", f"--against={before}")
    assert ", 0 FAIL, " in checks
    for check in ("transformers: tensors", "logits: text", "logits: image", "logits: video"):
        assert re.search(f"(?m)^ok +{check} ", checks), checks
