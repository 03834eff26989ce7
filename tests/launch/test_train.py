"""launch.train as a user runs it: killed, restarted, on a data folder with many broken records."""

import dataclasses
import errno
import functools
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from data_pipelines import pipeline
from data_pipelines import tasks
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch import run
from launch import train
from launch.support import cli
from molmo2_jax import config
from molmo2_jax import files
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.monitor import metrics
from tests.monitor import test_metrics

STEPS, SAVE_EVERY = 24, 3
ONE_DEVICE = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # the last word counts
GIN = """
from __gin__ import dynamic_registration
from data_pipelines import pipeline
from launch import run
from molmo2_jax import config
from molmo2_jax import optim
from molmo2_jax import train
from molmo2_jax.inputs import packers

run.RunConfig.model = @config.Molmo2Config()
config.Molmo2Config.vision = @config.VisionConfig()
config.Molmo2Config.connector = @config.ConnectorConfig()
config.Molmo2Config.text = @config.TextConfig()
config.VisionConfig.image_size = 24
config.VisionConfig.patch_size = 4
config.VisionConfig.width = 8
config.VisionConfig.num_layers = 1
config.VisionConfig.num_heads = 1
config.VisionConfig.head_dim = 8
config.VisionConfig.mlp_width = 8
config.ConnectorConfig.taps = (0,)
config.ConnectorConfig.num_heads = 1
config.ConnectorConfig.head_dim = 8
config.ConnectorConfig.mlp_width = 8
config.TextConfig.vocab_size = 400
config.TextConfig.width = 16
config.TextConfig.num_layers = 1
config.TextConfig.num_heads = 2
config.TextConfig.num_kv_heads = 1
config.TextConfig.head_dim = 8
config.TextConfig.mlp_width = 16
config.TextConfig.max_positions = 1024

run.RunConfig.inputs = @config.InputConfig()
config.InputConfig.max_frames = 8
config.InputConfig.max_crops = 1
config.InputConfig.high_res_crops = 1
config.InputConfig.overlap_margins = (1, 1)

run.RunConfig.tokenizer = '{folder}'
run.RunConfig.data = @pipeline.DataConfig()
pipeline.DataConfig.train = (('{folder}', (1.0, 0.5)),)
pipeline.DataConfig.lessons = (30,)
pipeline.DataConfig.seed = 5
pipeline.DataConfig.row_tokens = 512
pipeline.DataConfig.row_crops = 16
pipeline.DataConfig.row_visual_tokens = 128
pipeline.DataConfig.batch_rows = 1
pipeline.DataConfig.packer = @packers.OldestFirst()
packers.OldestFirst.buffer = 4
pipeline.DataConfig.num_workers = 0

run.RunConfig.optim = @optim.OptimConfig()
run.RunConfig.train = @train.TrainConfig()
train.TrainConfig.steps = {steps}
train.TrainConfig.dtype = 'float32'
train.TrainConfig.remat = 'none'
train.TrainConfig.log_every = 1
train.TrainConfig.save_every = {save_every}
"""


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def write_audio(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


OUTSIDE = [{"type": "points", "label": "dot", "points": [{"time": 0.0, "x": 5000.0, "y": 1.0}]}]
BROKEN_MEDIA = ((cut, "media"), (write_audio, "media"), (lambda path: path.write_bytes(b""), "line"))
BROKEN_LINES = ((lambda record: record | {"colour": "red"}, "line"),
                (lambda record: {"video": record["video"], "annotations": OUTSIDE}, "annotation"))


def break_records(folder):
    """Breaks one record in each way; returns {record: reason why it must be skipped}."""
    path = folder / "annotations.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    videos = (number for number, record in enumerate(records) if "video" in record)
    reasons = {}
    for harm, reason in BROKEN_MEDIA + BROKEN_LINES:
        number = next(videos)
        reasons[f"annotations.jsonl:{number + 1}"] = reason
        if (harm, reason) in BROKEN_LINES:
            records[number] = harm(records[number])
        else:
            harm(folder / records[number]["video"])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return reasons


def write_world(folder):
    """Draws 20 records, trains a tokenizer on them, and returns the gin file of a small run."""
    drawn = dataclasses.replace(world_config.quickstart_world(), frame_side=(32, 40))
    folder = world_write.write(folder, drawn, 0, 20, "train", progress=False).parent
    tokenizers.train_small((folder / "annotations.jsonl").read_text().splitlines(), 400).save(folder)
    gin = folder / "run.gin"
    gin.write_text(GIN.format(folder=folder, steps=STEPS, save_every=SAVE_EVERY))
    return gin


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(gin file of a small run over 20 records, {broken record: reason})."""
    gin = write_world(tmp_path_factory.mktemp("world"))
    return gin, break_records(gin.parent)


def command(world, workdir, *flags, output=None, **how):
    """Starts launch.train on one device and returns its process."""
    environment = os.environ | {"XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(run.ROOT)}
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen([sys.executable, "-m", "launch.train", f"--gin_file={world[0]}",
                                 f"--workdir={workdir}", *flags],
                                cwd=run.ROOT, env=environment, stdout=output or log, stderr=output or log,
                                **how)


def finish(process, workdir):
    assert process.wait() == 0, pathlib.Path(f"{workdir}.log").read_text()[-3000:]


def losses(workdir):
    """Returns {step: values that do not depend on the clock}."""
    return {line["step"]: {name: value for name, value in line.items() if not metrics.is_timed(name)}
            for line in metrics.read(str(workdir / "metrics.jsonl"))}


def counters(workdir):
    return json.loads((workdir / "data_counters.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(command(world, workdir), workdir)
    return workdir


@pytest.mark.slow(36)
def test_broken_records_are_skipped_and_counted_by_reason(world, uninterrupted):
    folder = str(world[0].parent)
    counted = counters(uninterrupted)
    assert list(losses(uninterrupted)) == list(range(1, STEPS + 1)) and counted["rows"] == STEPS
    assert {key: text.split(":")[0] for key, text in counted["broken"][folder].items()} == world[1]
    skipped = counted["skipped"][folder]
    assert set(skipped) == {"media", "line", "annotation"}
    # Two broken lines, each counted every time it is met.
    assert skipped["line"] >= 2 and skipped["media"] >= 2 and skipped["annotation"] >= 1


@pytest.mark.slow(36)
def test_the_log_of_a_run_begins_with_a_picture_of_its_first_row(uninterrupted):
    ((step, name, pixels),) = test_metrics.logged_pictures(uninterrupted)
    assert (step, name) == (0, "first_batch") and pixels.shape[1] > 256 and pixels.std() > 10


def kill_in_the_middle(process, workdir):
    """Kills a run at a random moment after its first checkpoint; returns the number of steps it logged."""
    lines = random.SystemRandom().randrange(SAVE_EVERY, STEPS // 2)
    while not (saved(workdir) and len(losses(workdir)) >= lines):
        assert process.poll() is None, pathlib.Path(f"{workdir}.log").read_text()[-3000:]
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = losses(workdir)
    assert lines <= len(before) < STEPS
    return before


@pytest.mark.slow(90)
def test_adapters_of_a_run_killed_at_any_moment_repeat_every_loss(world, uninterrupted, tmp_path):
    gin = tmp_path / "adapters.gin"
    gin.write_text(f"""
from __gin__ import dynamic_registration
from molmo2_jax import finetune
from molmo2_jax import train

include '{world[0]}'
train.TrainConfig.lora = @finetune.LoraConfig()
finetune.LoraConfig.rank = 2
finetune.LoraConfig.dropout = 0.1
""")
    adapted, base = (gin, world[1]), f"--init_from={uninterrupted}"
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    finish(command(adapted, whole, base), whole)
    kill_in_the_middle(command(adapted, workdir, base), workdir)
    finish(command(adapted, workdir, base), workdir)
    assert losses(workdir) == losses(whole) and len(losses(whole)) == STEPS


@pytest.mark.slow(90)
def test_a_run_that_points_by_choosing_tokens_and_is_killed_repeats_every_loss(world, tmp_path):
    gin = tmp_path / "pointer.gin"
    gin.write_text(f"""
from __gin__ import dynamic_registration
from molmo2_jax import config
from molmo2_jax import optim

include '{world[0]}'
config.Molmo2Config.pointer = @config.PointerConfig()
config.PointerConfig.width = 16
optim.OptimConfig.pointer = @pointer/optim.Tower()
pointer/optim.Tower.lr = 1e-3
""")
    pointing, whole, workdir = (gin, world[1]), tmp_path / "whole", tmp_path / "killed"
    finish(command(pointing, whole), whole)
    kill_in_the_middle(command(pointing, workdir), workdir)
    finish(command(pointing, workdir), workdir)
    assert losses(workdir) == losses(whole) and "patch_loss" in losses(whole)[STEPS]
    assert counters(workdir) == counters(whole)


@pytest.mark.slow(60)
def test_a_run_killed_at_any_moment_and_started_again_repeats_every_loss(world, uninterrupted, tmp_path):
    workdir = tmp_path / "killed"
    killed = command(world, workdir, "--gin=pipeline.DataConfig.num_workers = 1")
    before = kill_in_the_middle(killed, workdir)
    first_log = len(pathlib.Path(f"{workdir}.log").read_text())
    finish(command(world, workdir), workdir)
    assert losses(workdir) == losses(uninterrupted), f"killed behind step {len(before)}"
    assert counters(workdir) == counters(uninterrupted)
    assert f" 0/{STEPS} [" not in pathlib.Path(f"{workdir}.log").read_text()[first_log:]  # the bar


@pytest.mark.slow(60)
def test_a_disk_that_takes_no_more_ends_the_run_with_what_is_kept_and_the_command_resumes(world, tmp_path):
    workdir = tmp_path / "full"
    finish(command(world, workdir, "--gin=train.TrainConfig.steps = 3"), workdir)
    kept = max(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
    more = (world, workdir, "--gin=train.TrainConfig.steps = 6")
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (kept // 2, kept // 2))
    # The limit holds for all files, so a log would be cut, too.
    process = command(*more, preexec_fn=limit, output=subprocess.PIPE)
    printed = process.communicate(timeout=240)[1].decode()
    assert process.returncode == cli.DISK_ERROR, printed[-3000:]
    last = printed.splitlines()[-1]
    assert last.startswith(f"error: the run could not write to {workdir}: File too large (")
    assert "; kept: the checkpoint of step 3. Once" in last and "resumes after step 3" in last
    said = json.loads((workdir / "hosts" / "0.json").read_text())
    assert said["status"] == "failed" and "could not write to" in said["reason"]
    finish(command(*more), workdir)
    assert list(losses(workdir)) == [1, 2, 3, 4, 5, 6]


def saved(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()]


# Settings


def test_a_curriculum_is_bound_by_gin_and_is_the_one_that_is_read(world):
    data = run.resolve([world[0]]).data
    assert data.lessons == (30,) and data.train == ((str(world[0].parent), (1.0, 0.5)),)
    two = run.resolve([world[0]], ["pipeline.DataConfig.train = (('a', (1.0, 0.0)), ('b', (0.0, 1)))"]).data
    mixtures, _ = tasks.of_folders(two.train, len(two.lessons) + 1)
    assert [tasks.rates(mixture, {"a": 1, "b": 1}) for mixture in mixtures] == [{"a": 1.0}, {"b": 1.0}]
    with pytest.raises(ValueError, match=r"DataConfig.lessons must be tuple\[int, ...\]"):
        run.resolve([world[0]], ["pipeline.DataConfig.lessons = [30]"])
    with pytest.raises(ValueError, match="lessons must begin at increasing numbers"):
        cycle = dataclasses.replace(data, lessons=(30, 20), train=(str(world[0].parent),))
        pipeline.make_iterator(cycle, run.resolve([world[0]]).model, config.InputConfig(), None)


# Mistakes


@pytest.fixture
def refused(capsys):
    """Starts launch.train with flags that it must reject; returns the one line that it prints."""
    def start(*arguments):
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
            cli.start(train.main, ["train", *arguments])
        assert caught.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        return captured.err
    yield start
    flags.FLAGS.mark_as_parsed()


def test_mistakes_are_one_sentence_and_exit_status_2(refused, tmp_path, world):
    workdir, gin = f"--workdir={tmp_path / 'run'}", f"--gin_file={world[0]}"
    assert "--gin_file must be given" in refused()
    assert "gin files must exist" in refused("--gin_file=nowhere.gin", workdir)
    assert "--workdir must name" in refused(gin)
    assert "steps must be int" in refused(gin, workdir, "--gin=train.TrainConfig.steps = 'many'")
    assert "stepps" in refused(gin, workdir, "--gin=train.TrainConfig.stepps = 3")
    assert "must be >= 1" in refused(gin, workdir, "--gin=train.TrainConfig.steps = 0")
    assert "run.RunConfig.optim" in refused("--gin_file=gin_configs/models/nano.gin", workdir)
    assert "takes flags only" in refused(gin, workdir, "more")
    assert not (tmp_path / "run").exists()


def test_an_empty_annotation_file_is_one_sentence(refused, tmp_path, world):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "annotations.jsonl").write_bytes(b"")
    message = refused(f"--gin_file={world[0]}", f"--workdir={tmp_path / 'run'}",
                      f"--gin=pipeline.DataConfig.train = ('{folder}',)")
    assert "0 bytes" in message and str(folder) in message


def test_a_full_disk_of_copies_is_not_explained_as_that_of_the_work_directory(tmp_path, monkeypatch):
    def fill(*_):
        raise files.StorageError("copies") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(train, "first_params", fill)
    with pytest.raises(files.StorageError, match="^copies$"):
        train._train(None, tmp_path, None)


def test_processes_compare_their_records_before_anything_is_written(refused, tmp_path, world, monkeypatch):
    def differ(what, values):
        raise ValueError(f"{what}: {values}")
    monkeypatch.setattr(train.hosts, "check_same", differ)
    monkeypatch.setattr(train.cli, "_is_users_mistake", lambda error: True)  # raised in hosts, not here
    message = refused(f"--gin_file={world[0]}", f"--workdir={tmp_path / 'run'}")
    assert message == f"error: records of each data set: {{'{world[0].parent}': 20}}\n"
    assert not (tmp_path / "run" / "config.gin").exists()


@pytest.mark.parametrize("value, hosts, folder", [
    (None, 1, "~/.cache/molmo2_jax/programs"), (None, 2, "WORKDIR/programs"), ("/mnt/mine", 2, "/mnt/mine"),
    ("", 2, None)])
def test_compiled_programs_of_several_hosts_are_where_all_read(value, hosts, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train.jax, "process_count", lambda: hosts)
    before = train.jax.config.jax_compilation_cache_dir
    train.jax.config.update("jax_compilation_cache_dir", None)
    try:
        with flagsaver.flagsaver(compilation_cache=value):
            train._keep_programs(tmp_path)
        found = train.jax.config.jax_compilation_cache_dir
    finally:
        train.jax.config.update("jax_compilation_cache_dir", before)
    assert found == (folder and os.path.expanduser(folder.replace("WORKDIR", str(tmp_path))))
