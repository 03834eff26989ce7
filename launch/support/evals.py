"""Evaluation inside training: the scores of a run's weights, on its devices, at the steps of EvalsConfig.

The scores of every evaluation are a line of `evals.jsonl` in the work directory. A killed evaluation has no
line and is repeated when the run resumes; what benchmarks had been asked by then is kept in `evals/step_STEP`
and not asked again. Weights with the highest metric are kept in `best`, which is a work directory itself.
"""

import math
import pathlib
import statistics
import time

import jax
from absl import logging

from data_pipelines import suites
from data_pipelines.suites import benchmark
from data_pipelines.suites import predictions
from data_pipelines.suites import results
from launch import run
from launch.evaluation import runner
from launch.evaluation import suite
from launch.support import folders
from launch.support import trained
from molmo2_jax import checkpoint
from molmo2_jax import files
from molmo2_jax import generate
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.monitor import metrics

NAME = "evals.jsonl"
FOLDER = "evals"       # with a folder of predictions for each evaluation of benchmarks
BEST = "best"
NEW_TOKENS = 256       # of an answer about a folder, where EvalsConfig has no other number

Scores = dict[str, dict[str, float]]   # of each folder and of each benchmark


class Evals:
    """Evaluates the weights of a run where they are: nothing is copied. All processes must make equal calls.

    Called as train.fit says, first for the step at which the run starts or resumes; returns whether the run
    ends there.

    Raises:
      ValueError: a folder holds nothing that can be scored, a benchmark's files are absent or it needs a
        judge, or (when called) none has the metric.
    """

    def __init__(self, config: run.RunConfig, workdir, tokenizer: tokenizers.Tokenizer,
                 mesh: jax.sharding.Mesh):
        assert config.evals and config.train and config.data
        self._run, self._config, self._steps = config, config.evals, config.train.steps
        self._workdir, self._tokenizer, self._mesh = files.path(workdir), tokenizer, mesh
        self._data = {folder: folders.read(folder, self._config.limit) for folder in self._config.folders}
        for folder, data in self._data.items():
            if not data.examples:
                raise ValueError("a folder of train.EvalsConfig must hold records that can be scored; "
                                 f"got none in {folder}: {'; '.join([*data.left_out, *data.obstacles][:5])}")
        self._benchmarks = self._usable() if self._config.suites else []
        self._lines = metrics.read(self._workdir / NAME)

    def _usable(self) -> list[tuple[suites.Benchmark, benchmark.Read]]:
        """Returns the benchmarks that can be evaluated, with their questions."""
        assert self._run.data
        found, may_miss = suites.load(self._config.suites), self._run.data.allow_missing
        judged = [one.name for one in found if one.needs_judge]
        if judged and not may_miss:
            raise ValueError("train.EvalsConfig.suites must name benchmarks that need no judge of captions "
                             "(launch.evaluate asks one, about saved weights); got " + ", ".join(judged))
        for name in judged:
            logging.warning("left out of the evaluations: %s needs a judge of captions", name)
        job = suite.Job(benchmarks=[one for one in found if not one.needs_judge], output=pathlib.Path(),
                        root=pathlib.Path(self._config.benchmarks).absolute(), allow_missing=may_miss)
        usable, reasons = suite.usable(job)
        for reason in reasons.values():
            logging.warning("left out of the evaluations: %s", reason)
        return [(one, one.read(job.root, self._config.limit)) for one in usable]

    def __call__(self, step: int, params, held, report) -> bool:
        self._lines = [line for line in self._lines if line["step"] <= step]
        is_due = step > 0 and (step % self._config.every == 0 or step == self._steps)
        if is_due and step not in [line["step"] for line in self._lines]:
            report.previous()
            with report.during("evaluation"):
                self._evaluate(step, params, held, report)
        return self._is_over()

    def _evaluate(self, step: int, params, held, report) -> None:
        start = time.perf_counter()
        assert self._run.train and self._run.data
        answerer = generate.Answerer(
            params, self._run.model, self._run.inputs, self._tokenizer, mesh=self._mesh, is_copied=False,
            dtype=self._run.train.dtype, max_new_tokens=self._config.max_new_tokens or NEW_TOKENS)
        groups = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        rows = -(-self._config.rows // groups) * groups

        def watch(example) -> None:
            report.alive(f"evaluation after step {step} asks about {example.key}")

        scores: Scores = {folder: folders.score(
            answerer, data, rows=rows, is_pretraining=self._run.data.is_pretraining, watch=watch,
        ).scores for folder, data in self._data.items()}
        if self._benchmarks:
            scores |= self._of_benchmarks(step, answerer, rows, watch)
        value = self._value(scores)
        if value is not None and value > max(self._values(), default=-math.inf):
            self._keep(step, held)
        seconds = time.perf_counter() - start
        self._lines.append({"step": step, "scores": scores, "value": value, "seconds": round(seconds, 1)})
        if jax.process_index() == 0:
            with files.whole(self._workdir / NAME) as file:
                file.writelines(files.to_json(line) + "\n" for line in self._lines)
        text = "".join(f"\n  {folder}: " + ", ".join(f"{name} {one:.4g}" for name, one in found.items())
                       for folder, found in scores.items())
        report.evaluated(step, {f"{folder}/{name}": one for folder, found in scores.items()
                                for name, one in found.items()},
                         f"evaluation after step {step}, {seconds:.0f} s{text}")

    def _of_benchmarks(self, step: int, answerer: generate.Answerer, rows: int, watch) -> Scores:
        """Returns the scores of benchmarks, with "score", the headline; {} of answers that have none."""
        weights, scores, folder = answerer.fingerprint(), {}, self._workdir / FOLDER / f"step_{step}"
        for one, read in self._benchmarks:
            # Files in a bucket cannot be appended to.
            store = None if files.is_remote(folder) else predictions.Store.of(folder, one.name)
            outcome = runner.run(answerer, one, read.items, store, rows=rows, weights=weights, watch=watch,
                                 most_new_tokens=self._config.max_new_tokens)
            found: dict[str, float] = {}
            if jax.process_index() == 0:   # the others may read other masks
                result, _ = results.result(one, read.items, outcome.answers,
                                           [*map(str, read.errors), *outcome.left_out])
                if result.score is not None:
                    found = {"score": result.score, **result.scores}
                if result.reason:
                    logging.warning("%s after step %d: %s", one.name, step, result.reason)
                found["questions_left_out"] = float(len(result.left_out))
            scores[f"suites/{one.name}"] = runner.of_first(found)
        return scores

    def _value(self, scores: Scores) -> float | None:
        """Returns the mean of the metric over all that have it; None for NaN or without a metric."""
        name = self._config.metric
        if name is None:
            return None
        found = [one[name] for one in scores.values() if name in one]
        if not found:
            known = sorted({score for one in scores.values() for score in one})
            raise ValueError("train.EvalsConfig.metric must be a score of its folders or benchmarks, "
                             f"{', '.join(known)}; got {name}")
        mean = statistics.fmean(found)
        return mean if math.isfinite(mean) else None

    def _values(self) -> list[float]:
        return [-math.inf if line["value"] is None else line["value"] for line in self._lines]

    def _is_over(self) -> bool:
        """Returns whether the last `patience` evaluations brought no new highest value."""
        values, patience = self._values(), self._config.patience
        if not values or patience is None:
            return False
        return len(values) - 1 - values.index(max(values)) >= patience

    def _keep(self, step: int, held) -> None:
        """Saves what checkpoints hold of the weights as those of a work directory of its own."""
        best = self._workdir / BEST
        checkpoint.save_params(str(best), held, step)
        if jax.process_index() == 0:
            trained.copy_settings(self._workdir, best)
