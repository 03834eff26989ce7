import numpy as np
import pytest

from data_pipelines.scoring import counting
from data_pipelines.scoring import regions


def answer(*places):
    """Returns points text, places in thousandths."""
    body = " ".join(f"{n} {x:03d} {y:03d}" for n, (x, y) in enumerate(places, 1))
    return f'<points coords="1 {body}">x</points>'


def mask_target(category="spatial", size=(100, 100)):
    mask = np.zeros(size[::-1], bool)
    mask[20:40, 20:40] = True
    return regions.MaskTarget(mask=mask, width=100, height=100, category=category)


@pytest.mark.parametrize(
    "text, is_right",
    [
        (answer((200, 200)), 1),
        (answer((399, 399)), 1),
        (answer((400, 300)), 0),
        (answer((199, 300)), 0),
        (answer((200, 200), (300, 300)), 1),
        (answer((200, 200), (900, 900)), 0),
        ("There are none.", 0),
        ("", 0),
    ],
)
def test_point_bench_wants_every_point_inside_and_one_at_least(text, is_right):
    assert regions.score_masks([mask_target()], [text])["accuracy"] == is_right


def test_a_point_beyond_a_smaller_mask_is_a_miss():
    assert (
        regions.score_masks([mask_target(size=(50, 50))], [answer((300, 300), (600, 300))])[
            "accuracy"
        ]
        == 0
    )
    assert regions.score_masks([mask_target(size=(50, 50))], [answer((300, 300))])["accuracy"] == 1


def test_point_bench_averages_categories_alike():
    targets = [mask_target("spatial")] * 3 + [mask_target("counting")]
    hit, miss = answer((300, 300)), answer((900, 900))
    scores = regions.score_masks(targets, [hit, hit, miss, miss])
    assert scores == {
        "accuracy": pytest.approx(1 / 3),
        "accuracy_spatial": pytest.approx(2 / 3),
        "accuracy_counting": 0,
        "valid": 1,
    }


def test_the_first_point_must_be_in_the_box_edges_included():
    target = regions.BoxTarget(box=(100, 50, 200, 100), width=1000, height=500)
    texts = [
        answer((100, 100)),
        answer((200, 200)),
        answer((201, 200)),
        answer((150, 150), (0, 0)),
        answer((0, 0), (150, 150)),
        "click on it",
    ]
    rights = [regions.score_boxes([target], [text])["accuracy"] for text in texts]
    assert rights == [1, 1, 0, 1, 0, 0]
    assert regions.score_boxes([target] * 6, texts)["valid"] == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match=r"a box must be .*; got \(200, 50, 100, 100\)"):
        regions.BoxTarget(box=(200, 50, 100, 100), width=1000, height=500)


def test_counts_by_points_are_averaged_over_true_counts():
    texts = [answer((1, 1)), answer((1, 1), (2, 2)), answer((1, 1)), "There are none."]
    scores = counting.score_by_points([1, 2, 2, 0], texts)
    assert scores == {
        "correct": 0.75,
        "close": 1,
        "valid": 1,
        "per_category_average": pytest.approx(2.5 / 3),
        "correct_0": 1,
        "correct_1": 1,
        "correct_2": 0.5,
    }


PIECES = [
    "<points",
    "<tracks",
    ' coords="',
    "1 1 500 500",
    "1 ",
    "12",
    "999 999",
    "1000",
    "1001 1001",
    '"',
    ">",
    "/>",
    ";",
    ",",
    "\t",
    ".",
    "..",
    "-5",
    "NaN",
    'x="50"',
    "(50, 50)",
    "</points>",
    "\n",
    "猫",
    "\x00",
    "9" * 400,
]


def test_ten_thousand_malformed_answers_never_raise_and_never_invent_a_point():
    rng = np.random.RandomState(0)
    target = regions.MaskTarget(
        mask=np.ones((100, 100), bool), width=100, height=100, category="counting"
    )
    num_read = 0
    for _ in range(10_000):
        start = "" if rng.randint(2) else answer((1, 2), (500, 500), (999, 1000))
        cut, end = np.sort(rng.randint(len(start) + 1, size=2))
        text = (
            start[:cut]
            + "".join(PIECES[n] for n in rng.randint(len(PIECES), size=rng.randint(8)))
            + start[end:]
        )
        found = regions.read(target, text)
        num_read += len(found)
        if 'coords="' not in text or "<" not in text:
            assert not found, text
        # an id, x and y in digits for every point, and a place inside the image
        assert sum(char.isdigit() for char in text) >= 7 * len(found), text
        assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in found)
        assert counting.score_by_points([len(found)], [text])["correct"] == 1
        regions.score_masks([target], [text])
        regions.score_boxes([regions.BoxTarget(box=(0, 0, 9, 9), width=100, height=100)], [text])
    assert num_read > 1000
