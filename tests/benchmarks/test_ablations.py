import dataclasses
import json

import pytest

from benchmarks import ablations
from data_pipelines import annotations
from data_pipelines import sources
from launch import run
from launch.support import comparison


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    few = {name: dataclasses.replace(folder, examples=min(folder.examples, 3))
           for name, folder in ablations.FOLDERS.items()}
    for sweep in ablations.SWEEPS.values():
        ablations.draw([*sweep.data, *sweep.heldout], root, few)
    return root


@pytest.mark.slow(15)
def test_every_folder_is_drawn_and_valid(root):
    for name in ablations.FOLDERS:
        examples, errors = sources.read_folder(root / name)
        assert examples and not errors, name


@pytest.mark.slow(15)
def test_the_records_of_a_tree_are_the_questions_of_its_branches(root):
    trees, single = (sources.read_folder(root / name)[0] for name in ("near", "single"))
    asked = [(tree.video, one) for tree in trees for one in tree.annotations]
    assert [(one.video, one.annotations[0]) for one in single][:len(asked)] == asked
    assert {len(one.annotations) for one in single} == {1}


@pytest.mark.slow(15)
def test_counting_alone_has_the_same_clips_and_numbers_without_points_in_answers(root):
    points, alone = (sources.read_folder(root / name)[0] for name in ("points_then_count", "count_alone"))
    for one, other in zip(points, alone, strict=True):
        assert one.video == other.video
        assert all(isinstance(a, annotations.Points) and a.modes == ("point_count",) and b.modes == ("count",)
                   and a.points == b.points for a, b in zip(one.annotations, other.annotations, strict=True))


@pytest.mark.slow(15)
def test_frames_of_every_clip_are_on_the_grid_of_its_masks(root):
    for name, seconds in (("near_heldout", {0.0, 0.5, 1.0, 1.5}), ("far_heldout", {0.0, 1.0, 2.0, 3.0})):
        for line in (root / name / "annotations.jsonl").read_text().splitlines():
            assert seconds <= {mask["time"] for mask in json.loads(line)["masks"]}


@pytest.mark.parametrize("name", ablations.SWEEPS)
def test_arms_train_on_drawn_folders_only(name):
    sweep = ablations.SWEEPS[name]
    for path in sweep.arms:
        for folder in run.resolve([path]).data.train:
            assert folder.removeprefix(f"{ablations.ROOT}/data/") in sweep.data, path


def test_a_row_of_the_table_is_the_mean_difference_of_equal_seeds(tmp_path):
    sweep = ablations.SWEEPS["counting"]
    assert "| A10 | `count_alone` | counts −6.4 | not run |" in ablations.table(sweep, tmp_path)
    accuracies = {"small_counting": ("points_then_count", (0.5, 0.7)),
                  "count_alone": ("count_alone", (0.4, 0.4))}
    record = {}
    for arm, (folder, values) in accuracies.items():
        for seed, value in enumerate(values):
            name = f"{arm}_seed-{seed}"
            record[name] = [f"{arm}.gin", *(f"{field} = {seed}" for field in comparison.SEED_FIELDS)]
            (tmp_path / name).mkdir()
            scores = {f"runs/{folder}_heldout": {"count_accuracy": value}}
            (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    # Differences -0.1 and -0.3: deviation 0.1414, Student's t of one degree of freedom 12.706.
    assert "counts 0.600, -0.200 ± 1.271 |" in ablations.table(sweep, tmp_path)
