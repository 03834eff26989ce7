"""Accuracy of counts, read from the answer's sentence or from its number of points.

Source: paper, section 4 (video and image counting); reference: olmo/eval/evaluators.py.
"""

from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.scoring import hits
from molmo2_jax.inputs import points

BINS = (0, 5, 10, 15, 20, 25)  # lower ends of the ranges of true counts over which the average is taken


def score(targets: Sequence[int], answers: Sequence[str]) -> dict[str, float]:
    """Returns the scores of counts read from sentences; the _reference reader accepts fewer sentences.

    correct, close (off by at most 1 + 5 % of the true count), valid (readable), correct_from_N per range of
    true counts from N, and per_category_average, their mean.

    Raises:
      ValueError: there are no answers, or not one per target.
    """
    return (_score(targets, answers, points.read_count, "")
            | _score(targets, answers, points.read_count_reference, "_reference"))


def score_by_points(targets: Sequence[int], answers: Sequence[str]) -> dict[str, float]:
    """Returns the scores when an answer's count is its number of points, as for images in the reference.

    close means off by at most one. correct_COUNT is the accuracy at a true count, per_category_average the
    mean of these. An answer without a point counts 0; valid is the share of the others, and of those that say
    that there are none.

    Raises:
      ValueError: there are no answers, or not one per target.
    """
    counts = [len(points.parse_points(answer, 1, 1)) for answer in answers]
    rows = [{"correct": float(count == true), "close": float(abs(count - true) <= 1),
             "valid": float(count > 0 or points.read_count(answer) == 0)}
            for true, count, answer in zip(targets, counts, answers, strict=True)]
    by_count = hits.means([{f"correct_{true}": row["correct"]}
                           for true, row in sorted(zip(targets, rows), key=lambda pair: pair[0])])
    return hits.means(rows) | {"per_category_average": float(np.mean(list(by_count.values())))} | by_count


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
