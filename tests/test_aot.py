"""Steps compiled for TPUs that are not there: memory, operations, what they move."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from launch import run
from molmo2_jax import aot


def test_the_mesh_of_a_slice_has_a_row_for_each_group_of_devices():
    meshes = {number: aot.default_mesh(128, number) for number in (16, 128, 256)}
    assert [(m.data, m.fsdp, m.context) for m in meshes.values()] == [(1, 16, 1), (8, 16, 1), (8, 16, 2)]


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def compile_run(tmp_path, *arguments):
    """Returns status, output and JSON of launch.compile, which changes settings of its process."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    output = tmp_path / "out.json"
    done = subprocess.run([sys.executable, "-m", "launch.compile", *arguments, f"--output={output}"],
                          cwd=run.ROOT, env=environment, capture_output=True, text=True, timeout=900,
                          check=False)
    report = json.loads(output.read_text()) if output.exists() else None
    return done.returncode, done.stdout + done.stderr, report


@needs_libtpu
@pytest.mark.slow
def test_the_8b_fine_tuning_step_of_the_recipe_fits_on_128_chips(tmp_path):
    status, text, report = compile_run(tmp_path, "--gin_file=gin_configs/runs/sft_8b.gin",
                                       "--topology=v5p-256")
    assert status == 0, text
    assert report["chips"] == 128 and report["mesh"] == {"data": 8, "fsdp": 16, "tensor": 1, "context": 1}
    assert report["headroom"] > 0 and report["peak"] < 40 * aot.GIB  # 28.4 measured
    assert report["mfu_bound"] > 0.6 and report["bounded_by"] == "compute"
    assert report["collectives"]["ici all-gather"] > 20 * aot.GIB  # weights, layer by layer
    # Sums of the head's gradient and of gradients over data; a weight gathered by sums would add 30 GiB.
    assert report["collectives"]["ici all-reduce"] < 12 * aot.GIB


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_a_nano_step_compiles_for_other_chips(topology, tmp_path):
    status, text, report = compile_run(
        tmp_path, "--gin_file=gin_configs/runs/quickstart.gin", f"--topology={topology}",
        "--gin=pipeline.DataConfig.batch_rows = 8", "--gin=train.TrainConfig.dtype = 'bfloat16'")
    assert status == 0, text
    assert report["chips"] == 8 and report["headroom"] > 15 * aot.GIB and "MFU" in text


def test_a_wrong_topology_is_one_sentence_with_those_that_exist(tmp_path):
    status, text, _ = compile_run(tmp_path, "--gin_file=gin_configs/runs/sft_8b.gin", "--topology=v5p:3x3x3")
    assert status == 2 and "v5p:4x4x8 (v5p-256, 128 chips)" in text and text.count("\n") == 1


def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    error = aot.DoesNotFit(40 * aot.GIB, 31.25 * aot.GIB, ["context = 2", "a larger slice"])
    assert str(error) == ("a step must fit into 31.2 GiB per chip; it needs 40.0 GiB, 8.8 too many; "
                          "what may help: context = 2; a larger slice")
