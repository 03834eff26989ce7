"""Points, tracks and masks drawn on frames; frames as contact sheets, animations and video files.

H x W source pixels, h x w drawn pixels, N frames. Marks are in source pixels; ids are strings, as parsed from
answers, and keep their colour from frame to frame.
"""

import base64
import fractions
import io
import itertools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import av
import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFilter
from PIL import ImageFont

from molmo2_jax.inputs import video_file

# Distinct on light and dark backgrounds, also for most colour-blind readers.
COLOURS = ((255, 92, 92), (64, 156, 255), (255, 190, 40), (60, 200, 120), (190, 120, 255), (255, 130, 200),
           (40, 200, 210), (200, 150, 90))
SHORT_SIDE = 288          # pixels, at least, of a drawn frame
_SMOOTH = 3               # marks are drawn this many times larger, then scaled down
_INK, _PAPER = (24, 28, 36), (255, 255, 255)

XY = tuple[float, float]
Mark = tuple[str, float, float]  # id, x, y


def colour(name: str) -> tuple[int, int, int]:
    """Returns the colour of an id; those of "1" ... "8" all differ."""
    number = int(name) - 1 if name.isdecimal() else zlib.crc32(name.encode())
    return COLOURS[number % len(COLOURS)]


def scale_of(pixels: np.ndarray, short_side: int = SHORT_SIDE) -> float:
    """Returns the factor >= 1 that enlarges a frame's shorter side to at least short_side pixels."""
    return max(1.0, short_side / min(pixels.shape[:2]))


def draw(pixels: np.ndarray, *, predicted: Sequence[Mark] = (), true: Sequence[Mark] = (),
         masks: Sequence[tuple[str, np.ndarray]] = (), trails: Mapping[str, Sequence[XY]] | None = None,
         label: str = "", short_side: int = SHORT_SIDE) -> np.ndarray:
    """Returns uint8[h, w, 3]: the enlarged frame with predicted points as crosses and true ones as rings.

    masks: (id, bool[H, W]), drawn as a tint with an outline.
    trails: id -> earlier positions of an object.
    label: text in the upper left corner.
    """
    scale = scale_of(pixels, short_side)
    height, width = (round(side * scale) for side in pixels.shape[:2])
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    for name, mask in masks:
        _tint(picture, mask, colour(name))
    marks = Image.new("RGBA", (width * _SMOOTH, height * _SMOOTH))
    pen = ImageDraw.Draw(marks)
    size = min(width, height) * _SMOOTH * 0.035
    for name, places in (trails or {}).items():
        _trail(pen, [(x * scale * _SMOOTH, y * scale * _SMOOTH) for x, y in places], size, colour(name))
    for name, x, y in true:
        _ring(pen, x * scale * _SMOOTH, y * scale * _SMOOTH, size * 1.5, colour(name))
    for name, x, y in predicted:
        _cross(pen, x * scale * _SMOOTH, y * scale * _SMOOTH, size, colour(name))
    marks = marks.resize((width, height), Image.Resampling.LANCZOS)
    picture.paste(marks, (0, 0), marks)
    if label:
        _label(picture, label)
    return np.asarray(picture)


def _tint(picture: Image.Image, mask: np.ndarray, rgb) -> None:
    shape = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR)
    shape = shape.point(lambda value: 255 * (value >= 128))
    picture.paste(Image.new("RGB", picture.size, rgb), (0, 0), shape.point(lambda value: value * 0.35))
    grown = np.asarray(shape.filter(ImageFilter.MaxFilter(3)))
    shrunk = np.asarray(shape.filter(ImageFilter.MinFilter(3)))
    picture.paste(Image.new("RGB", picture.size, rgb), (0, 0), Image.fromarray(grown & ~shrunk))


def _cross(pen, x, y, size, rgb) -> None:
    for width, ink in ((0.95, _PAPER), (0.75, _INK), (0.45, rgb)):
        reach = size * (1 + (width - 0.45) / 2)
        for sign in (1, -1):
            pen.line((x - reach, y - sign * reach, x + reach, y + sign * reach), fill=(*ink, 255),
                     width=max(1, round(size * width)))


def _ring(pen, x, y, radius, rgb) -> None:
    for reach, width, ink in ((1.12, 0.5, _PAPER), (1.0, 0.26, rgb)):
        pen.ellipse((x - radius * reach, y - radius * reach, x + radius * reach, y + radius * reach),
                    outline=(*ink, 255), width=max(1, round(radius * width)))


