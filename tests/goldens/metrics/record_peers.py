"""Records the scores of public packages for the cases of tests/scoring_cases.py in peers.json.

  python -m venv /tmp/peers
  /tmp/peers/bin/pip install trackeval==1.3.0 scikit-image scikit-learn anls==0.0.2
  PYTHONPATH=tests /tmp/peers/bin/python tests/goldens/metrics/record_peers.py evaluation_datasets.py

The argument is tapnet/tapvid/evaluation_datasets.py of google-deepmind/tapnet (commit 025fba6). Its function
compute_tapvid_metrics alone is read, so neither TensorFlow nor tapnet is needed. TrackEval's F is that of
davis2017-evaluation.
"""

import ast
import json
import pathlib
import sys
import typing

import anls
import numpy as np
import scoring_cases as cases
import trackeval
from pycocotools import mask as coco
from sklearn import metrics

AT_HALF = 9   # of the thresholds 0.05, 0.1 ... 0.95


def hota(seed):
    objects, boxes, given = cases.tracks(seed)
    names = sorted({name for frame in given.values() for name in frame})
    ids = {name: n for n, name in enumerate(objects)}, {name: n for n, name in enumerate(names)}
    data = {"gt_ids": [], "tracker_ids": [], "similarity_scores": [], "num_gt_ids": len(objects),
            "num_tracker_ids": len(names)}
    for frame, shown in boxes.items():
        data["gt_ids"].append(np.array([ids[0][name] for name in shown], int))
        data["tracker_ids"].append(np.array([ids[1][name] for name in given[frame]], int))
        inside = [[float(left <= x < right and top <= y < bottom) for x, y in given[frame].values()]
                  for left, top, right, bottom in shown.values()]
        data["similarity_scores"].append(np.reshape(inside, (len(shown), len(given[frame]))))
    data["num_gt_dets"] = sum(map(len, data["gt_ids"]))
    data["num_tracker_dets"] = sum(map(len, data["tracker_ids"]))
    result = trackeval.metrics.HOTA().eval_sequence(data)
    return {name: float(result[name][AT_HALF]) for name in ("HOTA", "DetA", "AssA", "DetPr", "DetRe")}


def region_and_boundary(seed):
    encoded = [[coco.encode(np.asfortranarray(mask.astype(np.uint8)))] for mask in cases.mask_pair(seed)]
    j_and_f = trackeval.metrics.JAndF
    j = j_and_f._compute_j([encoded[0]], [encoded[1]], 1, 1, 1)
    f = j_and_f._compute_f([encoded[0]], [encoded[1]], 0, 0, 0.008)
    return {"j": float(np.ravel(j)[0]), "f": float(f[0])}


def tap_vid(seed, compute):
    query, true, hidden, given, given_hidden = cases.point_tracks(seed)
    queries = np.stack([query, *np.zeros((2, len(query)))], axis=-1)[None]
    return {mode: {name: float(value[0]) for name, value in compute(
        queries, hidden[None], true[None], given_hidden[None], given[None], mode).items()}
        for mode in ("first", "strided")}


def f1(seed):
    hits, predicted, true = cases.counts(seed)
    missed, wrong = true - hits, predicted - hits
    truth, guess = [1] * true + [0] * wrong, [1] * hits + [0] * missed + [1] * wrong
    scores = metrics.precision_recall_fscore_support(truth, guess, average="binary", zero_division=0)
    return [float(value) for value in scores[:3]]


def function_of(path):
    """Returns compute_tapvid_metrics of a file, without importing the file."""
    tree = ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))
    body = [node for node in tree.body if getattr(node, "name", "") == "compute_tapvid_metrics"]
    known = {"np": np, "Mapping": typing.Mapping}
    exec(compile(ast.Module(body, []), path, "exec"), known)
    return known["compute_tapvid_metrics"]


def main():
    compute = function_of(sys.argv[1])
    recorded = {
        "hota": [hota(seed) for seed in cases.TRACK_SEEDS],
        "region_and_boundary": [region_and_boundary(seed) for seed in cases.MASK_SEEDS],
        "tap_vid": [tap_vid(seed, compute) for seed in cases.POINT_SEEDS],
        "f1": [f1(seed) for seed in cases.COUNT_SEEDS],
        "anls": [anls.anls_score(prediction=answer, gold_labels=accepted, threshold=0.5)
                 for accepted, answer in map(cases.texts, cases.TRACK_SEEDS)],
    }
    path = pathlib.Path(__file__).with_name("peers.json")
    path.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
