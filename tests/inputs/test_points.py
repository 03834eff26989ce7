"""Points and tracks: recorded texts, worked examples, round trips."""

import json
import pathlib
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from molmo2_jax.inputs import points

GOLDENS = json.loads((pathlib.Path(__file__).parents[1] / "goldens/point_format/cases.json").read_text())
PIXEL_TOLERANCE = 1e-9  # the same products in the same order; measured 0


def answer(mode, groups, label, **how):
    if mode == "count":
        return points.format_count(sum(len(group) for _, group in groups))
    write = {"pointing": points.format_points, "point": points.format_points,
             "point_count": points.format_point_count, "point_then_count": points.format_point_count,
             "count_then_point": points.format_count_point, "count_point": points.format_count_point}[mode]
    return write(groups, label, **how)


def observed(tracks):
    return [(frame["time"], {name: None if at["occluded"] else at["point"]
                             for name, at in frame["points"].items()}) for frame in tracks]


def check(groups, case, mode=None):
    how = {"scale": case["scale"]}
    mode = mode or case["mode"]
    assert answer(mode, groups, case["label"], **how) == case["html_v2"]
    if "html_v1" in case:
        how["separator"] = points.PRETRAINING_SEPARATOR
        assert answer(mode, groups, case["label"], **how) == case["html_v1"]


@pytest.mark.parametrize("case", GOLDENS["image_points"], ids=lambda c: f"{len(c['points'])}-{c['mode']}")
def test_image_points_are_written_as_recorded(case):
    check([(1, case["points"])], case)


@pytest.mark.parametrize("case", GOLDENS["multi_image_points"], ids=lambda c: c["mode"])
def test_points_of_several_images_are_written_as_recorded(case):
    check(list(zip(case["image_indices"], case["points"], strict=True)), case)


@pytest.mark.parametrize("case", GOLDENS["video_points"], ids=lambda c: c["mode"])
def test_video_points_are_written_as_recorded(case):
    check(list(zip(case["timestamps"], case["points"], strict=True)), case)


@pytest.mark.parametrize("case", GOLDENS["video_tracks"], ids=lambda c: f"start_end={c['start_end_only']}")
def test_tracks_are_written_as_recorded(case):
    frames = observed(case["tracks"])
    frames = points.start_end(frames) if case["start_end_only"] else frames
    assert points.format_tracks(frames, case["label"], scale=case["scale"]) == case["html_v2"]


@pytest.mark.parametrize("case", GOLDENS["output_timestamps"], ids=lambda c: repr(c["value"]))
def test_times_are_written_as_recorded(case):
    assert points.time_text(case["value"]) == case["output"]


@pytest.mark.parametrize("case", GOLDENS["parse"], ids=lambda c: f"{c['text'][:40]} {c['width']}")
def test_texts_are_read_as_recorded(case):
    found = points.parse_points(case["text"], case["width"], case["height"])
    assert [[point.index, point.id] for point in found] == [row[:2] for row in case["timed_with_ids"]]
    expected = np.array(case["points"]).reshape(-1, 2)
    np.testing.assert_allclose(np.array([point[2:] for point in found]).reshape(-1, 2), expected,
                               rtol=PIXEL_TOLERANCE)
    tracks = points.parse_tracks(case["text"], case["width"], case["height"], 6)
    assert [(at.seconds, at.frame, {name: list(xy) for name, xy in at.points.items()}) for at in tracks] == [
        (at["time"], at["frame"], {name: p["point"] for name, p in at["points"].items()})
        for at in case["tracks_fps6"]]


