"""Text around questions and frames: chat format, style prefixes, frame timestamps, subtitles.

This module works on strings; sequence.py turns them into tokens.
"""

import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from molmo2_jax import config

# Texts that the tokenizer turns into single ids with a special meaning.
RESERVED = config.SPECIAL_TOKENS + ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
# Grounding tokens with their choices (inputs/grounded.py), which answers made by this code may contain.
CHOICES = ("<|token_index:", "<|vit_index:", "<|vit_loc:")

# Styles that a demo's user would use: the question has no prefix.
_DEMO_STYLES = frozenset("""
    point_count pointing cosyn_point user_qa long_caption short_caption video_long_caption
    video_short_caption video_point_track_per_frame video_point_track_start_end
    video_single_point_track_start_end video_transcript video_clip_caption_start_end
    video_clip_caption_start_end_in_seconds video_clip_transcript_start_end
    video_clip_transcript_start_end_in_seconds video_frame_caption_timestamp
    video_frame_caption_timestamp_in_seconds correction_qa text_sft video_point video_point_count
    video_count video_count_point multi_image_pointing multi_image_counting
    multi_image_point_then_count multi_image_count_then_point""".split())

_CHOICE_STYLES = frozenset("""
    video_multiple_choice video_multiple_choice_count_without_pointing
    video_multiple_choice_multiple_correct video_multiple_choice_w_subtitle a_okvqa_mc
    ai2_diagram_no_letter ai2_diagram science_qa eval_multiple_choice multi_image_mc
    multi_image_mc_exp mantis_instruct_mc eval_multi_image_mc""".split())

STYLES_WITHOUT_PREFIX = _DEMO_STYLES | _CHOICE_STYLES

# Evaluation sets' names for the styles of training.
_EVALUATION_NAMES = {
    "eval_short_answer": "vqa2",
    "eval_multiple_choice": "a_okvqa_mc",
    "video_eval_short_answer": "video_short_answer",
    "video_eval_multiple_choice": "video_multiple_choice",
    "video_eval_multiple_choice_w_subtitle": "video_multiple_choice_w_subtitle",
}

_POINTING_STYLES = frozenset({"pointing", "point_count", "cosyn_point"})


@functools.lru_cache(maxsize=8)
def _reserved_pattern(reserved: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(re.escape(token) for token in sorted(reserved, key=len, reverse=True)))


def refuse_reserved(text: str, reserved: Iterable[str] = RESERVED) -> None:
    """Rejects text that contains special tokens, so that users cannot inject visual tokens or chat markup.

    Raises:
      ValueError: the text contains one of `reserved`.
    """
    found = _reserved_pattern(tuple(reserved)).search(text)
    if found:
        raise ValueError("a text must not contain special tokens of the model; "
                         f"got {found.group()!r} at character {found.start()}")


def chat_texts(turns: Sequence[str], reserved: Iterable[str] = RESERVED,
               in_answers: Sequence[str] = ()) -> list[str]:
    """Returns the turns with chat markup: user, model, user, model ...; model turns stay unchanged.

    `in_answers` are special tokens that answers may contain. The model's end-of-turn token is not added here:
    sequence.py adds it as an id. Each later user turn begins with a second one, as in the reference's
    training examples.

    Raises:
      ValueError: there is no turn, an answer is empty, or a turn contains a special token.

    Source: chat template of Qwen3 without system turn; reference: olmo/preprocessing/data_formatter.py.
    """
    reserved = tuple(reserved)
    of_answers = tuple(token for token in reserved if token not in in_answers)
    for number, turn in enumerate(turns):
        refuse_reserved(turn, of_answers if number % 2 else reserved)
    return ["".join(text for text, _ in pieces) for pieces in chat_pieces(turns)]


def chat_pieces(turns: Sequence[str]) -> list[list[tuple[str, bool]]]:
    """Returns for each turn the pieces that `chat_texts` joins: (text, whether it is a special token).

    Raises:
      ValueError: there is no turn, or an answer is empty.
    """
    if not turns:
        raise ValueError("a conversation must have at least one turn; got none")
    start, end = ("<|im_start|>", True), ("<|im_end|>", True)
    pieces = []
    for number, turn in enumerate(turns):
        if number % 2 == 1:
            if not turn:
                raise ValueError(f"an answer must not be empty; got '' as turn {number + 1}")
            pieces.append([(turn, False)])
        else:
            closing = [end, ("\n", False)] if number else []
            pieces.append([*closing, start, (f"user\n{turn}", False), end, ("\n", False), start,
                           ("assistant\n", False)])
    return pieces


