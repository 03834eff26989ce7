"""Results of a sweep: arms that differ only in seed as one row, with intervals, differences and curves.

The interval of n seeds is that of Student's t, 95 %, for their mean: it assumes that seeds differ like draws
from a normal distribution. Differences to a baseline are taken seed by seed.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from molmo2_jax.monitor import metrics
from molmo2_jax.render import charts
from molmo2_jax.render import report

SEED_FIELDS = ("train.TrainConfig.seed", "pipeline.DataConfig.seed")
_LEVEL = 0.95
_LAST = 5  # lines of metrics.jsonl that the final values are means of
_FINAL = ("loss", "accuracy", "examples_per_second", "tokens_per_second")
_SEED = re.compile(rf"\s*(?:{'|'.join(map(re.escape, SEED_FIELDS))})\s*=\s*(\S+)\s*")


class Mean(NamedTuple):
    """Mean of `num` values; `half` is half the length of its interval, None if there is one value."""
    mean: float
    half: float | None
    num: int

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:.5g}"
        digits = max(0, 1 - int(np.floor(np.log10(self.half)))) if self.half > 0 else 4
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """An arm: its name, settings (gin files and bindings), metrics of its steps, and final values."""
    name: str
    settings: tuple[str, ...]
    lines: Sequence[Mapping[str, float]]
    values: Mapping[str, float]

    @property
    def seed(self) -> str:
        return " ".join(match[1] for match in map(_SEED.fullmatch, self.settings) if match)

    @property
    def group(self) -> tuple[str, ...]:
        """The settings apart from seeds, equal for arms that are repetitions of each other."""
        return tuple(one for one in self.settings if not _SEED.fullmatch(one))


def read(folder: pathlib.Path, described: Mapping[str, Sequence[str]]) -> list[Trained]:
    """Returns the arms of a sweep's folder; `described` maps their names to their settings."""
    arms = []
    for name, settings in described.items():
        lines = metrics.read(folder / name / "metrics.jsonl")
        arms.append(Trained(name=name, settings=tuple(settings), lines=lines,
                            values=_final(lines) | _scores(folder / name)))
    return arms


def groups(arms: Sequence[Trained]) -> dict[str, list[Trained]]:
    """Returns the arms by name of the group: the arm's name without its seed, or the name of a single arm."""
    found: dict[tuple[str, ...], list[Trained]] = {}
    for arm in arms:
        found.setdefault(arm.group, []).append(arm)
    named: dict[str, list[Trained]] = {}
    for members in found.values():
        name = members[0].name if len(members) == 1 else (
            re.sub(r"(^|_)[^_]*seed-[^_]*", "", members[0].name).strip("_") or "all seeds")
        named[name if name not in named else members[0].name] = members
    return named


def mean(values: Sequence[float]) -> Mean:
    """Returns the mean of at least one value, with its interval."""
    count = len(values)
    if count == 1:
        return Mean(float(values[0]), None, 1)
    quantile = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1))
    return Mean(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / count ** 0.5, count)


def means(members: Sequence[Trained]) -> dict[str, Mean]:
    """Returns the mean of each value over the arms of a group that have it."""
    names = dict.fromkeys(name for arm in members for name in arm.values)
    return {name: mean([arm.values[name] for arm in members if arm.values.get(name) is not None])
            for name in names if any(arm.values.get(name) is not None for arm in members)}


def differences(members: Sequence[Trained], baseline: Sequence[Trained]) -> dict[str, Mean]:
    """Returns the mean of (arm - baseline of the same seed) for each value that both have."""
    before = {arm.seed: arm for arm in baseline}
    pairs = [(arm.values, before[arm.seed].values) for arm in members if arm.seed in before]
    found: dict[str, list[float]] = {}
    for after, base in pairs:
        for name in after:
            if name != "step" and after[name] is not None and base.get(name) is not None:
                found.setdefault(name, []).append(after[name] - base[name])
    return {name: mean(values) for name, values in found.items()}