@pytest.mark.parametrize("groups, scale, text", [
    ([(1, [(12.34, 56.78)])], 100, "1 1 123 568"),
    ([(1, [(90, 10), (10, 80), (10, 20)])], 100, "1 1 100 200 2 100 800 3 900 100"),
    ([(1, [(320, 240), (1, 1)])], (640, 480), "1 1 002 002 2 500 500"),
    ([(1, [(50.05, 50.15), (50.25, 50.35)])], 100, "1 1 500 501 2 502 504"),
    ([(1, [(99.96, 99.94)])], 100, "1 1 1000 999"),
    ([(1, [(20.04, 50), (20.01, 40)])], 100, "1 1 200 400 2 200 500"),
    ([(1, [(50, 50)]), (3, [(20, 10), (5, 90)])], 100, "1 1 500 500;3 2 050 900 3 200 100"),
    ([(12.25, [(50, 50)]), (62.5, [(50, 50)])], 100, "12.2 1 500 500;62.5 2 500 500"),
    # clipping and ascending groups are deliberate differences from the reference
    ([(1, [(105, 50), (50, 105), (-5, -5), (-5, 50)])], 100,
     "1 1 000 000 2 000 500 3 500 1000 4 1000 500"),
    ([(3, [(20, 10), (5, 90)]), (1, [(50, 50)])], 100, "1 1 500 500;3 2 050 900 3 200 100"),
    ([(2, [(10, 10)]), (1, [(10, 10)])], [(20, 20), (40, 40)], "1 1 250 250;2 2 500 500"),
    ([(1, []), (2, [(10, 10)])], 100, "2 1 100 100"),
])
def test_worked_examples_of_points(groups, scale, text):
    assert points.format_points(groups, "c", scale=scale) == f'<points coords="{text}">c</points>'


def test_a_visible_text_may_differ_from_the_name():
    text = points.format_points([(1, [(10, 20)])], "a red dog", alt="dog")
    assert text == '<points alt="dog" coords="1 1 100 200">a red dog</points>'
    assert points.parse_points(text, 100, 100) == [(1.0, "1", 10.0, 20.0)]


PLAYERS = [(0.0, {7: (600, 100), 3: (100, 300)}), (0.5, {7: (50, 100), 3: None}),
           (1.0, {9: (1, 1), 3: (120, 300)})]
MORE_PLAYERS = PLAYERS + [(1.5, {3: (130, 300), 9: (5, 5)}), (2.0, {3: None})]


@pytest.mark.parametrize("frames, text", [
    (PLAYERS, "0.0 1 156 625 2 938 208;0.5 2 078 208;1.0 1 188 625 3 002 002"),
    (PLAYERS[::-1], "0.0 1 156 625 2 938 208;0.5 2 078 208;1.0 1 188 625 3 002 002"),
    (MORE_PLAYERS, "0.0 1 156 625 2 938 208;0.5 2 078 208;1.0 1 188 625 3 002 002;"
                   "1.5 1 203 625 3 008 010"),
    (points.start_end(MORE_PLAYERS), "0.0 1 156 625 2 938 208;0.5 2 078 208;1.0 3 002 002;1.5 3 008 010"),
    ([("00:01.50", {0: (64, 48)})], "1.5 1 100 100"),
])
def test_worked_examples_of_tracks(frames, text):
    written = points.format_tracks(frames, "players", scale=(640, 480))
    assert written == f'<tracks coords="{text}">players</tracks>'


def test_tracks_without_frames_or_visible_objects_say_so():
    assert points.format_tracks([], "p", scale=100) == "No tracks available."
    assert points.format_tracks([(0.0, {1: None})], "p", scale=100) == ""


def test_single_point_tracking_asks_from_the_first_visible_point_and_answers_later_ones():
    frames = [(k / 2, {"cat": None if k == 3 else (10 * k + 10, 20)}) for k in range(6)]
    seconds, point = points.start_point(frames[1:], "cat")
    assert points.format_points([(seconds, [point])], "cat") == '<points coords="0.5 1 200 200">cat</points>'
    later = points.later_than(points.on_grid(frames, 2), seconds)
    assert points.format_tracks(later, "cat", scale=100) == (
        '<tracks coords="1.0 1 300 200;2.0 1 500 200;2.5 1 600 200">cat</tracks>')
    assert points.start_point([(0.0, {"cat": None, "dog": (1, 1)})], "cat") is None


