"""Steps compiled for TPUs that are not there: collectives, operations, memory, and the names of slices."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from launch import run
from molmo2_jax import aot
from molmo2_jax import chips
from molmo2_jax import config as config_lib
from molmo2_jax import flops
from molmo2_jax import loss
from molmo2_jax.model import molmo2
from tests import packs

# Elementwise work, softmax and norms, which XLA counts and the formula does not: 1.4 % measured.
FLOPS_TOLERANCE = 0.025

HLO = """HloModule jit_step
%all-reduce-scatter.1 (input: f32[64,32]) -> f32[16,32] {
  %all-reduce.7 = f32[64,32]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%body.1 (p: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %ag = bf16[64,32]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
  %rs = f32[16,32]{1,0} fusion(%ag), kind=kCustom, calls=%all-reduce-scatter.1
}
%cond.1 (p: (s32[], bf16[64,32])) -> pred[] {
  %n = s32[] constant(36)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], bf16[64,32]) while(%t), condition=%cond.1, body=%body.1
  %sum = f32[8]{0} all-reduce(%a), replica_groups=[1,8]<=[8], to_apply=%add
  %nothing = f32[8]{0} all-reduce(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
}
"""


def test_collectives_are_read_with_their_loops_groups_and_networks():
    found = {one.kind: one for one in aot.find_collectives(HLO, devices_per_slice=4)}
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    gather, scatter, reduce = found["all-gather"], found["reduce-scatter"], found["all-reduce"]
    assert (gather.times, gather.group, gather.size) == (36, 4, 64 * 32 * 2)
    assert gather.spans_slices  # devices 0, 2, 4, 6
    assert (scatter.times, scatter.group, scatter.size, scatter.spans_slices) == (36, 4, 64 * 32 * 4, False)
    assert (reduce.times, reduce.group, reduce.traffic) == (1, 8, 2 * 32 * 7 / 8)
    assert aot.collectives(HLO, 8).keys() == {"ici all-gather", "ici reduce-scatter", "ici all-reduce"}


def test_operations_are_those_that_xla_counts_in_one_layer():
    model = config_lib.Molmo2Config(
        vision=config_lib.VisionConfig(image_size=28, patch_size=4, width=128, num_layers=1, num_heads=4,
                                       head_dim=32, mlp_width=384),
        connector=config_lib.ConnectorConfig(taps=(0,), num_heads=4, head_dim=32, mlp_width=256),
        text=config_lib.TextConfig(vocab_size=512, width=192, num_layers=1, num_heads=6, num_kv_heads=2,
                                   head_dim=32, mlp_width=512, max_positions=256))
    B, T, M, R, W = 2, 128, 4, 32, 9
    batch = packs.random_rows(0, model, B, T, M, R)
    module = molmo2.Molmo2(model, remat="none", attention="dense")

    def value(params):
        hidden = module.apply({"params": params}, batch, method="hidden")
        logits = module.apply({"params": params}, hidden, method="logits")
        return loss.objective(loss.token_sums(logits, batch.targets, batch.weights), 0.0)[0]

    params = packs.random_params(model)
    shape = dict(tokens=B * T, crops=B * M, windows=B * R, slots=W, pairs=B * T * T)
    forward = jax.jit(value).lower(params).cost_analysis()["flops"]
    assert flops.forward(model, **shape).total == pytest.approx(forward, rel=FLOPS_TOLERANCE)
    both = jax.jit(jax.value_and_grad(value)).lower(params).cost_analysis()["flops"]
    once = flops.train_step(model, rows=B, T=T, M=M, R=R, W=W, density=1.0)
    assert once.total == pytest.approx(both, rel=FLOPS_TOLERANCE)


def test_the_mesh_of_a_slice_has_a_row_for_each_group_of_devices():
    meshes = {number: aot.default_mesh(128, number) for number in (16, 128, 256)}
    assert [(m.data, m.fsdp, m.context) for m in meshes.values()] == [(1, 16, 1), (8, 16, 1), (8, 16, 2)]


def test_cloud_names_count_cores_where_they_do():
    assert chips.find("v5p-256") == chips.find("v5p:4x4x8") and chips.find("v5p-256").chips == 128
    assert chips.find("v6e-256").chips == 256 and chips.find("v5litepod-16").chips == 16
    assert (chips.find("v5p-256").hosts, chips.find("v6e-8").hosts, chips.find("v6e-16").hosts) == (32, 1, 4)
    with pytest.raises(ValueError, match=r"v5p:2x2x2 \(v5p-16, 8 chips\).*got 'v5p-17'"):
        chips.find("v5p-17")
    with pytest.raises(ValueError, match="v4:..., v5e:..., v5p:..., v6e:...; got 'v9'"):
        chips.find("v9")


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
