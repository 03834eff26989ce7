"""Statistics of the findings of one data set, collected record by record, as plain values for JSON."""

import array
import collections
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_pipelines.doctor import examination
from data_pipelines.stream import ledger

MOST_BINS = 16       # of a histogram
MOST_RULES = 200     # kinds of problems that are told apart; further ones are counted as one
MOST_EXAMPLES = 3    # of each kind of problem
MOST_SIZES = 12      # resolutions that are listed; further ones are counted as one
OTHER = "other"
_MEASURES = ("duration_seconds", "frame_rate", "keyframe_seconds", "frames", "tokens", "visual_tokens",
             "crops")


def summary(values: Sequence[float]) -> dict[str, Any] | None:
    """Returns count, mean, total, quantiles and a histogram of numbers; None if there are none."""
    if not len(values):
        return None
    data = np.asarray(values, np.float64)
    low, p10, median, p90, high = (float(q) for q in np.quantile(data, (0, 0.1, 0.5, 0.9, 1)))
    bins = min(MOST_BINS, max(1, len(np.unique(data[:10_000]))))
    counts, edges = np.histogram(data, bins=bins, range=(low, high if high > low else low + 1))
    return {"count": len(data), "min": low, "p10": p10, "median": median, "mean": float(data.mean()),
            "p90": p90, "max": high, "total": float(data.sum()),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()}}


def rule(message: str, paths: Iterable[str] = ()) -> str:
    """Returns a problem's message without what differs between records: places, files, values, details."""
    text = re.sub(r"^.*?\.jsonl:\d+: ", "", message)
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, "FILE")
    text = re.sub(r"^[^:]*(?:/|\\)[^:]*: ", "FILE: ", text)
    text = text.partition("; got ")[0]
    while text != (text := re.sub(r"\s*\([^()]*\)", "", text)):
        pass
    text = re.sub(r"\[\d+\]", "[]", text)
    return re.sub(r"\d+(?:\.\d+)?", "N", text)[:200]


class Statistics:
    """Collects the findings of one data set."""

    def __init__(self):
        self._examined, self._alive, self._cut = 0, 0, 0
        self._media, self._reasons = collections.Counter(), collections.Counter()
        self._sizes = collections.Counter()
        self._numbers = {name: array.array("d") for name in _MEASURES}
        self._amounts = collections.defaultdict(lambda: array.array("d"))
        self._kinds = collections.Counter()                   # records with an annotation of the kind
        self._problems = collections.Counter()                # by (stage, rule), once per record
        self._examples = collections.defaultdict(list)
        self._read = {"video": [0, 0, 0.0], "images": [0, 0, 0.0]}   # records, frames or images, seconds
        self._seconds = [0, 0.0]                              # records, CPU seconds of the whole preparation
        self._fitting = array.array("q")                      # tokens, crops, visual tokens of usable records

    def add(self, found: examination.Finding, paths: Iterable[str] = ()) -> None:
        """Counts a finding; `paths` are the files that its problems may name."""
        self._examined += 1
        self._alive += not found.reason
        self._cut += found.is_cut
        if found.reason:
            self._reasons[found.reason] += 1
        if found.medium:
            self._media[found.medium] += 1
        self._sizes.update(found.sizes)
        for kind, held in found.amounts:
            self._amounts[kind].append(held)
        self._kinds.update({kind for kind, _ in found.amounts})
        self._add_problems(found, paths)
        self._add_numbers(found)

    def _add_problems(self, found: examination.Finding, paths: Iterable[str]) -> None:
        seen = set()
        for problem in found.problems:
            kind = (problem.stage, rule(problem.message, paths))
            if kind not in self._problems and len(self._problems) >= MOST_RULES:
                kind = (problem.stage, OTHER)
            if kind in seen:
                continue
            seen.add(kind)
            self._problems[kind] += 1
            if len(self._examples[kind]) < MOST_EXAMPLES:
                self._examples[kind].append(problem.message)

    def _add_numbers(self, found: examination.Finding) -> None:
        film, numbers = found.film, self._numbers
        if film:
            for name, value in (("duration_seconds", film.duration), ("frame_rate", film.fps),
                                ("keyframe_seconds", film.keyframe_seconds), ("frames", film.num_frames)):
                numbers[name].append(value)
        if found.sizes:
            read = self._read[found.medium]
            read[0] += 1
            read[1] += film.num_frames if film else len(found.sizes)
            read[2] += found.read_seconds
        if not found.tokens:
            return
        for name in ("tokens", "visual_tokens", "crops"):
            numbers[name].append(getattr(found, name))
        if not found.reason:
            self._seconds[0] += 1
            self._seconds[1] += found.read_seconds + found.compose_seconds
            self._fitting.extend((found.tokens, found.crops, found.visual_tokens))

    @property
    def seconds_per_record(self) -> float | None:
        """CPU seconds that preparing a usable record takes; None if none was prepared."""
        return self._seconds[1] / self._seconds[0] if self._seconds[0] else None

    @property
    def usable_sizes(self) -> np.ndarray:
        """int64[N, 3]: tokens, crops and visual tokens of the usable records."""
        return np.array(self._fitting, np.int64).reshape(-1, 3)

    def result(self) -> dict[str, Any]:
        """Returns the statistics. Shares refer to the examined records; a problem counts once per record."""
        return {
            "examined": self._examined, "usable": self._alive, "usable_share": self._share(self._alive),
            "left_out": dict(self._reasons.most_common()), "media": dict(self._media.most_common()),
            "cut": self._cut, "cut_share": self._share(self._cut),
            "too_large": self._reasons[ledger.SIZE],
            "too_large_share": self._share(self._reasons[ledger.SIZE]),
            "annotations": {kind: {"records": self._kinds[kind], "unit": examination.KIND_UNITS[kind],
                                   "amount": summary(self._amounts[kind])}
                            for kind in sorted(self._amounts)},
            **{name: summary(values) for name, values in self._numbers.items()},
            "resolutions": self._resolutions(), "reading": self._reading(),
            "core_seconds_per_record": self.seconds_per_record, "problems": self._grouped()}

    def _share(self, count: int) -> float | None:
        return count / self._examined if self._examined else None

    def _resolutions(self) -> dict[str, int]:
        """Returns how many media have each size, "WIDTH x HEIGHT" in pixels."""
        listed = self._sizes.most_common()
        named = {f"{width} x {height}": count for (width, height), count in listed[:MOST_SIZES]}
        rest = sum(count for _, count in listed[MOST_SIZES:])
        return named | ({OTHER: rest} if rest else {})

    def _reading(self) -> dict[str, Any]:
        """Returns what reading media costs on this machine, by medium."""
        return {medium: {"records": records, "pictures": pictures, "core_seconds": seconds,
                         "pictures_per_core_second": pictures / seconds if seconds else None}
                for medium, (records, pictures, seconds) in self._read.items() if records}

    def _grouped(self) -> list[dict[str, Any]]:
        return [{"stage": stage, "rule": text, "records": count, "share": self._share(count),
                 "examples": self._examples[stage, text]}
                for (stage, text), count in sorted(self._problems.items(), key=lambda one: (-one[1], one[0]))]
