"""Two evaluations of the same questions: differences with intervals, and the answers that flipped."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from data_pipelines import suites
from data_pipelines.suites import predictions
from data_pipelines.suites import results
from launch.evaluation import suite

FLIP = 0.5       # difference of a question's score from which its answer has flipped
SHOWN = 10       # flipped answers of a benchmark that are printed
_LONGEST = 80    # characters of an answer that are printed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flip:
    """A question whose score changed by at least FLIP, and both answers."""
    id: str
    scores: tuple[float, float]
    answers: tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """The second evaluation minus the first, over the `examples` questions that both have answers to."""
    name: str
    examples: int = 0
    scores: tuple[float, float] = (0.0, 0.0)
    difference: float = 0.0
    interval: results.Interval = None
    flips: tuple[Flip, ...] = ()
    reason: str = ""

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def compare(job: suite.Job, first: str | os.PathLike, second: str | os.PathLike) -> list[Compared]:
    """Returns the comparison of each benchmark of two output folders or files of predictions.

    Raises:
      ValueError: as suite.usable, or there are no predictions at a path.
    """
    found, reasons = suite.usable(job)
    names = [one.name for one in job.benchmarks]
    sides = [predictions.of_path(path, names) for path in (first, second)]
    made = {name: Compared(name=name, reason=reason) for name, reason in reasons.items()}
    for benchmark in found:
        items = benchmark.read(job.root, job.limit).items
        answers = [side[benchmark.name] for side in sides]
        one, other = (results.rows_of(benchmark, items, given)[0] for given in answers)
        common = [item.id for item in items if item.id in one and item.id in other]
        if not common:
            made[benchmark.name] = Compared(name=benchmark.name, reason="no question has an answer in both")
            continue
        one, other = ({name: rows[name] for name in common} for rows in (one, other))
        clusters = {item.id: item.cluster for item in items}
        difference, interval = results.difference(benchmark.metric, one, other, clusters)
        values = {name: (results.value_of(benchmark.metric, one[name]),
                         results.value_of(benchmark.metric, other[name])) for name in common}
        flips = [Flip(id=name, scores=pair, answers=(answers[0][name].answer, answers[1][name].answer))
                 for name, pair in values.items() if abs(pair[1] - pair[0]) >= FLIP]
        means = tuple(results.headline(benchmark.metric, rows) for rows in (one, other))
        made[benchmark.name] = Compared(
            name=benchmark.name, examples=len(common), scores=(means[0], means[1]), difference=difference,
            interval=interval, flips=tuple(flips))
    return [made[name] for name in names]


def as_json(found: Sequence[Compared], first: str, second: str) -> dict[str, Any]:
    """Returns the comparison as plain values."""
    return {"first": first, "second": second, "benchmarks": {
        one.name: dataclasses.asdict(one) | {"is_significant": one.is_significant} for one in found}}


def text(found: Sequence[Compared], first: str, second: str) -> str:
    """Returns the comparison for a terminal, in percent."""
    lines = [f"first: {first}", f"second: {second}", "",
             f"{'benchmark':28}{'examples':>9}{'first':>8}{'second':>8}{'difference':>12}   95 %", "-" * 84]
    for one in found:
        title = suites.BENCHMARKS[one.name].title
        if one.reason:
            lines.append(f"{title:28}{one.reason}")
            continue
        interval = "" if one.interval is None else (
            f"{100 * one.interval[0]:+.1f} to {100 * one.interval[1]:+.1f}")
        lines.append(f"{title:28}{one.examples:>9}{100 * one.scores[0]:>8.1f}{100 * one.scores[1]:>8.1f}"
                     f"{100 * one.difference:>+12.1f}   {interval}{' *' if one.is_significant else ''}")
    lines += ["-" * 84, "* the interval excludes 0"]
    for one in found:
        if one.flips:
            better = sum(flip.scores[1] > flip.scores[0] for flip in one.flips)
            lines += ["", f"{suites.BENCHMARKS[one.name].title}: {len(one.flips)} answers flipped, "
                      f"{better} for the better"]
            lines += [f"  {flip.id}: {flip.scores[0]:.2f} -> {flip.scores[1]:.2f}: "
                      f"{_short(flip.answers[0])} -> {_short(flip.answers[1])}" for flip in one.flips[:SHOWN]]
    return "\n".join(lines)


def _short(answer: str) -> str:
    answer = " ".join(answer.split())
    return repr(answer if len(answer) <= _LONGEST else f"{answer[:_LONGEST]}…")
