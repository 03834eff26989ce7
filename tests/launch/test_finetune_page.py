"""docs/finetune.md: each command of its example runs as written, and what it says of it holds."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from launch import run

PAGE = (run.ROOT / "docs/finetune.md").read_text(encoding="utf-8")
EXAMPLE = PAGE.partition("## A released model")[0]
F1_OF_MUGS, F1_KEPT = 0.85, 0.9   # of the new object, and of what was known, relative to before
pytestmark = pytest.mark.slow(400)   # seconds


def commands(text):
    """Returns the shell commands of a page, in order."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which all commands of the example have run, from outside the repository's own runs."""
    folder = tmp_path_factory.mktemp("page")
    paths = [str(run.ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # Compiled as for users: optimised, for one device.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "PYTHONPATH": os.pathsep.join(paths)}
    for name in ("assets", "gin_configs"):
        (folder / name).symlink_to(run.ROOT / name)
    for command in commands(EXAMPLE):
        words = shlex.split(command)
        assert words[:2] == ["python", "-m"]
        if words[2] == "launch.train":   # paths in gin files are relative to the repository
            words.append("--gin=pipeline.DataConfig.train = "
                         f"(('{folder}/runs/mugs/data/train', 0.7), ('{folder}/runs/mugs/general', 0.3))")
        done = subprocess.run([sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True,
                              text=True, check=False)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return folder


def scores(folder, name):
    found = json.loads((folder / f"runs/mugs/{name}.json").read_text())
    return tuple(found[f"runs/mugs/{part}"]["video_point_f1"] for part in ("data/heldout", "known"))


def test_the_example_has_the_steps_that_the_page_promises():
    modules = [shlex.split(command)[2] for command in commands(EXAMPLE)]
    assert modules == ["data_pipelines.world.example", "launch.prepare", "launch.check", "launch.inspect",
                       "launch.evaluate", "launch.train", "launch.evaluate", *["launch.convert"] * 4,
                       "launch.generate"]


def test_the_new_object_is_learnt_and_the_old_world_is_kept(folder):
    (mugs, known), (mugs_after, known_after) = scores(folder, "before"), scores(folder, "after")
    assert mugs < 0.6 and mugs_after >= F1_OF_MUGS and known_after >= F1_KEPT * known


def test_the_merged_folder_and_the_adapter_load_in_transformers(folder):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    python = re.search(r"```python\n(.*?)```", EXAMPLE, re.DOTALL)[1]
    assert "PeftModel" in python and peft and transformers
    done = subprocess.run([sys.executable, "-c", python], cwd=folder, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]
