"""The frame of a self-contained HTML page: title, facts, sections, pictures; light and dark, any width."""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from molmo2_jax.render import pictures


def html_of(title: str, summary: str, facts: Mapping[str, str], sections: Iterable[str], *,
            style: str = "", script: str = "", data: Any = None) -> str:
    """Returns the page. Texts are escaped; sections are HTML (see `section`).

    facts: short name -> value, shown under the title.
    script: JavaScript that runs when the page is there; the browser is told to run nothing else.
    data: what the script reads as JSON from the element `data`.
    """
    listed = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
                     for name, value in facts.items())
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
            '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'{_policy(script)}<meta name="color-scheme" content="light dark"><style>{_STYLE}{style}</style>'
            "</head><body><main>"
            f"<header><h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>"
            f'{f"<dl>{listed}</dl>" if listed else ""}</header>'
            f"{''.join(sections)}</main>{_scripts(script, data)}</body></html>\n")


def _policy(script: str) -> str:
    """Returns the rule that this script runs, no other one, and that nothing is loaded."""
    if not script:
        return ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return ('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            f'style-src \'unsafe-inline\'; script-src \'sha256-{digest}\'">')


def _scripts(script: str, data: Any) -> str:
    if not script:
        return ""
    # "<" would let a text end the element
    values = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{values}</script><script>{script}</script>'


def section(title: str, body: str, anchor: str = "") -> str:
    """Returns a section with an escaped title, or "" without a body; links to `#anchor` lead to it."""
    name = f' id="{html.escape(anchor)}"' if anchor else ""
    return f"<section{name}><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def picture(pixels: np.ndarray, alt: str) -> str:
    """Returns uint8[h, w, 3] as an <img> that holds its own data."""
    # WEBP: a tenth of PNG's size for textured frames, and all current browsers show it
    data = pictures.data_uri(pictures.encode(pixels, "WEBP"), "webp")
    height, width = pixels.shape[:2]
    return f'<img src="{data}" width="{width}" height="{height}" alt="{html.escape(alt)}">'


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
h1{font-size:30px;line-height:1.2;margin:0 0 8px;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:20px;margin:0 0 16px;letter-spacing:-.01em;overflow-wrap:anywhere}
h3{font-size:15px;line-height:1.4;margin:12px 0 6px;display:flex;gap:10px;justify-content:space-between;
white-space:pre-line}
header p{color:var(--soft);margin:0 0 20px;max-width:70ch}
section{margin-top:52px}
header dl{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 20px}
header dl div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px}
header dt{font-size:12px;color:var(--soft)}
header dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
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
svg .bin{fill:var(--accent)}
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
a{color:var(--accent)}
details ul,article ul{margin:8px 0;padding-left:18px;font-size:14px;overflow-wrap:anywhere}
tbody th:has(details){white-space:normal;min-width:220px}
.bins{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr));gap:14px;
margin:16px 0 24px}
section .scroll{margin-bottom:20px}
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
