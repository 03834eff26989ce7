"""A run as one self-contained HTML page: scores, curves, answers drawn on held-out media, one packed row."""

import dataclasses
import html
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from molmo2_jax.render import charts
from molmo2_jax.render import pictures

Curve = Sequence[tuple[float, float]]  # (step, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A score of the trained model beside that of the untrained one; both in [0, 1] unless `unit` is set."""
    name: str
    trained: float
    untrained: float | None = None
    goal: float | None = None
    unit: str = ""      # shown behind the number; no bar is drawn then
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """One question, the answers, and frames uint8[h, w, 3] with what was answered drawn on them.

    score: in [0, 1]; None where there is no verdict.
    frames: shown side by side. animation: shown large, `seconds` per picture.
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
    """What the page shows; empty parts are left out.

    facts: short name -> value, shown under the title. curves: chart title -> curve name -> curve.
    row_svg, row_mask: of tree.tree_svg and tree.mask_picture. command: what to type next, at the end.
    """
    title: str
    summary: str = ""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metrics: Sequence[Metric] = ()
    curves: Mapping[str, Mapping[str, Curve]] = dataclasses.field(default_factory=dict)
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
              "predicted point; a colour stands for one id of the answer</p>")
    command = f"<pre><code>{html.escape(report.command)}</code></pre>" if report.command else ""
    sections = [
        _section("Scores on held-out data", _metrics(report.metrics) if report.metrics else ""),
        _section("Training", _charts(report.curves) if report.curves else ""),
        _section("Answers about clips and images never seen in training",
                 legend + _cards(report.answers) if report.answers else ""),
        _section("Tracks", _cards(report.tracks, "wide") if report.tracks else ""),
        _section("One packed row, as its message trees", _row(report)),
        _section("To try next", command),
    ]
    facts = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
                    for name, value in report.facts.items())
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(report.title)}'
            '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><style>{_STYLE}</style></head><body><main>'
            f"<header><h1>{html.escape(report.title)}</h1><p>{html.escape(report.summary)}</p>"
            f'{f"<dl>{facts}</dl>" if facts else ""}</header>'
            f"{''.join(sections)}</main></body></html>\n")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


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


def _charts(curves) -> str:
    drawn = "".join(f"<figure><figcaption>{html.escape(title)}</figcaption>"
                    f"{charts.curves_svg(lines, y_label=title, is_log=_spans_decades(lines))}</figure>"
                    for title, lines in curves.items())
    return f'<div class="charts">{drawn}</div>'


def _spans_decades(lines) -> bool:
    """Returns whether the values of curves are positive and the largest is 100 times the smallest."""
    values = [y for line in lines.values() for _, y in line if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 100 * min(values)


def _picture(picture: np.ndarray, alt: str) -> str:
    # WEBP: a tenth of the size of PNG for textured frames, and every browser of today shows it
    data = pictures.data_uri(pictures.encode(picture, "WEBP"), "webp")
    height, width = picture.shape[:2]
    return f'<img src="{data}" width="{width}" height="{height}" alt="{html.escape(alt)}">'


def _cards(shown: Sequence[Shown], kind: str = "") -> str:
    return f'<div class="cards {kind}">{"".join(_card(one) for one in shown)}</div>'


def _card(one: Shown) -> str:
    frames = "".join(_picture(frame, one.question) for frame in one.frames)
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
    """Returns an answer as code; the rest of a long one is folded away."""
    if len(text) <= limit:
        return f"<code>{html.escape(text) or '(empty)'}</code>"
    return (f"<details><summary><code>{html.escape(text[:limit])}…</code></summary>"
            f"<code>{html.escape(text[limit:])}</code></details>")


def _row(report: Report) -> str:
    if not report.row_svg:
        return ""
    legend = ('<p class="legend">A row is filled with several examples. Each is a tree: the root holds the '
              "visual tokens <b class=visual></b> once; every branch asks and answers one question. Only "
              "the deep-coloured tokens are learnt. Branches do not see each other.</p>")
    mask = ""
    if report.row_mask is not None:
        data = pictures.data_uri(pictures.encode(report.row_mask), "png")
        mask = (f'<figure class="mask"><img src="{data}" alt="attention mask"><figcaption>The attention mask '
                "of this row: each line is a token, its coloured columns are what it sees. Visual tokens see "
                "each other in both directions (pale blue above the diagonal); text sees what came before it "
                "in its own branch and root.</figcaption></figure>")
    return f'{legend}<div class="scroll">{report.row_svg}</div>{mask}'


_STYLE = """
:root{--paper:#fbfbfa;--card:#fff;--ink:#1d2330;--soft:#667085;--line:#e4e7ec;--accent:#0f766e;
--bar:#e8edf2;--curve0:#0f766e;--curve1:#c2410c;--curve2:#6d28d9;--curve3:#1d4ed8;--good:#15803d;
--fair:#b45309;--poor:#b91c1c}
@media (prefers-color-scheme:dark){:root{--paper:#12151b;--card:#1a1f28;--ink:#e7eaf0;--soft:#98a2b3;
--line:#2b323e;--accent:#2dd4bf;--bar:#2a313d;--curve0:#2dd4bf;--curve1:#fb923c;--curve2:#c4b5fd;
--curve3:#93c5fd;--good:#4ade80;--fair:#fbbf24;--poor:#f87171}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:30px;line-height:1.2;margin:0 0 8px;letter-spacing:-.02em}
h2{font-size:20px;margin:0 0 16px;letter-spacing:-.01em}
h3{font-size:15px;line-height:1.4;margin:12px 0 6px;display:flex;gap:10px;justify-content:space-between;
white-space:pre-line}
header p{color:var(--soft);margin:0 0 20px;max-width:70ch}
section{margin-top:52px}
header dl{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 20px}
header dl div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px}
header dt{font-size:12px;color:var(--soft)}
header dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px;overflow:auto;
white-space:pre-wrap}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--line);
border-radius:12px;border-spacing:0;overflow:hidden}
th,td{padding:10px 16px;text-align:left;border-top:1px solid var(--line)}
thead th{border:0;font-size:12px;color:var(--soft);font-weight:500;text-align:right}
tbody th{font-weight:500;white-space:nowrap}
small{display:block;color:var(--soft);font-weight:400;white-space:normal}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.wide{width:38%;min-width:180px}
.bar{position:relative;height:10px;border-radius:5px;background:var(--bar)}
.bar b{display:block;height:100%;border-radius:5px;background:var(--accent)}
.bar i{position:absolute;top:-4px;width:2px;height:18px;background:var(--soft)}
.bar i.goal{background:var(--ink);opacity:.85}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:20px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px}
figcaption{font-size:14px;color:var(--soft);margin-bottom:8px}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink)}
svg .soft,.chart text{fill:var(--soft)}
svg .strong{font-weight:600}
svg .grid{stroke:var(--line)}
svg .rule{stroke:var(--ink);stroke-width:1.5}
.tree{min-width:820px;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:20px}
.cards.wide{grid-template-columns:1fr}
article{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px;min-width:0}
.frames{display:flex;flex-wrap:wrap;gap:8px;align-items:flex-start;justify-content:center}
.frames img{max-width:100%;height:auto;border-radius:8px;display:block}
.wide .frames{display:grid;grid-template-columns:minmax(0,3fr) minmax(0,7fr)}
.wide .frames img{width:100%}
.wide .frames img:only-child{grid-column:1/-1}
@media (max-width:700px){.wide .frames{grid-template-columns:1fr}}
article dl{margin:0;display:grid;grid-template-columns:auto 1fr;gap:4px 12px;font-size:14px}
article dt{color:var(--soft);font-size:12px;padding-top:2px}
article dd{margin:0;min-width:0}
summary{cursor:pointer}
.soft{color:var(--soft);font-size:13px;margin:8px 0 0}
.verdict{font-size:12px;font-weight:600;border-radius:999px;padding:1px 9px;border:1px solid;
height:fit-content;font-variant-numeric:tabular-nums}
.good{color:var(--good)}.fair{color:var(--fair)}.poor{color:var(--poor)}
.legend{color:var(--soft);font-size:14px;margin:0 0 14px;max-width:80ch}
.ring{display:inline-block;width:13px;height:13px;border:3px solid #409cff;border-radius:50%;
vertical-align:-2px}
.cross{color:#409cff;font-weight:800;margin-left:14px}
.visual{display:inline-block;width:22px;height:11px;background:#2e86c1;border-radius:2px}
.mask{margin-top:20px;display:flex;flex-wrap:wrap;gap:20px;align-items:center}
.mask img{width:min(100%,460px);image-rendering:pixelated;border-radius:6px}
.mask figcaption{flex:1 1 240px}
"""
