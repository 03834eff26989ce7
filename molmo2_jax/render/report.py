"""A run as a self-contained HTML page: scores, curves, answers drawn on held-out media, a packed row."""

import dataclasses
import html
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from molmo2_jax.render import charts
from molmo2_jax.render import document
from molmo2_jax.render import pictures

Curve = Sequence[tuple[float, float]]  # (step, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A score of the trained model and that of the untrained one; both in [0, 1] unless `unit` is set."""
    name: str
    trained: float
    untrained: float | None = None
    goal: float | None = None
    unit: str = ""      # shown after the number; no bar is drawn then
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """One question, the answers, and frames uint8[h, w, 3] with the answer drawn on them.

    score: in [0, 1]; None if there is none.
    frames: shown side by side.
    animation: shown large, `seconds` per picture.
    """
    question: str
    answer: str
    truth: str = ""
    score: float | None = None
    frames: Sequence[np.ndarray] = ()
    animation: Sequence[np.ndarray] = ()
    seconds: float = 0.5
    caption: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Contents of the page; empty parts are omitted.

    facts: short name -> value, shown under the title.
    curves: chart title -> curve name -> curve.
    bands: chart title -> curve name -> (step, low, high), drawn behind the curve of that name.
    row_svg, row_mask: from tree.tree_svg and tree.mask_picture.
    command: a command to try next, shown at the end.
    """
    title: str
    summary: str = ""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metrics: Sequence[Metric] = ()
    curves: Mapping[str, Mapping[str, Curve]] = dataclasses.field(default_factory=dict)
    bands: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]] = dataclasses.field(
        default_factory=dict)
    answers: Sequence[Shown] = ()
    tracks: Sequence[Shown] = ()
    row_svg: str = ""
    row_mask: np.ndarray | None = None
    command: str = ""


def write_report(path, report: Report) -> None:
    """Writes the page; it needs no other file and no network."""
    pathlib.Path(path).write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """Returns the HTML of a report."""
    legend = ('<p class="legend"><span class="ring"></span> true point <span class="cross">✕</span> '
              "predicted point; each colour is one id of the answer</p>")
    command = f"<pre><code>{html.escape(report.command)}</code></pre>" if report.command else ""
    sections = [
        document.section("Scores on held-out data", _metrics(report.metrics) if report.metrics else ""),
        document.section("Training", _charts(report.curves, report.bands) if report.curves else ""),
        document.section("Answers about clips and images not seen in training",
                 legend + cards(report.answers) if report.answers else ""),
        document.section("Tracks", cards(report.tracks, "wide") if report.tracks else ""),
        document.section("One packed row as message trees", _row(report)),
        document.section("Try next", command),
    ]
    return document.html_of(report.title, report.summary, report.facts, sections)


def _number(value: float | None, unit: str) -> str:
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:,.4g} {html.escape(unit)}" if unit else f"{value:.3f}"


def _metrics(metrics: Sequence[Metric]) -> str:
    rows = []
    for one in metrics:
        bar = ""
        if not one.unit and np.isfinite(one.trained):
            marks = "".join(f'<i class="{name}" style="left:{100 * min(max(value, 0), 1):.1f}%"></i>'
                            for name, value in (("before", one.untrained), ("goal", one.goal))
                            if value is not None and np.isfinite(value))
            bar = (f'<div class="bar"><b style="width:{100 * min(max(one.trained, 0), 1):.1f}%"></b>{marks}'
                   "</div>")
        note = f"<small>{html.escape(one.note)}</small>" if one.note else ""
        goal = _number(one.goal, one.unit) if one.goal is not None else ""
        rows.append(f"<tr><th>{html.escape(one.name)}{note}</th><td class=number>"
                    f"<strong>{_number(one.trained, one.unit)}</strong></td><td class=number>"
                    f"{_number(one.untrained, one.unit)}</td><td class=number>{goal}</td>"
                    f"<td class=wide>{bar}</td></tr>")
    goal_head = "goal" if any(one.goal is not None for one in metrics) else ""
    return ('<div class="scroll"><table><thead><tr><th></th><th>trained</th><th>untrained</th>'
            f"<th>{goal_head}</th><th></th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>")


def _charts(curves, bands) -> str:
    drawn = ""
    for title, lines in curves.items():
        chart = charts.curves_svg(lines, bands.get(title, {}), y_label=title, is_log=_spans_decades(lines))
        drawn += f"<figure><figcaption>{html.escape(title)}</figcaption>{chart}</figure>"
    return f'<div class="charts">{drawn}</div>'


def _spans_decades(lines) -> bool:
    """Returns whether the values of curves are positive and the largest is 100 times the smallest."""
    values = [y for line in lines.values() for _, y in line if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 100 * min(values)


def cards(shown: Sequence[Shown], kind: str = "") -> str:
    """Returns figures side by side, as HTML; "" without any. kind: "wide" for one below the other."""
    if not shown:
        return ""
    return f'<div class="cards {kind}">{"".join(_card(one) for one in shown)}</div>'


def _card(one: Shown) -> str:
    frames = "".join(document.picture(frame, one.question) for frame in one.frames)
    if one.animation:
        data = pictures.data_uri(pictures.animation(one.animation, one.seconds, "WEBP"), "webp")
        height, width = one.animation[0].shape[:2]
        frames = f'<img src="{data}" width="{width}" height="{height}" alt="animation">{frames}'
    verdict = ""
    if one.score is not None:
        grade = "good" if one.score >= 0.8 else "fair" if one.score >= 0.4 else "poor"
        verdict = f'<span class="verdict {grade}">{one.score:.2f}</span>'
    truth = f"<dt>truth</dt><dd>{_answer(one.truth)}</dd>" if one.truth else ""
    caption = f'<p class="soft">{html.escape(one.caption)}</p>' if one.caption else ""
    return (f'<article><div class="frames">{frames}</div><h3>{html.escape(one.question)}{verdict}</h3>'
            f"<dl><dt>answer</dt><dd>{_answer(one.answer)}</dd>{truth}</dl>{caption}</article>")


def _answer(text: str, limit: int = 220) -> str:
    """Returns an answer as code; the rest of a long one is collapsed."""
    if len(text) <= limit:
        return f"<code>{html.escape(text) or '(empty)'}</code>"
    return (f"<details><summary><code>{html.escape(text[:limit])}…</code></summary>"
            f"<code>{html.escape(text[limit:])}</code></details>")


def _row(report: Report) -> str:
    if not report.row_svg:
        return ""
    legend = ('<p class="legend">A row holds several examples. Each is a tree: the root holds the visual '
              "tokens <b class=visual></b> once; each branch asks and answers one question. Only the "
              "deep-coloured tokens are learnt. Branches do not attend to each other.</p>")
    mask = ""
    if report.row_mask is not None:
        data = pictures.data_uri(pictures.encode(report.row_mask), "png")
        mask = (f'<figure class="mask"><img src="{data}" alt="attention mask"><figcaption>The attention mask '
                "of this row: each line is a query, its coloured columns are the keys it attends to. Visual "
                "tokens attend in both directions (pale blue above the diagonal); text attends to earlier "
                "tokens of its own branch and root.</figcaption></figure>")
    return f'{legend}<div class="scroll">{report.row_svg}</div>{mask}'
