"""Multiple choice: the recorded layout, random layouts, parsers."""

import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from molmo2_jax.inputs import choices

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
RECORDED = json.loads((GOLDENS / "message_tree/formatting.json").read_text())
COLOURS = ("red", "green", "blue", "light yellow")


@pytest.mark.parametrize("case", RECORDED["multiple_choice_eval"], ids=lambda case: case["output"])
def test_the_evaluation_layout_is_the_recorded_one(case):
    example = case["example"]
    options = example.get("options", example.get("unlabelled_options"))
    shown = choices.format_evaluation(example["question"], options, is_labelled="options" in example)
    assert shown.prompt == case["prompt"]
    assert shown.answer(example["answer_idx"]) == case["output"]
    assert list(shown.names) == case["option_names"]


def drawn(count, **how):
    for seed in range(count):
        yield choices.format_training("Which colour?", COLOURS, 2, np.random.default_rng(seed), **how)


def test_training_layouts_show_the_question_and_every_option_and_read_their_own_answer():
    for shown in drawn(600):
        assert "Which colour?" in shown.prompt
        assert all(line in shown.prompt for line in shown.lines)
        assert all(text in line for text, line in zip(COLOURS, shown.lines, strict=True))
        for number in range(len(COLOURS)):
            assert choices.read_choice(shown.answer(number), shown) == number


def test_training_layouts_have_the_stated_probabilities():
    shown = list(drawn(4000))
    evaluation = [choices.INSTRUCTION in one.prompt for one in shown]
    label_only = [one.label_only for one in shown]
    labelled = [one.names != COLOURS for one in shown]
    assert abs(np.mean(evaluation) - 0.1) < 0.02
    assert abs(np.mean(label_only) - 0.9 * 0.25) < 0.03
    assert abs(np.mean(labelled) - (0.1 + 0.9 * (0.25 + 0.75 * 0.8))) < 0.03
    kinds = {one.names[0] for one in shown if one.names != COLOURS}
    assert kinds == {"A", "a", "1", "i"}


def test_a_label_only_question_says_what_to_answer_with():
    kinds = ("letter", "number", "numeral", "identifier", "label")
    for shown in drawn(600):
        if shown.label_only:
            assert any(kind in shown.prompt for kind in kinds)
            assert shown.answer(2) == shown.names[2] in ("C", "c", "3", "iii")


def test_options_labelled_in_the_picture_get_no_second_label():
    for shown in drawn(300, is_labelled=False):
        assert shown.lines == COLOURS and not shown.label_only and shown.answer(1) == "green"


def test_a_blank_correct_option_is_always_labelled():
    for seed in range(300):
        shown = choices.format_training("Which?", ["x", " "], 1, np.random.default_rng(seed))
        assert shown.answer(1).strip()


def test_braces_in_a_question_stay_as_they_are():
    for seed in range(100):
        shown = choices.format_training("Is {o} {q}?", ["{k}", "{0}"], 0, np.random.RandomState(seed))
        assert "Is {o} {q}?" in shown.prompt and "{k}" in shown.prompt and "{0}" in shown.prompt


def test_a_layout_is_a_function_of_the_random_state():
    assert list(drawn(50)) == list(drawn(50))
    assert len({shown.prompt for shown in drawn(200)}) > 120


@pytest.mark.parametrize("question, options, answer, message", [
    ("", ("a", "b"), 0, "must have a question"), ("Q?", ("a",), 0, "at least two options"),
    ("Q?", ("a", "b"), 2, r"one of options 0 \.\.\. 1; got 2"), ("Q?", ("a", "b"), -1, "got -1")])
def test_questions_that_are_none_are_refused(question, options, answer, message):
    with pytest.raises(ValueError, match=message):
        choices.format_training(question, options, answer, np.random.default_rng(0))


def test_more_options_than_letters_get_numbers():
    options = [f"option{number}" for number in range(40)]
    for seed in range(60):
        shown = choices.format_training("Q?", options, 30, np.random.default_rng(seed))
        assert choices.read_choice(shown.answer(30), shown) == 30
    with pytest.raises(ValueError, match="at most 26 options"):
        choices.format_evaluation("Q?", options)


@pytest.mark.parametrize("text, number", [
    ("B. blue cube", 1), ("b. blue cube", 1), ("B", 1), ("b.", 1), ("(B)", 1), ("Answer: B", 1),
    ("blue cube", 1), ("The best answer is C", 2), ("A", 0), ("A.", 0), ("A red ball", 0),
    ("A brown dog", None), ("A and B", None), ("(A) or (B)", None), ("AB", None),
    ("Sorry", None), ("", None), ("zzz", None),
    ("Because of its edges.\nAnswer: C. green cone", 2)])
def test_answers_are_read_without_guessing(text, number):
    options = ("A red ball", "blue cube", "green cone")
    shown = choices.format_evaluation("Which?", options)
    assert choices.read_choice(text, shown, options) == number


@pytest.mark.parametrize("text, names, number", [
    ("b.", ("A", "B"), 1), ("B. blue cube", ("A", "B"), 1), ("zzz", ("A. red", "B. blue"), 0),
    ("B. blue", ("A. red", "B. blue"), 1), ("it is b. blue", ("A. red", "B. blue"), 1),
    ("red ball", ("red", "blue"), 0), ("bl", ("red", "blue"), 1), ("lue", ("red", "blue"), 1),
    ("geen", ("red", "green"), 1)])
def test_the_reference_always_picks_an_option(text, names, number):
    assert choices.match_option(text, names) == number


def test_the_answer_is_the_last_line_with_single_spaces():
    assert choices.answer_part(" one\ntwo\ntwo ") == "two" and choices.answer_part("a   b") == "a b"


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(strategies.text(max_size=40), strategies.lists(strategies.text(max_size=8), min_size=2,
                                                                 max_size=5))
def test_reading_never_fails(text, options):
    shown = choices.format_evaluation("Q?", options)
    assert choices.read_choice(text, shown, options) in (None, *range(len(options)))
    assert choices.match_option(text, options) in range(len(options))
