"""What is drawn at a time: points at their times, tracks between them, and the same on the page."""

import json
import pathlib

import numpy as np

from molmo2_jax.inputs import points
from molmo2_jax.render import moments

MARKS = pathlib.Path(moments.__file__).parents[1] / "serving/page/marks.js"


def point(time, name="1", x=10.0, y=20.0):
    return points.Point(time, name, x, y)


def test_a_point_is_shown_at_its_time_and_for_a_second():
    said = [point(2.0)]
    assert [second for second in (0.0, 1.9, 1.96, 2.5, 2.99, 3.0, 9.0)
            if moments.marks_at(said, second)] == [1.96, 2.5, 2.99]
    assert moments.marks_at(said, 2.5) == [("1", 10.0, 20.0)]


def test_the_next_time_of_the_answer_ends_a_point():
    said = [point(2.0), point(2.5, "2")]
    assert [name for name, _, _ in moments.marks_at(said, 2.4)] == ["1"]
    assert [name for name, _, _ in moments.marks_at(said, 2.5)] == ["2"]


def test_a_track_runs_between_its_times_unless_it_is_hidden_at_one():
    said = [point(1.0), point(2.0, x=30.0, y=0.0)]
    assert moments.marks_at(said, 1.25) == [("1", 15.0, 15.0)]
    assert moments.trails_at(said, 1.5) == {} and moments.trails_at(said, 2.0) == {"1": [(10, 20), (30, 0)]}
    hidden = [*said, point(1.4, "2")]
    assert [name for name, _, _ in moments.marks_at(hidden, 1.3)] == ["1"]   # stays where it was
    assert moments.marks_at(hidden, 1.3)[0][1:] == (10.0, 20.0)
    assert [name for name, _, _ in moments.marks_at(hidden, 1.6)] == ["2"]


def test_points_of_one_id_at_one_time_are_all_shown():
    assert len(moments.marks_at([point(1.0), point(1.0, x=5.0), point(2.0)], 1.2)) == 2


def test_the_page_shows_the_same_at_every_time(new_page, tmp_path):
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(60):
        said = [point(round(rng.integers(0, 40) / 10, 1), str(rng.integers(1, 4)), *rng.uniform(0, 99, 2))
                for _ in range(rng.integers(1, 9))]
        cases.append((said, [round(second, 3) for second in rng.uniform(0, 6, 12)]))
    page = new_page()
    text = MARKS.read_text(encoding="utf-8").replace("export function", "function")
    page.set_content(f"<script>{text}</script>")
    found = page.evaluate(
        "cases => cases.map(([points, seconds]) => seconds.map(second => marksAt(points, second)"
        ".map(one => [one.id, one.x, one.y])))",
        [([{"id": one.id, "time": one.index, "x": one.x, "y": one.y} for one in said], seconds)
         for said, seconds in cases])
    for (said, seconds), shown in zip(cases, found, strict=True):
        for second, marks in zip(seconds, shown, strict=True):
            wanted = sorted(moments.marks_at(said, second))
            assert [one[0] for one in sorted(marks)] == [one[0] for one in wanted], (said, second)
            np.testing.assert_allclose([one[1:] for one in sorted(marks)], [one[1:] for one in wanted])
    assert json.dumps(found).count('"') > 100   # something was shown
