"""Questions with text answers: free-form, conversations, multiple choice, captions.

Each function returns the style and the turns of a question: (style, user, model, user, model, ...).
"""

from data_pipelines import annotations
from data_pipelines.formats import templates
from data_pipelines.formats import view as views
from molmo2_jax.inputs import choices
from molmo2_jax.inputs import prompt

DEFAULT_STYLE = "user_qa"
SHORT_ANSWER = "video_short_answer"
CHOICE, CHAT = "video_multiple_choice", "text_sft"  # styles that have a prefix only in pre-training

_CAPTIONS = {  # style: templates
    "long_caption": templates.LONG_CAPTION, "video_long_caption": templates.LONG_CAPTION,
    "short_caption": templates.SHORT_CAPTION, "video_short_caption": templates.SHORT_CAPTION,
    "video_motion_caption": templates.MOTION_CAPTION, "video_object_caption": templates.OBJECT_CAPTION,
    "video_transcript": templates.TRANSCRIPT, "video_frame_caption_timestamp": templates.FRAME_CAPTION,
    "video_clip_caption_start_end": templates.CLIP_CAPTION,
    "video_clip_transcript_start_end": templates.CLIP_TRANSCRIPT,
}


def ask_qa(annotation: annotations.QA, view: views.View) -> tuple[str, str, str]:
    """Returns style, question, answer; short-answer questions about videos use templates."""
    style, question = annotation.style or DEFAULT_STYLE, view.one_of(annotation.question)
    if style == SHORT_ANSWER:
        question = view.pick(templates.SHORT_ANSWER, "{question}").format(question=question)
    return style, question, annotation.answer


def ask_chat(annotation: annotations.Chat, view: views.View) -> tuple[str, ...]:
    """Returns the style and all turns of a conversation."""
    return CHAT, *annotation.turns


def ask_choice(annotation: annotations.Choice, view: views.View) -> tuple[str, str, str]:
    """Returns style, question with options, answer. The layout is random in training, otherwise fixed."""
    question, options, answer = annotation.question, annotation.options, annotation.answer
    if annotation.shuffle and view.train:
        places = view.rng.permutation(len(options))
        options, answer = tuple(options[place] for place in places), places.tolist().index(answer)
    if view.train and view.num_templates != 1:
        shown = choices.format_training(question, options, answer, view.rng,
                                        is_labelled=annotation.labelled)
    else:
        shown = choices.format_evaluation(question, options, is_labelled=annotation.labelled)
    return CHOICE, shown.prompt, shown.answer(answer)


def ask_caption(annotation: annotations.Caption, view: views.View) -> tuple[str, str, str]:
    """Returns style, request for a caption, caption. A style without templates is itself the request."""
    style = annotation.style or _caption_style(annotation, view)
    text = view.one_of(annotation.text)
    family = _CAPTIONS.get(style)
    if family is None and prompt.style_prefix(style):
        return style, "", text
    if family is None:
        family = templates.LONG_CAPTION if annotation.length == "long" else templates.SHORT_CAPTION
    template = view.pick(family)
    times = {"time": annotation.time, "start": annotation.start, "end": annotation.end}
    times = {name: value for name, value in times.items() if value is not None}
    if times:
        as_clock = view.train and view.num_templates != 1 and view.rng.uniform() < 0.5
        times = {name: _clock(value) if as_clock else f"{value:.1f} seconds" for name, value in times.items()}
    return style, template.format(medium=view.medium, object=annotation.object, **times), text


def _caption_style(annotation: annotations.Caption, view: views.View) -> str:
    """Returns the style of a caption whose annotation sets none."""
    if annotation.time is not None:
        return "video_frame_caption_timestamp"
    if annotation.start is not None:
        return "video_clip_caption_start_end"
    if annotation.object is not None:
        return "video_object_caption"
    return ("video_" if view.medium == "video" else "") + f"{annotation.length}_caption"


def _clock(seconds: float) -> str:
    """Returns HH:MM:SS.s."""
    tenths = round(seconds * 10)
    return f"{tenths // 36000:02d}:{tenths // 600 % 60:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"
