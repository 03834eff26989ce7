"""Pictures of the model's inputs and answers."""

import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import video as videos
from molmo2_jax.render import moments
from molmo2_jax.render import pictures

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4")
_MOST_FRAMES = {".gif": 400, ".mp4": 3000}   # in an animation
_AT_ONCE = 32         # frames in memory
_SHORT_SIDE = 480     # pixels, at most, of frames read for drawing


def suffix(path: str) -> str:
    """Returns the suffix, in lower case, of a picture to write.

    Raises:
      ValueError: the suffix is not one of SUFFIXES.
    """
    found = pathlib.Path(path).suffix.lower()
    if found not in SUFFIXES:
        raise ValueError(f"--render must end in one of {', '.join(SUFFIXES)}; got {path!r}")
    return found


def save_answer(answer, path: str, *, video: str | None = None, images: Sequence[str] = (),
                fps: float = 8.0) -> None:
    """Draws the points of a generate.Answer on its media and writes them to `path`.

    A still picture shows the times (or images) that the answer names; .gif and .mp4 play the whole video at
    `fps`, or fewer if it is long, with points at their times and tracks that run along (moments.marks_at).

    Raises:
      ValueError: the suffix is not one of SUFFIXES.
      MediaError: the media cannot be read.
    """
    kind = suffix(path)
    by_index: dict[float, list[pictures.Mark]] = {}
    for point in answer.points:
        by_index.setdefault(point.index, []).append((point.id, point.x, point.y))
    if video is not None and kind in (".gif", ".mp4"):
        drawn, rate = _play(video, answer.points, fps, _MOST_FRAMES[kind])
    elif video is not None:
        drawn, rate = _stills(video, by_index), 1.0
    else:
        drawn = [pictures.draw(pixels_lib.load(one), predicted=by_index.get(number, ()),
                               label=f"image {number}" if len(images) > 1 else "")
                 for number, one in enumerate(images, 1)]
        rate = 1.0
    _write(path, kind, drawn, rate)


def _write(path: str, suffix: str, drawn: Iterable[np.ndarray], fps: float) -> None:
    if suffix == ".mp4":
        pictures.write_video(path, drawn, fps)
        return
    drawn = list(drawn)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix, suffix[1:].upper())
    if suffix == ".gif":
        data = pictures.animation(drawn, 1 / fps)
    else:
        data = pictures.encode(drawn[0] if len(drawn) == 1 else pictures.contact_sheet(drawn), kind)
    pathlib.Path(path).write_bytes(data)


def _read(video: str, seconds) -> tuple[np.ndarray, float]:
    """Returns (uint8[N, H, W, 3], the factor by which the frames were scaled)."""
    source = videos.read(video, max_frames=1, seconds=np.zeros(1)).pixels[0]
    factor = min(1.0, _SHORT_SIDE / min(source.shape[:2]))
    size = tuple(max(1, round(side * factor)) for side in source.shape[:2])
    return videos.read(video, max_frames=len(seconds), seconds=np.asarray(seconds), size=size).pixels, factor


def _scaled(marks: Sequence[pictures.Mark], factor: float) -> list[pictures.Mark]:
    return [(name, x * factor, y * factor) for name, x, y in marks]


def _stills(video: str, by_index) -> list[np.ndarray]:
    seconds = sorted(by_index) or [0.0]
    frames, factor = _read(video, seconds)
    marks = [_scaled(by_index.get(second, ()), factor) for second in seconds]
    return [pictures.draw(pixels, predicted=points, label=f"{second:.1f} s")
            for second, pixels, points in zip(seconds, frames, marks)]


def _play(video: str, points, fps: float, most: int) -> tuple[Iterator[np.ndarray], float]:
    """Returns (frames with what is to be seen at their times, frames per second)."""
    duration = videos.index(video).duration
    seconds = np.arange(0, duration, max(1 / fps, duration / most))

    def drawn() -> Iterator[np.ndarray]:
        for start in range(0, len(seconds), _AT_ONCE):
            frames, factor = _read(video, seconds[start:start + _AT_ONCE])
            for second, pixels in zip(seconds[start:], frames):
                trails = {name: [(x * factor, y * factor) for x, y in places]
                          for name, places in moments.trails_at(points, second).items()}
                yield pictures.draw(pixels, predicted=_scaled(moments.marks_at(points, second), factor),
                                    trails=trails, label=f"{second:.1f} s")

    return drawn(), min(fps, most / duration)
