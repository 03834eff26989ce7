"""The gin files people start from: runs resolve with all their parts, ablations change what they say."""

import dataclasses

import pytest

from launch import run

ABSENT = "absent"
BASE = "gin_configs/runs/quickstart.gin"
ABLATIONS = {  # file: {path of a field: (value in the base run, value here)}
    "causal_visual_tokens": {"model.visual_attention": ("image_tokens", "causal")},
    "pool_4x4": {"model.connector.video_window": ((3, 3), (4, 4))},
    "no_frame_times": {"inputs.frame_time_text": (True, False)},
}


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
    resolved = run.resolve([path])
    assert None not in (resolved.tokenizer, resolved.data, resolved.optim, resolved.train)
    shape = resolved.data.shape(resolved.model)
    assert shape["M"] > 0 and 0 < shape["R"] < shape["T"]


def test_every_ablation_is_listed_here():
    assert {path.stem for path in files("ablations")} == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_its_run_in_the_intended_fields_only(name):
    ablation = run.resolve([f"gin_configs/ablations/{name}.gin"])
    assert differences(run.resolve([BASE]), ablation) == ABLATIONS[name]


def test_a_part_that_one_side_lacks_is_a_difference():
    base = run.resolve([BASE])
    found = differences(base, dataclasses.replace(base, optim=None))
    assert found["optim"] == (ABSENT, None)
    assert found["optim.vit.lr"] == (base.optim.vit.lr, ABSENT)