def test_training_sometimes_starts_tracking_later():
    frames = [(float(k), {0: (k, k)}) for k in range(10)]
    rng = np.random.default_rng(0)
    starts = [points.start_point(frames, 0, rng)[0] for _ in range(500)]
    assert 0.75 < np.mean(np.equal(starts, 0)) < 0.88  # 0.8 + 0.2 / 10
    assert set(starts) == set(range(10))


def test_only_frames_that_are_shown_and_on_the_grid_remain():
    frames = [(k / 6, {0: (k, k)}) for k in range(13)]
    shown = points.match_frames(frames, [0.0, 0.5, 1.004, 1.52])
    assert [seconds for seconds, _ in shown] == [0.0, 0.5, 1.0]
    assert [seconds for seconds, _ in points.on_grid(frames, 2)] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [seconds for seconds, _ in points.on_grid(frames, 1)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("value", [-1, -0.06, float("nan"), float("inf"), "a:b", ""])
def test_times_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="a time must be"):
        points.time_text(value)


def test_times_just_below_zero_are_zero():
    assert points.time_text(-1e-9) == "0.0" and points.time_text(np.float32(0.5)) == "0.5"


@pytest.mark.parametrize("scale, xy", [((640, 0), (1, 1)), ((1, 2, 3), (1, 1)), (100, (float("nan"), 1))])
def test_coordinates_and_scales_that_are_none_are_refused(scale, xy):
    with pytest.raises(ValueError, match="must be"):
        points.format_points([(1, [xy])], "c", scale=scale)


@pytest.mark.parametrize("text, expected", [
    ('<points coords="1 1 055 070 2 100 200">x</points>', [(1, 35.2, 33.6), (1, 64, 96)]),
    ('<points coords="1 1 1000 1000">x</points>', [(1, 640, 480)]),
    ('<points alt="k" coords="3.5 1 100 200"/>', [(3.5, 64, 96)]),
    ('<points coords="0.5 1 100 200 1.0 2 300 400">x</points>', [(0.5, 64, 96), (0.5, 192, 192)]),
    ('<points coords="1.0 1 100 200\t2.0 2 300 400,3.0 3 500 600">x</points>',
     [(1, 64, 96), (2, 192, 192), (3, 320, 288)]),
    ('<points coords="1 1 100 200', []),
    ('<points coords="a 1 100 200">x</points>', []),
    ("1 1 100 200", []),
    ('<points coords="1 1 12345 100">x</points>', []),
    ('<points label coords="1 1 100 100" alt="q">x</points>', []),
    ('<points coords="1.2.3 1 100 200;2 1 100 200">x</points>', [(2, 64, 96)]),
])
def test_worked_examples_of_reading(text, expected):
    found = points.parse_points(text, 640, 480)
    np.testing.assert_allclose(np.array([(p.index, p.x, p.y) for p in found]).reshape(-1, 3),
                               np.array(expected).reshape(-1, 3), rtol=1e-9)


def test_images_may_differ_in_size_and_unknown_images_are_skipped():
    text = '<points coords="1 1 500 500;2 2 100 200;3 3 100 200;0.5 4 100 200;0 5 100 200">x</points>'
    found = points.parse_points(text, sizes=[(100, 50), (200, 400)])
    assert found == [(1, "1", 50, 25), (2, "2", 20, 80)]
    with pytest.raises(ValueError, match="either width and height or sizes"):
        points.parse_points(text)


def test_an_answer_cut_off_is_read_only_on_request():
    text = 'Counting the <points coords="0.5 1 100 200;1.0 2 300 4'
    assert points.parse_points(text, 1000, 1000) == []
    assert points.parse_points(text, 1000, 1000, accept_unterminated=True) == [(0.5, "1", 100, 200)]
    assert points.parse_labelled(text, 1000, 1000, accept_unterminated=True) == [
        ("", (0.5, "1", 100, 200))]


