import math

import pytest

from data_pipelines import tasks


def member(task, **fields):
    return tasks.Member(task=task, **fields)


def test_a_group_divides_its_share_by_square_roots_of_sizes():
    mixture = (tasks.Group(rate=3.0, members=(member("a"), member("b"))),
               tasks.Group(rate=1.0, members=(member("c"),)))
    shares = tasks.rates(mixture, {"a": 100, "b": 400, "c": 7})
    assert shares == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25})


@pytest.mark.parametrize("fields, size", [
    ({}, 20.0), ({"root_size_factor": 0}, 1.0), ({"root_size_factor": 0.25}, 10.0),
    ({"root_size_factor": 1}, 1.0), ({"root_size_factor": 60_000}, math.sqrt(60_000)),
    ({"sampling_rate": 1.5}, 30.0)])
def test_a_member_may_pretend_another_size(fields, size):
    assert member("a", **fields).size(400) == pytest.approx(size)


def test_folders_share_by_size_or_by_the_rates_given():
    (mixture,), known = tasks.of_folders(("x/a", "x/b"))
    assert known["x/a"].folder == "x/a"
    assert tasks.rates(mixture, {"x/a": 100, "x/b": 900}) == pytest.approx({"x/a": 0.25, "x/b": 0.75})
    (mixture,), _ = tasks.of_folders((("x/a", 0.2), ("x/b", 0.6)))
    assert tasks.rates(mixture, {"x/a": 100, "x/b": 900}) == pytest.approx({"x/a": 0.25, "x/b": 0.75})


def test_a_folder_may_have_a_rate_for_each_lesson_and_rest_in_some():
    sizes = {"a": 100, "b": 900, "c": 4}
    mixtures, known = tasks.of_folders((("a", (1.0, 0.0)), ("b", (1.0, 3.0)), ("c", 1.0)), 2)
    assert set(known) == {"a", "b", "c"}
    first, second = (tasks.rates(mixture, sizes) for mixture in mixtures)
    assert first == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert second == pytest.approx({"b": 0.75, "c": 0.25})


def test_folders_without_rates_keep_their_shares_in_every_lesson():
    mixtures, _ = tasks.of_folders(("a", "b"), 3)
    assert [tasks.rates(mixture, {"a": 1, "b": 9}) for mixture in mixtures] == [{"a": 0.25, "b": 0.75}] * 3


def test_mixtures_name_known_tasks_once():
    for mixture in tasks.MIXTURES.values():
        assert {one.task for one in tasks.members(mixture)} <= set(tasks.TASKS)
    twice = (tasks.Group(rate=1.0, members=(member("a"),)), tasks.Group(rate=1.0, members=(member("a"),)))
    with pytest.raises(ValueError, match="once.*'a'"):
        tasks.members(twice)


def test_mixtures_for_ablations_differ_in_one_thing():
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
    (lambda: tasks.of_folders(("a", ("b", 0.5))), "either all"),
    (lambda: tasks.of_folders((("a", -1.0),)), "one rate >= 0.*-1.0.*for a"),
    (lambda: tasks.of_folders((("a", (1.0, 2.0)),), 3), "one rate >= 0 for each of the 3 lessons"),
    (lambda: tasks.of_folders((("a", 1.0), ("a", 1.0))), "once"),
    (lambda: tasks.of_folders(("a", "a")), "once"),
    (lambda: tasks.Group(rate=-1.0, members=(member("a"),)), "rate of a group"),
    (lambda: tasks.Group(rate=1.0, members=()), "at least one member"),
    (lambda: member("a", sampling_rate=0), "sampling_rate"),
    (lambda: member("a", high_res_share=1.5), "high_res_share"),
    (lambda: member("a", point_modes=("point",)), "point_modes must be of bare.*'point'.*for a"),
    (lambda: member("a", root_size_factor=-1), "root_size_factor")])
def test_what_makes_no_mixture_is_refused(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()
