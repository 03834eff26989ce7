import numpy as np
import pytest

from data_pipelines.scoring import short_answers as short


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The two dogs.", "2 dogs"),
        ("An apple, a pear", "apple pear"),
        ("dont", "don't"),
        ("didn't", "didn't"),
        ("yall'dve", "yall'dve"),
        ("yalldve", "yalldve"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("none", "0"),
        ("3.5", "3.5"),
        ("no. 3.", "no 3"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("1,000", "1000"),
        ("1,000 km-h", "1000 kmh"),
        ("t-shirt", "t shirt"),
        ("a\nb\tc", "b c"),
        ("", ""),
        ("?!", ""),
        ("10:30", "10:30"),
        ("ten", "10"),
        ("eleven", "eleven"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert short.normalise(text) == expected


@pytest.mark.parametrize("votes, expected", [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (10, 1)])
def test_three_of_ten_human_answers_make_a_vqa_answer_right(votes, expected):
    accepted = ["A Dog."] * votes + ["cat"] * (10 - votes)
    assert short.vqa(accepted, "the dog") == pytest.approx(expected)


def test_a_okvqa_keeps_articles_and_signs():
    assert short.a_okvqa(["A dog "] * 3, "a dog") == 1
    assert short.a_okvqa(["A dog"] * 3, "dog") == 0
    assert short.a_okvqa(["dog"] * 2 + ["cat"] * 8, "dog") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "true, answer, expected",
    [
        ("12.5", "12.6", 1),
        ("12.5", "13.2", 0),
        ("1000", "1,000", 0),
        ("0", "0.0", 0),
        ("0", "0", 1),
        ("50%", "0.5", 1),
        ("50%", "51%", 1),
        ("50%", "60%", 0),
        ("-10", "-10.4", 1),
        ("-10", "10", 0),
        ("Red", "red", 1),
        ("red", "dark red", 0),
        ("100", "105", 1),
        ("100", "105.1", 0),
        ("3", "three", 0),
        ("5", "nan", 0),
        ("5", "", 0),
        ("5", "%", 0),
    ],
)
def test_relaxed_correctness(true, answer, expected):
    assert short.relaxed([true], answer) == expected


@pytest.mark.parametrize(
    "true, answer, expected",
    [
        ("12.5", "The value is about 12.6.", 1),
        ("0.5", "answer: 50%", 1),
        ("3", "there are three of them", 1),
        ("3", "no number", 0),
        ("1000", "1,000 people", 1),
        ("0", "0.04", 1),
        ("red", "It is dark red.", 1),
        ("[red, blue]", "blue and red", 1),
        ("[red, blue]", "red", 0),
        ("red", "", 0),
        ("5", "7 or 5", 0),
    ],
)
def test_relaxed_correctness_in_free_text(true, answer, expected):
    assert short.relaxed_free_text([true], answer) == expected


@pytest.mark.parametrize(
    "accepted, answer, expected",
    [
        (["hello"], "hello", 1),
        (["hello"], "HELO", 0.8),
        (["abcd"], "abxy", 0),
        (["abcde"], "abxye", 0.6),
        (["a b"], "ab", 2 / 3),
        (["no", "hello"], "hello!", 5 / 6),
        ([""], "", 1),
        ([""], "x", 0),
    ],
)
def test_anls(accepted, answer, expected):
    assert short.anls(accepted, answer) == pytest.approx(expected)


def test_exact_match_knows_case_only():
    assert [short.exact(["Two", "2"], text) for text in ("two", "2", "two.")] == [1, 1, 0]
    assert short.normalised_match(["The two"], "2") == 1


def test_the_part_after_answer_is_judged_and_the_best_accepted_answer_counts():
    scores = short.score(
        short.relaxed, [["4", "8"], ["red"], ["x"]], ["I think. Answer: 8", "red\nblue\nred", ""]
    )
    assert scores == {"score": pytest.approx(2 / 3), "valid": pytest.approx(2 / 3)}


def test_a_question_needs_a_list_of_answers():
    for accepted in ([], "red"):
        with pytest.raises(ValueError, match="must have a list of accepted answers"):
            short.score(short.vqa, [accepted], ["red"])
    with pytest.raises(ValueError, match="at least one example"):
        short.score(short.vqa, [], [])


JUDGES = (
    short.vqa,
    short.a_okvqa,
    short.exact,
    short.normalised_match,
    short.anls,
    short.relaxed,
    short.relaxed_free_text,
)
PIECES = [
    "",
    " ",
    "\n",
    "%",
    "1",
    "9" * 400,
    "1e999",
    "nan",
    "inf",
    "-",
    "--",
    ".",
    ",",
    "1,",
    "½",
    "٣",
    "Answer:",
    "answer:",
    "[",
    "]",
    "\x00",
    "猫",
    "one",
    "none",
    "'",
    "a",
    "the",
    "can't",
    "_",
    "1_0",
    "İ",
]


def test_ten_thousand_malformed_answers_never_raise_and_score_between_0_and_1():
    rng = np.random.RandomState(0)
    for _ in range(10_000):
        accepted = [
            "".join(PIECES[n] for n in rng.randint(len(PIECES), size=rng.randint(1, 4)))
            for _ in range(2)
        ]
        answer = "".join(PIECES[n] for n in rng.randint(len(PIECES), size=rng.randint(6)))
        judge = JUDGES[rng.randint(len(JUDGES))]
        assert 0 <= short.score(judge, [accepted], [answer[:60]])["score"] <= 1


@pytest.mark.parametrize("judge", JUDGES)
def test_the_accepted_answer_itself_is_right_and_nonsense_is_not(judge):
    accepted = ["12"] * 10 if "relaxed" in judge.__name__ else ["red cube"] * 10
    assert judge(accepted, accepted[0]) == 1
    assert judge(accepted, "zzzzzzzzzzzz") == 0
