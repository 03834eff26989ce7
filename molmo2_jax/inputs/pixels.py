"""Pixels of still images: files to arrays, and resizing that equals torch's bit for bit.

H x W source pixels.

Source: reference, olmo/preprocessing/image_preprocessor.py.
"""

import contextlib
import functools
import os
import warnings

import numpy as np
import PIL
from PIL import Image
from PIL import ImageOps

from molmo2_jax.inputs import file_kind

MAX_PIXELS = 100_000_000      # larger images are rejected; this many take 0.3 GB decoded
RESIZE_BLOCK = 1 << 16        # values resized at a time, so that intermediates fit the cache


class MediaError(ValueError):
    """A media file cannot be used; the message names the file and the reason."""


# Loading


def load(path) -> np.ndarray:
    """Returns uint8[H, W, 3]: RGB, turned upright by the EXIF orientation; alpha is dropped.

    The first image of an animation is used. 16-bit grey is scaled to 8 bits; the reference clips it to
    white. Unlike the reference, truncated files are rejected rather than filled with grey.

    Raises:
      MediaError: the file is missing, empty or broken, has more than MAX_PIXELS, or pixels of unknown range.
    """
    if not os.path.isfile(path):
        raise MediaError(f"{path}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning; MAX_PIXELS is the rule here
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise MediaError(f"{path}: an image may have at most {MAX_PIXELS} pixels; "
                                     f"got {image.width} x {image.height}")
                return _upright_rgb(path, image)
    except MediaError:
        raise
    except Image.DecompressionBombError:
        raise MediaError(f"{path}: an image may have at most {MAX_PIXELS} pixels") from None
    except PIL.UnidentifiedImageError:
        what = file_kind.describe(path)
        raise MediaError(f"{path}: is not an image of a known format"
                         + (f", but {what}" if what else "")) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise MediaError(f"{path}: cannot be decoded as an image: {error}") from error


def check_size(path, most_pixels: int) -> None:
    """Checks the size that an image states, before it is decoded; files that are no image pass.

    Raises:
      MediaError: it has more pixels.
    """
    with contextlib.suppress(OSError, Image.DecompressionBombError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            if image.width * image.height > most_pixels:
                raise MediaError(f"{path}: an image may have at most {most_pixels} pixels; got "
                                 f"{image.width} x {image.height}")


def _upright_rgb(path, image) -> np.ndarray:
    image.load()
    with contextlib.suppress(Exception):  # a broken EXIF block does not affect the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise MediaError(f"{path}: pixels must be integers; got floating point")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 1 << 16:
            raise MediaError(f"{path}: grey values must be in 0 .. 65535; "
                             f"got {values.min()} .. {values.max()}")
        grey = np.asarray(values >> 8 if values.max() > 255 or ";16" in image.mode else values, np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


# Resizing


def resize(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Returns uint8[rows, columns, 3]: two-tap bilinear, half-pixel centres, no antialiasing, half to even.

    Equals torch's float32 interpolate with fused multiply-adds bit for bit: columns first, then rows.

    Raises:
      ValueError: rows or columns is below 1.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"an image must be resized to at least 1 x 1 pixels; got {rows} x {columns}")
    if pixels.shape[:2] == (rows, columns):
        return pixels.copy()
    height, width, channels = pixels.shape
    pixels = np.ascontiguousarray(pixels).reshape(height, width * channels)
    top, bottom, *row_weights = _taps(height, rows, 1)
    left, right, *column_weights = _taps(width, columns, channels)
    out = np.empty((rows, columns * channels), np.uint8)
    step = max(1, RESIZE_BLOCK // (columns * channels))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        first, last = top[block.start], bottom[block.stop - 1]
        if last - first < 2 * step:
            lines, above, below = pixels[first:last + 1], top[block] - first, bottom[block] - first
        else:  # reducing by more than two: most lines are unused
            lines = pixels[np.concatenate((top[block], bottom[block]))]
            above, below = slice(None, len(lines) // 2), slice(len(lines) // 2, None)
        lines = _blend(lines.take(left, axis=1), lines.take(right, axis=1), *column_weights)
        mixed = _blend(lines[above], lines[below], *(w[block, None] for w in row_weights))
        out[block] = np.rint(mixed, out=mixed)  # means of values in 0 .. 255 need no clipping
    return out.reshape(rows, columns, channels)


def _blend(first, second, first_weight, second_weight) -> np.ndarray:
    """Returns float32 fma(first, first_weight, second * second_weight).

    The product of a float32 with at most 29 significant bits is exact in float64, so rounding the float64
    sum to float32 once equals the fused instruction.
    """
    scaled = np.multiply(second, second_weight, dtype=np.float32)
    total = np.multiply(first, first_weight, dtype=np.float64)
    return np.add(total, scaled, out=scaled, casting="same_kind")


@functools.lru_cache(maxsize=1024)
def _taps(size_in: int, size_out: int, channels: int):
    """Returns, for each output value, the indices and weights (float64 and float32) of its two neighbours.

    The channels of a pixel are adjacent in memory, so along columns an index counts `channels` values.
    """
    scale = np.float64(np.float32(size_in) / np.float32(size_out))
    place = np.float32(scale * (np.arange(size_out) + 0.5) - 0.5)  # fused in the reference: one rounding
    place = np.maximum(place, np.float32(0))
    low = np.minimum(place.astype(np.int64), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    high_weight = np.minimum(place - low.astype(np.float32), np.float32(1))
    low_weight = np.float32(1) - high_weight
    channel = np.arange(channels)
    low, high = ((index[:, None] * channels + channel).ravel() for index in (low, high))
    return (low, high, np.repeat(low_weight, channels).astype(np.float64),
            np.repeat(high_weight, channels))
