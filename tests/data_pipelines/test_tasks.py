import math

import pytest

from data_pipelines import pipeline
from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines.doctor import mixture as mixture_lib
from launch import run
from molmo2_jax import types


def member(task, **fields):
    return tasks.Member(task=task, **fields)


def test_a_group_splits_its_share_by_the_square_roots_of_its_members_sizes():
    mixture = (tasks.Group(rate=3.0, members=(member("a"), member("b"))),
               tasks.Group(rate=1.0, members=(member("c"),)))
    shares = tasks.rates(mixture, {"a": 100, "b": 400, "c": 7})
    assert shares == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25})


@pytest.mark.parametrize("fields, size", [
    ({}, 20.0), ({"root_size_factor": 0}, 1.0), ({"root_size_factor": 0.25}, 10.0),
    ({"root_size_factor": 1}, 1.0), ({"root_size_factor": 60_000}, math.sqrt(60_000)),
    ({"sampling_rate": 1.5}, 30.0)])
def test_a_member_may_assume_another_size(fields, size):
    assert member("a", **fields).size(400) == pytest.approx(size)


def test_folders_have_shares_by_size_or_by_the_given_rates():
    (mixture,), known = tasks.of_folders(("x/a", "x/b"))
    assert known["x/a"].folder == "x/a"
    assert tasks.rates(mixture, {"x/a": 100, "x/b": 900}) == pytest.approx({"x/a": 0.25, "x/b": 0.75})
    (mixture,), _ = tasks.of_folders((("x/a", 0.2), ("x/b", 0.6)))
    assert tasks.rates(mixture, {"x/a": 100, "x/b": 900}) == pytest.approx({"x/a": 0.25, "x/b": 0.75})


def test_a_folder_may_have_a_rate_for_each_lesson_and_be_unused_in_some():
    sizes = {"a": 100, "b": 900, "c": 4}
    mixtures, known = tasks.of_folders((("a", (1.0, 0.0)), ("b", (1.0, 3.0)), ("c", 1.0)), 2)
    assert set(known) == {"a", "b", "c"}
    first, second = (tasks.rates(mixture, sizes) for mixture in mixtures)
    assert first == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert second == pytest.approx({"b": 0.75, "c": 0.25})


def test_folders_without_rates_keep_their_shares_in_every_lesson():
    mixtures, _ = tasks.of_folders(("a", "b"), 3)
    assert [tasks.rates(mixture, {"a": 1, "b": 9}) for mixture in mixtures] == [{"a": 0.25, "b": 0.75}] * 3


def test_mixtures_name_known_tasks_and_none_twice():
    for mixture in tasks.MIXTURES.values():
        assert {one.task for one in tasks.members(mixture)} <= set(tasks.TASKS)
    twice = (tasks.Group(rate=1.0, members=(member("a"),)), tasks.Group(rate=1.0, members=(member("a"),)))
    with pytest.raises(ValueError, match="not appear twice.*'a'"):
        tasks.members(twice)


def test_mixtures_of_ablations_change_one_thing():
    def of(name):
        return {one.task: one for one in tasks.members(tasks.MIXTURES[name])}

    sft, even, counts = of("sft"), of("sft_even_weights"), of("sft_counts_as_they_come")
    without = of("sft_counts_without_points")
    assert even.keys() == sft.keys() == counts.keys() == without.keys()
    assert {(one.weight.scale, one.weight.by_length, one.weight.by_branches) for one in even.values()} == {
        (1.0, False, False)}
    video_points = {"molmo2_video_point_0_5", "molmo2_video_point_6_25", "molmo2_video_point_26_60",
                    "academic_video_point"}
    assert {name for name in sft if counts[name] != sft[name]} == video_points
    assert {name for name in sft if without[name].point_modes == ("count",)} == video_points
    sizes = {name: 900 if "26_60" in name else 90_000 for name in sft}
    rare = "molmo2_video_point_26_60"
    upsampled, plain = (tasks.rates(tasks.MIXTURES[name], sizes)[rare]
                        for name in ("sft", "sft_counts_as_they_come"))
    assert upsampled == pytest.approx(0.15 / 1.1 * 0.1) and plain == pytest.approx(0.15 / 1.1 * 30 / 930)
    gone = sft.keys() - of("sft_tracks_without_points").keys()
    assert {name.rpartition("point")[1] or name for name in gone} == {"point", "pixmo_count"}
    assert "molmo2_cap" in of("sft_captions_without_video_qa") and not {"molmo2_cap_qa", "tgif"} & set(
        of("sft_captions_without_video_qa"))
    assert of("pretrain_without_pointing").keys() == {"pixmo_cap_with_transcripts", "tulu_short"}


