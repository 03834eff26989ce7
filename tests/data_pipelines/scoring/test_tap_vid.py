import numpy as np
import pytest

from data_pipelines.scoring import tap_vid


def tracks(places, visible):
    return tap_vid.Tracks(xy_NF2=np.array(places, float), visible_NF=np.array(visible, bool))


TRUE = tracks([[(0, 0), (10, 10), (20, 20), (30, 30)]], [[1, 1, 1, 0]])


def test_a_perfect_tracker_scores_one_in_everything():
    scores = tap_vid.score_video(TRUE, TRUE, [0], (256, 256))
    assert set(scores.values()) == {1.0} and len(scores) == 13


def test_a_case_by_hand():
    # frames 1 to 3 count; 3 pixels off in frame 1, right in frame 2, visible in frame 3 where it is hidden
    given = tracks([[(9, 9), (10, 13), (20, 20), (30, 30)]], [[0, 1, 1, 1]])
    scores = tap_vid.score_video(TRUE, given, [0], (256, 256))
    assert [scores[f"delta_{x}"] for x in tap_vid.THRESHOLDS] == [0.5, 0.5, 1, 1, 1]
    # visible 2; right 1 and wrong 2 below 4 pixels, right 2 and wrong 1 from there on
    assert [scores[f"jaccard_{x}"] for x in tap_vid.THRESHOLDS] == [
        1 / 4,
        1 / 4,
        2 / 3,
        2 / 3,
        2 / 3,
    ]
    assert scores["delta_average"] == pytest.approx(0.8)
    assert scores["average_jaccard"] == pytest.approx(0.5)
    assert scores["occlusion_accuracy"] == pytest.approx(2 / 3)


def test_a_distance_equal_to_the_threshold_is_too_far():
    given = tracks([[(0, 0), (10, 14), (20, 24), (30, 30)]], TRUE.visible_NF)
    scores = tap_vid.score_video(TRUE, given, [0], (256, 256))
    assert (scores["delta_4"], scores["delta_8"]) == (0, 1)


def test_frames_before_the_query_count_in_strided_mode_only():
    given = tracks([[(99, 99), (10, 10), (20, 20), (30, 30)]], TRUE.visible_NF)
    assert tap_vid.score_video(TRUE, given, [1], (256, 256))["delta_16"] == 1
    assert tap_vid.score_video(TRUE, given, [1], (256, 256), "strided")["delta_16"] == 0.5


def test_distances_are_of_a_raster_of_256_pixels_a_side():
    given = tracks(TRUE.xy_NF2 + [5, 0], TRUE.visible_NF)
    assert tap_vid.score_video(TRUE, given, [0], (256, 256))["delta_4"] == 0
    assert tap_vid.score_video(TRUE, given, [0], (1024, 256))["delta_4"] == 1


def test_what_cannot_be_divided_is_left_out_of_the_mean():
    hidden = tracks(TRUE.xy_NF2, [[1, 0, 0, 0]])
    scores = tap_vid.score_video(hidden, hidden, [0], (256, 256))
    assert scores == {"occlusion_accuracy": 1}
    assert tap_vid.score_video(hidden, TRUE, [0], (256, 256))["average_jaccard"] == 0
    assert tap_vid.score_video(TRUE, TRUE, [3], (256, 256)) == {}
    mean = tap_vid.score([scores, tap_vid.score_video(TRUE, hidden, [0], (256, 256))])
    assert (mean["occlusion_accuracy"], mean["average_jaccard"]) == (
        pytest.approx((1 + 1 / 3) / 2),
        0,
    )


def test_unlike_shapes_and_unknown_modes_are_refused():
    with pytest.raises(ValueError, match=r"positions \[N, F, 2\]"):
        tracks([[(0, 0)]], [[1, 1]])
    with pytest.raises(ValueError, match="must have the same shape"):
        tap_vid.score_video(TRUE, tracks([[(0, 0)]], [[1]]), [0], (256, 256))
    with pytest.raises(ValueError, match="'last'"):
        tap_vid.score_video(TRUE, TRUE, [0], (256, 256), "last")
