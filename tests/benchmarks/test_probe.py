"""The probes name tokens and questions rightly, and read what is linearly there."""

import numpy as np
import pytest

from benchmarks import probe
from data_pipelines.world import scene as scene_lib


def named(text, pieces=None):
    """Returns [(piece, kind)] of a text, by default of its characters."""
    pieces = list(text) if pieces is None else pieces
    return list(zip(pieces, probe.kinds(pieces), strict=True))


def test_tokens_of_points_are_named_by_what_they_say():
    found = named('<points coords="0.5 1 052 900 2 640 071;12.0 3 111 222">red star</points>')
    by_kind = {kind: "".join(piece for piece, other in found if other == kind) for _, kind in found}
    assert by_kind["index"] == "0.512.0"
    assert by_kind["id"] == "123"
    assert (by_kind["x, first digit"], by_kind["x, other digits"]) == ("061", "524011")
    assert (by_kind["y, first digit"], by_kind["y, other digits"]) == ("902", "007122")
    assert by_kind["label"] == "red star"
    assert by_kind["separator"] == 6 * " " + ";" + 3 * " "


def test_other_answers_have_letters_counts_and_an_end():
    assert named("B") == [("B", "letter")]
    assert named("12", ["1", "2", ""]) == [("1", "count"), ("2", "count"), ("", "end")]
    assert named("There are 3 ", ["There", " are", " 3", " "]) == [
        ("There", "text"), (" are", "text"), (" 3", "count"), (" ", "text")]


@pytest.mark.parametrize("label, form", [
    ("object", "any"), ("red object", "colour"), ("red star", "colour_kind"), ("star", "kind")])
def test_a_label_has_the_form_of_its_phrase(label, form):
    assert probe.form(label) == form


def test_a_probe_reads_what_is_a_linear_function_and_nothing_else():
    rng, number = np.random.default_rng(0), 4000
    features = rng.standard_normal((number, 12))
    known = {"colour": features[:, :len(scene_lib.COLOURS)].argmax(1), "is_first": features[:, 9] > 0,
             "x": features @ rng.standard_normal(12), "y": rng.standard_normal(number),
             "time": features[:, 0]}
    found = probe.probe(features, known, np.arange(number) % 2 == 0)
    assert found["colour"] > 0.85 and found["first frame"] > 0.95
    assert found["x"] < 0.05 < 0.7 < found["y"]   # the mean size of y is 0.8


def test_features_have_as_many_dimensions_as_directions_that_vary():
    rng = np.random.default_rng(0)
    features = 5 + rng.standard_normal((500, 4)) @ rng.standard_normal((4, 30))
    assert probe.dimensions(features, share=0.9999) == 4
    assert probe.dimensions(rng.standard_normal((5000, 30))) == 30
