"""Scores of a benchmark's answers, with intervals, and the table of a suite.

N answers, K scores, C clusters, D draws. The bootstrap draws clusters (videos) with replacement, as answers
about one video are not independent; its seed is fixed, so that equal answers give equal intervals.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import suites
from data_pipelines.scoring import hits
from data_pipelines.suites import benchmark as benchmarks
from data_pipelines.suites import predictions
from data_pipelines.suites import rows as rows_lib

DRAWS, SEED = 1000, 0
LEVEL = 95.0           # percent of the draws inside an interval
_BLOCK = 100           # draws made at a time

Interval = tuple[float, float] | None
Rows = Mapping[str, benchmarks.Row]      # id of a question -> scores of its answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a table says about one benchmark; scores are 0 to 1.

    questions: of the benchmark. examples: answers that were scored. left_out: reasons why rows, questions or
      answers were left out.
    score, interval: of the headline, by the clean rule. published_score, published_interval: by the rule of
      published figures.
    parsed: share of answers that could be read. tokens, frames: means. seconds: sum.
    reason: why there is no score; "" if there is one.
    """
    name: str
    questions: int = 0
    examples: int = 0
    left_out: tuple[str, ...] = ()
    score: float | None = None
    interval: Interval = None
    published_score: float | None = None
    published_interval: Interval = None
    parsed: float | None = None
    tokens: float = 0.0
    prompt_tokens: float = 0.0
    frames: float = 0.0
    seconds: float = 0.0
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns the result as plain values, with the published figures beside."""
        benchmark = suites.BENCHMARKS[self.name]
        return dataclasses.asdict(self) | {
            "title": benchmark.title, "headline": benchmark.metric.headline,
            "published_rule": benchmark.metric.published,
            "published": {score: dict(zip(benchmarks.MODELS, figures, strict=True))
                          for score, figures in benchmark.published.items()}}


def rows_of(benchmark: benchmarks.Benchmark, items: Iterable[benchmarks.Item],
            answers: Mapping[str, predictions.Prediction]) -> tuple[Rows, list[str]]:
    """Returns the scores of each answer by id, and a sentence about each answer that cannot be scored.

    Raises:
      ValueError: a judge cannot answer; a caption is never left out for that.
    """
    rows: dict[str, benchmarks.Row] = {}
    left_out = []
    for item in items:
        if item.id not in answers:
            continue
        try:
            rows[item.id] = benchmark.metric.each(item, answers[item.id].answer)
        except (*rows_lib.BAD_ROW, OSError) as error:
            if benchmark.needs_judge:
                raise
            left_out.append(f"{item.id}: {type(error).__name__}: {error}")
    return rows, left_out


def result(benchmark: benchmarks.Benchmark, items: Sequence[benchmarks.Item],
           answers: Mapping[str, predictions.Prediction], left_out: Sequence[str] = (),
           ) -> tuple[Result, Rows]:
    """Returns the result of answers by id, and the scores of each; left_out: reasons for questions that were
    not asked.

    Raises:
      ValueError: as rows_of.
    """
    rows, unscored = rows_of(benchmark, items, answers)
    return _result(benchmark, items, answers, rows, (*left_out, *unscored)), rows


def _result(benchmark, items, answers, rows: Rows, reasons: tuple[str, ...]) -> Result:
    if not rows:
        return Result(name=benchmark.name, questions=len(items), left_out=reasons,
                      reason=f"no answer could be scored: {reasons[0] if reasons else 'there is none'}")
    metric = benchmark.metric
    scores = metric.derive(hits.means(list(rows.values())))
    clusters = {item.id: item.cluster for item in items}
    intervals = bootstrap(metric, rows, clusters)
    used = [answers[name] for name in rows]

    def mean(field: str) -> float:
        return float(np.mean([getattr(one, field) for one in used]))

    return Result(
        name=benchmark.name, questions=len(items), examples=len(rows), left_out=reasons,
        score=scores[metric.headline], interval=intervals.get(metric.headline),
        published_score=scores.get(metric.published), published_interval=intervals.get(metric.published),
        parsed=scores.get("valid"), tokens=mean("new_tokens"), prompt_tokens=mean("prompt_tokens"),
        frames=mean("frames"), seconds=float(sum(one.seconds for one in used)), scores=scores)


def headline(metric: benchmarks.Metric, rows: Rows) -> float:
    """Returns the headline of the answers."""
    return metric.derive(hits.means(list(rows.values())))[metric.headline]


def value_of(metric: benchmarks.Metric, row: benchmarks.Row) -> float:
    """Returns the headline of a single answer."""
    return row[metric.headline] if metric.headline in row else metric.derive(row)[metric.headline]


# ---- intervals


def bootstrap(metric: benchmarks.Metric, rows: Rows, clusters: Mapping[str, str], seed: int = SEED,
              ) -> dict[str, Interval]:
    """Returns the intervals of the headline and of the published score; none with fewer than two clusters."""
    draws = _draws(metric, [rows], clusters, seed)
    return {} if draws is None else {name: _interval(values[0]) for name, values in draws.items()}


def difference(metric: benchmarks.Metric, first: Rows, second: Rows, clusters: Mapping[str, str],
               seed: int = SEED) -> tuple[float, Interval]:
    """Returns (headline of the second minus that of the first, its interval) over the questions in both.

    Both are scored on the same draws of clusters, so that what is common to them cancels.

    Raises:
      ValueError: they have no question in common.
    """
    common = [name for name in first if name in second]
    if not common:
        raise ValueError("two evaluations must have questions in common; these have none")
    one, other = ({name: rows[name] for name in common} for rows in (first, second))
    means = [headline(metric, rows) for rows in (one, other)]
    draws = _draws(metric, [one, other], clusters, seed)
    values = None if draws is None else draws[metric.headline]
    return means[1] - means[0], None if values is None else _interval(values[1] - values[0])


def _interval(values_D: np.ndarray) -> Interval:
    tail = (100 - LEVEL) / 2
    found = values_D[np.isfinite(values_D)]
    if not len(found):
        return None
    low, high = np.percentile(found, [tail, 100 - tail])
    return float(low), float(high)


def _draws(metric: benchmarks.Metric, sides: Sequence[Rows], clusters: Mapping[str, str], seed: int,
           ) -> dict[str, np.ndarray] | None:
    """Returns score -> float64[sides, D] of all draws; None with fewer than two clusters."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters[one] for one in sides[0]))}
    C = len(numbers)
    if C < 2:
        return None
    names = list(dict.fromkeys(name for rows in sides for row in rows.values() for name in row))
    tables = [_sums(rows, names, clusters, numbers) for rows in sides]
    wanted = dict.fromkeys((metric.headline, metric.published))
    found: dict[str, list[list[float]]] = {name: [[] for _ in sides] for name in wanted}
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS // _BLOCK):
        weights_DC = rng.multinomial(C, np.full(C, 1 / C), size=_BLOCK).astype(np.float64)
        for side, (sums_CK, counts_CK) in enumerate(tables):
            with np.errstate(invalid="ignore", divide="ignore"):
                means_DK = (weights_DC @ sums_CK) / (weights_DC @ counts_CK)
            for means_K in means_DK:
                scores = metric.derive({name: float(value) for name, value in zip(names, means_K, strict=True)
                                        if np.isfinite(value)})
                for name in wanted:
                    found[name][side].append(scores.get(name, np.nan))
    return {name: np.array(values) for name, values in found.items()}


def _sums(rows: Rows, names: Sequence[str], clusters: Mapping[str, str], numbers: Mapping[str, int],
          ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (sums, counts) float64[C, K] of the scores in each cluster."""
    sums_CK, counts_CK = np.zeros((2, len(numbers), len(names)))
    columns = {name: column for column, name in enumerate(names)}
    for one, row in rows.items():
        cluster = numbers[clusters[one]]
        for name, value in row.items():
            sums_CK[cluster, columns[name]] += value
            counts_CK[cluster, columns[name]] += 1
    return sums_CK, counts_CK
