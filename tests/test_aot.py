"""Steps compiled for TPUs that are not there: memory, operations, what they move."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from launch import run
from molmo2_jax import aot
from molmo2_jax import chips
from molmo2_jax import hlo


def test_the_mesh_of_a_slice_has_a_row_for_each_group_of_devices():
    meshes = {number: aot.default_mesh(128, number) for number in (16, 128, 256)}
    assert [(m.data, m.fsdp, m.context) for m in meshes.values()] == [(1, 16, 1), (8, 16, 1), (8, 16, 2)]
    several = aot.default_mesh(128, 256, slices=2)  # 64 rows for each slice's 128 chips
    assert (several.data, several.fsdp, several.context) == (8, 16, 2)


# Bytes. Numbers of crops are gathered by sums where context divides the crops: 1,536 of 384, in an 8B step.
SMALLEST_KERNEL = 4096

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def run_apart(*command):
    """Returns status and output of a Python process: compiling for TPU changes settings of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, *command], cwd=run.ROOT, env=environment, capture_output=True,
                          text=True, check=False)
    return done.returncode, done.stdout + done.stderr


EIGHT_B = """
import json, re
from launch import compile, run
from molmo2_jax import aot
config = run.resolve(["gin_configs/runs/sft_8b.gin"])
aot.prepare()
shape = config.data.shape(config.model)
report, program = aot.compile_step(
    config.model, config.train, config.optim, shape, config.data.batch_rows, "v5p-256")
found = set(re.findall(r"\\b(?:pred|[a-z]+\\d+)\\[([\\d,]+)\\]", program))
print(json.dumps([compile.as_dict(report), shape.T, [list(map(int, one.split(","))) for one in found]]))
"""


@pytest.fixture(scope="module")
def eight_b():
    """Returns (report, tokens of a row, shapes of all arrays) of the 8B's step of fine-tuning."""
    status, text = run_apart("-c", EIGHT_B)
    assert status == 0, text
    return json.loads(next(line for line in text.splitlines() if line.startswith("[{")))


@needs_libtpu
@pytest.mark.slow(155)
def test_the_8b_fine_tuning_step_of_the_recipe_fits_on_128_chips(eight_b):
    report = eight_b[0]
    assert report["chips"] == 128 and report["mesh"] == {"data": 8, "fsdp": 16, "tensor": 1, "context": 1}
    assert report["headroom"] > 0 and report["peak"] < 40 * chips.GIB  # 28.4 measured
    assert report["mfu_bound"] > 0.6 and report["bounded_by"] == "compute"
    assert report["collectives"]["ici all-gather"] > 20 * chips.GIB  # weights, layer by layer
    # Sums of the head's gradient and of gradients over data; a weight gathered by sums would add 30 GiB.
    assert report["collectives"]["ici all-reduce"] < 12 * chips.GIB
    assert report["collectives"].get("ici " + hlo.GATHER_BY_SUM, 0) < SMALLEST_KERNEL


@needs_libtpu
@pytest.mark.slow(155)
def test_no_array_of_the_8b_step_has_two_sides_as_long_as_a_row(eight_b):
    _, tokens, shapes = eight_b
    longest = [sorted([1, *shape])[-2:] for shape in shapes]
    assert tokens == 16_384 and [1, tokens] < max(longest)
    assert not [pair for pair in longest if pair[0] >= tokens]


# Several programs in one process: starting one costs as much as compiling a nano step.
NANO = """
import dataclasses, json, sys
from launch import compile, run
from molmo2_jax import aot, aot_fit, aot_generate
config = run.resolve(["gin_configs/runs/quickstart.gin"], ["pipeline.DataConfig.batch_rows = 8",
    "train.TrainConfig.dtype = 'bfloat16'", "train.TrainConfig.remat = 'full'"])
aot.prepare()
said, shape = [], config.data.shape(config.model)
waiting = dataclasses.replace(config, optim=dataclasses.replace(config.optim, offload=True))
two_slices = compile.compile_one(waiting, "v5e:2x2", slices=2)
def one(mesh, remat):
    train = dataclasses.replace(config.train, remat=remat, vision_remat="dots")
    return compile.compile_one(dataclasses.replace(config, train=train, mesh=mesh), "v6e:2x4")
meshes = aot_fit.candidates(8, shape.T, 8)
fitted = aot_fit.search(one, meshes[1:], tries=1, seconds=600, say=said.append)
answers = aot_generate.compile_answers(config.model, shape, "v6e:1x1", new_tokens=8, dtype="bfloat16")
print(json.dumps([said, *map(compile.as_dict, (two_slices, fitted, answers))]))
print(compile.table(two_slices), compile.answers_table(answers), sep="\\n", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def nano():
    status, text = run_apart("-c", NANO)
    assert status == 0, text
    found = next(line for line in text.splitlines() if line.startswith("[["))
    return *json.loads(found), text


@needs_libtpu
@pytest.mark.slow(125)
def test_gradients_alone_cross_the_network_between_slices(nano):
    report = nano[1]
    assert report["chips"] == 8 and report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    across = sum(size for name, size in report["collectives"].items() if name.startswith("dcn"))
    assert 0 < across <= 4.1 * report["parameters"]  # of 4 parts; activations would be many times more


@needs_libtpu
@pytest.mark.slow(125)
def test_offloaded_moments_take_no_memory_of_the_chip(nano):
    report, plain, text = nano[1], nano[2], nano[4]
    assert report["optimiser"] < 1000 < report["parameters"] < report["offloaded"]  # counts stay
    assert report["collectives"]["host"] == 2 * report["offloaded"] and "iB in the host's memory" in text
    assert plain["offloaded"] == 0 < plain["parameters"] < plain["optimiser"]


@needs_libtpu
@pytest.mark.slow(125)
def test_no_weight_is_gathered_by_a_sum(nano):
    for report in nano[1:3]:
        assert report["collectives"]["ici all-gather"] > 0
        assert report["collectives"].get("ici " + hlo.GATHER_BY_SUM, 0) < SMALLEST_KERNEL


@needs_libtpu
@pytest.mark.slow(125)
def test_a_search_compiles_what_may_fit_and_says_so(nano):
    said, report = nano[0], nano[2]
    assert len(said) == 1 and "remat 'full'" in said[0] and "GiB left" in said[0]
    assert (report["remat"], report["vision_remat"]) == ("full", "dots")
    assert report["chips"] == 8 and report["mesh"]["context"] == 2 and report["headroom"] > 25 * chips.GIB


@needs_libtpu
@pytest.mark.slow(125)
def test_answering_compiles_for_one_chip(nano):
    report, text = nano[3], nano[4]
    assert report["topology"] == "v6e:1x1" and report["headroom"] > 25 * chips.GIB
    assert min(report["prefill_peak"], report["decode_peak"]) > report["parameters"] > 0
    # keys and values, bfloat16, of 3 layers with 2 heads of 32
    assert report["memory"] == 2 * 2 * 3 * 2 * 32 * (report["prompt_tokens"] + report["new_tokens"])
    assert "a token takes at least" in text and "no step takes less than" in text


def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    error = aot.DoesNotFit(40 * chips.GIB, 31.25 * chips.GIB, ["context = 2", "a larger slice"])
    assert str(error) == ("a step must fit into 31.2 GiB per chip; it needs 40.0 GiB, 8.8 too many; "
                          "what may help: context = 2; a larger slice")
    assert error.hints == ["context = 2", "a larger slice"]
