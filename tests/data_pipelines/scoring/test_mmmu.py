import numpy as np
import pytest

from data_pipelines.scoring import choices
from data_pipelines.scoring import mmmu


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1,234.567", [1234.57]),
        (" Apple ", ["apple"]),
        ("x", [" x", "x "]),
        ("", [""]),
        ("-2e3", [-2000.0]),
    ],
)
def test_texts_and_numbers_are_normalised(text, expected):
    assert mmmu.normalise(text) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("So the answer is 3.14159.", {3.14}),
        ("the area is 12 cm", {"12 cm", 12.0}),
        ("x = 5", {5.0}),
        ("x = 5\ndone", {"x = 5\ndone", 5.0}),  # "=" is a cue in the last line only
        ("It could be red\nThus blue", {"red", "blue"}),
        (
            "1,234 or 2e3",
            {"1,234 or 2e3", 1234.0, 2000.0, 234.0, 3.0},
        ),  # the published patterns overlap
        ("the answer is :", {"the answer is :"}),
    ],
)
def test_what_an_open_answer_may_mean(answer, expected):
    assert mmmu.read_open(answer) == expected


@pytest.mark.parametrize(
    "accepted, answer, is_right",
    [
        (["3.14"], "So the answer is 3.14159.", True),
        (["3.15"], "So the answer is 3.14159.", False),
        (["blue whale", "whale"], "It is a Blue Whale", True),
        (["a"], "banana", False),
        (["a"], "point a is it", False),
        (["1000"], "the result is 1,000 m", True),
        (["red"], "", False),
        ([""], "red", False),
    ],
)
def test_open_answers_hold_a_number_or_contain_a_text(accepted, answer, is_right):
    assert mmmu.is_right(accepted, answer) == is_right


def test_both_kinds_of_questions_have_their_scores_and_one_average():
    question = choices.Target("Which?", ("cat", "dog"), 1)
    scores = mmmu.score(
        [question, ["5"], ["6"], question], ["B", "it is 5", "it is 5", "none of these"]
    )
    assert scores == {
        "choice_accuracy": 0.5,
        "choice_valid": 0.5,
        "choice_accuracy_reference": 0.75,
        "choice_valid_reference": 0.5,
        "open_accuracy": 0.5,
        "accuracy_reference": 0.625,
    }
    assert mmmu.score([["5"]], ["5"]) == {"open_accuracy": 1, "accuracy_reference": 1}
    assert mmmu.score([question], ["B"])["accuracy_reference"] == 1
    with pytest.raises(ValueError, match="at least one example"):
        mmmu.score([], [])


def test_ten_thousand_malformed_answers_never_raise_and_are_never_right():
    pieces = [
        "",
        " ",
        "\n",
        "is ",
        "so ",
        "=",
        ".",
        ",",
        "-",
        "e",
        "1,",
        "nan",
        "inf",
        "9" * 400,
        "٣",
        "½",
        "\x00",
        "'",
    ]
    rng = np.random.RandomState(0)
    for _ in range(10_000):
        answer = "".join(pieces[n] for n in rng.randint(len(pieces), size=rng.randint(12)))
        assert not mmmu.is_right(["zebra", "17.25"], answer), answer