def tables(arms: Sequence[Trained], baseline: str | None) -> str:
    """Returns the results in Markdown: a row per group and, with a baseline, the differences to it.

    Raises:
      ValueError: no group is called `baseline`.
    """
    named = groups(arms)
    if baseline is not None and baseline not in named:
        raise ValueError(f"--baseline must be one of {list(named)}; got {baseline!r}")
    text = _table({name: (len(members), means(members)) for name, members in named.items()})
    if baseline is not None:
        others = {name: (len(members), differences(members, named[baseline]))
                  for name, members in named.items() if name != baseline}
        text += f"\nDifference to {baseline}, seed by seed:\n\n{_table(others)}"
    if any(len(members) > 1 for members in named.values()):
        text += (f"\n± is the {_LEVEL:.0%} interval of the mean over seeds (Student's t).\n\nEvery arm:\n\n"
                 + _table({arm.name: (1, means([arm])) for arm in arms}))
    return text


def to_json(arms: Sequence[Trained]) -> dict[str, dict]:
    """Returns the final values of every arm, and of every group of several seeds the means."""
    found = {arm.name: dict(arm.values) for arm in arms}
    return found | {name: {key: one._asdict() for key, one in means(members).items()}
                    for name, members in groups(arms).items() if len(members) > 1}


def page(title: str, arms: Sequence[Trained], names: Sequence[str], table: str) -> report.Report:
    """Returns a report with a chart per metric, of a curve per group; bands reach over all of its seeds."""
    curves: dict[str, dict[str, report.Curve]] = {}
    bands: dict[str, dict[str, Sequence[tuple[float, float, float]]]] = {}
    for metric in names:
        for name, members in groups(arms).items():
            found = [points for points in (_curve(arm, metric) for arm in members) if points]
            if not found:
                continue
            if len(found) == 1:
                curves.setdefault(metric, {})[name] = list(found[0].items())
                continue
            steps = sorted(set.intersection(*(set(points) for points in found)))
            values = np.array([[points[step] for step in steps] for points in found])
            if charts.is_noisy(values[0]):
                values = np.array([charts.smooth(row) for row in values])
            curves.setdefault(metric, {})[name] = list(zip(steps, values.mean(0).tolist()))
            bands.setdefault(metric, {})[name] = list(zip(
                steps, values.min(0).tolist(), values.max(0).tolist()))
    summary = "Bands reach from the lowest to the highest seed." if bands else ""
    return report.Report(title=title, summary=summary, curves=curves, bands=bands, command=table)


def _curve(arm: Trained, metric: str) -> dict[float, float]:
    return {line["step"]: line[metric] for line in arm.lines if line.get(metric) is not None}


def _final(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the last step and the means of the last metrics."""
    if not lines:
        return {"step": 0}
    return {"step": lines[-1]["step"]} | {
        name: float(np.mean([line[name] for line in lines[-_LAST:]])) for name in _FINAL if name in lines[-1]}


def _scores(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the scores that launch.evaluate wrote into the arm's folder, as {"data set: score": value}."""
    found = {}
    for path in sorted(workdir.glob("scores*.json")):
        for data, scores in json.loads(path.read_text(encoding="utf-8")).items():
            found |= {f"{pathlib.Path(data).name}: {name}": value for name, value in scores.items()}
    return found


def _table(results: Mapping[str, tuple[int, Mapping[str, Mean]]]) -> str:
    columns = list(dict.fromkeys(name for _, values in results.values() for name in values))
    has_seeds = any(count > 1 for count, _ in results.values())
    head = ["arm", *(["seeds"] if has_seeds else []), *columns]
    rows = [head, ["---"] * len(head)]
    rows += [[arm, *([str(count)] if has_seeds else []), *(str(values.get(name, "")) for name in columns)]
             for arm, (count, values) in results.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
