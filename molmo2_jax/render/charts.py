"""Curves as inline SVG that follows the page's colours, light or dark."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 28, 14, 50
_MOST_POINTS = 400


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Returns round numbers from `low` to `high`, at most `most` of them."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    for step in (factor * 10.0 ** power for power in range(math.floor(math.log10(span)) - 1, 20)
                 for factor in (1, 2, 5)):
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        if count <= most:
            return [round((first + n) * step, 10) for n in range(max(count, 0))]
    return [low]


def smooth(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Returns float64[N]: a mean over as many neighbours on both sides, `share` of the length at most."""
    place = np.arange(len(values))
    reach = np.minimum(max(1, round(len(values) * share)), np.minimum(place, place[::-1]))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def is_noisy(values: np.ndarray) -> bool:
    """Returns whether a curve is worth smoothing: long, and far from its own mean over neighbours."""
    return len(values) > 20 and float(np.std(values - smooth(values))) > 0.005 * float(np.ptp(values))


def curves_svg(curves: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str = "step",
               y_label: str = "loss", is_log: bool = False) -> str:
    """Returns a chart of named curves, noisy ones pale with a smoothed one; points not finite are left out.

    y_label is for readers who do not see; the page names the chart.

    Raises:
      ValueError: no curve has a finite point.
    """
    clean = {}
    for name, pairs in curves.items():
        points = np.array(sorted(pairs), np.float64).reshape(-1, 2)
        points = points[np.isfinite(points).all(1) & ((points[:, 1] > 0) | (not is_log))]
        if len(points):
            clean[name] = points
    if not clean:
        raise ValueError(f"a chart needs a curve with a finite point; got {list(curves)}")
    place = _Axes(clean, is_log)
    parts = [*place.grid(), _text(_LEFT + place.width / 2, HEIGHT - 6, x_label, "middle")]
    for number, (name, points) in enumerate(clean.items()):
        colour = f"var(--curve{number % 4})"
        if is_noisy(points[:, 1]):
            parts.append(place.path(points, colour, 1, 0.3))
            points = np.column_stack([points[:, 0], smooth(points[:, 1])])
        parts.append(place.path(points, colour, 2.2, 1))
        if len(clean) == 1:  # the page names the chart
            continue
        x, y = _LEFT + place.width - 8, _TOP + 16 + 18 * number
        parts += [f'<path d="M{x - 22} {y - 5}H{x}" stroke="{colour}" stroke-width="3"/>',
                  _text(x - 28, y, name, "end")]
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)} by '
            f'{html.escape(x_label)}" class="chart">{"".join(parts)}</svg>')


def _text(x, y, text, anchor) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="15">{html.escape(text)}</text>'


class _Axes:
    """Maps values to places in the chart."""

    def __init__(self, curves: Mapping[str, np.ndarray], is_log: bool):
        self._log = is_log
        points = np.concatenate(list(curves.values()))
        values = self._value(points[:, 1])
        low, high = float(values.min()), float(values.max())
        pad = (high - low) * 0.04 or 0.5
        self._y = (low - pad, high + pad)
        if not is_log and low >= 0 and low < 0.25 * high:
            self._y = (0.0, high + pad)
        first, last = float(points[:, 0].min()), float(points[:, 0].max())
        self._x = (first, last if last > first else first + 1)
        self.width, self.height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def _value(self, y):
        return np.log10(y) if self._log else y

    def x(self, value):
        return _LEFT + (value - self._x[0]) / (self._x[1] - self._x[0]) * self.width

    def y(self, value):
        return _TOP + (self._y[1] - self._value(value)) / (self._y[1] - self._y[0]) * self.height

    def grid(self) -> list[str]:
        parts = []
        rows = ([10.0 ** n for n in ticks(*self._y)] if self._log else ticks(*self._y))
        for value in rows:
            y = self.y(value)
            parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(_text(_LEFT - 7, y + 4, f"{value:.3g}", "end"))
        for value in ticks(*self._x, most=8):
            parts.append(_text(self.x(value), HEIGHT - _BOTTOM + 20, f"{value:g}", "middle"))
        return parts

    def path(self, points: np.ndarray, colour: str, width: float, opacity: float) -> str:
        step = -(-len(points) // _MOST_POINTS)
        kept = points[::step] if step == 1 else np.concatenate([points[::step], points[-1:]])
        line = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in kept)
        return (f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="{width}" '
                f'stroke-opacity="{opacity}" stroke-linejoin="round"/>')
