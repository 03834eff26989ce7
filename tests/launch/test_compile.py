"""launch.compile: the mistakes it rejects before compiling, and its report of a compiled step."""

import dataclasses
import math
import shlex

import pytest
from absl import flags
from absl.testing import flagsaver

from launch import compile as compile_lib
from launch import run
from molmo2_jax import sharding
from molmo2_jax.aot import step as aot_step
from molmo2_jax.cost import bounds
from molmo2_jax.cost import flops

SFT = "gin_configs/runs/sft_8b.gin"


@pytest.fixture(autouse=True)
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def refused(**values):
    with flagsaver.flagsaver(**values), pytest.raises(ValueError) as caught:
        compile_lib.main([])
    return str(caught.value)


def test_a_wrong_topology_is_one_sentence_with_those_that_exist():
    message = refused(gin_file=[SFT], topology="v5p:3x3x3")
    assert "v5p:4x4x8 (v5p-256, 128 chips)" in message and "\n" not in message
    missing = refused(gin_file=[SFT], topology=None)
    assert "known slices: v4:" in missing and "v5e:4x4 (v5litepod-16)" in missing and "tpu7x:4x4x4" in missing


def test_a_model_alone_has_no_step_to_compile(monkeypatch):
    monkeypatch.setattr(aot_step, "prepare", lambda: pytest.fail("went on"))
    message = refused(gin_file=["gin_configs/models/nano.gin"], topology="v5p-256")
    assert "run.RunConfig.data, run.RunConfig.optim, run.RunConfig.train" in message


def test_a_run_without_gin_file_is_told_to_name_one():
    assert refused(topology="v5p-256").startswith("--gin_file must be given")


@pytest.mark.parametrize("value", [["1"], ["0.5", "0"], ["1.1", "1"], ["a", "1"], ["0.1", "0.1", "0.1"]])
def test_a_fill_that_is_not_two_shares_is_refused(value):
    assert "--fill must be two shares" in refused(gin_file=[SFT], topology="v5p-256", fill=value)


# A step of a nano model on two slices; by formula its ViT keeps more bytes than are live at the peak.
REPORT = aot_step.StepReport(
    topology="v5e:2x2", slices=2, chips=8, mesh={"data": 2, "fsdp": 4, "tensor": 1, "context": 1}, rows=8,
    accumulate=1, remat="full", vision_remat="full",
    parameters=2**20, optimiser=2**21, offloaded=0, data=2**20,
    temporaries=2**20, vision=2**22, peak=5 * 2**20, available=15 * 2**30,
    flops=flops.Flops(1e9, 1e9, 1e9, 1e9), hardware_flops=5e9, collectives={"ici all-gather": 2.0**21},
    traffic=(), seconds_bound=4.2e-4, bounded_by="dcn", mfu_bound=0.1, compile_seconds=3.0,
    strict=bounds.Strict(flops=6e9, compute=6e-4, ici=2e-4, ici_bfloat16=1e-4, dcn=5e-4, mfu=0.07))


def test_the_table_adds_up_to_the_peak_and_small_numbers_can_be_read():
    lines = compile_lib.table(REPORT).splitlines()
    size = lambda name: float(next(line for line in lines if name in line).split(name)[1].split()[0])
    parts = ("parameters ", "optimiser", "data  ", "all else at the peak")
    assert sum(map(size, parts)) == size("  peak ") == 5.0
    assert any("of the ViT, at most" in line and "4.00 MiB" in line for line in lines)
    assert any("420 us (bounded by dcn)" in line for line in lines)
    strictly = lines.index("strictly, at least         600 us (bounded by compute), 1.3 ms if nothing "
                           "overlaps; useful MFU at most 7.0%")
    assert "6e+09" in lines[strictly + 1] and "200 us; 100 us with gradients" in lines[strictly + 2]
    assert "bytes per chip" in lines
    halves = dataclasses.replace(REPORT, chips=4)
    assert "bytes per device (two per chip)" in compile_lib.table(halves)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "long_context"])
def test_the_flags_for_training_give_the_mesh_that_was_compiled(stage):
    words = shlex.split(compile_lib.shown(compile_lib.bindings(REPORT, with_remat=True)))
    config = run.resolve([f"gin_configs/runs/{stage}_4b.gin"],
                         [word.removeprefix("--gin=") for word in words])
    sizes = sharding.mesh_sizes(config.mesh, math.prod(REPORT.mesh.values()))
    assert dict(zip(sharding.AXES, sizes)) == REPORT.mesh and config.train.remat == "full"
    assert not any("remat" in one for one in compile_lib.bindings(REPORT, with_remat=False))


@pytest.mark.slow(9)
def test_a_step_on_one_device_is_estimated_with_what_would_fit():
    text = compile_lib.estimated(run.resolve(["gin_configs/runs/finetune_8b.gin"]), 24.0)
    assert text.startswith("an estimate by formula; nothing was compiled")
    assert "does not fit; what would: " in text
    assert "finetune.LoraConfig.base = 'int8'" in text and "frozen parameters           16.1" in text
    assert compile_lib.estimated(run.resolve(["gin_configs/runs/finetune_4b.gin"]), 80.0).endswith("fits")
