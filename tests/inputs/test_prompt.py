"""Chat format, style prefixes, frame times, subtitles."""

import json
import pathlib

import numpy as np
import pytest

from molmo2_jax import config
from molmo2_jax.inputs import prompt

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/message_tree"
RECORDED = json.loads((GOLDENS / "formatting.json").read_text())
TREES = json.loads((GOLDENS / "cases.json").read_text())["trees"]


@pytest.mark.parametrize("case", RECORDED["chat"], ids=lambda case: f"{len(case['messages'])} turns")
def test_conversations_are_formatted_as_recorded(case):
    assert prompt.chat_texts(case["messages"]) == case["formatted"]


def test_branches_of_recorded_trees_are_formatted_as_recorded():
    for tree in TREES:
        for number, texts in enumerate(tree["formatted"]):
            assert prompt.chat_texts(tree["branches"][number]) == texts


@pytest.mark.parametrize("case", RECORDED["sft_style_prefix"], ids=lambda case: case["style"])
def test_style_prefixes_are_the_recorded_ones(case):
    assert prompt.style_prefix(case["style"]) == case["prefix_train"] == case["prefix_eval"]


@pytest.mark.parametrize("case", RECORDED["pretrain_inference_prefix"], ids=lambda case: case["style"])
def test_pretraining_prefixes_are_the_recorded_ones(case):
    assert prompt.pretrain_prefix(case["style"]) == case["inference_prefix"]


def test_pretraining_prefixes_state_a_noisy_length_for_nine_in_ten():
    rng = np.random.default_rng(0)
    drawn = [prompt.pretrain_prefix("long_caption", "x" * 900, rng) for _ in range(2000)]
    numbers = [int(text.removeprefix("long_caption ")[:-1]) for text in drawn if text != "long_caption:"]
    assert 0.88 < len(numbers) / len(drawn) < 0.92
    assert 58 < np.mean(numbers) < 61 and 1.4 < np.std(numbers) < 2
    assert prompt.pretrain_prefix("pointing", "x" * 900, rng) == "pointing:"
    with pytest.raises(ValueError, match="needs rng"):
        prompt.pretrain_prefix("long_caption", "x")


@pytest.mark.parametrize("style, prefix", [
    ("eval_short_answer", "vqa2:"), ("eval_multiple_choice", ""), ("eval_multi_image_mc", ""),
    ("video_eval_short_answer", "video_short_answer:"), ("eval_multi_image_da", "multi_image_da:"),
    ("video_eval_multiple_choice_w_subtitle", ""),
    ("video_multiple_choice_count_without_pointing", "")])
def test_evaluation_names_get_the_prefix_of_the_style_that_was_trained(style, prefix):
    assert prompt.style_prefix(style) == prefix


def test_a_prefix_is_followed_by_a_space_only_before_text():
    assert prompt.with_prefix("vqa2:", "What colour?") == "vqa2: What colour?"
    assert prompt.with_prefix("video_merged_caption:", "") == "video_merged_caption:"
    assert prompt.with_prefix("", "What colour?") == "What colour?"


@pytest.mark.parametrize("token", [*config.SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_turns_cannot_write_special_tokens(token):
    for turns in ([f"What is {token}?"], ["What?", f"It is {token}"]):
        with pytest.raises(ValueError, match="special tokens of the model; got"):
            prompt.chat_texts(turns)


def test_text_that_resembles_markup_is_fine():
    turn = "Is <im patch> or <points coords=\"1 1 100 200\"> or <|im_star|> markup?"
    assert turn in prompt.chat_texts([turn])[0]


@pytest.mark.parametrize("seconds, first, later", [(0.0, "0.0 ", " 0.0 "), (0.5, "0.5 ", " 0.5 "),
                                                   (2.3622, "2.4 ", " 2.4 "), (127.5, "127.5 ", " 127.5 "),
                                                   (0.25, "0.2 ", " 0.2 "), (0.35, "0.3 ", " 0.3 ")])
def test_times_of_frames_have_one_decimal(seconds, first, later):
    assert prompt.frame_time_text(seconds, True) == first
    assert prompt.frame_time_text(np.float64(seconds), False) == later


def test_subtitles_are_listed_near_the_frames_that_are_shown():
    subtitles = [(0.0, 1.04, "hello"), (10.0, 12.0, "far away"), (20.0, 21.0, "bye")]
    assert prompt.subtitle_text(subtitles) == (
        "subtitle\n0.0 - 1.0 hello\n10.0 - 12.0 far away\n20.0 - 21.0 bye\n")
    assert prompt.subtitle_text(subtitles, [2.0, 19.0]) == "subtitle\n0.0 - 1.0 hello\n20.0 - 21.0 bye\n"
    assert prompt.subtitle_text(subtitles, [5.0]) == "" and prompt.subtitle_text([]) == ""
    assert prompt.subtitle_text("as it is") == "subtitle\nas it is"


def test_subtitles_are_cut_to_the_clip():
    subtitles = [(-9.0, -0.5, "long ago"), (-2.0, 0.0, "just before"), (-1.5, 1.0, "at its start"),
                 (2.0, 3.0, "within"), (4.5, 7.0, "at its end"), (5.0, 6.0, "just after")]
    assert prompt.subtitles_within(subtitles, 5.0) == (
        (0.0, 1.0, "at its start"), (2.0, 3.0, "within"), (4.5, 5.0, "at its end"))
    assert prompt.subtitles_within(subtitles[:2], 5.0) == prompt.subtitles_within((), 5.0) == ()
    assert prompt.subtitles_within("as it is", 5.0) == "as it is"


@pytest.mark.parametrize("value", [True, False])
def test_frames_are_marked_as_transformers_marks_them(value):
    processing = pytest.importorskip("transformers.models.molmo2.processing_molmo2")
    torch = pytest.importorskip("torch")
    theirs = object.__new__(processing.Molmo2Processor)
    theirs.use_frame_special_tokens, theirs.video_use_col_tokens = value, False
    start, end = prompt.frame_markers(config.InputConfig(use_frame_special_tokens=value))
    seconds = [0.0, 0.5, 12.25]
    ours = "".join(prompt.frame_time_text(second, place == 0) + start + "<im_patch>" * 6 + end
                   for place, second in enumerate(seconds))
    assert theirs.get_video_string(torch.tensor([3, 2, 3]), seconds) == ours
