import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines import formats
from data_pipelines import sources
from data_pipelines.scoring import choices
from data_pipelines.scoring import counting
from data_pipelines.scoring import hits
from data_pipelines.scoring import points
from data_pipelines.scoring import suite
from data_pipelines.scoring import tracks
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from molmo2_jax import types
from molmo2_jax.inputs import video

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "goldens" / "metrics" / "cases.json").read_text())
TOLERANCE = 1e-9


def box(height, width, corners):
    mask = np.zeros((height, width), bool)
    if corners:
        x0, y0, x1, y1 = corners
        mask[y0:y1, x0:x1] = True
    return mask


def clip(width, height, duration):
    return types.Media(sizes=((width, height),), seconds=np.zeros(1), duration=duration)


# ---- pointing


@pytest.mark.parametrize("case", GOLDEN["video_pointing"])
def test_video_pointing_equals_the_recorded_reference(case):
    shapes = tuple(
        {time: box(case["height"], case["width"], one["box"]) for time in one["times"]}
        for one in case["masks"]
    )
    target = points.PointTarget(
        points=tuple(map(tuple, case["gt"])),
        masks=shapes,
        media=clip(case["width"], case["height"], case["duration"]),
    )
    scores = points.score_points(target, [tuple(row) for row in case["pred"]])
    for name, expected in case["expected"].items():
        assert abs(scores[f"{name}_reference"] - expected) <= TOLERANCE
        assert abs(scores[name] - expected) <= 1e-9  # here both rules pair alike; F1 differs by its 1e-10