@pytest.mark.parametrize("make, rule", [
    (lambda: tasks.of_folders(()), "at least one data folder"),
    (lambda: tasks.of_folders(("a", ("b", 0.5))), "either all data folders must"),
    (lambda: tasks.of_folders((("a", -1.0),)), "one rate >= 0.*-1.0.*for a"),
    (lambda: tasks.of_folders((("a", (1.0, 2.0)),), 3), "one rate >= 0 for each of the 3 lessons"),
    (lambda: tasks.of_folders((("a", 1.0), ("a", 1.0))), "not appear twice"),
    (lambda: tasks.of_folders(("a", "a")), "not appear twice"),
    (lambda: tasks.Group(rate=-1.0, members=(member("a"),)), "rate of a group"),
    (lambda: tasks.Group(rate=1.0, members=()), "at least one member"),
    (lambda: member("a", sampling_rate=0), "sampling_rate"),
    (lambda: member("a", high_res_share=1.5), "high_res_share"),
    (lambda: member("a", point_modes=("point",)), "point_modes must be among bare.*'point'.*for a"),
    (lambda: member("a", root_size_factor=-1), "root_size_factor")])
def test_invalid_mixtures_are_refused(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()


# Training examples of each set, after questions were grouped into trees (paper).
SIZES = {"pixmo_ask_model_anything": 71_000, "pixmo_cap_qa": 190_000, "molmo2_multi_image_qa": 45_000,
         "molmo2_human_qa": 43_000, "molmo2_cap": 100_000, "molmo2_cap_qa": 190_000,
         "molmo2_subtitle_qa": 100_000, "video_localized_narratives": 56_000, "vqa2": 83_000,
         "tally_qa": 130_000, "llava_665k_multi": 160_000, "pixmo_points": 530_000, "pixmo_count": 74_000,
         "cosyn_point": 68_000, "academic_video_point": 44_000, "tulu": 980_000,
         "pixmo_cap": 710_000, "pixmo_cap_with_transcripts": 710_000, "pixmo_multi_points": 470_000,
         "tgif": 63_000, "tvqa_with_sub": 120_000, "paxion": 440_000,
         "moments_in_time_qa": 710_000, "kinetics_qa": 420_000}
POINT_SIZES = {"molmo_point_gui": 36_192, "molmo_point_track_any": 34_874, "molmo_point_track_syn": 76_165}
TRACKED = {"molmo2_video_track": 220_000, "mevis": 150_000, "vicas": 130_000, "vasttrack": 93_000,
           "revos": 82_000, "lv_vis": 38_000, "trackingnet": 29_000, "ref_yt_vos": 26_000}
UNLISTED = 10_000   # examples of the sets whose size the paper does not list
ASSUMED = {"pixmo_cap": 100_000, "tgif": 60_000, "tvqa_with_sub": 60_000, "paxion": 60_000,
           "moments_in_time_qa": 60_000, "kinetics_qa": 60_000, "dv_qa": 10_000, "figure_qa": 10_000,
           "plot_qa": 20_000, "vicas_track": 30_000, "vicas_ground": 30_000, "vicas_single_point": 30_000,
           "pixmo_multi_points": 200_000, "molmo_point_track_syn": 10_000}
TRACKING = {"track": 0.4, "track_tail": 0.05, "ground": 0.2, "ground_tail": 0.01, "single_point": 0.15,
            "boxes": 0.2, "boxes_tail": 0.1}
POINT_TRACKING = TRACKING | {"track": 0.45, "track_tail": 0.07}
VIDEO_POINTING = {"molmo2_video_point_0_5": 0.4, "molmo2_video_point_6_25": 0.3,
                  "molmo2_video_point_26_60": 0.1, "academic_video_point": 0.2,
                  "molmo2_video_point_oversampled": 0.8, "molmo2_video_point_whole": 0.8}


def split_name(task):
    """Returns the source and the sub-group of a tracking task; the second is None for other tasks."""
    if task in POINT_SIZES:
        return task, "track" if "track" in task else None
    kind = next((kind for kind in sorted(TRACKING, key=len, reverse=True) if task.endswith(f"_{kind}")), None)
    return task.removesuffix(f"_{kind}"), kind


def size(task):
    return (SIZES | POINT_SIZES).get(task, TRACKED.get(split_name(task)[0], UNLISTED))


def weight(task, tracking=TRACKING):
    """Returns the weight of a task within its group, by the recipe's rules."""
    if task in VIDEO_POINTING:
        return VIDEO_POINTING[task]
    kind = split_name(task)[1]
    factor = 1.5 if task == "molmo2_cap" else tracking[kind] / sum(tracking.values()) if kind else 1.0
    return factor * math.sqrt(ASSUMED.get(task, size(task)))


PRETRAIN = [(0.6, 1, "pixmo_cap_with_transcripts"), (0.3, 4, "pixmo_points"), (0.1, 1, "tulu_short")]
SFT = [(0.15, 6, "molmo2_cap"), (0.20, 35, "tgif"), (0.25, 31, "vqa2"), (0.15, 35, "mevis_track"),
       (0.15, 4, "academic_video_point"), (0.10, 5, "pixmo_count"), (0.0995, 1, "tulu"),
       (0.0005, 1, "hardcodes")]
POINT = [*SFT[:3], (0.12, 37, "mevis_track"), (0.11, 2, "academic_video_point"), (0.07, 5, "pixmo_count"),
         *SFT[6:]]


def recipe(mixture, groups, tracking=TRACKING):
    """Returns the rates by the recipe's rules; groups: (rate, number of members, one of them)."""
    total = sum(rate for rate, _, _ in groups)
    found = {}
    for rate, number, one in groups:
        [names] = [[member.task for member in group.members] for group in mixture
                   if one in {member.task for member in group.members}]
        assert len(names) == number
        weights = {name: weight(name, tracking) for name in names}
        found |= {name: rate / total * weights[name] / sum(weights.values()) for name in names}
    return found


class Sized:
    """A data set of which only the size matters."""

    def __init__(self, size):
        self._size = size

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        return types.Example(annotations=())


@pytest.mark.parametrize("stage, name, groups, tracking", [
    ("pretrain", "pretrain", PRETRAIN, TRACKING), ("sft", "sft", SFT, TRACKING),
    ("long_context", "sft", SFT, TRACKING), ("molmo_point_pretrain", "pretrain", PRETRAIN, TRACKING),
    ("molmo_point_sft", "molmo_point", POINT, POINT_TRACKING),
    ("molmo_point_long_context", "molmo_point_long_context", POINT, POINT_TRACKING),
    ("molmo_point_gui", "molmo_point_gui", [(1.0, 1, "molmo_point_gui")], TRACKING)])
def test_a_run_of_each_stage_draws_data_sets_at_the_rates_of_the_recipe(stage, name, groups, tracking,
                                                                        monkeypatch):
    monkeypatch.setattr(sources, "is_data", lambda folder: True)
    monkeypatch.setattr(sources, "open_source", lambda folder, *, name, cache: Sized(size(name)))
    config = run.resolve([f"gin_configs/runs/{stage}_8b.gin"])
    order = pipeline.make_dataset(config.data, config.model, config.inputs, None).preparer.order
    _, (sizes, ((start, rates),), _) = order.__reduce__()
    drawn = [member.task for member in tasks.members(tasks.MIXTURES[name])]
    assert start == 0 and list(sizes) == [size(task) for task in drawn]
    found, expected = dict(zip(drawn, rates, strict=True)), recipe(
        tasks.MIXTURES[name], groups, tracking)
    assert found == pytest.approx(expected, abs=1e-6, rel=0) and len(found) == len(expected)
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    assert mixture_lib.shares(tasks.MIXTURES[name], dict(zip(drawn, sizes, strict=True))) == pytest.approx(
        found, abs=1e-9)  # what launch.inspect shows


def test_the_recipes_sizes_are_those_of_the_paper():
    assert {name: task.examples for name, task in tasks.TASKS.items() if task.examples} == SIZES | POINT_SIZES