def test_frames_of_tracks_follow_the_frame_rate():
    text = '<tracks coords="0.7 1 100 200;0.5 2 100 200">x</tracks>'
    assert [at.frame for at in points.parse_tracks(text, 1000, 1000, 6)] == [3, 4]
    assert [at.frame for at in points.parse_tracks(text, 1000, 1000, 24)] == [12, 17]


@pytest.mark.parametrize("text, count, by_reference", [
    ("7", 7, 7), (" 7. ", 7, 7), ("0", 0, 0),
    ('Counting the <points coords="0.5 1 100 200">dogs</points> shows a total of 1.', 1, 1),
    ("The total number of dogs is: 12", 12, 12),
    ("There are none.", 0, None), ("none", 0, None),
    ('There are 3 <points coords="0.5 1 100 200">dogs</points>.', 3, None),
    ("seven", None, None), ("about 7", None, None), ("", None, None), ("nonetheless", None, None)])
def test_counts_are_read_from_every_sentence_that_is_written(text, count, by_reference):
    assert points.read_count(text) == count
    assert points.read_count_reference(text) == by_reference


COORDINATE = strategies.floats(0, 100, allow_nan=False)
GROUPS = strategies.dictionaries(
    strategies.integers(0, 600).map(lambda tenths: tenths / 10),
    strategies.lists(strategies.tuples(COORDINATE, COORDINATE), min_size=1, max_size=6), max_size=5)
LABELS = strategies.text(max_size=12).filter(lambda label: "coords=" not in label)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(GROUPS, LABELS)
def test_what_is_written_is_read_back_in_order_with_running_ids(groups, label):
    text = points.format_point_count(list(groups.items()), label)
    count = sum(map(len, groups.values()))
    found = points.parse_points(text, 100, 100)
    assert [point.id for point in found] == [str(number + 1) for number in range(count)]
    assert points.read_count(text) == count or re.search("total", label)
    expected = sorted((seconds, *xy) for seconds, all_xy in groups.items() for xy in all_xy)
    nearest = sorted((point.index, point.x, point.y) for point in found)
    if count:
        # rounding may swap neighbours whose x differ by less than a thousandth: compare each axis sorted
        for axis in (0, 1, 2):
            np.testing.assert_allclose(sorted(row[axis] for row in nearest),
                                       sorted(row[axis] for row in expected), atol=0.05 + 1e-9)
    by_group = {}
    for point in found:
        by_group.setdefault(point.index, []).append((point.x, point.y))
    assert points.format_points(list(by_group.items()), label) == points.format_points(
        list(groups.items()), label)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(strategies.text(alphabet='<points track/coords="0123456789.;:,\t "\n>x', max_size=120))
def test_reading_never_fails(text):
    for point in points.parse_points(text, 640, 480, accept_unterminated=True):
        assert 0 <= point.x <= 640 and 0 <= point.y <= 480
    points.parse_tracks(text, 640, 480, 6)
    points.read_count(text)


def test_numbers_too_long_to_be_meant_are_not_read():
    digits = "9" * 5000
    assert points.read_count(digits) is None
    assert points.parse_tracks(f'<tracks coords="{digits} 1 100 200">x</tracks>', 10, 10, 6) == []


def test_points_are_read_with_the_label_of_their_tag():
    text = ('<points coords="1 1 100 200">red <ball</points>, '
            '<tracks coords="0.5 1 500 500">dog</tracks> and <points alt="x" coords="1 2 300 400"/>none')
    assert points.parse_labelled(text, 1000, 1000) == [
        ("red ", (1.0, "1", 100, 200)), ("dog", (0.5, "1", 500, 500)),
        ("", (1.0, "2", 300, 400))]
