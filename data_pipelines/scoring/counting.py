"""Accuracy of counts, read from the answer's sentence or from the number of points in it.

Source: paper, section 4 (video and image counting); reference: olmo/eval/evaluators.py.
"""

from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.scoring import hits
from molmo2_jax.inputs import points

BINS = (0, 5, 10, 15, 20, 25)  # lower ends of the ranges of true counts averaged over


def score(targets: Sequence[int], answers: Sequence[str]) -> dict[str, float]:
    """Returns the scores of counts read from sentences; the _reference reader knows fewer sentences."""
    return (_score(targets, answers, points.read_count, "")
            | _score(targets, answers, points.read_count_reference, "_reference"))


def score_by_points(targets: Sequence[int], answers: Sequence[str]) -> dict[str, float]:
    """Returns the scores when an answer's count is its number of points, as for images in the reference.

    per_category_average is the mean over the true counts that occur; close means off by at most one.
    """
    counts = [len(points.parse_points(answer, 1, 1)) for answer in answers]
    rows = [{"correct": float(count == true), "close": float(abs(count - true) <= 1)}
            for true, count in zip(targets, counts, strict=True)]
    by_count = {true: np.mean([row["correct"] for row, other in zip(rows, targets) if other == true])
                for true in sorted(set(targets))}
    return hits.means(rows) | {"per_category_average": float(np.mean(list(by_count.values())))}


def _score(targets, answers, read: Callable[[str], int | None], suffix: str) -> dict[str, float]:
    rows = []
    for true, answer in zip(targets, answers, strict=True):
        count = read(answer)
        is_close = count is not None and abs(count - true) <= 1 + int(0.05 * true)
        rows.append({"correct": float(count == true), "close": float(is_close),
                     "valid": float(count is not None)})
    scores = hits.means(rows)
    bins = np.searchsorted(BINS, np.asarray(targets), side="right") - 1
    correct = np.array([row["correct"] for row in rows])
    accuracy = {f"correct_from_{BINS[b]}": float(correct[bins == b].mean()) for b in np.unique(bins)}
    scores["per_category_average"] = float(np.mean(list(accuracy.values())))
    return {name + suffix: value for name, value in (scores | accuracy).items()}
