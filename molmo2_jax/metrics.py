"""What a run reports: JSON lines, TensorBoard, a progress bar; counts of what a batch really holds."""

import json
import os
import time

import numpy as np
import tqdm

from molmo2_jax import types


def batch_counts(batch: types.Batch) -> dict[str, float]:
    """Returns examples, branches, tokens and crops in a host batch, and the fill of both budgets (0 to 1)."""
    real = batch.example >= 0
    examples = int((batch.example.max(axis=1) + 1).sum())
    pairs = batch.example.astype(np.int64) * 100_000 + batch.branch
    branches = sum(len(np.unique(row[keep])) for row, keep in zip(pairs, real & (batch.branch >= 0)))
    crop_of = batch.pooled // batch.patches.shape[2]
    used = sum(int(rows.max(initial=-1)) + 1 for rows in crop_of)
    slots = batch.patches.shape[0] * batch.patches.shape[1]
    return {"examples": examples, "branches": branches, "tokens": int(real.sum()),
            "token_fill": float(real.mean()), "crop_fill": used / slots if slots else 0.0}


class Writer:
    """Appends metrics to `metrics.jsonl` and to TensorBoard files in a work directory.

    After a resume, lines of steps that will be repeated are dropped first.
    """

    def __init__(self, workdir: str, first_step: int):
        os.makedirs(workdir, exist_ok=True)
        self._path = os.path.join(workdir, "metrics.jsonl")
        kept = [line for line in read(self._path) if line["step"] < first_step]
        with open(self._path + ".tmp", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(self._path + ".tmp", self._path)
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115, closed by close()
        import tensorboardX  # half a second of imports that only a training run needs
        self._board = tensorboardX.SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read(path: str) -> list[dict]:
    """Returns the lines of a metrics file; a last line cut off by a kill is left out."""
    if not os.path.exists(path):
        return []
    lines = []
    with open(path) as file:
        for line in file:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


class Progress:
    """A bar over steps with loss, examples/s, tokens/s, the fill of both budgets and the time left."""

    def __init__(self, first: int, total: int, disable: bool = False):
        self._bar = tqdm.tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, disable=disable,
                              mininterval=1.0)
        self._last = time.monotonic()
        self._rates = {}

    def update(self, counts: dict[str, float], loss: float) -> dict[str, float]:
        """Advances one step; returns the smoothed rates."""
        now = time.monotonic()
        seconds, self._last = max(now - self._last, 1e-6), now
        for name in ("examples", "tokens"):
            rate = counts[name] / seconds
            self._rates[name] = 0.95 * self._rates.get(name, rate) + 0.05 * rate
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {self._rates['examples']:.0f} ex/s, {self._rates['tokens']:.0f} tok/s, "
            f"fill {counts['token_fill']:.0%} tokens {counts['crop_fill']:.0%} crops", refresh=False)
        self._bar.update(1)
        return {f"{name}_per_second": rate for name, rate in self._rates.items()}

    def close(self) -> None:
        self._bar.close()
