"""Stops a run whose loss is not finite or spikes, and keeps the batch that caused it.

`evidence/step_<n>/` in the work directory receives, for each host, its rows of the batch and the measured
values. The order of the data and dropout follow from the seed, so a run that resumes from the checkpoint
before it reaches the same step again.
"""

import collections
import math
import os

import numpy as np

from molmo2_jax import files
from molmo2_jax import types

WINDOW = 100     # steps whose losses define what a spike is
_FEWEST = 20     # with fewer losses, nothing counts as a spike
_SPREAD = 0.01   # lower bound on the deviation, as a share of the median


class Divergence(FloatingPointError):
    """The loss is not finite, or spiked; `folder` holds the evidence."""

    def __init__(self, message: str, folder: str):
        self.folder = folder
        super().__init__(f"{message}; its batch is kept in {folder}; the same command resumes after the "
                         "last checkpoint and reaches this step again")


class Guard:
    """Checks the measured values of every step.

    spike: number of deviations above the median of the last losses from which a loss is a spike; None: only
      values that are not finite stop the run. The deviation is 1.48 x the median distance from the median.
    """

    def __init__(self, workdir: str, host: int, spike: float | None):
        self._workdir, self._host, self._spike = workdir, host, spike
        self._losses = collections.deque(maxlen=WINDOW)

    def check(self, step: int, values: dict[str, float], batch: types.Batch) -> None:
        """Checks one step; on divergence, writes the evidence first.

        Raises:
          Divergence: a value is not finite, or the loss is a spike.
        """
        if not all(map(math.isfinite, values.values())):
            raise self._divergence(f"loss and gradients of step {step} must be finite; got {values}", step,
                                   values, batch)
        limit = self.limit()
        if values["loss"] > limit:
            raise self._divergence(f"the loss of step {step} must be below {limit:.4g}, {self._spike:g} "
                                   f"deviations above the median; got {values['loss']:.4g}", step, values,
                                   batch)
        self._losses.append(values["loss"])

    def limit(self) -> float:
        """Returns the highest loss that is not a spike."""
        if self._spike is None or len(self._losses) < _FEWEST:
            return math.inf
        median = np.median(self._losses)
        deviation = 1.4826 * np.median(np.abs(np.asarray(self._losses) - median))
        return float(median + self._spike * max(deviation, _SPREAD * abs(median)))

    def _divergence(self, message, step, values, batch):
        folder = files.path(self._workdir) / "evidence" / f"step_{step}"
        files.write_json(folder / f"host_{self._host}.json", {
            "step": step, "measured": {name: repr(value) for name, value in values.items()},
            "losses_before": list(self._losses), "rows": rows(batch)})
        with (folder / f"host_{self._host}.npz").open("wb") as file:
            np.savez(file, **{name: value for name, value in batch._asdict().items() if value is not None})
        return Divergence(message, str(folder))


def rows(batch: types.Batch) -> list[dict]:
    """Returns the examples of each row: numbers of tokens and answer tokens, and sum of loss weights."""
    def count(row, number):
        of_it = batch.example[row] == number
        weights = batch.weights[row][of_it]
        return {"example": number, "tokens": int(of_it.sum()), "answer_tokens": int((weights != 0).sum()),
                "weight": repr(float(weights.sum())),
                "first_tokens": batch.tokens[row][of_it][:32].tolist()}
    return [{"row": row, "examples": [count(row, number) for number in range(batch.example[row].max() + 1)]}
            for row in range(len(batch.tokens))]


def load(path: str | os.PathLike) -> types.Batch:
    """Returns the batch of an evidence file, host_<n>.npz."""
    with files.path(path).open("rb") as file, np.load(file) as fields:
        return types.Batch(**fields)
