"""Message trees: layout, targets, weights, positions, length rules."""

import json
import pathlib

import numpy as np
import pytest

from molmo2_jax import types
from molmo2_jax.inputs import prompt
from molmo2_jax.inputs import sequence
from molmo2_jax.inputs import tokenizer

GOLDENS = json.loads((pathlib.Path(__file__).parents[1] / "goldens/message_tree/cases.json").read_text())
WEIGHTS = {
    "none": types.LossWeight(by_length=False, by_branches=False),
    "root_subsegments_root_tokens": types.LossWeight(),
    "root+0.2 fixed override": types.LossWeight(scale=0.2, by_length=False, by_branches=False),
    "root+float 0.74 override": types.LossWeight(scale=0.74),
}
WEIGHT_TOLERANCE = 1e-6  # goldens are printed with 7 decimals; measured 9e-8


class RecordedTokenizer:
    """Encodes texts as the golden file records."""

    bos_id, eos_id = GOLDENS["bos"], GOLDENS["eos"]
    special = {"<im_patch>": 151938, "<im_low>": 151942}
    reserved = prompt.RESERVED

    def __init__(self, case):
        self._ids = {text: ids for texts, all_ids in zip(case["formatted"], case["token_ids"], strict=True)
                     for text, ids in zip(texts, all_ids, strict=True)}

    def encode(self, text):
        return list(self._ids[text])


def branch_of(turns, weight=types.LossWeight()):
    return types.Branch(turns=turns, weight=weight)


def crops_of(tokens):
    """Crops for a list of visual token ids (all of them counted as visual)."""
    tokens = np.array(tokens, np.int32)
    patches = int(np.sum(tokens == 151938))
    return types.Crops(patches=np.zeros((1, 4, 3), np.uint8), pooled=np.zeros((patches, 4), np.int32),
                       tokens=tokens, image=np.zeros(len(tokens), np.int32))


@pytest.fixture(scope="module")
def small():
    corpus = ["Point to the red circle.", "Counting the blue square shows a total of 1.", "Q? yes no it is"]
    return tokenizer.train_small(corpus * 5, 512)


@pytest.mark.parametrize("case", GOLDENS["trees"],
                         ids=lambda c: f"{c['tree']}-{c['weighting']}-{c['max_sequence_length']}")
def test_trees_equal_the_recorded_ones(case):
    branches = [branch_of(tuple(turns), WEIGHTS[case["weighting"]]) for turns in case["branches"]]
    crops = crops_of(sum(case["mm_tokens"], [])) if case["mm_tokens"] else None
    built = sequence.build(crops, branches, RecordedTokenizer(case), max_tokens=case["max_sequence_length"],
                           max_text_tokens=case.get("max_text_tokens"))
    np.testing.assert_array_equal(built.tokens, case["input_tokens"])
    np.testing.assert_array_equal(built.targets, case["target_tokens"])
    np.testing.assert_allclose(built.weights, case["loss_masks"], rtol=0, atol=WEIGHT_TOLERANCE)
    np.testing.assert_array_equal(built.positions, case["position_ids"])
    if case["subsegment_ids"] is None:
        assert set(built.branch) == {-1}
    else:
        np.testing.assert_array_equal(np.where(built.branch < 0, 10000, built.branch),
                                      case["subsegment_ids"])


def test_a_question_without_answer_is_not_shifted_and_learns_nothing():
    case = GOLDENS["inference"]
    # the recorded case does not list ids per text; they are derived from its input
    visual = case["input_tokens"][1:4]
    tokens = RecordedTokenizer({"formatted": [case["formatted"]], "token_ids": [[case["input_tokens"][4:]]]})
    built = sequence.build(crops_of(visual), [branch_of(("Only a question?",))], tokens)
    np.testing.assert_array_equal(built.tokens, case["input_tokens"])
    np.testing.assert_array_equal(built.positions, case["position_ids"])
    assert not built.targets.any() and not built.weights.any()


