"""The page of a data check is self-contained and shows the JSON's numbers and no foreign markup."""

import copy

import numpy as np
import pytest

from molmo2_jax.render import charts
from molmo2_jax.render import checkup
from tests.render import test_report

EVIL = "</style><script>alert('x')</script><img src=x onerror=\"y\">"


def summary(seed):
    numbers = np.random.default_rng(seed).uniform(1, 9999, 7).tolist()
    columns = ("min", "p10", "median", "mean", "p90", "max", "total")
    return dict(zip(columns, numbers, strict=True)) | {
        "count": 1234 + seed, "histogram": {"edges": [1.5, 2.5, 3.5], "counts": [7, 8]}}


def source(name, **fields):
    return {
        "name": name, "records": 1_000_001, "examined": 1000, "is_sampled": True, "usable": 977,
        "usable_share": 0.977, "left_out": {"line": 23}, "media": {"video": 977}, "cut": 12,
        "cut_share": 0.0124, "too_large": 5, "too_large_share": 0.0051,
        "annotations": {"points": {"records": 811, "unit": "points", "amount": summary(1)}},
        **{measure: summary(place) for place, measure in enumerate(checkup._MEASURES, 2)},
        "resolutions": {"641 x 359": 977}, "core_seconds_per_record": 0.4321,
        "reading": {"video": {"records": 977, "pictures": 31_337, "core_seconds": 98.76,
                              "pictures_per_core_second": 317.3}},
        "problems": [{"stage": "line", "rule": "record: must be an object", "records": 23, "share": 0.023,
                      "examples": ["annotations.jsonl:8: record: must be an object; got 7"]}]} | fields


def report(*sources, batch=None):
    return {"settings": {"run": None, "sample": 1000, "seed": 0}, "sources": list(sources), "batch": batch}


BATCH = {"rows": 128, "examples_per_row": 4.321, "examples": 553.1, "core_seconds_per_example": 0.765,
         "core_seconds": 423.1, "hosts": 16, "cores_per_host": {"2.5": 10.57}}


def test_every_number_of_the_json_is_on_the_page():
    found = report(source("set"), batch=BATCH)
    page = checkup.page(found, {})

    def check(value):
        if isinstance(value, dict):
            for name, one in value.items():
                if name not in ("total", "histogram"):
                    check(one)
        elif isinstance(value, list):
            for one in value:
                check(one)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            assert checkup.number(value) in page or checkup.percent(value) in page, value

    check(found)
    assert "A sample of 1,000 of 1,000,001 records" in page and "were sampled" in page


def test_a_changed_number_changes_the_page():
    found = report(source("set"), batch=BATCH)
    page = checkup.page(found, {})
    for path in (("sources", 0, "usable"), ("sources", 0, "problems", 0, "records"),
                 ("sources", 0, "annotations", "points", "amount", "p90"), ("sources", 0, "tokens", "mean"),
                 ("sources", 0, "reading", "video", "pictures"), ("batch", "cores_per_host", "2.5")):
        other = copy.deepcopy(found)
        holder = other
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] += 1
        assert checkup.page(other, {}) != page, path


def test_texts_from_outside_are_escaped():
    evil = source(EVIL, resolutions={EVIL: 1}, problems=[
        {"stage": EVIL, "rule": EVIL, "records": 1, "share": 1.0, "examples": [EVIL]}])
    evil["annotations"] = {EVIL: evil["annotations"]["points"] | {"unit": EVIL}}
    found = report(evil)
    found["settings"] = {EVIL: EVIL}
    picture = checkup.Picture(key=EVIL, texts=[EVIL], frames=[np.zeros((8, 8, 3), np.uint8)])
    page = checkup.page(found, {EVIL: [picture]})
    assert "<script" not in page and "onerror=\"" not in page and page.count("</style>") == 1
    assert "&lt;script&gt;" in page
    parser = test_report.Reader()
    parser.feed(page)
    assert not parser.open and all(one.startswith(("data:image/", "#source")) for one in parser.sources)


def test_the_page_needs_nothing_else_and_fits_narrow_and_dark_screens(tmp_path):
    checkup.write(tmp_path / "page.html", report(source("set")), {})
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert "prefers-color-scheme:dark" in page and "width=device-width" in page
    assert page.count("<table>") == page.count('<div class="scroll"><table>')


def test_a_source_without_records_or_numbers_is_shown():
    nothing = source("empty", records=1, examined=1, is_sampled=False, usable=0, usable_share=0.0,
                     annotations={}, resolutions={}, reading={}, core_seconds_per_record=None, problems=[],
                     **dict.fromkeys(checkup._MEASURES))
    page = checkup.page(report(nothing), {})
    assert "All 1 records." in page and "No problems were found." in page and "–" in page


def test_names_that_are_no_text_are_written(tmp_path):
    checkup.write(tmp_path / "page.html", report(source("a\udcffb")), {})
    assert "a\\udcffb" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_bars_have_the_heights_of_their_counts():
    svg = charts.histogram_svg([1, 4, 0], [0.0, 1.0, 2.0, 3.0], "some <label>")
    assert svg.count("<rect") == 3 and 'height="60.0"' in svg and 'height="15.0"' in svg
    assert "some &lt;label&gt;" in svg
    with pytest.raises(ValueError, match="one more edge than counts; got 1 counts and 1 edges"):
        charts.histogram_svg([1], [0.0], "a")
