import numpy as np
import pytest

from data_pipelines.scoring import temp_compass

LINES = ("Caption A: a dog runs.", "Caption B: a dog sits.")


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Caption B: a dog sits.", 1),
        ("a dog sits.", 1),
        ("a dog sits", 1),
        ("Caption B", 1),
        ("B", 1),
        ("B.", 1),
        ("A", 0),
        ("b", None),
        ("", None),
        (".", None),
        ("Caption", None),
        ("a dog", None),
    ],
)
def test_captions_are_named_by_text_label_or_letter(answer, expected):
    assert temp_compass.read_match(answer, LINES) == expected


def test_the_reference_compares_letters_with_the_first_character_of_the_line():
    rights = [temp_compass.match_reference(answer, LINES[1]) for answer in (LINES[1], "B", "C", "A")]
    assert rights == [True, False, True, False]
    targets = [temp_compass.Match(LINES, 1)] * 2
    assert temp_compass.score_matching(targets, ["B", LINES[1]]) == {
        "accuracy": 1,
        "valid": 1,
        "accuracy_reference": 0.5,
    }


def test_yes_and_no_are_read_at_the_start_alone():
    read = [temp_compass.yes_or_no(text) for text in ("Yes, it does", " nothing", "I say no", "")]
    assert read == ["yes", "no", None, None]
    scores = temp_compass.score_yes_no(["yes", "no", "no", "no"], ["yes", "Yes.", "No", "unsure"])
    assert scores == {"accuracy": 0.5, "valid": 0.75}
    with pytest.raises(ValueError, match="targets must be 'yes' or 'no'; got \\['maybe'\\]"):
        temp_compass.score_yes_no(["maybe"], ["yes"])


def test_malformed_answers_never_raise_and_never_name_a_caption():
    pieces = ["", " ", ".", ":", "Caption", "a dog", "\n", "(", "é", "\x00", "none", "C", "1"]
    rng = np.random.RandomState(0)
    for _ in range(10_000):
        answer = "".join(pieces[n] for n in rng.randint(len(pieces), size=rng.randint(9)))
        assert temp_compass.read_match(answer, LINES) is None, answer
        temp_compass.match_reference(answer, LINES[0])


@pytest.mark.parametrize("said, is_right", [
    ("B. sits", True), ("B", False), ("B. stands", True), ("A. runs", False), ("A. runs or B. sits", False),
    ("Reasoning: it sits.\nAnswer: B. sits", True), ("Answer: A. runs", False), ("", False)])
def test_a_caption_is_right_if_the_judge_names_the_right_option_and_no_other(said, is_right):
    """Worked out by hand from eval_captioning.py of TempCompass."""
    asked = []
    choose = lambda *given: asked.append(given) or said
    target = temp_compass.Captioned("What does it do?\nA. runs\nB. sits", "B. sits")
    found = temp_compass.score_captions([target], [" A dog sits. "], choose)
    assert found == {"accuracy": is_right, "valid": 1}
    assert asked == [(target.question, "A dog sits.")]
    assert temp_compass.score_captions([target], [" "], choose) == {"accuracy": 0, "valid": 0}
    assert len(asked) == 1
