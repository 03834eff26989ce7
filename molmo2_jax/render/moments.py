"""Which points of an answer are drawn at which second of its video.

serving/page/marks.js follows the same rule, so that a downloaded video looks like the page.
"""

from collections.abc import Sequence

from molmo2_jax.inputs import points as points_lib
from molmo2_jax.render import pictures

EARLY = 0.05   # seconds that a point is shown before its time: times in answers have one decimal
HELD = 1.0     # seconds that it stays, unless the answer names another time before


def by_id(points: Sequence[points_lib.Point]) -> dict[str, list[points_lib.Point]]:
    """Returns the points of each id in order of time; `index` is a time in seconds."""
    found: dict[str, list[points_lib.Point]] = {}
    for point in sorted(points, key=lambda one: one.index):
        found.setdefault(point.id, []).append(point)
    return found


def marks_at(points: Sequence[points_lib.Point], second: float) -> list[pictures.Mark]:
    """Returns (id, x, y) of what is drawn at a second.

    An id that has several times is a track. Between two of them it is on the line between its points, unless
    the answer names a time between them, at which it is hidden. Other points stay for HELD seconds, or until
    the next time in the answer.
    """
    times = sorted({point.index for point in points})
    shown = []
    for name, track in by_id(points).items():
        passed = [point for point in track if point.index <= second + EARLY]
        if not passed:
            continue
        last = passed[-1]
        together = [point for point in passed if point.index == last.index]
        following = next((time for time in times if time > last.index), None)
        after = track[len(passed)] if len(track) > len(passed) else None
        if after and after.index == following and len(together) == 1:
            share = min(max((second - last.index) / (after.index - last.index), 0.0), 1.0)
            shown.append((name, last.x + share * (after.x - last.x), last.y + share * (after.y - last.y)))
        elif second < last.index + HELD and (following is None or second < following - EARLY):
            shown += [(name, point.x, point.y) for point in together]
    return shown


def trails_at(points: Sequence[points_lib.Point], second: float) -> dict[str, list[pictures.XY]]:
    """Returns id -> the places of its track up to a second."""
    passed = {name: [(point.x, point.y) for point in track if point.index <= second]
              for name, track in by_id(points).items()}
    return {name: places for name, places in passed.items() if len(places) > 1}
