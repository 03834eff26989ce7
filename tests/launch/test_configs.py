"""The included gin files: runs resolve with all their parts, ablations change exactly what they claim."""

import dataclasses
import functools
import re

import pytest

from launch import run
from molmo2_jax import config
from molmo2_jax.inputs import packers

ABSENT = "absent"
CAUSAL = {"model.visual_attention": ("image_tokens", "causal")}
POOL_4X4 = {"model.connector.video_window": ((3, 3), (4, 4))}
POOL_2X2 = {"model.connector.video_window": ((3, 3), (2, 2))}
NO_TIMES = {"inputs.frame_time_text": (True, False)}
ABLATIONS = {  # file: (base run, {path of a field: (value in the base run, value here)})
    "causal_visual_tokens": ("quickstart", CAUSAL),
    "pool_4x4": ("quickstart", POOL_4X4),
    "no_frame_times": ("quickstart", NO_TIMES),
    "points_as_tokens": ("quickstart", {
        "model.pointer": (None, ABSENT), "optim.pointer.lr": (1e-4, 5e-3), "optim.pointer.warmup": (200, 50),
        **{f"model.pointer.{field.name}": (ABSENT, field.default)
           for field in dataclasses.fields(config.PointerConfig)}}),
    "small/causal": ("small", CAUSAL),
    "small/within_image": ("small", {"model.visual_attention": ("image_tokens", "within_image")}),
    "small/even_weights": ("small", {"data.weights.pointing": (0.2, 1.0),
                                     "data.weights.by_length": (True, False)}),
    "small/no_frame_times": ("small", NO_TIMES),
    "small/pool_2x2": ("small", {**POOL_2X2, "data.row_tokens": (1024, 1280)}),
    "small/pool_5x5": ("small", {"model.connector.video_window": ((3, 3), (5, 5))}),
    "small/one_example_per_row": ("small", {"data.packer.buffer": (48, 1)}),
    "small/one_annotation_per_row": ("small", {
        "data.packer.buffer": (48, 1),
        "data.train": (("runs/ablations/data/near", "runs/ablations/data/far"),
                       ("runs/ablations/data/single",))}),
    "small/count_alone": ("small_counting", {"data.train": (
        ("runs/ablations/data/points_then_count",), ("runs/ablations/data/count_alone",))}),
    "recipe/causal_visual_tokens": ("sft_4b", CAUSAL),
    "recipe/pool_4x4": ("sft_4b", POOL_4X4),
    "recipe/no_frame_times": ("sft_4b", NO_TIMES),
    "recipe/pool_2x2": ("sft_4b", {**POOL_2X2, "inputs.max_frames": (128, 52)}),
    "recipe/pool_2x2_all_frames": ("sft_4b", {**POOL_2X2, "data.row_tokens": (16384, 36864)}),
    "recipe/one_example_per_row": ("sft_4b", {"data.packer.buffer": (80, 1)}),
    "recipe/reference_packing": ("sft_4b", {
        "data.packer.buffer": (80, 48), "data.packer.text_weight": (ABSENT, 1.0),
        "data.packer.image_weight": (ABSENT, 30.0), "data.packer.emit_full_crops_alone": (ABSENT, False),
        "data.packer.max_wait": (96, ABSENT), "data.packer.waste": (0.01, ABSENT),
        "data.packer.slack": (0.1, ABSENT), "data.packer.steps": (512, ABSENT)}),
    **{f"recipe/{name}": ("sft_4b", {"data.train": ("sft", f"sft_{name}")})
       for name in ("even_weights", "counts_as_they_come", "counts_without_points",
                    "tracks_without_points", "captions_without_video_qa")},
    "recipe/pretrain_without_pointing": ("pretrain_4b", {
        "data.train": ("pretrain", "pretrain_without_pointing")}),
    "recipe/ask_224_frames": ("sft_8b", {"inputs.max_frames": (128, 224)}),
    "recipe/ask_332_frames_pool_5x5": ("sft_8b", {"model.connector.video_window": ((3, 3), (5, 5)),
                                                  "inputs.max_frames": (128, 332)}),
}

# The recipe (paper, section 3.3 and appendix), the same for all sizes: steps, tokens and crops of a row,
# frames, peak rates of ViT, connector and decoder, their warm-ups, dropout of all and of answers, steps
# between saves, seed of the data.
STAGES = {
    "pretrain": (32000, 2560, 16, 16, 6e-6, 2e-4, 2e-5, 2000, 200, 2000, 0.0, 0.1, 4000, 95818),
    "sft": (30000, 16384, 128, 128, 5e-6, 5e-6, 1e-5, 200, 200, 200, 0.1, 0.0, 2000, 50189),
    "long_context": (2000, 36864, 384, 384, 5e-6, 5e-6, 1e-5, 200, 200, 200, 0.1, 0.0, 2000, 50189),
}
SIZES = ("4b", "8b", "o_7b")

# MolmoPoint (released scripts): as STAGES, then rows of a batch and the mixture. The pointer has 1e-4 and 200
# steps of warm-up everywhere.
POINT_STAGES = {
    "pretrain": (31000, 2536, *STAGES["pretrain"][2:], 128, "pretrain"),
    "sft": (22000, *STAGES["sft"][1:], 160, "molmo_point"),
    "long_context": (2000, 37376, *STAGES["long_context"][2:], 160, "molmo_point_long_context"),
    "gui": (2000, 12288, 49, 49, *STAGES["sft"][4:12], 500, 95818, 128, "molmo_point_gui"),
}
POINT_RUNS = [(stage, size) for size in ("8b", "vid_4b") for stage in POINT_STAGES
              if (stage, size) != ("gui", "vid_4b")]


