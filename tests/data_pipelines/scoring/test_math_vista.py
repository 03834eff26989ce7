import numpy as np
import pytest

from data_pipelines.scoring import math_vista

INTEGER = math_vista.Question(answer="14", answer_type="integer")
FLOAT = math_vista.Question(answer="0.6", answer_type="float", precision=1)
LIST = math_vista.Question(answer="[2007, 2008]", answer_type="list")
CHOICE = math_vista.Question(answer="8/11", choices=("3/11", "8/11", "6/11", "3/5"))


@pytest.mark.parametrize(
    "question, extracted, expected",
    [
        (INTEGER, "14", "14"),
        (INTEGER, "14.0", "14"),
        (INTEGER, "1e999", None),
        (INTEGER, "about 14", None),
        (FLOAT, "0.62", "0.6"),
        (FLOAT, "3", "3.0"),
        (FLOAT, "0.65 m", None),
        (LIST, "[2007, 2008]", "[2007, 2008]"),
        (CHOICE, "B", "8/11"),
        (CHOICE, "B: 8/11", "8/11"),
        (CHOICE, "(B)", "8/11"),
        (CHOICE, "8/11", "8/11"),
        (CHOICE, "B. 8/11", "8/11"),
        (CHOICE, "9/11", None),
        (CHOICE, "", None),
    ],
)
def test_values_take_the_form_of_the_question(question, extracted, expected):
    assert math_vista.value(extracted, question) == expected


@pytest.mark.parametrize(
    "extracted, expected",
    [("B", "8/11"), ("b: whatever", "8/11"), ("9/11", "3/11"), ("", "3/5"), ("(B)", "3/5")],
)
def test_the_reference_guesses_the_closest_option(extracted, expected):
    assert math_vista.value_reference(extracted, CHOICE) == expected


def test_without_an_extractor_the_answer_is_the_value():
    scores = math_vista.score([INTEGER, FLOAT, CHOICE], ["14", "The fraction is 0.6", "8/12"])
    assert scores == {
        "accuracy": pytest.approx(1 / 3),
        "valid": pytest.approx(1 / 3),
        "accuracy_reference": pytest.approx(2 / 3),
    }  # 8/12 is closest to 8/11


def test_an_extractor_sees_the_question_and_is_not_asked_about_nothing():
    asked = []

    def extract(answer, question):
        asked.append((answer, question))
        return answer.split()[-1]

    scores = math_vista.score(
        [INTEGER, CHOICE, INTEGER], ["it is 14", "it must be B", " "], extract
    )
    assert asked == [("it is 14", INTEGER), ("it must be B", CHOICE)]
    assert (scores["accuracy"], scores["valid"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_ten_thousand_malformed_answers_never_raise_and_never_invent_a_value():
    pieces = [
        "",
        " ",
        ":",
        "(",
        ")",
        "1e999",
        "nan",
        "-inf",
        "9" * 30,
        "x",
        "½",
        "\x00",
        "[",
        "Answer:",
        "\n",
        "z",
    ]
    rng = np.random.RandomState(0)
    for _ in range(10_000):
        answer = "".join(pieces[n] for n in rng.randint(len(pieces), size=rng.randint(8)))
        question = (INTEGER, FLOAT, CHOICE)[rng.randint(3)]
        assert math_vista.score([question], [answer])["accuracy"] == 0, answer
        assert question is not CHOICE or math_vista.value(answer, CHOICE) is None, answer
