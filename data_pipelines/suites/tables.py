"""The table of a suite in Markdown and JSON: our scores, and the published ones beside them, in percent."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import suites
from data_pipelines.suites import benchmark as benchmarks
from data_pipelines.suites import results

EMPTY = "–"
LEGEND = (
    "Percent. *score*: by the clean rule, which counts an answer that cannot be read as wrong; with its 95 % "
    "interval, from a bootstrap over videos. *published rule*: by the rule of the published figures, to be "
    "compared with them. *parsed*: share of answers that could be read. *tokens*, *frames*: means of an "
    "answer. *seconds*: for all answers.")


def averages(found: Sequence[results.Result]) -> dict[str, tuple[float, float] | None]:
    """Returns suite -> (mean score, mean by the published rule) of the paper's averages, for suites that were
    asked as a whole; None if one of the benchmarks has no score."""
    by_name = {one.name: one for one in found}
    means: dict[str, tuple[float, float] | None] = {}
    for suite in suites.AVERAGES:
        members = [by_name.get(one.name) for one in suites.SUITES[suite]]
        if not all(members):
            continue
        pairs = [(one.score, one.published_score) for one in members
                 if one and one.score is not None and one.published_score is not None]
        whole = len(pairs) == len(members)
        means[suite] = (float(np.mean([one for one, _ in pairs])),
                        float(np.mean([other for _, other in pairs]))) if whole else None
    return means


def as_json(found: Sequence[results.Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of results.json; about: what was evaluated."""
    means = averages(found)
    return {**about, "benchmarks": {one.name: one.as_json() for one in found},
            "averages": {suite: None if pair is None else dict(zip(("score", "published_score"), pair,
                                                                   strict=True))
                         for suite, pair in means.items()}}


def _percent(value: float | None) -> str:
    return EMPTY if value is None else f"{100 * value:.1f}"


def _interval(interval: results.Interval) -> str:
    return EMPTY if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"


def _figure(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.1f}"


HEAD = ("benchmark", "metric", "examples", "score", "95 %", "published rule", "parsed", "tokens", "frames",
        "seconds", *benchmarks.MODELS)


def cells(found: Sequence[results.Result]) -> list[tuple[str, ...]]:
    """Returns the table's rows, those of averages last; as many cells as HEAD."""
    rows = []
    for one in found:
        benchmark = suites.BENCHMARKS[one.name]
        metric = benchmark.metric
        is_empty = one.score is None
        published = map(_figure, benchmarks.published_of(benchmark, metric.published))
        rows.append((
            benchmark.title, metric.headline, EMPTY if is_empty else f"{one.examples} of {one.questions}",
            _percent(one.score), _interval(one.interval), _percent(one.published_score), _percent(one.parsed),
            EMPTY if is_empty else f"{one.tokens:.0f}", EMPTY if is_empty else f"{one.frames:.0f}",
            EMPTY if is_empty else f"{one.seconds:.0f}", *published))
    for suite, pair in averages(found).items():
        rows.append((f"average of {suite} ({len(suites.SUITES[suite])})", "", "",
                     _percent(pair and pair[0]), "", _percent(pair and pair[1]), "", "", "", "",
                     *map(_figure, suites.AVERAGES[suite])))
    return rows


def further(found: Sequence[results.Result]) -> list[tuple[str, ...]]:
    """Returns (benchmark, score, ours, published figures) of published scores besides the headline's."""
    rows = []
    for one in found:
        benchmark = suites.BENCHMARKS[one.name]
        rows += [(benchmark.title, name, _percent(one.scores[name]), *map(_figure, figures))
                 for name, figures in benchmark.published.items()
                 if name != benchmark.metric.published and name in one.scores]
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "\n".join(" | ".join(("", *row, "")).strip() for row in lines)


def markdown(found: Sequence[results.Result], about: Mapping[str, Any]) -> str:
    """Returns the table, what it says, and why cells are empty."""
    told = "".join(f"{name}: {value}\n" for name, value in about.items())
    empty = [f"- {suites.BENCHMARKS[one.name].title}: {one.reason}" for one in found if one.reason]
    partial = [f"- {suites.BENCHMARKS[one.name].title}: {len(one.left_out)} questions left out, the first: "
               f"{one.left_out[0]}" for one in found if one.left_out and not one.reason]
    parts = [told.rstrip(), _table(HEAD, cells(found)), LEGEND]
    if others := further(found):
        parts += ["Further published scores:",
                  _table(("benchmark", "score", "ours", *benchmarks.MODELS), others)]
    parts += ["Without a score:\n\n" + "\n".join(empty)] if empty else []
    parts += ["Incomplete:\n\n" + "\n".join(partial)] if partial else []
    return "\n\n".join(filter(None, parts)) + "\n"


def sources() -> str:
    """Returns the table of all benchmarks for the documentation: names, files, where they come from."""
    lines = ["| suite | benchmark | files, below `FOLDER/` | source | new tokens |", "|---|---|---|---|---:|"]
    for suite, members in suites.SUITES.items():
        if suite != "molmo2":
            lines += [f"| `{suite}` | `{one.name}`: {one.title} | "
                      + ", ".join(f"`{one.folder}/{name.strip()}`" for pattern in one.files
                                  for name in pattern.split("|")[:1])
                      + f" | {one.origin} | {one.max_new_tokens} |" for one in members]
    return "\n".join(lines)


def text(found: Sequence[results.Result]) -> str:
    """Returns the table for a terminal."""
    rows = [HEAD, *cells(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
