"""A few frames of a record with its points, for a reader who wants to see whether they are in place.

H x W pixels, reduced.
"""

import dataclasses

import numpy as np
from PIL import Image

from data_pipelines import annotations
from molmo2_jax import types
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import video

MOST_FRAMES = 3    # of a record
LONG_SIDE = 320    # pixels, at most
MOST_TEXTS = 4     # annotations that are described
MOST_LETTERS = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture. marks: (id, x, y) in its pixels. label: its time or number."""
    pixels: np.ndarray   # uint8[H, W, 3]
    marks: tuple[tuple[str, float, float], ...] = ()
    label: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A record: its place in the file, what is asked and answered, and frames."""
    key: str
    texts: tuple[str, ...]
    frames: tuple[Frame, ...]


def of(example: types.Example) -> Thumbnail:
    """Returns frames at annotated times, or spread over the clip if no time is annotated.

    Raises:
      ValueError: the media cannot be read, or a point lies outside.
    """
    if example.video is not None:
        frames = _video_frames(example)
    else:
        frames = [_image_frame(example, number) for number in range(1, len(example.images) + 1)[:MOST_FRAMES]]
    texts = [describe(one) for one in example.annotations[:MOST_TEXTS]]
    if len(example.annotations) > MOST_TEXTS:
        texts.append(f"and {len(example.annotations) - MOST_TEXTS} more annotations")
    return Thumbnail(key=example.key, texts=tuple(texts), frames=tuple(frames))


def describe(annotation: annotations.Annotation) -> str:
    """Returns an annotation in one short line."""
    match annotation:
        case annotations.Points():
            text = f"{annotation.label} ({len(annotation.points)})"
        case annotations.Tracks():
            text = f"{annotation.label} ({len(annotation.tracks)})"
        case annotations.Count():
            text = f"{annotation.label} ({annotation.count})"
        case annotations.QA():
            text = f"{_first(annotation.question)} → {annotation.answer}"
        case annotations.Choice():
            text = f"{annotation.question} → {annotation.options[annotation.answer]}"
        case annotations.Chat():
            text = f"{annotation.turns[0]} → {annotation.turns[1]}"
        case annotations.Caption():
            text = _first(annotation.text)
        case _:
            text = ""
    text = f"{annotation.type}: {' '.join(text.split())}"
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS - 1]}…"


def _first(text: str | tuple[str, ...]) -> str:
    return text if isinstance(text, str) else text[0]


def _points(example: types.Example) -> list[tuple[annotations.Annotation, annotations.Point]]:
    """Returns the visible points of an example, each with its annotation."""
    found: list[tuple[annotations.Annotation, annotations.Point]] = []
    for one in example.annotations:
        if isinstance(one, annotations.Points):
            found += [(one, point) for point in one.points]
        elif isinstance(one, annotations.Tracks):
            found += [(one, point) for track in one.tracks for point in track.points if not point.occluded]
    return found


def _video_frames(example: types.Example) -> list[Frame]:
    points = _points(example)
    times = sorted({point.time for _, point in points if point.time is not None})
    if not times:
        duration = video.clip_span(video.index(example.video), example.clip)[1]
        times = np.linspace(0, duration, MOST_FRAMES).tolist()
    places = np.unique(np.linspace(0, len(times) - 1, MOST_FRAMES).round().astype(int))
    times = [times[place] for place in places]
    shown = video.read(example.video, max_frames=len(times), clip=example.clip, seconds=np.array(times))
    return [_frame(pixels, shown.media, f"{time:.1f} s",
                   [(one, point) for one, point in points if point.time is not None
                    and abs(point.time - time) <= annotations.TIME_TOLERANCE])
            for pixels, time in zip(shown.pixels, times, strict=True)]


def _image_frame(example: types.Example, number: int) -> Frame:
    loaded = [pixels_lib.load(path) for path in example.images[:number]]
    media = types.Media(sizes=tuple((one.shape[1], one.shape[0]) for one in loaded))
    label = f"image {number}" if len(example.images) > 1 else ""
    return _frame(loaded[-1], media, label, [(one, point) for one, point in _points(example)
                                             if (point.image or 1) == number])


def _frame(pixels: np.ndarray, media: types.Media, label: str, points) -> Frame:
    picture = Image.fromarray(pixels)
    picture.thumbnail((LONG_SIDE, LONG_SIDE))
    width, height = picture.size
    marks = []
    for annotation, point in points:
        x, y = annotations.relative(annotation, point, media)
        marks.append((str(point.id), x * width, y * height))
    return Frame(pixels=np.array(picture), marks=tuple(marks), label=label)
