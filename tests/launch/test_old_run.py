"""A work directory that version 0.1 wrote still loads, and its training resumes.

old_run.tar.gz holds the result of three steps of a tiny model on four drawn examples: config.gin, the
tokenizer, a checkpoint and the metrics.
"""

import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch.support import trained
from molmo2_jax.monitor import metrics

ARCHIVE = pathlib.Path(__file__).parents[1] / "old_run.tar.gz"


@pytest.fixture()
def workdir(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


def test_its_record_resolves_and_its_weights_load(workdir):
    source = trained.load(workdir)
    assert source.model.text.num_layers == 2
    assert source.tokenizer.decode(source.tokenizer.encode("red")) == "red"
    assert all(np.isfinite(leaf).all() for leaf in _leaves(source.params))


@pytest.mark.slow(20)
def test_its_training_resumes_after_its_last_step(workdir, tmp_path):
    world, _ = world_config.WORLDS["quickstart"]
    world_write.write(tmp_path, world(), 0, 4, split="train", progress=False)
    command = [sys.executable, "-m", "launch.train", f"--gin_file={workdir / 'config.gin'}",
               f"--workdir={workdir}", f"--gin=pipeline.DataConfig.train = ('{tmp_path / 'train'}',)",
               "--gin=train.TrainConfig.steps = 4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"})
    assert done.returncode == 0, done.stderr
    steps = [line["step"] for line in metrics.read(str(workdir / "metrics.jsonl"))]
    assert steps == [1, 2, 3, 4]


def _leaves(tree):
    return [leaf for value in tree.values()
            for leaf in (_leaves(value) if isinstance(value, dict) else [np.asarray(value)])]