def training_style(style: str) -> str:
    """Returns the style of training that an evaluation set's name stands for."""
    if style in _EVALUATION_NAMES:
        return _EVALUATION_NAMES[style]
    if style.startswith("eval_multi_image_"):
        return style.removeprefix("eval_")
    return style.removesuffix("_count_without_pointing")


def style_prefix(style: str) -> str:
    """Returns "STYLE:" for academic styles, "" for demo and multiple-choice styles.

    Two tracking styles have a prefix only because their names differ from those in the reference's demo list;
    the released models were trained with it.

    Source: reference: olmo/preprocessing/data_formatter.py, `demo_or_style_v2`.
    """
    name = training_style(style)
    return "" if name in STYLES_WITHOUT_PREFIX else f"{name}:"


def pretrain_prefix(style: str, answer: str | None = None,
                    rng: np.random.RandomState | np.random.Generator | None = None) -> str:
    """Returns the prefix of the pre-training stage: "STYLE N:", where N is about len(answer) / 15.

    With an answer and rng (training), N is noisy, and omitted for one example in ten; without an answer
    (inference) N is 65. Pointing styles have no N.

    Raises:
      ValueError: an answer is given without rng.
    Source: reference, `style_and_length_v2`.
    """
    if style in _POINTING_STYLES:
        return f"{style}:"
    if answer is None:
        return f"{style} 65:"
    if rng is None:
        raise ValueError("pretrain_prefix needs rng when it is given an answer; got None")
    if rng.uniform() >= 0.9:
        return f"{style}:"
    return f"{style} {(len(answer) + int(rng.normal(scale=25))) // 15}:"


def with_prefix(prefix: str, text: str) -> str:
    """Returns prefix and text, separated by a space if neither is empty."""
    return f"{prefix} {text}" if prefix and text else prefix + text


def frame_time_text(seconds: float, is_first: bool) -> str:
    """Returns the text before a frame: "0.0 " before the first, " 0.5 " before later ones.

    It is encoded separately for each frame. Source: paper, section 3.1.
    """
    return f"{seconds:.1f} " if is_first else f" {seconds:.1f} "


def subtitles_within(subtitles: str | Sequence[tuple[float, float, str]],
                     duration: float) -> str | tuple[tuple[float, float, str], ...]:
    """Returns the (start, end, text) entries within a clip, cut to its 0 .. duration seconds.

    A single text has no times and is returned unchanged. The reference does not cut: its entries that begin
    before the clip keep a negative time, which corresponds to no frame.
    """
    if isinstance(subtitles, str):
        return subtitles
    return tuple((max(start, 0.0), min(end, duration), text) for start, end, text in subtitles
                 if start < duration and end > 0)


def frame_markers(inputs: config.InputConfig) -> tuple[str, str]:
    """Returns the special tokens before and after the patches of a frame.

    Released checkpoints use either pair; the processor file states which one a model was trained with.
    Source: transformers: models/molmo2/processing_molmo2.py, `get_video_string`.
    """
    if inputs.use_frame_special_tokens:
        return "<frame_start>", "<frame_end>"
    return "<im_start>", "<im_end>"


def subtitle_text(subtitles: str | Sequence[tuple[float, float, str]],
                  frame_seconds: Sequence[float] | None = None, margin: float = 1.0) -> str:
    """Returns the text placed after the frames: "subtitle", then one "START - END TEXT" per line.

    With `frame_seconds`, entries more than `margin` seconds from every frame are dropped. Returns "" if no
    entry is left. Source: reference: olmo/preprocessing/video_preprocessor.py.
    """
    if isinstance(subtitles, str):
        return f"subtitle\n{subtitles}" if subtitles else ""
    if frame_seconds is not None:
        seconds = np.asarray(frame_seconds, np.float64)
        subtitles = [entry for entry in subtitles
                     if np.any((entry[0] <= seconds + margin) & (entry[1] >= seconds - margin))]
    lines = [f"{start:.1f} - {end:.1f} {text}\n" for start, end, text in subtitles]
    return "subtitle\n" + "".join(lines) if lines else ""
