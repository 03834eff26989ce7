"""Scores equal those of public packages on random cases (tests/goldens/metrics/record_peers.py)."""

import json
import pathlib

import numpy as np
import pytest

from data_pipelines.scoring import hits
from data_pipelines.scoring import short_answers
from data_pipelines.scoring import tap_vid
from data_pipelines.scoring import tracks
from tests import scoring_cases as cases

PEERS = json.loads((pathlib.Path(__file__).parents[2] / "goldens/metrics/peers.json").read_text())
TOLERANCE = 1e-9  # measured: 2e-16


def close(value):
    return pytest.approx(value, abs=TOLERANCE)


@pytest.mark.parametrize("seed", cases.TRACK_SEEDS)
def test_hota_equals_trackeval(seed):
    objects, boxes, given = cases.tracks(seed)
    target = tracks.TrackTarget(
        objects=tuple(objects),
        width=cases.WIDTH,
        height=cases.HEIGHT,
        fps=1.0,
        points={
            frame: {name: (box[0], box[1]) for name, box in shown.items()}
            for frame, shown in boxes.items()
        },
        masks={
            frame: {name: cases.mask_of(box) for name, box in shown.items()}
            for frame, shown in boxes.items()
        },
    )
    scores = tracks.score_points(target, given)
    assert {name: scores[name] for name in PEERS["hota"][seed]} == close(PEERS["hota"][seed])


@pytest.mark.parametrize("seed", cases.MASK_SEEDS)
def test_j_and_f_equal_trackeval(seed):
    pair = cases.mask_pair(seed)
    scores = {"j": tracks.region_similarity(*pair), "f": tracks.boundary_similarity(*pair)}
    assert scores == close(PEERS["region_and_boundary"][seed])


@pytest.mark.parametrize("seed", cases.POINT_SEEDS)
@pytest.mark.parametrize("mode", ["first", "strided"])
def test_tap_vid_scores_equal_those_of_tapnet(seed, mode):
    query, true, hidden, given, given_hidden = cases.point_tracks(seed)
    size = np.array((640, 480))
    scores = tap_vid.score_video(
        tap_vid.Tracks(xy_NF2=true * size / tap_vid.RASTER, visible_NF=~hidden),
        tap_vid.Tracks(xy_NF2=given * size / tap_vid.RASTER, visible_NF=~given_hidden),
        query,
        (640, 480),
        mode,
    )
    names = {
        name.replace("delta_average", "average_pts_within_thresh").replace(
            "delta_", "pts_within_"
        ): value
        for name, value in scores.items()
    }
    assert names == close(PEERS["tap_vid"][seed][mode])


@pytest.mark.parametrize("seed", cases.COUNT_SEEDS)
def test_precision_recall_and_f1_equal_scikit_learn(seed):
    assert hits.precision_recall_f1(*cases.counts(seed)) == close(tuple(PEERS["f1"][seed]))


@pytest.mark.parametrize("seed", cases.TRACK_SEEDS)
def test_anls_equals_the_package_of_that_name(seed):
    assert short_answers.anls(*cases.texts(seed)) == close(PEERS["anls"][seed])


def test_the_cases_are_of_all_kinds():
    assert 0 < sum(one["HOTA"] == 0 for one in PEERS["hota"]) < len(PEERS["hota"]) / 2
    values = [one["f"] for one in PEERS["region_and_boundary"]]
    assert {0.0, 1.0} < set(values) and sum(0 < value < 1 for value in values) > 5
    assert sum(0 < value < 1 for value in PEERS["anls"]) > 5 and 0 in PEERS["anls"]
