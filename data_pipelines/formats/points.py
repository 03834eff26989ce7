"""Questions about locations and counts in images and videos."""

from collections.abc import Mapping

from data_pipelines import annotations
from data_pipelines.formats import templates
from data_pipelines.formats import view as views
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import points

_FORMS = {  # mode: (templates, templates naming a selection of images, style suffixes)
    "bare": (templates.POINT, templates.MULTI_POINT, ("pointing", "multi_image_pointing", "video_point")),
    "point_count": (templates.POINT_COUNT, templates.MULTI_POINT_COUNT,
                    ("point_count", "multi_image_point_then_count", "video_point_count")),
    "count_point": (templates.COUNT_POINT, templates.MULTI_COUNT_POINT,
                    ("count_then_point", "multi_image_count_then_point", "video_count_point")),
    "count": (templates.COUNT, templates.MULTI_COUNT, ("count", "multi_image_counting", "video_count")),
}
ALL_IMAGES = "all images"


def ask_points(annotation: annotations.Points, view: views.View) -> tuple[str, str, str] | None:
    """Returns (style, question, answer) of points; None if a point is in none of the frames shown.

    Raises:
      ValueError: a point lies outside its frame, or the declared size differs from that of the media.
    """
    selection = _select_images(annotation, view)
    groups = {}
    for point in annotation.points:
        if selection is not None and point.image not in selection:
            continue
        index = view.shown(point.time) if view.media.is_video else point.image
        if index is None:
            return None
        groups.setdefault(index, []).append(annotations.relative(annotation, point, view.media))
    label, modes = _label(annotation, view), annotation.modes
    mode = modes[view.below(len(modes))] if view.train and len(modes) > 1 else modes[0]
    style, question = _question(mode, label, _selection_text(selection, view), view)
    question = _prompt(annotation, mode, question, view)
    return annotation.style or style, question, _answer(mode, sorted(groups.items()), label, view)


def _prompt(annotation: annotations.Points, mode: str, question: str, view: views.View) -> str:
    """Returns the annotation's own prompt at the uses that have one, else the question."""
    asked = annotation.prompt
    if asked is None or view.train and annotation.prompt_share < 1 and (
            view.rng.uniform() >= annotation.prompt_share):
        return question
    return asked.get(mode, question) if isinstance(asked, Mapping) else view.one_of(asked)


def ask_count(annotation: annotations.Count, view: views.View) -> tuple[str, str, str]:
    """Returns (style, question, answer) of a count."""
    label = _label(annotation, view)
    selection = ALL_IMAGES if view.medium == "images" else None
    return *_question("count", label, selection, view), points.format_count(annotation.count)


def _answer(mode: str, groups, label: str, view: views.View) -> str:
    write = points.format_points if view.media.cells is None else grounded.format_points
    if mode == "bare":
        return write(groups, label, **view.writing)
    if mode == "point_count":
        return points.format_point_count(groups, label, write, **view.writing)
    if mode == "count_point":
        return points.format_count_point(groups, label, write, **view.writing)
    return points.format_count(sum(len(group) for _, group in groups))


def _question(mode: str, label: str, selection: str | None, view: views.View) -> tuple[str, str]:
    family, multi_family, styles = _FORMS[mode]
    is_plain = selection == ALL_IMAGES and mode == "bare" and view.train and view.rng.uniform() < 0.5
    if selection is not None and not is_plain:
        family = multi_family
    style = styles[("image", "images", "video").index(view.medium)]
    template = view.pick(family, "{label}")
    return style, template.format(label=label, medium=view.medium, selection=selection)


def _label(annotation: annotations.Points | annotations.Count, view: views.View) -> str:
    """Returns the label in the prompt: lower case for single images, as in the released models."""
    return annotation.label.lower() if view.medium == "image" else annotation.label


def _select_images(annotation: annotations.Points, view: views.View) -> set[int] | None:
    """Returns the numbers of the images to ask about: in training often a random subset; None for a video."""
    if view.media.is_video:
        return None
    total = len(view.media.sizes)
    if not view.train or total == 1 or annotation.prompt is not None or view.rng.uniform() < 0.5:
        return set(range(1, total + 1))
    number = 1 + view.below(total)
    return {int(i) + 1 for i in view.rng.permutation(total)[:number]}


def _selection_text(selection: set[int] | None, view: views.View) -> str | None:
    if selection is None or len(view.media.sizes) == 1:
        return None
    if len(selection) == len(view.media.sizes):
        return ALL_IMAGES
    return ", ".join(f"image_{number}" for number in sorted(selection))
