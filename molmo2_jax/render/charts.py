"""Curves and histograms as inline SVG in the page's colours, light or dark."""

import html
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 28, 14, 50
_MOST_POINTS = 400
_BAR_WIDTH, _BAR_HEIGHT = 240, 60


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Returns at most `most` round numbers between `low` and `high`."""
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
    """Returns float64[N]: centred means over at most `share` of the length N on each side."""
    place = np.arange(len(values))
    reach = np.minimum(max(1, round(len(values) * share)), np.minimum(place, place[::-1]))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def is_noisy(values: np.ndarray) -> bool:
    """Returns whether a curve needs smoothing: it is long, and far from its own moving mean."""
    return len(values) > 20 and float(np.std(values - smooth(values))) > 0.005 * float(np.ptp(values))


def curves_svg(curves: Mapping[str, Sequence[tuple[float, float]]],
               bands: Mapping[str, Sequence[tuple[float, float, float]]] = MappingProxyType({}), *,
               x_label: str = "step", y_label: str = "loss", is_log: bool = False) -> str:
    """Returns a chart of named curves; noisy ones are pale under a smoothed curve.

    `bands` are areas (x, low, high) behind the curves of their names, which are then drawn as they are.
    Non-finite points are dropped. y_label is for screen readers; the page shows the chart's title.

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
    areas = {}
    for name, triples in bands.items():
        area = np.array(sorted(triples), np.float64).reshape(-1, 3)
        area = area[np.isfinite(area).all(1) & ((area[:, 1] > 0) | (not is_log))]
        if name in clean and len(area):
            areas[name] = area
    edges = [area[:, [0, column]] for area in areas.values() for column in (1, 2)]
    place = _Axes([*clean.values(), *edges], is_log)
    parts = [*place.grid(), _text(_LEFT + place.width / 2, HEIGHT - 6, x_label, "middle")]
    for number, (name, points) in enumerate(clean.items()):
        colour = f"var(--curve{number % 4})"
        if name in areas:
            parts.append(place.area(areas[name], colour))
        elif is_noisy(points[:, 1]):
            parts.append(place.path(points, colour, 1, 0.3))
            points = np.column_stack([points[:, 0], smooth(points[:, 1])])
        parts.append(place.path(points, colour, 2.2, 1))
        if len(clean) == 1:  # the page shows its title
            continue
        x, y = _LEFT + place.width - 8, _TOP + 16 + 18 * number
        parts += [f'<path d="M{x - 22} {y - 5}H{x}" stroke="{colour}" stroke-width="3"/>',
                  _text(x - 28, y, name, "end")]
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)} by '
            f'{html.escape(x_label)}" class="chart">{"".join(parts)}</svg>')


def histogram_svg(counts: Sequence[int], edges: Sequence[float], label: str) -> str:
    """Returns bars of `counts`, one between each two neighbours of `edges`, with both ends of the range.

    Raises:
      ValueError: there are no counts, or not one more edge than counts.
    """
    if not counts or len(edges) != len(counts) + 1:
        raise ValueError("a histogram needs at least one count, and one more edge than counts; "
                         f"got {len(counts)} counts and {len(edges)} edges")
    width, height, tallest = _BAR_WIDTH / len(counts), _BAR_HEIGHT, max(*counts, 1)
    bars = "".join(
        f'<rect class="bin" x="{place * width:.1f}" y="{height * (1 - count / tallest):.1f}" '
        f'width="{max(width - 1, 1):.1f}" height="{height * count / tallest:.1f}">'
        f"<title>{edges[place]:.4g} to {edges[place + 1]:.4g}: {count}</title></rect>"
        for place, count in enumerate(counts))
    return (f'<svg viewBox="0 0 {_BAR_WIDTH} {height + 18}" role="img" aria-label="{html.escape(label)}" '
            f'class="chart">{bars}{_text(0, height + 15, f"{edges[0]:.4g}", "start")}'
            f'{_text(_BAR_WIDTH, height + 15, f"{edges[-1]:.4g}", "end")}</svg>')


def _text(x, y, text, anchor) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="15">{html.escape(text)}</text>'


def _thinned(points: np.ndarray) -> np.ndarray:
    """Returns at most about `_MOST_POINTS` rows, the last one among them."""
    step = -(-len(points) // _MOST_POINTS)
    return points if step <= 1 else np.concatenate([points[::step], points[-1:]])


class _Axes:
    """Maps values to positions in the chart."""

    def __init__(self, curves: Sequence[np.ndarray], is_log: bool):
        self._log = is_log
        points = np.concatenate(curves)
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

    def _line(self, points: np.ndarray) -> str:
        return "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def area(self, area: np.ndarray, colour: str) -> str:
        kept = _thinned(area)
        around = np.concatenate([kept[:, [0, 1]], kept[::-1][:, [0, 2]]])
        return f'<path d="M{self._line(around)}Z" fill="{colour}" fill-opacity="0.18" stroke="none"/>'

    def path(self, points: np.ndarray, colour: str, width: float, opacity: float) -> str:
        return (f'<path d="M{self._line(_thinned(points))}" fill="none" stroke="{colour}" '
                f'stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"/>')
