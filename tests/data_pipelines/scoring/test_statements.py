import json

import numpy as np
import pytest

from data_pipelines.scoring import statements as lib

S = lib.Statement


def test_statements_and_categories_are_read_from_lines():
    text = "1. A dog runs | Action\n\n2. It is | big | Atribute\n3. no bar\n4. odd | nonsense"
    found = lib.read_statements(text)
    assert found[:3] == [
        S("1. A dog runs", "Action"),
        S("2. It is | big", "Attribute"),
        S("3. no bar", None),
    ]
    assert found[3].category in lib.CATEGORIES
    assert len(lib.CATEGORIES) == 18


@pytest.mark.parametrize(
    "line, expected",
    [
        ("1. Stated", True),
        ("2. Not Stated", False),
        ("3. not sated", None),
        ("3. Not Statd", False),
        ("Stated", None),
        ("4. is stated clearly", True),
        ("maybe", None),
        ("5. **Not Stated**", True),
    ],
)
def test_verdicts_are_read_by_the_published_rule(line, expected):
    assert lib.read_verdicts(line, 1) == [expected]


def test_lines_beyond_the_statements_are_ignored_and_missing_ones_missing():
    assert lib.read_verdicts("1. Stated\n\n2. Not Stated\n3. Stated", 2) == [True, False]
    assert lib.read_verdicts("1. Stated", 3) == [True]


def judge(splits, verdicts):
    """Returns a judge that knows the statements of captions, and the verdicts on texts."""
    return lib.Judge(
        split=lambda caption: splits[caption],
        check=lambda said, text: [verdicts[one] for one in said],
    )


def test_f1_is_of_the_averages_over_videos():
    targets = [
        lib.Target(statements=(S("h1", "Object"), S("h2", "Action")), caption="human"),
        lib.Target(statements=(S("h3", "Object"),), caption="human"),
    ]
    by_hand = judge(
        {"one": [S("m1", "Object"), S("m2", None), S("m3", "OCR")], "two": [S("m4", "Object")]},
        {"h1": True, "h2": False, "h3": True, "m1": True, "m2": False, "m3": None, "m4": True},
    )
    scores = lib.score(targets, ["one", "two"], by_hand)
    assert scores == pytest.approx(
        {
            "recall": 0.75,
            "recall_Object": 1,
            "recall_Action": 0,
            "precision": 0.75,
            "precision_Object": 1,
            "precision_OCR": 0,
            "valid": 1,
            "f1": 0.75,
        }
    )
    unequal = lib.score(
        targets[:1], ["two"], judge({"two": [S("m4", "Object")]}, {"h1": 1, "h2": 0, "m4": 1})
    )
    assert unequal["f1"] == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_an_empty_caption_states_nothing_and_asks_no_judge():
    target = lib.Target(statements=(S("h", "Object"),), caption="human")
    scores = lib.score([target], ["  "], judge({}, {}))
    assert (scores["recall"], scores["precision"], scores["f1"], scores["valid"]) == (0, 0, 0, 0)


def test_recorded_judgements_give_the_scores_and_a_missing_one_is_an_error(tmp_path):
    path = tmp_path / "judgements.jsonl"
    lines = [
        {"caption": "A dog runs.", "split": "A dog | Object\nIt runs | Action"},
        {
            "statements": ["a dog", "grass"],
            "caption": "A dog runs.",
            "check": "1. Stated\n2. Not Stated",
        },
        {"statements": ["A dog", "It runs"], "caption": "human", "check": "1. Stated\n2. Stated"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    target = lib.Target(statements=(S("a dog", "Object"), S("grass", "Object")), caption="human")
    known = lib.recorded(path)
    assert lib.score([target], ["A dog runs."], known) == pytest.approx(
        {
            "recall": 0.5,
            "recall_Object": 0.5,
            "precision": 1,
            "precision_Object": 1,
            "precision_Action": 1,
            "valid": 1,
            "f1": 2 / 3,
        }
    )
    with pytest.raises(
        ValueError, match="must hold statements of every caption; got none of 'A cat.'"
    ):
        lib.score([target], ["A cat."], known)
    with pytest.raises(ValueError, match="must hold verdicts on all statements"):
        known.check(["a dog"], "A dog runs.")


@pytest.mark.parametrize(
    "line", ["not json", "3", "{}", '{"split": "x"}', '{"statements": 5, "caption": "x"}']
)
def test_a_line_of_another_kind_is_named(tmp_path, line):
    path = tmp_path / "judgements.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"judgements.jsonl:1: a judgement must be an object"):
        lib.recorded(path)


def test_ten_thousand_malformed_judgements_never_raise_and_never_invent_a_verdict():
    pieces = [
        "",
        " ",
        "\n",
        "|",
        "||",
        "Not",
        "not st",
        "state",
        "stat",
        "1.",
        "**",
        "\x00",
        "猫",
        "Object",
        "\t",
    ]
    rng = np.random.RandomState(0)
    for _ in range(10_000):
        text = "".join(pieces[n] for n in rng.randint(len(pieces), size=rng.randint(12)))
        assert True not in lib.read_verdicts(text, 5)  # " stated" is never written
        assert len(lib.read_verdicts(text, 2)) <= 2
        assert all(
            one.category is None or one.category in lib.CATEGORIES
            for one in lib.read_statements(text)
        )
