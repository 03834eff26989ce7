"""Temporal segments named in an answer, such as "[3.5-10], [20-24]", against annotated ones (QVHighlights).

S true segments, P predicted ones, each (start, end) in seconds.

Source: reference, olmo/eval/evaluators.py, QVHighlightsEval.
"""

import re
from collections.abc import Sequence

import numpy as np

from data_pipelines.scoring import hits

Segment = tuple[float, float]
OVERLAP = 0.5   # intersection over union from which a segment is found
# Possessive, and only from the first digit on: a long row of digits takes linear, not cubic, time.
_SEGMENT = re.compile(r"(?<![0-9])([0-9]++\.?+[0-9]*+)\s*+-\s*+([0-9]++\.?[0-9]*)")


def read(answer: str) -> list[Segment]:
    """Returns the segments "START-END" of an answer; those that do not end after their start are skipped."""
    found = [(float(start), float(end)) for start, end in _SEGMENT.findall(answer)]
    return [segment for segment in found if segment[0] < segment[1]]


def intersection_over_union(first: Segment, second: Segment) -> float:
    """Returns the temporal IoU, 0 to 1; 0 for segments that do not overlap."""
    shared = min(first[1], second[1]) - max(first[0], second[0])
    together = max(first[1], second[1]) - min(first[0], second[0])
    return shared / together if shared > 0 else 0.0


def score(targets: Sequence[Sequence[Segment]], answers: Sequence[str]) -> dict[str, float]:
    """Returns means over examples of precision, recall, f1 at an IoU of 0.5, iou, and valid.

    The clean rule finds as many one-to-one pairs as possible. The `_reference` rule pairs each true segment,
    in order, with the first free prediction. iou is that of the first true and the first predicted segment,
    for questions about one moment; examples without a true segment have none.

    Raises:
      ValueError: there is no example.
    """
    return hits.means([_score(target, read(answer)) for target, answer in zip(targets, answers, strict=True)])


def _score(target: Sequence[Segment], given: Sequence[Segment]) -> dict[str, float]:
    iou_SP = np.array([[intersection_over_union(one, other) for other in given] for one in target])
    is_hit_SP = iou_SP.reshape(len(target), len(given)) >= OVERLAP
    row = {"valid": float(bool(given))}
    if target:
        row["iou"] = float(iou_SP[0, 0]) if given else 0.0
    most = hits.most_hits(is_hit_SP) if is_hit_SP.size else 0
    for suffix, found in (("", most), ("_reference", _greedy(is_hit_SP))):
        values = hits.precision_recall_f1(found, len(given), len(target))
        row |= {name + suffix: one for name, one in zip(("precision", "recall", "f1"), values, strict=True)}
    return row


def _greedy(is_hit_SP: np.ndarray) -> int:
    free_P = np.ones(is_hit_SP.shape[1], bool)
    for is_hit_P in is_hit_SP:
        candidates = np.flatnonzero(is_hit_P & free_P)
        free_P[candidates[:1]] = False
    return int((~free_P).sum())
