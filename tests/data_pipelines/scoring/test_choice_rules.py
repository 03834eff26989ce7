import string

import numpy as np
import pytest

from data_pipelines.scoring import choice_rules as rules
from data_pipelines.scoring import choices
from molmo2_jax.inputs import choices as shown_lib

FOUR, FIVE = ("cat", "dog", "cow", "hen"), ("cat", "dog", "cow", "hen", "fox")


def letters(read, options, answer):
    chosen = read(answer, options)
    return None if chosen is None else string.ascii_uppercase[chosen]


@pytest.mark.parametrize(
    "read, options, answer, expected",
    [
        # the rows of the specification
        (rules.ego_schema, FIVE, "A and B", "A"),
        (rules.next_qa, FIVE, "A and B", "B"),
        (rules.mmmu, FOUR, "A and B", "B"),
        (rules.ego_schema, FIVE, "(A) or (B)", "A"),
        (rules.next_qa, FIVE, "(A) or (B)", "B"),
        (rules.mmmu, FOUR, "(A) or (B)", "B"),
        (rules.first_word, FOUR, "AB", None),
        (rules.first_word, FOUR, "a", None),
        (rules.first_word, FOUR, "so C", "C"),
        (rules.video_mme, FOUR, "Best answer: C", "B"),
        (rules.video_mme, FOUR, "Based on the video, C", "B"),
        (rules.video_mme, FOUR, "Answer: D", "D"),
        (rules.long_video_bench, FIVE, "Answer: D", "A"),
        (rules.long_video_bench, FIVE, "Best answer: C", "C"),
        (rules.video_mme, FOUR, "Sorry", None),
        (rules.option_match, ("red", "blue"), "b.", "B"),
        (rules.option_match, ("red", "blue"), "zzz", "A"),
        # start letter
        (rules.start_letter, FOUR, "b) dog", "B"),
        (rules.start_letter, FOUR, "a dog is seen", "A"),
        (rules.start_letter, FOUR, "Z", None),
        (rules.start_letter, FOUR, "", None),
        (rules.start_letter, FOUR, "E", None),
        # styles of letters
        (rules.next_qa, FIVE, "It is A or C", "C"),
        (rules.next_qa, FIVE, "A. or B. not", "B"),
        (rules.next_qa, FIVE, "Is (A) better than B ?", "A"),
        (rules.next_qa, FIVE, "C.", "C"),
        (rules.ego_schema, FIVE, "C. not (A)", "C"),
        (rules.ego_schema, FIVE, "(B) B", "B"),
        (rules.mmmu, FOUR, "D", "D"),
        (rules.mmmu, FOUR, "A) or C: or B.", "A"),
        (rules.mmmu, FOUR, "B: A: not", "A"),
        (rules.mmmu, FOUR, "'D.'", "D"),
        (rules.mmmu, FOUR, "AB", None),
        # texts of options, in more than five words only
        (rules.next_qa, FIVE, "at first a dog and then a cow", "C"),
        (rules.next_qa, FIVE, "a dog then a cow", None),
        (rules.ego_schema, FIVE, "at first a dog and then a cow", "B"),
        (rules.mmmu, FOUR, "at first a DOG was in here", "B"),
        # TempCompass
        (rules.temp_compass, FOUR, "B. dog", "B"),
        (rules.temp_compass, FOUR, "B", "B"),
        (rules.temp_compass, FOUR, "C) what", "C"),
        (rules.temp_compass, FOUR, "Better", None),
        (rules.temp_compass, FOUR, "the dog", None),
    ],
)
def test_answers_are_read_as_documented(read, options, answer, expected):
    assert letters(read, options, answer) == expected


@pytest.mark.parametrize("benchmark", rules.RULES)
def test_whole_lines_and_letters_are_right_in_every_benchmark(benchmark):
    targets = [("Which?", FOUR, number) for number in range(4)]
    for answers in (
        [f"{letter}. {text}" for letter, text in zip("ABCD", FOUR, strict=True)],
        list("ABCD"),
    ):
        scores = rules.score(benchmark, targets, answers)
        assert scores == {"accuracy": 1, "valid": 1, "accuracy_reference": 1, "valid_reference": 1}


