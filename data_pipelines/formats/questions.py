"""Questions answered in words: free answers, conversations, multiple choice, captions."""

from collections.abc import Mapping

from data_pipelines.formats import templates
from data_pipelines.formats import view as views
from molmo2_jax.inputs import choices
from molmo2_jax.inputs import prompt

DEFAULT_STYLE = "user_qa"


def ask_qa(annotation: Mapping, view: views.View) -> tuple[str, str]:
    """Returns (question, answer); academic styles stand before the question."""
    style = annotation.get("style", DEFAULT_STYLE)
    return prompt.with_prefix(prompt.style_prefix(style), annotation["question"]), annotation["answer"]


def ask_chat(annotation: Mapping, view: views.View) -> tuple[str, ...]:
    """Returns all turns of a conversation."""
    return annotation["turns"]


def ask_choice(annotation: Mapping, view: views.View) -> tuple[str, str]:
    """Returns (question with options, answer): mostly random layouts in training, else the fixed one."""
    question, options, answer = annotation["question"], annotation["options"], annotation["answer"]
    if annotation.get("shuffle") and view.train:
        places = view.rng.permutation(len(options))
        options, answer = tuple(options[place] for place in places), places.tolist().index(answer)
    if view.train and view.num_templates != 1:
        shown = choices.format_training(question, options, answer, view.rng)
    else:
        shown = choices.format_evaluation(question, options)
    return shown.prompt, shown.answer(answer)


def ask_caption(annotation: Mapping, view: views.View) -> tuple[str, str]:
    """Returns (request for a caption, caption); where the style has a prefix, that is the request."""
    if prefix := prompt.style_prefix(annotation.get("style", "long_caption")):
        return prefix, annotation["text"]
    is_long = annotation["length"] == "long"
    request = view.pick(templates.LONG_CAPTION if is_long else templates.SHORT_CAPTION)
    return request.format(medium=view.medium), annotation["text"]