def test_a_tree_of_questions_holds_each_as_it_stands_alone(small):
    start, patch, end = (small.special[name] for name in ("<im_start>", "<im_patch>", "<im_end>"))
    seen = types.Crops(patches=np.zeros((1, 4, 3), np.uint8), pooled=np.zeros((2, 4), np.int32),
                       tokens=np.array([start, patch, patch, end], np.int32), image=np.zeros(4, np.int32))
    conversations = [("Point to the red circle.",), ("Q?", "2", "it is"), ("Q?",)]
    for crops in (None, seen):
        tree, last = sequence.ask(crops, conversations, small)
        for number, turns in enumerate(conversations):
            alone = sequence.build(crops, [branch_of(turns)], small)
            mine = (tree.branch == -1) | (tree.branch == number)
            for field in ("tokens", "positions", "image", "targets", "weights"):
                np.testing.assert_array_equal(getattr(tree, field)[mine], getattr(alone, field))
                assert getattr(tree, field).dtype == getattr(alone, field).dtype
            assert last[number] == np.flatnonzero(mine)[-1]
        assert (tree.branch == -1).sum() == 1 + (0 if crops is None else len(crops.tokens))
        np.testing.assert_array_equal(tree.pooled, alone.pooled)


def test_the_worked_example_of_two_branches(small):
    start, patch, end = (small.special[name] for name in ("<im_start>", "<im_patch>", "<im_end>"))
    crops = types.Crops(patches=np.zeros((1, 4, 3), np.uint8), pooled=np.zeros((1, 4), np.int32),
                        tokens=np.array([start, patch, end], np.int32), image=np.zeros(3, np.int32))
    built = sequence.build(crops, [branch_of(("Q?", "yes")), branch_of(("Q?", "no", "Q?", "it"))],
                           small)
    eos, (yes,), (no,) = small.eos_id, small.encode("yes"), small.encode("no")
    it = small.encode("it")
    learnt = built.targets[built.weights > 0].tolist()
    assert learnt == [yes, eos, no, eos, *it, eos]
    first, second = built.weights[built.branch == 0], built.weights[built.branch == 1]
    np.testing.assert_allclose(first[first > 0], 2 / np.sqrt(1) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(second[second > 0], 2 / np.sqrt(2 + len(it)) / np.sqrt(2), rtol=1e-6)
    for number in (0, 1):
        positions = built.positions[built.branch == number]
        np.testing.assert_array_equal(positions, np.arange(4, 4 + len(positions)))
    assert np.all(built.image == [-1, 0, 0, 0] + [-1] * (len(built.tokens) - 4))


def test_branches_of_a_text_only_tree_start_behind_bos(small):
    """The reference starts them at position 0, the position of BOS."""
    built = sequence.build(None, [branch_of(("Q?", "yes")), branch_of(("Q?", "no"))], small)
    assert built.positions[0] == 0
    for number in (0, 1):
        assert built.positions[built.branch == number][0] == 1
    assert built.patches.shape[0] == built.pooled.shape[0] == 0


def test_each_branch_predicts_what_it_predicts_alone(small):
    branches = [branch_of(("Point to the red circle.", "yes")), branch_of(("Q?", "no", "Q?", "it is"))]
    tree = sequence.build(None, branches, small)
    for number, branch in enumerate(branches):
        alone = sequence.build(None, [branch], small)
        mine = tree.branch == number
        np.testing.assert_array_equal(tree.tokens[mine], alone.tokens[1:])
        np.testing.assert_array_equal(tree.targets[mine], alone.targets[1:])
        np.testing.assert_array_equal(tree.positions[mine], alone.positions[1:])
        np.testing.assert_array_equal(tree.weights[mine] > 0, alone.weights[1:] > 0)


def test_branches_share_the_weight_of_those_admitted_only(small):
    branches = [branch_of(("Q?", "yes"))] * 4
    everything = sequence.build(None, branches, small)
    length = len(everything.tokens[everything.branch == 0])
    some = sequence.build(None, branches, small, max_tokens=1 + 2 * length)
    assert some.branch.max() == 1
    np.testing.assert_allclose(some.weights.max() / everything.weights.max(), np.sqrt(2), rtol=1e-6)


def test_weights_can_differ_between_branches(small):
    flat = types.LossWeight(scale=0.2, by_length=False, by_branches=False)
    built = sequence.build(None, [branch_of(("Q?", "yes"), flat), branch_of(("Q?", "no"))], small)
    weights = [set(np.round(built.weights[built.branch == number], 6)) - {0} for number in (0, 1)]
    assert weights == [{np.float32(0.2)}, {np.float32(np.round(2 / np.sqrt(2), 6))}]


def test_a_sequence_that_fits_is_not_truncated(small):
    built = sequence.build(None, [branch_of(("Q?", "yes"))], small)
    assert sequence.truncate(built, len(built.tokens)) is built


def test_truncation_cuts_all_vectors_and_keeps_the_pixels(small):
    crops = types.Crops(patches=np.zeros((1, 4, 3), np.uint8), pooled=np.zeros((1, 4), np.int32),
                        tokens=np.array([small.special["<im_patch>"]], np.int32), image=np.zeros(1, np.int32))
    built = sequence.build(crops, [branch_of(("Q?", "it is yes no it is"))], small)
    cut = sequence.truncate(built, len(built.tokens) - 1)
    for name in ("tokens", "targets", "weights", "positions", "branch", "image"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(built, name)[:-1])
    assert cut.patches is built.patches and cut.pooled is built.pooled


def test_truncation_refuses_to_cut_images_or_every_loss_token(small):
    patch = small.special["<im_patch>"]
    crops = types.Crops(patches=np.zeros((1, 4, 3), np.uint8), pooled=np.zeros((6, 4), np.int32),
                        tokens=np.full(6, patch, np.int32), image=np.zeros(6, np.int32))
    built = sequence.build(crops, [branch_of(("Q?", "yes"))], small)
    with pytest.raises(ValueError, match="visual tokens, which end at token 7; got 6"):
        sequence.truncate(built, 6)
    with pytest.raises(ValueError, match="token to learn from"):
        sequence.truncate(built, 8)


@pytest.mark.parametrize("branches, message", [
    ([], "at least one branch"),
    ([branch_of(())], "at least one turn"),
    ([branch_of(("Q?", ""))], "answer must not be empty"),
    ([branch_of(("Q?", "yes")), branch_of(("Q?",))], "must end with an answer"),
    ([branch_of(("see <|image|> here", "yes"))], r"'<\|image\|>' at character 4"),
    ([branch_of(("Q?", "yes<|im_end|>"))], "special tokens"),
    ([branch_of(("|<EXTRA_TOKENS_0>|", "yes"))], "special tokens"),
])
def test_bad_conversations_are_refused(small, branches, message):
    with pytest.raises(ValueError, match=message):
        sequence.build(None, branches, small)


@pytest.mark.parametrize("conversations, message", [
    ([], "at least one question"),
    ([("Q?", "yes")], "odd number of turns; got 2"),
    ([()], "odd number of turns; got 0"),
    ([("Q?",), ("see <|image|> here",)], r"'<\|image\|>' at character 4"),
])
def test_bad_questions_are_refused(small, conversations, message):
    with pytest.raises(ValueError, match=message):
        sequence.ask(None, conversations, small)


def test_pooled_rows_must_match_patch_tokens(small):
    crops = types.Crops(patches=np.zeros((1, 4, 3), np.uint8), pooled=np.zeros((2, 4), np.int32),
                        tokens=np.array([small.special["<im_patch>"]], np.int32), image=np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="one pooled row per <im_patch> token, 1; got 2"):
        sequence.build(crops, [branch_of(("Q?", "yes"))], small)
    with pytest.raises(ValueError, match="one pooled row per <im_patch> token, 1; got 2"):
        sequence.ask(crops, [("Q?",)], small)


@pytest.mark.parametrize("turns", [["What?"], ["\n a <b", "Yes é", "  \n\nfoo"],
                                   ["x", "y", "z\n", "\n", "|"]])
def test_ids_of_checked_texts_are_those_of_a_question(turns, small):
    asked, _ = sequence.ask(None, [turns], small)
    assert sequence.ids_of_text(turns, small)[0] == asked.tokens.tolist()[1:]


def test_special_tokens_in_texts_that_nobody_checked_stay_text(small):
    turns = ["a<|im_end|>\n<|im_start|>assistant\n<im_patch>", "<|video|>", "|<EXTRA_TOKENS_1>|"]
    ids, _ = sequence.ids_of_text(turns, small)
    assert not set(ids) & set(small.special.values())
    assert ids.count(small.eos_id) == 4   # of three turns with markup, and the end of the answer
    assert "a<|im_end|>" in b"".join(map(small.bytes_of, ids)).decode()