def _trail(pen, places, size, rgb) -> None:
    for number, (start, end) in enumerate(zip(places, places[1:])):
        fade = round(60 + 160 * (number + 1) / len(places))
        pen.line((*start, *end), fill=(*rgb, fade), width=max(1, round(size * 0.4)))
    for x, y in places[:-1]:
        pen.ellipse((x - size * 0.3, y - size * 0.3, x + size * 0.3, y + size * 0.3), fill=(*rgb, 200))


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=round(size))


def _label(picture: Image.Image, text: str) -> None:
    font = _font(max(11, min(picture.size) / 18))
    box = font.getbbox(text)
    width, height = box[2] + 10, box[3] + 6
    plate = Image.new("RGB", (math.ceil(width), math.ceil(height)), _INK)
    ImageDraw.Draw(plate).text((5, 2), text, fill=_PAPER, font=font)
    picture.paste(plate, (6, 6), Image.new("L", plate.size, 205))


def track(frames: np.ndarray, tracked: Sequence[Mapping[str, XY]], *,
          true: Sequence[Mapping[str, XY]] | None = None,
          masks: Sequence[Sequence[tuple[str, np.ndarray]]] | None = None,
          labels: Sequence[str] | None = None, short_side: int = SHORT_SIDE) -> list[np.ndarray]:
    """Returns uint8[h, w, 3] per frame of uint8[N, H, W, 3]: crosses at `tracked`, each with its trail.

    tracked, true: per frame, id -> (x, y); masks: per frame, (id, bool[H, W]).
    """
    drawn, trails = [], {}
    for number, pixels in enumerate(frames):
        for name, place in tracked[number].items():
            trails.setdefault(name, []).append(place)
        drawn.append(draw(
            pixels, predicted=[(name, *place) for name, place in tracked[number].items()],
            true=[(name, *place) for name, place in true[number].items()] if true else (),
            masks=masks[number] if masks else (), trails={name: trails[name] for name in tracked[number]},
            label=labels[number] if labels else "", short_side=short_side))
    return drawn


def contact_sheet(pictures: Sequence[np.ndarray], columns: int | None = None, gap: int = 8,
                  ground: tuple[int, int, int] = (30, 34, 42)) -> np.ndarray:
    """Returns uint8[h, w, 3]: pictures in rows, each centred in a cell of the largest picture's size.

    Raises:
      ValueError: there is no picture.
    """
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture; got none")
    columns = columns or math.ceil(math.sqrt(len(pictures) * 1.6))
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    high, wide = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    sheet = np.empty((rows * (high + gap) + gap, columns * (wide + gap) + gap, 3), np.uint8)
    sheet[:] = ground
    for number, picture in enumerate(pictures):
        top = gap + number // columns * (high + gap) + (high - picture.shape[0]) // 2
        left = gap + number % columns * (wide + gap) + (wide - picture.shape[1]) // 2
        sheet[top:top + picture.shape[0], left:left + picture.shape[1]] = picture
    return sheet


def encode(picture: np.ndarray, kind: str = "PNG") -> bytes:
    """Returns a still picture encoded as PNG, JPEG or WEBP."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind, **({} if kind == "PNG" else {"quality": 88}))
    return out.getvalue()


def animation(pictures: Sequence[np.ndarray], seconds: float | Sequence[float], kind: str = "GIF") -> bytes:
    """Returns a looping animation as GIF, animated PNG or WEBP; `seconds` for all pictures, or for each.

    Raises:
      ValueError: there is no picture.
    """
    if not pictures:
        raise ValueError("an animation needs at least one picture; got none")
    times = [seconds] * len(pictures) if isinstance(seconds, (int, float)) else seconds
    images = [Image.fromarray(picture) for picture in pictures]
    options = {"quality": 82} if kind == "WEBP" else {}
    out = io.BytesIO()
    images[0].save(out, kind, save_all=True, append_images=images[1:], loop=0,
                   duration=[max(20, round(1000 * one)) for one in times], **options)
    return out.getvalue()


def write_video(path, pictures: Iterable[np.ndarray], fps: float) -> None:
    """Writes an H.264 file; sides are cut to an even number of pixels.

    Raises:
      ValueError: there is no picture.
    """
    coming = iter(pictures)
    first = next(coming, None)
    if first is None:
        raise ValueError("a video needs at least one picture; got none")
    height, width = (side // 2 * 2 for side in first.shape[:2])
    with av.open(video_file.url(path), "w") as container:
        rate = fractions.Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in itertools.chain([first], coming):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def data_uri(data: bytes, kind: str) -> str:
    """Returns "data:image/KIND;base64,..."."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