@pytest.mark.parametrize(
    "benchmark, expected",
    [("next_qa", 0.25), ("mvbench", 0.0), ("perception_test", 0.0), ("mmmu", 0.25)],
)
def test_an_unread_answer_counts_what_the_benchmark_says(benchmark, expected):
    scores = rules.score(benchmark, [("Which?", FOUR, 3)], ["none of them"])
    assert scores == {
        "accuracy": 0,
        "valid": 0,
        "accuracy_reference": expected,
        "valid_reference": 0,
    }


def test_video_mme_leaves_unread_answers_out_of_the_published_average():
    targets = [("Which?", FOUR, 1)] * 3
    scores = rules.score("video_mme", targets, ["B", "A", "unsure"])
    assert (scores["accuracy"], scores["accuracy_reference"]) == (pytest.approx(1 / 3), 0.5)
    assert scores["valid_reference"] == pytest.approx(2 / 3)
    assert "accuracy_reference" not in rules.score("video_mme", targets[:1], ["unsure"])


def test_the_most_frequent_line_is_judged_where_the_reference_does():
    answers = ["(C) is wrong\nB\nB"]
    assert rules.score("next_qa", [("Which?", FIVE, 1)], answers)["accuracy_reference"] == 1
    assert rules.score("lvbench", [("Which?", FIVE, 1)], answers)["accuracy_reference"] == 0


def test_diagrams_without_letters_count_in_both_variants_of_ai2d():
    targets = [("Which?", FOUR, 1)] * 3
    scores = rules.score_ai2d(targets, ["B", "A", "B"], ["opaque", "transparent", None])
    assert (scores["opaque_accuracy"], scores["transparent_accuracy_reference"]) == (1, 0.5)


def test_an_unknown_benchmark_is_named():
    with pytest.raises(ValueError, match="benchmark must be one of .*; got 'mvbnch'"):
        rules.score("mvbnch", [], [])


PIECES = [
    "",
    " ",
    "\n",
    "(",
    ")",
    ".",
    ":",
    "'",
    "none",
    "the",
    "answer",
    "Answer:",
    "is",
    "sorry",
    "\x00",
    "é",
    "猫",
    "<points",
    "0.5",
    "**",
    "[",
    "]",
    "{",
    "\\",
    "|",
    "option",
    "both",
    "neither",
    "unsure",
    "?",
    "!",
    ";",
]


def malformed(seed, letters=()):
    """Returns a text of random pieces; of the letters and texts of options it has only those given."""
    rng = np.random.RandomState(seed)
    pieces = [*PIECES, *letters]
    return "".join(
        pieces[n] + " " * rng.randint(2) for n in rng.randint(len(pieces), size=rng.randint(14))
    )


def names_an_option(answer, chosen, options):
    letter = string.ascii_uppercase[chosen]
    return letter.lower() in answer.lower() or options[chosen].lower() in answer.lower()


@pytest.mark.slow(7)
def test_ten_thousand_malformed_answers_never_raise_and_never_invent_a_choice():
    """The parsers that always guess are exempt from the second half, see `option_match`."""
    options = ("xenon", "quartz", "zinc", "krypton")
    shown = shown_lib.format_evaluation("Which?", options)
    published = [rule.read for rule in rules.RULES.values() if rule.read is not rules.option_match]
    for seed in range(10_000):
        answer = malformed(seed, letters=("B", "(C)", "D.", "b") if seed % 4 == 0 else ())
        clean = shown_lib.read_choice(answer, shown, options)
        if seed % 4:
            assert clean is None, answer
        assert clean is None or names_an_option(answer, clean, options)
        for read in published:
            chosen = read(answer, options)
            assert chosen is None or names_an_option(answer, chosen, options), (read, answer)
        assert 0 <= rules.option_match(answer, options) < len(options)
    texts = [malformed(seed) for seed in range(200)]
    targets = [choices.Target("Which?", options, 0)] * len(texts)
    assert all(rules.score(name, targets, texts)["accuracy"] == 0 for name in rules.RULES)
