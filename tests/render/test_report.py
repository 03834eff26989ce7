"""The page is complete, self-contained and well formed; trees, masks and curves are drawn correctly."""

import html.parser
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from molmo2_jax import types
from molmo2_jax.attention import tree_mask
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.render import charts
from molmo2_jax.render import pictures
from molmo2_jax.render import report
from molmo2_jax.render import tree


def sequence(num_frames=2, branches=(3, 2)):
    """Returns frames of two visual tokens, each after a text token, then branches; last token learnt."""
    image = np.concatenate([[-1], *[[-1, n, n] for n in range(num_frames)]])
    branch = np.concatenate([np.full(len(image), -1), *[np.full(size, n) for n, size in enumerate(branches)]])
    weights = np.concatenate([np.zeros(len(image)), *[np.eye(size)[-1] for size in branches]])
    positions = np.concatenate([np.arange(len(image)), *[len(image) + np.arange(size) for size in branches]])
    image = np.concatenate([image, np.full(len(branch) - len(image), -1)])
    ints = [x.astype(np.int32) for x in (np.arange(len(branch)), np.arange(len(branch)) + 100)]
    return types.Sequence(*ints, weights.astype(np.float32), positions.astype(np.int32),
                          branch.astype(np.int32), image.astype(np.int32),
                          np.ones((num_frames, 1, 3), np.uint8), np.zeros((2 * num_frames, 1), np.int32))


def packed():
    return rows_lib.join([sequence(), sequence(1, (2, 2, 2))], types.RowShape(T=28, M=4, R=8, W=1))


def test_a_row_is_split_into_roots_branches_and_padding():
    assert [(run.start, run.stop, run.example, run.branch) for run in tree.runs(packed(), 0)] == [
        (0, 7, 0, -1), (7, 10, 0, 0), (10, 12, 0, 1), (12, 16, 1, -1), (16, 18, 1, 0), (18, 20, 1, 1),
        (20, 22, 1, 2), (22, 28, -1, -1)]


def test_the_drawing_of_a_row_names_every_example_question_and_answer():
    svg = ElementTree.fromstring(tree.tree_svg(packed(), 0, lambda ids: f"<{','.join(map(str, ids))}>"))
    texts = [node.text for node in svg.iter("text")]
    assert texts[0] == "one row: 22 of 28 tokens used, 3 of 4 crops"
    assert [text for text in texts if text.startswith("example")] == ["example 0", "example 1"]
    assert "2 images or frames, 4 visual of 7 tokens" in texts
    assert "<7,8,9> → <109>" in texts and len([text for text in texts if "→" in text]) == 5
    titles = [node.text for node in svg.iter("title")]
    assert "visual: tokens 2 to 3" in titles and "learnt: tokens 9 to 9" in titles


def test_the_mask_picture_is_coloured_exactly_where_the_mask_allows():
    batch = packed()
    allowed = np.asarray(tree_mask.dense(tree_mask.TreeMask(batch.end, batch.group)))[0]
    picture = tree.mask_picture(batch, 0)
    np.testing.assert_array_equal((picture != (20, 23, 29)).any(-1), allowed)
    np.testing.assert_array_equal(picture[9, 7], pictures.COLOURS[0])
    assert tree.mask_picture(batch, 0, stop=12).shape == (12, 12, 3)


def test_curves_are_well_formed_and_leave_out_what_is_not_finite():
    curves = {"a": [(1, 2.0), (2, float("nan")), (3, 1.0)], "b": [(1, float("inf"))], "c": [(2, 1.0)]}
    svg = charts.curves_svg(curves, y_label="loss & more")
    ElementTree.fromstring(svg)
    assert "nan" not in svg and ">b<" not in svg and ">a<" in svg and ">c<" in svg
    assert ">a<" not in charts.curves_svg({"a": curves["a"]})  # one curve needs no legend
    banded = charts.curves_svg({"a": [(0, 1.0), (10, 2.0)]}, {"a": [(0, -30.0, 3.0), (10, 1.5, 40.0)]})
    assert ">40<" in banded and 'fill-opacity="0.18"' in banded  # the axes hold the whole band
    with pytest.raises(ValueError, match="finite point; got .'b'"):
        charts.curves_svg({"b": curves["b"]})
    ElementTree.fromstring(charts.curves_svg({"a": [(5, 0.0)]}))
    ElementTree.fromstring(charts.curves_svg({"a": [(n, 10.0 ** -n) for n in range(9)]}, is_log=True))


def test_ticks_are_few_round_numbers_inside_the_range():
    assert charts.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert charts.ticks(0.13, 0.41) == [0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
    for low, high in ((-3, 1e6), (0, 1e-7), (5, 5.01)):
        found = charts.ticks(low, high)
        assert 2 <= len(found) <= 6 and low <= min(found) and max(found) <= high * (1 + 1e-9)


def test_smoothing_keeps_straight_lines_and_removes_noise():
    line = np.linspace(3, 1, 200)
    np.testing.assert_allclose(charts.smooth(line), line, atol=1e-12)
    noisy = line + np.random.default_rng(0).normal(size=200) * 0.3
    assert np.std(charts.smooth(noisy) - line) < 0.15
    assert charts.is_noisy(noisy) and not charts.is_noisy(line)


class Reader(html.parser.HTMLParser):
    """Collects image sources and checks that tags are closed in order."""
    VOID = {"meta", "img", "br", "rect", "path", "line"}

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_with_everything_in_it(tmp_path):
    frame = np.full((30, 40, 3), 90, np.uint8)
    row = packed()
    answer = '<points coords="0.5 1 100 200">a & b</points>'
    report.write_report(tmp_path / "r.html", report.Report(
        title="Nano & co", summary="What it learnt", facts={"steps": "12"}, command="bash x.sh",
        metrics=[report.Metric(name="F1", trained=0.8125, untrained=0.0, goal=0.8, note="points"),
                 report.Metric(name="loss", trained=0.5, untrained=float("nan"), unit="nats")],
        curves={"loss": {"train": [(n, 1 / (n + 1)) for n in range(40)]}},
        answers=[report.Shown(question="Where is <it>?", answer=answer, truth="none", score=0.9,
                              frames=[frame])],
        tracks=[report.Shown(question="Track it", answer="x" * 500, animation=[frame, frame // 2])],
        row_svg=tree.tree_svg(row, 0, str), row_mask=tree.mask_picture(row, 0)))
    text = (tmp_path / "r.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and len(reader.sources) == 3
    assert all(source.startswith("data:image/") for source in reader.sources)
    assert not re.search(r"https?:|@import|url\(|<script", text)
    for part in ("Nano & co", "0.812", "0.5 nats", "–", answer, "Where is <it>?", "0.90", "x" * 280,
                 "bash x.sh"):
        assert part in reader.text, part
    assert "prefers-color-scheme:dark" in text


def test_parts_without_content_are_left_out():
    page = report.page(report.Report(title="Empty"))
    assert "<section>" not in page and "Scores" not in page and "<h1>Empty</h1>" in page