def image_target(*corners, size=(100, 100)):
    return points.PointTarget(
        points=tuple((1.0, (x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in corners),
        masks=tuple({1.0: box(size[1], size[0], one)} for one in corners),
        media=types.Media(sizes=(size,)),
    )


def test_the_clean_rule_finds_hits_that_pairing_by_distance_misses():
    # A wide object annotated at its right end, and a small one above its middle.
    target = dataclasses.replace(
        image_target((0, 40, 100, 60), (45, 30, 55, 40)), points=((1.0, 99, 50), (1.0, 50, 38))
    )
    scores = points.score_points(target, [(1.0, 46.0, 30.0), (1.0, 47.0, 41.0)])
    assert (scores["f1"], scores["f1_reference"]) == (1, 0)
    scores = points.score_points(target, [(1.0, 98.0, 50.0), (1.0, 50.0, 36.0)])
    assert (scores["f1"], scores["f1_reference"]) == (1, pytest.approx(1, abs=1e-9))


def test_two_points_on_one_object_count_as_one_hit():
    scores = points.score(
        [image_target((0, 0, 20, 20), (60, 60, 80, 80))],
        ['<points coords="1 1 050 050 2 100 100">x</points>'],
    )
    assert (scores["precision"], scores["recall"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    "answer, expected", [("There are none.", 1), ("", 1), ('<points coords="1 1 500 500">x</points>', 0)]
)
def test_where_nothing_is_present_an_empty_answer_is_right(answer, expected):
    scores = points.score([image_target()], [answer])
    assert scores["f1"] == scores["f1_reference"] == scores["precision"] == expected


def test_a_point_at_the_very_edge_is_on_the_last_pixel():
    edge = '<points coords="1 1 1000 1000">x</points>'
    scores = points.score([image_target((90, 90, 100, 100))], [edge])
    assert (scores["f1"], scores["f1_reference"]) == (1, 0)


def test_the_time_of_a_point_must_equal_a_masks_time_rounded_as_in_answers():
    shapes = ({2.0: box(100, 100, (40, 40, 60, 60)), 2.4: box(100, 100, (40, 40, 60, 60))},)
    target = points.PointTarget(points=((2.0, 50, 50),), masks=shapes, media=clip(100, 100, 2.4167))
    for time, expected in (("2.0", 1), ("2.4", 1), ("2.2", 0)):
        assert points.score([target], [f'<points coords="{time} 1 500 500">x</points>'])["f1"] == expected


def test_points_in_several_images_are_scored_in_their_own_image():
    target = points.PointTarget(
        points=((1.0, 5, 5), (2.0, 5, 5)),
        media=types.Media(sizes=((10, 10), (20, 20))),
        masks=({1.0: box(10, 10, (3, 3, 7, 7))}, {2.0: box(20, 20, (3, 3, 7, 7))}),
    )
    scores = points.score([target], ['<points coords="1 1 500 500;2 2 250 250;3 3 500 500">x</points>'])
    assert scores["f1"] == 1 and "f1_reference" not in scores
    assert points.score([target], ['<points coords="1 1 500 500 2 500 500">x</points>'])["recall"] == 0.5


# ---- tracking


def golden_tracks(case):
    shapes = {}
    for name, boxes in case["mask_boxes_xyxy"].items():
        for frame, corners in boxes.items():
            shapes.setdefault(int(frame), {})[name] = box(case["height"], case["width"], corners)
    truth, predicted = (
        {
            row["frame"]: {name: tuple(one["point"]) for name, one in row["points"].items()}
            for row in case[side]
        }
        for side in ("gt", "pred")
    )
    target = tracks.TrackTarget(
        objects=tuple(case["mask_boxes_xyxy"]),
        points=truth,
        masks=shapes,
        width=case["width"],
        height=case["height"],
        fps=6,
    )
    return target, predicted


@pytest.mark.parametrize("case", GOLDEN["tracking"])
def test_tracking_equals_the_recorded_reference(case):
    target, predicted = golden_tracks(case)
    scores = tracks.score_points(target, predicted)
    for name, expected in case["expected"].items():
        assert abs(scores[f"{name}_reference"] - expected) <= TOLERANCE
    if all(len(frame) == len(target.objects) for frame in target.points.values()):
        for name, expected in case["expected"].items():
            assert abs(scores[name] - expected) <= 1e-9


def moving_target(objects=2, frames=4, absent=()):
    shapes = {
        f: {
            g: box(40, 60, (10 * f + 1, 20 * g + 2, 10 * f + 9, 20 * g + 12))
            for g in range(objects)
            if (f, g) not in absent
        }
        for f in range(frames)
    }
    truth = {f: {g: (10.0 * f + 5, 20.0 * g + 7) for g in shapes[f]} for f in range(frames)}
    return tracks.TrackTarget(
        objects=tuple(range(objects)), points=truth, masks=shapes, width=60, height=40, fps=2
    )


def perfect(target):
    return {f: {f"t{g}": place for g, place in frame.items()} for f, frame in target.points.items()}


def test_a_perfect_tracker_scores_one_by_the_clean_rules_and_less_by_the_reference_if_objects_are_absent():
    present, absent = moving_target(), moving_target(absent=((1, 0), (3, 1)))
    for target in (present, absent):
        scores = tracks.score_points(target, perfect(target)) | tracks.score_masks(target, perfect(target))
        clean = [value for name, value in scores.items() if not name.endswith("_reference")]
        assert np.allclose(clean, 1)
    assert tracks.score_points(present, perfect(present))["HOTA_reference"] == 1
    assert tracks.score_points(absent, perfect(absent))["HOTA_reference"] < 1
    assert tracks.score_points(absent, perfect(absent))["f1_reference"] < 1


def test_swapped_identities_leave_f1_and_lower_hota_and_jf():
    target = moving_target()
    swapped = perfect(target)
    for f in (2, 3):
        swapped[f] = {"t0": target.points[f][1], "t1": target.points[f][0]}
    scores = tracks.score_points(target, swapped) | tracks.score_masks(target, swapped)
    assert scores["f1"] == 1 and scores["DetA"] == 1
    assert scores["AssA"] == pytest.approx(1 / 3)  # 2 of 4 + 4 - 2 in each of the four matched pairs
    assert scores["HOTA"] == pytest.approx(3**-0.5)
    assert scores["jf"] == pytest.approx(0.5) and scores["jf_merged"] == 1


def test_jf_counts_objects_without_a_track_and_tracks_without_an_object():
    target, given = moving_target(), perfect(moving_target())
    missing = {f: {"t0": frame["t0"]} for f, frame in given.items()}
    extra = {f: {**frame, "t2": (59.0, 39.0)} for f, frame in given.items()}
    assert tracks.score_masks(target, missing)["jf"] == pytest.approx(0.5)
    assert tracks.score_masks(target, extra)["jf"] == pytest.approx(2 / 3)
    assert tracks.score_masks(target, {})["jf"] == 0
    nothing = dataclasses.replace(target, objects=(), points={})
    assert tracks.score_masks(nothing, {})["jf"] == 1 and tracks.score_masks(nothing, given)["jf"] == 0


def test_a_point_on_another_object_selects_the_mask_of_that_object():
    target = moving_target()
    only_first = dataclasses.replace(
        target, objects=(0,), points={f: {0: frame[0]} for f, frame in target.points.items()}
    )
    on_second = {f: {"t": frame[1]} for f, frame in target.points.items()}
    scores = tracks.score_masks(only_first, on_second)
    assert scores["jf"] == scores["jf_merged"] == 0


def test_region_and_boundary_of_shifted_squares():
    first, second = box(100, 100, (20, 20, 40, 40)), box(100, 100, (22, 20, 42, 40))
    assert tracks.region_similarity(first, second) == 18 / 22
    # 0.8 % of the diagonal is 1.13, so 2 pixels: every boundary pixel of a shift by 2 is near the other one
    assert tracks.boundary_similarity(first, second) == 1
    far = box(100, 100, (24, 20, 44, 40))
    # of the left and right sides of 20 pixels, only the 3 + 3 next to the other's rows match
    edge = 4 * 20 - 4
    near = np.count_nonzero([min(abs(x - x2) for x2 in range(24, 44)) <= 2 for x in range(20, 40)]) * 2
    assert near / edge < tracks.boundary_similarity(first, far) < 0.7
    empty = np.zeros((100, 100), bool)
    assert tracks.boundary_similarity(empty, empty) == tracks.region_similarity(empty, empty) == 1
    assert tracks.boundary_similarity(first, empty) == tracks.region_similarity(first, empty) == 0


def test_hota_does_not_depend_on_track_names():
    rng = np.random.default_rng(0)
    target = moving_target(3)
    given = {
        f: {
            name: tuple(rng.uniform(0, 40, 2)) if rng.random() < 0.3 else target.points[f][g]
            for g, name in enumerate("abc")
        }
        for f in target.points
    }
    renamed = {
        f: {{"a": "z", "b": "b", "c": "a"}[name]: place for name, place in frame.items()}
        for f, frame in given.items()
    }
    assert tracks.score_points(target, given) == pytest.approx(tracks.score_points(target, renamed))
    assert tracks.score_masks(target, given) == pytest.approx(tracks.score_masks(target, renamed))


# ---- counting and multiple choice


def test_counts_are_read_from_sentences_by_two_rules():
    answers = [
        "7.",
        'Counting the <points coords="0.5 1 100 200">dogs</points> shows a total of 1.',
        "The total number of dogs is: 12",
        "There are none.",
        'There are 3 <points coords="0.5 1 100 200">dogs</points>.',
        "seven",
    ]
    scores = counting.score([7, 1, 12, 0, 3, 7], answers)
    assert scores["correct"] == 5 / 6 and scores["valid"] == 5 / 6
    assert scores["correct_reference"] == 3 / 6 and scores["valid_reference"] == 3 / 6


@pytest.mark.parametrize(
    "true, given, is_close", [(0, 1, 1), (19, 21, 0), (20, 22, 1), (40, 43, 1), (39, 42, 0)]
)
def test_close_counts_are_within_one_and_a_twentieth(true, given, is_close):
    assert counting.score([true], [str(given)])["close"] == is_close


def test_the_average_over_ranges_weighs_each_range_equally():
    scores = counting.score([1, 2, 3, 30], ["1", "2", "9", "31"])
    assert scores["correct"] == 0.5
    assert scores["per_category_average"] == pytest.approx((2 / 3 + 0) / 2)


def test_an_image_count_is_the_number_of_points():
    answers = [
        'Counting the <points coords="1 1 100 200">dogs</points> shows a total of 2.',
        "There are none.",
        "3",
    ]
    scores = counting.score_by_points([1, 0, 3], answers)
    assert scores["correct"] == pytest.approx(2 / 3)
    assert scores["per_category_average"] == pytest.approx(2 / 3)


def test_unreadable_choices_are_wrong_by_the_clean_rule_and_guessed_by_the_reference():
    target = ("Which one?", ("red", "blue"), 0)
    scores = choices.score([target] * 4, ["A. red", "A", "zzz", "B. blue"])
    assert scores == {"accuracy": 0.5, "accuracy_reference": 0.75, "valid": 0.75}


# ---- everything together


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Every annotation of a small full world with the answer that the model is trained to give."""
    config = dataclasses.replace(
        world_config.full_world(),
        frame_side=(64, 96),
        duration=(1.0, 2.5),
        image_share=0.25,
        image_set_share=0.2,
    )
    path = world_write.write(tmp_path_factory.mktemp("world"), config, 3, 40, "heldout", progress=False)
    items = []
    for example in sources.examples(path.parent):
        if example.video:
            media = video.read(example.video, max_frames=128, size=(8, 8)).media
        else:
            media = types.Media(sizes=tuple(Image.open(path).size for path in example.images))
        made = formats.format_example(
            example, media=media, rng=np.random.default_rng(0), asking=formats.PLAIN
        )
        assert not made.dropped
        items += [
            suite.Answered(
                annotation=example.annotations[n],
                answer=branch.turns[-1],
                media=media,
            )
            for n, branch in zip(made.annotations, made.branches, strict=True)
        ]
    return items


def test_the_answers_of_training_score_one_in_every_score(answered):
    scores = suite.score(answered)
    assert {
        "video_point_f1",
        "image_point_f1",
        "image_set_point_f1",
        "count_accuracy",
        "track_jf",
        "track_HOTA",
        "choice_accuracy",
        "qa_accuracy",
    } <= set(scores)
    for name, value in scores.items():
        if not name.endswith(("_reference", "_examples", "point_valid")):
            assert value == pytest.approx(1, abs=1e-12), name


def test_scores_do_not_depend_on_the_order_of_examples(answered):
    shuffled = [answered[i] for i in np.random.default_rng(0).permutation(len(answered))]
    assert suite.score(shuffled) == pytest.approx(suite.score(answered))


def test_empty_answers_score_zero(answered):
    present = [
        dataclasses.replace(one, answer="")
        for one in answered
        if getattr(one.annotation, "points", None) != () and getattr(one.annotation, "count", None) != 0
    ]
    for name, value in suite.score(present).items():
        if not name.endswith(("_examples", "_reference")):
            # in frames where a tracked object is hidden, an empty answer is right
            limit = 0.1 if name.startswith("track_") and "A" not in name else 0
            assert value <= limit, name


def test_objects_without_masks_cannot_be_scored(answered):
    for kind in ("points", "tracks"):
        one = next(one for one in answered if getattr(one.annotation, kind, ()))
        bare = dataclasses.replace(one, annotation=dataclasses.replace(one.annotation, masks=()))
        [kind] = [name for name in suite.kinds(one.annotation, one.media) if name != "count"]
        others = {name: value for name, value in suite.score(answered).items()
                  if not name.startswith((kind, "count"))}
        mixed = suite.score([*answered, bare])
        assert mixed[f"{kind}_left_out"] == 1 and f"{kind}_left_out" not in suite.score(answered)
        assert mixed[f"{kind}_examples"] == suite.score(answered)[f"{kind}_examples"]
        assert {name: mixed[name] for name in others} == others
        assert f"{kind}_examples" not in suite.score([bare])
        target = points.target if kind != "track" else tracks.target
        with pytest.raises(ValueError, match="scoring .* needs a mask"):
            target(bare.annotation, bare.media)


def test_one_missing_mask_prevents_a_score_and_only_annotated_points_need_masks(answered):
    one = next(one.annotation for one in answered if getattr(one.annotation, "tracks", ()))
    assert not tracks.missing(one)
    asked = {(track.id, point.time) for track in one.tracks for point in track.points if not point.occluded}
    for mask in one.masks:
        rest = dataclasses.replace(one, masks=tuple(other for other in one.masks if other is not mask))
        assert bool(tracks.missing(rest)) == ((mask.id, mask.time) in asked)
    spot = next(one.annotation for one in answered if len(getattr(one.annotation, "points", ())) > 1)
    first = spot.points[0].id
    rest = dataclasses.replace(spot, masks=tuple(mask for mask in spot.masks if mask.id != first))
    assert f"got none of id {first}" in points.missing(rest)
    assert not points.missing(dataclasses.replace(spot, points=(), masks=()))


def test_a_score_over_no_examples_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        hits.means([])