@functools.cache
def resolve(*gin_files):
    return run.resolve([run.ROOT / "gin_configs" / path for path in gin_files])


def files(folder):
    return sorted((run.ROOT / "gin_configs" / folder).rglob("*.gin"))


def fields(value, path=""):
    """Returns {path: value} of all fields in a tree of dataclasses whose values are not dataclasses."""
    if not dataclasses.is_dataclass(value):
        return {path: value}
    found = {}
    for field in dataclasses.fields(value):
        found |= fields(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    return found


def differences(first, second):
    """Returns {path: (first value, second value)} for every difference between two configurations."""
    old, new = fields(first), fields(second)
    pairs = {path: (old.get(path, ABSENT), new.get(path, ABSENT)) for path in old.keys() | new.keys()}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("path", files("runs"), ids=lambda path: path.stem)
def test_runs_resolve_with_everything_that_training_needs(path):
    resolved = resolve(path.relative_to(run.ROOT / "gin_configs"))
    assert None not in (resolved.tokenizer, resolved.data, resolved.optim, resolved.train)
    shape = resolved.data.shape(resolved.model)
    assert shape.M > 0 and 0 < shape.R <= shape.T


def numbers(resolved):
    """Returns the numbers of a run in the order of STAGES; checks those that all stages share."""
    data, optim, train = resolved.data, resolved.optim, resolved.train
    towers = optim.vit, optim.connector, optim.llm
    assert (data.packer, train.seed, train.dtype, train.z_weight) == (
        packers.OldestFirst(), 6198, "bfloat16", 1e-4)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip_norm, optim.floor,
            optim.frozen, optim.muon) == (0.9, 0.95, 1e-6, 0.0, 1.0, 0.1, ("base_embedding",), None)
    return (train.steps, data.row_tokens, data.row_crops, resolved.inputs.max_frames,
            *(tower.lr for tower in towers), *(tower.warmup for tower in towers), train.residual_dropout,
            train.response_dropout, train.save_every, data.seed)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_runs_of_the_recipe_have_its_numbers(stage, size):
    resolved = resolve(f"runs/{stage}_{size}.gin")
    assert resolved.model == getattr(config, f"molmo2_{size}")()
    assert numbers(resolved) == STAGES[stage] and resolved.data.batch_rows == 128
    assert (resolved.inputs.max_crops, resolved.inputs.high_res_crops, resolved.inputs.max_fps) == (8, 24, 2)


@pytest.mark.parametrize("stage, size", POINT_RUNS)
def test_runs_of_molmo_point_have_the_released_numbers(stage, size):
    resolved = resolve(f"runs/molmo_point_{stage}_{size}.gin")
    assert resolved.model == getattr(config, f"molmo_point_{size}")()
    assert (*numbers(resolved), resolved.data.batch_rows, resolved.data.train) == POINT_STAGES[stage]
    assert (resolved.optim.pointer.lr, resolved.optim.pointer.warmup) == (1e-4, 200)
    assert (resolved.inputs.max_crops, resolved.inputs.max_images) == ((48, 1) if stage == "gui" else (8, 5))


def test_every_run_of_the_recipe_is_tested():
    names = {path.stem for path in files("runs")}
    assert names >= {f"{stage}_{size}" for stage in STAGES for size in SIZES}
    assert {name for name in names if name.startswith("molmo_point")} == {
        f"molmo_point_{stage}_{size}" for stage, size in POINT_RUNS}


def test_every_ablation_is_listed_here():
    folder = run.ROOT / "gin_configs" / "ablations"
    assert {str(path.relative_to(folder).with_suffix("")) for path in files("ablations")} == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_its_run_in_the_intended_fields_only(name):
    base, changed = ABLATIONS[name]
    assert differences(resolve(f"runs/{base}.gin"), resolve(f"ablations/{name}.gin")) == changed


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_one_or_two_lines(name):
    lines = (run.ROOT / f"gin_configs/ablations/{name}.gin").read_text().splitlines()
    bindings = [line for line in lines if line and not line.startswith(("#", "from ", "include "))]
    assert 1 <= len(bindings) <= 2


@pytest.mark.parametrize("path", files("models"), ids=lambda path: path.stem)
def test_models_resolve_alone(path):
    assert resolve(path.relative_to(run.ROOT / "gin_configs")).data is None


def test_every_gin_file_is_part_of_a_run_or_an_ablation():
    included = set()
    for folder in ("runs", "ablations"):
        for path in files(folder):
            included |= {run.ROOT / name for name in re.findall(r"include '(.*)'", path.read_text())}
    for path in (*files("stages"), *files("models")):
        included |= {run.ROOT / name for name in re.findall(r"include '(.*)'", path.read_text())}
    assert set(files("models")) | set(files("data")) | set(files("stages")) <= included


def test_a_part_that_one_side_lacks_is_a_difference():
    base = resolve("runs/quickstart.gin")
    found = differences(base, dataclasses.replace(base, optim=None))
    assert found["optim"] == (ABSENT, None)
    assert found["optim.vit.lr"] == (base.optim.vit.lr, ABSENT)
