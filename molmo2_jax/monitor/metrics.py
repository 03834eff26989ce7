"""Metrics of a run as JSON lines, in TensorBoard and as a progress bar; counts of a batch's contents."""

import hashlib
import importlib.util
import json
import os
import tempfile
import time

import numpy as np

from molmo2_jax import files
from molmo2_jax import types
from molmo2_jax.monitor import bars

NAME = "metrics.jsonl"


def batch_counts(batch: types.Batch) -> dict[str, float]:
    """Returns examples, branches and tokens in a host batch, and the fill (0 to 1) of its token and crop
    budgets."""
    real = batch.example >= 0
    examples = int((batch.example.max(axis=1) + 1).sum())
    pairs = batch.example.astype(np.int64) * 100_000 + batch.branch
    branches = sum(len(np.unique(row[keep])) for row, keep in zip(pairs, real & (batch.branch >= 0)))
    crop_of = batch.pooled // batch.patches.shape[2]
    used = sum(int(rows.max(initial=-1)) + 1 for rows in crop_of)
    slots = batch.patches.shape[0] * batch.patches.shape[1]
    return {"examples": examples, "branches": branches, "tokens": int(real.sum()),
            "token_fill": float(real.mean()), "crop_fill": used / slots if slots else 0.0}


def is_timed(name: str) -> bool:
    """Returns whether a value depends on the clock, and so differs between equal runs."""
    return name.endswith("_per_second") or name in ("mfu", "goodput", "data_stall")


def _open_board(folder: str, first_step: int):
    import tensorboardX  # half a second of imports, needed in training only
    return tensorboardX.SummaryWriter(folder, purge_step=first_step)


class Writer:
    """Appends metrics to `metrics.jsonl` and to TensorBoard files in a work directory, and to wandb if it is
    installed: offline, unless WANDB_API_KEY or WANDB_MODE is set.

    After a resume, lines of steps that will be repeated are dropped first. Objects in a bucket cannot be
    appended to: files are then kept on this machine and copied by `publish`.
    """

    def __init__(self, workdir: str, first_step: int):
        self._target = files.path(workdir)
        self._here = tempfile.TemporaryDirectory() if files.is_remote(workdir) else None
        self._folder = files.path(self._here.name if self._here else workdir)
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(self._target / NAME) if line["step"] < first_step]
        with files.whole(self._folder / NAME) as file:
            file.writelines(files.to_json(line) + "\n" for line in kept)
        self._file = open(self._folder / NAME, "a", buffering=1)  # noqa: SIM115, closed by close()
        self._board = _open_board(str(self._folder / "tensorboard"), first_step)
        self._wandb = _wandb_run(workdir) if _has_wandb() else None

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(files.to_json({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes uint8[h, w, 3] to TensorBoard, and to wandb if it is there."""
        self._board.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb:
            import wandb
            self._wandb.log({name: wandb.Image(pixels)}, step=step)

    def write_scores(self, step: int, scores: dict[str, float]) -> None:
        """Writes scores of an evaluation to TensorBoard and wandb, below "evals/"."""
        for name, value in scores.items():
            self._board.add_scalar(f"evals/{name}", value, step)
        if self._wandb:
            self._wandb.log({f"evals/{name}": value for name, value in scores.items()}, step=step)

    def publish(self) -> None:
        """Copies the files to a work directory in a bucket."""
        if self._here:
            files.copy(self._folder, self._target)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        self.publish()
        if self._here:
            self._here.cleanup()
        if self._wandb:
            self._wandb.finish()


def _has_wandb() -> bool:
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None  # a mere folder is found as a namespace


def _wandb_run(workdir):
    """Returns the wandb run of a work directory, the same one after a restart."""
    import wandb  # optional; not among the requirements
    place = str(files.path(workdir))
    has_account = bool(os.environ.get("WANDB_API_KEY"))
    mode = os.environ.get("WANDB_MODE") or ("online" if has_account else "offline")
    return wandb.init(project="molmo2_jax", name=os.path.basename(place), mode=mode,
                      dir=None if files.is_remote(place) else place,
                      resume="allow", id=hashlib.sha256(place.encode()).hexdigest()[:16])


def read(path: str | os.PathLike) -> list[dict]:
    """Returns the lines of a metrics file; a last line that a kill cut off is left out."""
    path = files.path(path)
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Progress:
    """A bar over steps with loss, examples/s, tokens/s, fill of tokens and crops, and remaining time."""

    def __init__(self, first: int, total: int, disable: bool = False):
        self._bar = bars.bar(total=total, initial=first, unit="step", dynamic_ncols=True, disable=disable,
                             mininterval=1.0)
        self._last = time.monotonic()
        self._rates = {}

    def update(self, counts: dict[str, float], loss: float, note: str = "") -> dict[str, float]:
        """Advances one step and returns the smoothed rates. `note` is appended to the line."""
        now = time.monotonic()
        seconds, self._last = max(now - self._last, 1e-6), now
        for name in [name for name in ("examples", "tokens", "flops") if name in counts]:
            rate = counts[name] / seconds
            self._rates[name] = 0.95 * self._rates.get(name, rate) + 0.05 * rate
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {self._rates['examples']:.0f} ex/s, {self._rates['tokens']:.0f} tok/s, "
            f"fill {counts['token_fill']:.0%} tokens {counts['crop_fill']:.0%} crops{note}", refresh=False)
        self._bar.update(1)
        return {f"{name}_per_second": rate for name, rate in self._rates.items()}

    def leave_out_time(self) -> None:
        """Leaves the time since the last update out of the rates."""
        self._last = time.monotonic()

    def close(self) -> None:
        self._bar.close()
