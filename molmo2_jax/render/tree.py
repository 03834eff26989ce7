"""Draws a packed row as its message trees, and the attention mask of the row.

T tokens of the row.
"""

import dataclasses
import html
from collections.abc import Callable, Iterator

import numpy as np

from molmo2_jax import types
from molmo2_jax.render import pictures

WIDTH = 1040                     # of the drawing, in SVG units
_LARGEST_MASK = 1024             # pixels per side
_VISUAL, _PAD, _HIDDEN = (46, 134, 193), (128, 136, 150), (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive tokens [start, stop) of one branch of one example."""
    start: int
    stop: int
    example: int   # -1: padding
    branch: int    # -1: root

    @property
    def length(self) -> int:
        return self.stop - self.start


def runs(batch: types.Batch, row: int) -> list[Run]:
    """Returns the roots, branches and padding of a row, in order."""
    example, branch = np.asarray(batch.example[row]), np.asarray(batch.branch[row])
    borders = np.flatnonzero((np.diff(example) != 0) | (np.diff(branch) != 0)) + 1
    edges = [0, *borders.tolist(), len(example)]
    return [Run(start, stop, int(example[start]), int(branch[start]))
            for start, stop in zip(edges, edges[1:])]


def tree_svg(batch: types.Batch, row: int, read: Callable[[list[int]], str]) -> str:
    """Returns an SVG of one row: the row to scale, then each example as a root with branches.

    read: token ids -> text, up to the first end of a turn.
    """
    found = runs(batch, row)
    parts, y = list(_strip(batch, row, found)), 74
    for example in sorted({run.example for run in found if run.example >= 0}):
        drawn, y = _example(batch, row, [run for run in found if run.example == example], y, read)
        parts += drawn
    return (f'<svg viewBox="0 0 {WIDTH} {y}" role="img" aria-label="a packed row as message trees" '
            f'class="tree">{"".join(parts)}</svg>')


def _rgb(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _branch_colour(run: Run) -> tuple[int, int, int]:
    return pictures.COLOURS[run.branch % len(pictures.COLOURS)]


def _rect(x, y, width, height, fill, opacity=1.0, title="") -> str:
    inner = f"<title>{html.escape(title)}</title>" if title else ""
    return (f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.4):.2f}" height="{height}" fill="{fill}" '
            f'fill-opacity="{opacity}">{inner}</rect>')


def _text(x, y, text, size=13, anchor="start", extra="") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" {extra}>'
            f"{html.escape(text)}</text>")


def _pieces(batch: types.Batch, row: int, run: Run) -> Iterator[tuple[int, int, str]]:
    """Yields (start, stop, "visual" | "learnt" | "text" | "pad") within a run."""
    if run.example < 0:
        yield run.start, run.stop, "pad"
        return
    place = slice(run.start, run.stop)
    kind = np.where(batch.image[row][place] >= 0, 2, np.where(batch.weights[row][place] > 0, 1, 0))
    frame = np.where(kind == 2, batch.image[row][place], -1)
    borders = np.flatnonzero((np.diff(kind) != 0) | (np.diff(frame) != 0)) + 1
    edges = [0, *borders.tolist(), run.length]
    for start, stop in zip(edges, edges[1:]):
        yield run.start + start, run.start + stop, ("text", "learnt", "visual")[kind[start]]


def _look(kind: str, run: Run) -> tuple[str, float]:
    """Returns (fill, opacity) of a piece."""
    if kind == "pad":
        return _rgb(_PAD), 0.18
    if kind == "visual":
        return _rgb(_VISUAL), 0.85
    if run.branch < 0:
        return _rgb(_PAD), 0.6
    return _rgb(_branch_colour(run)), 1.0 if kind == "learnt" else 0.42


def _strip(batch: types.Batch, row: int, found: list[Run]) -> Iterator[str]:
    """Yields the drawing of the row to scale, with how much of it is used."""
    total = found[-1].stop
    used = sum(run.length for run in found if run.example >= 0)
    patches = np.asarray(batch.patches[row])
    crops = int(patches.any(axis=(1, 2)).sum())
    yield _text(0, 14, f"one row: {used} of {total} tokens used, {crops} of {len(patches)} crops", 14,
                extra='class="strong"')
    for run in found:
        for start, stop, kind in _pieces(batch, row, run):
            fill, opacity = _look(kind, run)
            yield _rect(start / total * WIDTH, 24, (stop - start) / total * WIDTH, 22, fill, opacity,
                        f"{kind}: tokens {start} to {stop - 1}")
        if run.branch < 0 <= run.example and run.start:
            x = run.start / total * WIDTH
            yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="19" y2="51" class="rule"/>'


def _example(batch, row, found: list[Run], y: float, read) -> tuple[list[str], float]:
    """Returns (the drawing of one tree, the y below it)."""
    root, branches = found[0], found[1:]
    left, bar, gap, text_height = 330, 300, 64, 44
    height = max(len(branches) * text_height, 56)
    middle = y + 12 + height / 2
    frames = int((np.unique(batch.image[row][root.start:root.stop]) >= 0).sum())
    visual = int((batch.image[row][root.start:root.stop] >= 0).sum())
    parts = [_text(0, middle - 20, f"example {root.example}", 14, extra='class="strong"')]
    for start, stop, kind in _pieces(batch, row, root):
        fill, opacity = _look(kind, root)
        parts.append(_rect((start - root.start) / root.length * bar, middle - 12,
                           (stop - start) / root.length * bar - 0.4, 24, fill, opacity,
                           f"{kind}: {stop - start} tokens"))
    alone = "" if branches else ", one conversation"
    parts.append(_text(0, middle + 30, f"{frames} images or frames, {visual} visual of {root.length} "
                       f"tokens{alone}", 12, extra='class="soft"'))
    longest = max((run.length for run in branches), default=1)
    for number, run in enumerate(branches):
        top = y + 12 + number * text_height + (height - len(branches) * text_height) / 2
        colour = _rgb(_branch_colour(run))
        parts.append(f'<path d="M{bar} {middle:.1f} C{bar + gap / 2} {middle:.1f} {left + gap / 2 - 30} '
                     f'{top + 29:.1f} {left + gap - 4} {top + 29:.1f}" fill="none" stroke="{colour}" '
                     f'stroke-width="2" stroke-opacity=".8"/>')
        scale = (WIDTH - left - gap) / longest
        parts.append(_text(left + gap, top + 15, _excerpt(batch, row, run, read), 12))
        for start, stop, kind in _pieces(batch, row, run):
            fill, opacity = _look(kind, run)
            parts.append(_rect(left + gap + (start - run.start) * scale, top + 22, (stop - start) * scale, 13,
                               fill, opacity, f"{kind}: tokens {start} to {stop - 1}"))
    return parts, y + height + 34


def _excerpt(batch, row, run: Run, read, limit: int = 92) -> str:
    """Returns "question → answer" of a branch, each shortened if too long."""
    place = slice(run.start, run.stop)
    asked = read(np.asarray(batch.tokens[row][place]).tolist()).split("<|im_end|>")[0]
    learnt = np.asarray(batch.weights[row][place]) > 0
    answer = read(np.asarray(batch.targets[row][place])[learnt].tolist())
    asked, answer = (" ".join(text.replace("<|im_start|>user", "").split()) for text in (asked, answer))
    room = max(limit - len(asked), limit // 3)
    return f"{_cut(asked, limit - min(room, len(answer)))} → {_cut(answer, room)}" if answer else asked


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length - 1] + "…"


def mask_picture(batch: types.Batch, row: int, stop: int | None = None) -> np.ndarray:
    """Returns uint8[s, s, 3]: which keys (columns) each query (row) attends to, for the first `stop` tokens.

    Attended keys have the colour of their branch, grey for roots, blue for visual tokens; pale blue above the
    diagonal, where only visual tokens attend to later ones. Long rows are drawn with every n-th token.
    """
    end, group, branch = (np.asarray(x[row])[:stop] for x in (batch.end, batch.group, batch.branch))
    is_used = np.asarray(batch.example[row])[:stop] >= 0
    position = np.arange(len(end))
    kept = position[::-(-len(end) // _LARGEST_MASK)]
    i, j = kept[:, None], kept[None, :]
    causal = (j <= i) & (i < end[kept][None])
    both = (group[kept][:, None] == group[kept][None]) & (group[kept][None] >= 0)
    palette = np.array([_PAD, *pictures.COLOURS], np.float64)
    of_key = palette[np.where(branch[kept] < 0, 0, branch[kept] % len(pictures.COLOURS) + 1)]
    of_key[group[kept] >= 0] = _VISUAL
    of_key[~is_used[kept]] = np.array(_PAD) * 0.5
    picture = np.broadcast_to(np.array((20.0, 23.0, 29.0)), (len(kept), len(kept), 3)).copy()
    picture[causal] = np.broadcast_to(of_key[None], picture.shape)[causal]
    picture[both & ~causal] = np.array(_VISUAL) * 0.55 + 255 * 0.45
    return picture.astype(np.uint8)
