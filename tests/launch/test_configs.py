"""The gin files people start from: runs resolve with all their parts, ablations change what they say."""

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


@functools.cache
def resolve(*gin_files):
    return run.resolve([run.ROOT / "gin_configs" / path for path in gin_files])


def files(folder):
    return sorted((run.ROOT / "gin_configs" / folder).rglob("*.gin"))


def fields(value, path=""):
    """Returns {path: value} of all fields in a tree of dataclasses that are no dataclasses themselves."""
    if not dataclasses.is_dataclass(value):
        return {path: value}
    found = {}
    for field in dataclasses.fields(value):
        found |= fields(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    return found


def differences(first, second):
    """Returns {path: (first value, second value)} where two configurations differ."""
    old, new = fields(first), fields(second)
    pairs = {path: (old.get(path, ABSENT), new.get(path, ABSENT)) for path in old.keys() | new.keys()}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("path", files("runs"), ids=lambda path: path.stem)
def test_runs_resolve_with_everything_that_training_needs(path):
    resolved = resolve(path.relative_to(run.ROOT / "gin_configs"))
    assert None not in (resolved.tokenizer, resolved.data, resolved.optim, resolved.train)
    shape = resolved.data.shape(resolved.model)
    assert shape.M > 0 and 0 < shape.R <= shape.T


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_runs_of_the_recipe_have_its_numbers(stage, size):
    resolved = resolve(f"runs/{stage}_{size}.gin")
    data, optim, train = resolved.data, resolved.optim, resolved.train
    towers = optim.vit, optim.connector, optim.llm
    assert resolved.model == getattr(config, f"molmo2_{size}")()
    assert (train.steps, data.row_tokens, data.row_crops, resolved.inputs.max_frames,
            *(tower.lr for tower in towers), *(tower.warmup for tower in towers), train.residual_dropout,
            train.response_dropout, train.save_every, data.seed) == STAGES[stage]
    assert (data.batch_rows, data.packer, train.seed, train.dtype, train.z_weight) == (
        128, packers.OldestFirst(), 6198, "bfloat16", 1e-4)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip_norm, optim.floor,
            optim.frozen, optim.muon) == (0.9, 0.95, 1e-6, 0.0, 1.0, 0.1, ("base_embedding",), None)
    assert (resolved.inputs.max_crops, resolved.inputs.high_res_crops, resolved.inputs.max_fps) == (8, 24, 2)


def test_every_run_of_the_recipe_is_tested():
    assert {path.stem for path in files("runs")} >= {f"{stage}_{size}" for stage in STAGES for size in SIZES}


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
    for path in files("stages"):
        included |= {run.ROOT / name for name in re.findall(r"include '(.*)'", path.read_text())}
    assert set(files("models")) | set(files("data")) | set(files("stages")) <= included


def test_a_part_that_one_side_lacks_is_a_difference():
    base = resolve("runs/quickstart.gin")
    found = differences(base, dataclasses.replace(base, optim=None))
    assert found["optim"] == (ABSENT, None)
    assert found["optim.vit.lr"] == (base.optim.vit.lr, ABSENT)
