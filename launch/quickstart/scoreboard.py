"""The results of the quickstart: the content of summary.json and the printed table."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from molmo2_jax.monitor import metrics

# name in summary.json: (words, goal)
SCORES = {
    "video_point_precision": ("video pointing, precision", None),
    "video_point_recall": ("video pointing, recall", None),
    "video_point_f1": ("video pointing, F1", 0.80),
    "image_point_precision": ("image pointing, precision", None),
    "image_point_recall": ("image pointing, recall", None),
    "image_point_f1": ("image pointing, F1", 0.85),
    "count_accuracy": ("counting, accuracy", 0.70),
    "track_jf": ("tracking, J&F", 0.50),
    "choice_accuracy": ("multiple choice, accuracy", None),
}
COSTS = {"train_seconds": "training", "total_seconds": "everything", "peak_memory_gib": "memory"}
_LAST = 5   # last lines of metrics.jsonl; the loss of the trained model is their mean

Summary = Mapping[str, Any]   # name -> number or None; "untrained" -> such a mapping


def summary(trained: Mapping[str, float], untrained: Mapping[str, float],
            losses: tuple[float | None, float | None], costs: Mapping[str, float]) -> dict:
    """Returns the content of summary.json: scores and loss, those of the untrained model, and costs.

    Scores without questions are None. losses: (trained, untrained). costs: all of COSTS.
    """
    both = [{name: scores.get(name) for name in SCORES} | {"loss": loss}
            for scores, loss in zip((trained, untrained), losses, strict=True)]
    return both[0] | {name: round(costs[name], 3) for name in COSTS} | {"untrained": both[1]}


def losses(workdir: str | os.PathLike) -> tuple[float | None, float | None]:
    """Returns the mean training loss of the last steps, and the loss of the first step, before any update."""
    lines = metrics.read(str(pathlib.Path(workdir) / "metrics.jsonl"))
    if not lines:
        return None, None
    return float(np.mean([line["loss"] for line in lines[-_LAST:]])), lines[0]["loss"]


def table(content: Summary) -> str:
    """Returns the table printed in the terminal."""
    rows: list[tuple[str, str, float | None]] = [("training loss", "loss", None)]
    rows += [(words, name, goal) for name, (words, goal) in SCORES.items()]
    lines = [f"{'':27}{'trained':>9}{'untrained':>11}{'goal':>8}", "-" * 55]
    for words, name, goal in rows:
        lines.append(f"{words:27}{_number(content[name]):>9}{_number(content['untrained'][name]):>11}"
                     f"{_number(goal) if goal else '':>8}")
    training, total, memory = costs(content)
    lines += ["-" * 55, f"training took {training} of {total} in total; peak memory at most {memory}"]
    return "\n".join(lines)


def costs(content: Summary) -> tuple[str, str, str]:
    """Returns training time, total time and peak memory as text."""
    return (duration(content["train_seconds"]), duration(content["total_seconds"]),
            f"{content['peak_memory_gib']:.1f} GiB")


def duration(seconds: float) -> str:
    """Returns "4 min 05 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
