"""One evaluation of a suite: checks the files, asks the model, scores, writes the tables and the page.

The output folder holds predictions/BENCHMARK.jsonl, results.json, table.md and report.html.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from data_pipelines.scoring import statements
from data_pipelines.suites import benchmark as benchmarks
from data_pipelines.suites import metrics
from data_pipelines.suites import predictions
from data_pipelines.suites import results
from data_pipelines.suites import segmenters
from data_pipelines.suites import tables
from launch.evaluation import page
from launch.evaluation import runner
from launch.support import lock
from molmo2_jax import files
from molmo2_jax import generate

RESULTS, TABLE, PAGE = "results.json", "table.md", "report.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to evaluate, and where.

    root: folder of all benchmarks. limit: questions of each benchmark; None: all.
    allow_missing: a benchmark without files, or without a judge that it needs, has an empty cell.
    judge: of captions. segment: makes masks of tracks for J&F. most_new_tokens: limit on the length of
      answers besides the benchmarks'.
    """
    benchmarks: Sequence[benchmarks.Benchmark]
    root: pathlib.Path
    output: pathlib.Path
    rows: int = 8
    limit: int | None = None
    allow_missing: bool = False
    judge: statements.Judge | None = None
    segment: segmenters.Segment | None = None
    most_new_tokens: int | None = None


def equipped(benchmark: benchmarks.Benchmark, job: Job) -> benchmarks.Benchmark:
    """Returns the benchmark with the job's judge or segmenter, if it has a use for one."""
    if benchmark.needs_judge and job.judge:
        return dataclasses.replace(benchmark, metric=metrics.judged(benchmark.metric, job.judge))
    if benchmark.metric is metrics.TRACKS and job.segment:
        return dataclasses.replace(benchmark, metric=metrics.tracks_with(job.segment))
    return benchmark


def usable(job: Job) -> tuple[list[benchmarks.Benchmark], dict[str, str]]:
    """Returns the benchmarks that can be evaluated, and why the others cannot be, by name.

    Raises:
      ValueError: some cannot be, and job.allow_missing is not set; the message has a sentence for each.
    """
    reasons: dict[str, str] = {}
    for one in job.benchmarks:
        try:
            one.check(job.root)
            if one.needs_judge and not job.judge:
                reasons[one.name] = (f"{one.name} ({one.title}) needs a judge of captions: --judge_url and "
                                     "--judge_model, or --judgements with recorded ones")
        except benchmarks.Missing as error:
            reasons[one.name] = str(error)
    if reasons and (not job.allow_missing or len(reasons) == len(job.benchmarks)):
        raise ValueError("; ".join(reasons.values()) + ". --allow_missing evaluates the others, and leaves "
                         "these cells and the averages with them empty")
    return [equipped(one, job) for one in job.benchmarks if one.name not in reasons], reasons


def evaluate(job: Job, load: Callable[[], generate.Answerer], about: dict[str, Any],
             ) -> tuple[list[results.Result], int]:
    """Returns the results of all benchmarks, and how many answers were skipped as not finite.

    All processes call it; process 0 writes, and has results of scores.

    Args:
      load: returns the model; called after the files were checked.
      about: what the tables say about the model.

    Raises:
      ValueError: files or a judge are missing; or another run uses the output folder.
    """
    found, reasons = usable(job)
    with lock.held(job.output):
        answerer = load()
        weights = answerer.fingerprint()
        about = about | {"weights": weights}
        made = {name: results.Result(name=name, reason=reason) for name, reason in reasons.items()}
        not_finite, shown = 0, {}
        for one in found:
            read = one.read(job.root, job.limit)
            outcome = runner.run(
                answerer, one, read.items, predictions.Store.of(job.output, one.name), rows=job.rows,
                most_new_tokens=job.most_new_tokens, weights=weights,
                title=None if jax.process_index() else one.name)
            not_finite += outcome.not_finite
            if jax.process_index():
                continue
            made[one.name], rows = results.result(one, read.items, outcome.answers,
                                                  [*map(str, read.errors), *outcome.left_out])
            shown[one.name] = page.worst(one, read.items, rows, outcome.answers)
            write(job.output, _ordered(job, made), about)
            page.write(job.output / PAGE, _ordered(job, made), about, shown)
    return _ordered(job, made), not_finite


def _ordered(job: Job, made: dict[str, results.Result]) -> list[results.Result]:
    return [made[one.name] for one in job.benchmarks if one.name in made]


def write(output: pathlib.Path, found: Sequence[results.Result], about: dict[str, Any]) -> None:
    """Writes results.json and table.md."""
    files.write_json(output / RESULTS, tables.as_json(found, about))
    with files.whole(output / TABLE) as file:
        file.write(tables.markdown(found, about))


def score(job: Job, answers: dict[str, dict[str, predictions.Prediction]]) -> list[results.Result]:
    """Returns the results of answers by benchmark and id, without a model.

    Raises:
      ValueError: files or a judge are missing.
    """
    found, reasons = usable(job)
    made = {name: results.Result(name=name, reason=reason) for name, reason in reasons.items()}
    for one in found:
        read = one.read(job.root, job.limit)
        made[one.name], _ = results.result(one, read.items, answers.get(one.name, {}),
                                           list(map(str, read.errors)))
    return [made[one.name] for one in job.benchmarks]
