import numpy as np
import pytest

from data_pipelines.scoring import segments


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[3.5-10], [20 - 24]", [(3.5, 10), (20, 24)]),
        ("(0-2)", [(0, 2)]),
        ("from 1-4 on", [(1, 4)]),
        ("10-3", []),
        ("5-5", []),
        ("[5]", []),
        ("", []),
        ("none", []),
        ("-5-6", [(5, 6)]),
        ("1.5.2-9", [(5.2, 9)]),
    ],
)
def test_segments_are_read_from_text(text, expected):
    assert segments.read(text) == expected


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ((0, 10), (5, 15), 1 / 3),
        ((0, 10), (0, 10), 1),
        ((0, 10), (2, 8), 0.6),
        ((0, 1), (1, 2), 0),
        ((0, 1), (5, 6), 0),
    ],
)
def test_temporal_intersection_over_union(first, second, expected):
    assert segments.intersection_over_union(first, second) == pytest.approx(expected)
    assert segments.intersection_over_union(second, first) == pytest.approx(expected)


def test_precision_recall_and_f1_at_one_half():
    scores = segments.score([[(0, 10), (20, 30)]], ["[0-8], [40-50], [60-70]"])
    expected = {"precision": 1 / 3, "recall": 0.5, "f1": 0.4}
    assert scores == pytest.approx(
        {"valid": 1, "iou": 0.8}
        | expected
        | {f"{name}_reference": value for name, value in expected.items()}
    )


def test_the_reference_pairs_in_order_and_may_find_fewer():
    # The first true segment takes the prediction that only the second one could use.
    target, text = [(0, 10), (2, 14)], "[1-12], [0-6]"
    scores = segments.score([target], [text])
    assert (scores["recall"], scores["recall_reference"]) == (1, 0.5)


@pytest.mark.parametrize("target, text, f1", [([], "", 1), ([], "[0-1]", 0), ([(0, 1)], "", 0)])
def test_where_there_is_nothing_silence_is_right(target, text, f1):
    scores = segments.score([target], [text])
    assert (scores["f1"], scores["f1_reference"]) == (f1, f1)


def test_ten_thousand_malformed_answers_never_raise_and_never_invent_a_segment():
    pieces = [
        "",
        " ",
        "-",
        "--",
        "–",
        "[",
        "]",
        ".",
        "..",
        "nan",
        "e9",
        "x",
        "9" * 400,
        "٣-٤",
        "1",
        "2.5",
        "\n",
        ":",
    ]
    rng = np.random.RandomState(0)
    for _ in range(10_000):
        text = "".join(pieces[n] for n in rng.randint(len(pieces), size=rng.randint(10)))
        found = segments.read(text)
        assert text.count("-") >= len(found)
        assert all(start < end for start, end in found)
        segments.score([[(0, 1)]], [text])
