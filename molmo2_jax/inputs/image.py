"""Pixels to crops, and crops to visual tokens, for still images and video frames alike.

An image becomes one overview crop and a tiling of overlapping crops; a frame becomes one crop. Crops are
cut into patches; each visual token pools a window of patches, named by `crop * P + patch`.

H x W source pixels; M crops of P patches of C values; R visual tokens pooling up to W patches; T tokens.

Source: paper, section 3.1; reference: olmo/preprocessing/multicrop_preprocessor.py,
olmo/preprocessing/image_preprocessor.py, olmo/preprocessing/video_preprocessor.py.
"""

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Sequence

import numpy as np
import PIL
from PIL import Image
from PIL import ImageOps

from molmo2_jax import config as configs
from molmo2_jax import types
from molmo2_jax.inputs import prompt

MAX_PIXELS = 100_000_000      # larger stills are refused: 0.3 GB once decoded
RESIZE_BLOCK = 1 << 16        # values resized at a time, so that intermediates stay in the cache


class MediaError(ValueError):
    """A file that cannot be used, in one sentence: which file and why."""


# Loading


def load(path) -> np.ndarray:
    """Returns uint8[H, W, 3]: RGB, turned upright by the EXIF orientation; alpha is dropped.

    Of an animation the first picture is taken. 16-bit grey is scaled to 8 bits; the reference clips it to
    white. Unlike the reference, truncated files are refused rather than filled with grey.

    Raises:
      MediaError: missing, empty, broken, larger than MAX_PIXELS, or without a pixel range of known scale.
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
        raise MediaError(f"{path}: is not an image of a known format") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise MediaError(f"{path}: cannot be decoded as an image: {error}") from error


def _upright_rgb(path, image) -> np.ndarray:
    image.load()
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise MediaError(f"{path}: pixels must be integers; got floating point")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 1 << 16:
            raise MediaError(f"{path}: grey values must lie in 0 .. 65535; "
                             f"got {values.min()} .. {values.max()}")
        grey = np.asarray(values >> 8 if values.max() > 255 or ";16" in image.mode else values, np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


# Resizing


def resize(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Returns uint8[rows, columns, 3]: two-tap bilinear, half-pixel centres, no antialiasing, half to even.

    Bit for bit what torch's float32 interpolate computes with fused multiply-adds: columns first, then rows.
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
        else:  # shrinking by more than two: most lines are never looked at
            lines = pixels[np.concatenate((top[block], bottom[block]))]
            above, below = slice(None, len(lines) // 2), slice(len(lines) // 2, None)
        lines = _blend(lines.take(left, axis=1), lines.take(right, axis=1), *column_weights)
        mixed = _blend(lines[above], lines[below], *(w[block, None] for w in row_weights))
        out[block] = np.rint(mixed, out=mixed)  # a mean of values in 0 .. 255, so nothing to clip
    return out.reshape(rows, columns, channels)


def _blend(first, second, first_weight, second_weight) -> np.ndarray:
    """Returns float32 fma(first, first_weight, second * second_weight).

    The product of a float32 with at most 29 significant bits is exact in float64, so rounding the float64
    sum once to float32 is what the fused instruction does.
    """
    scaled = np.multiply(second, second_weight, dtype=np.float32)
    total = np.multiply(first, first_weight, dtype=np.float64)
    return np.add(total, scaled, out=scaled, casting="same_kind")


@functools.lru_cache(maxsize=1024)
def _taps(size_in: int, size_out: int, channels: int):
    """Returns for each output value: index of its two neighbours, their weights (float64 and float32).

    Values of a pixel are neighbours in memory, so along columns each index counts `channels` values.
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


# Crops and patches


def tiling(height: int, width: int, max_crops: int, config: configs.Molmo2Config,
           inputs: configs.InputConfig) -> tuple[int, int]:
    """Returns (rows, columns) of crops: least enlarging of the tilings that cover, else least shrinking."""
    window, margin = _window(config, inputs)
    patch = config.vision.patch_size
    candidates = sorted(
        ((i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)),
        key=lambda tiles: (tiles[0] * tiles[1], tiles[0]))
    covered = np.array(candidates, np.float32) * np.float32(window * patch)
    needed = np.maximum(np.array([height, width], np.float32) - margin * patch, 1)
    scale = (covered / needed).min(axis=1)
    if (scale < 1).all():
        return candidates[int(scale.argmax())]
    return candidates[int(np.where(scale < 1, np.inf, scale).argmin())]


def _window(config, inputs) -> tuple[int, int]:
    """Returns, in patches per side: what a crop adds to the tiling, and both overlap margins together."""
    margin = sum(inputs.overlap_margins)
    window = config.vision.grid - margin
    if window < 1:
        raise ValueError(f"overlap_margins must leave at least one of the {config.vision.grid} patches of "
                         f"a crop's side; got {inputs.overlap_margins}")
    return window, margin


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Returns uint8[M, P, C] of square crops uint8[M, S, S, 3].

    Patches are row-major; the values of a patch are ordered by row, column, channel.
    """
    crops, side = pixels.shape[0], pixels.shape[1] // patch
    pixels = pixels.reshape(crops, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(crops, side * side, patch * patch * 3)


def _image_patches(pixels, tiles, config, inputs) -> np.ndarray:
    """Returns uint8[1 + i * j, P, C]: the overview, then the crops of an i x j tiling, row-major."""
    window, margin = _window(config, inputs)
    size, patch = config.vision.image_size, config.vision.patch_size
    step = window * patch
    stitched = resize(pixels, *(n * step + margin * patch for n in tiles))
    crops = [stitched[a * step:a * step + size, b * step:b * step + size]
             for a in range(tiles[0]) for b in range(tiles[1])]
    return patchify(np.stack([resize(pixels, size, size), *crops]), patch)


# Pooling


def pool(ids: np.ndarray, window: tuple[int, int]) -> np.ndarray:
    """Returns int32[tokens, W]: the patch ids under each pooling window, row-major; -1 beyond the edge.

    The grid is padded to whole windows, the smaller half of the padding first.
    """
    pads = [((-size % q) // 2, -(-(-size % q) // 2)) for size, q in zip(ids.shape, window)]
    ids = np.pad(ids, pads, constant_values=-1)
    rows, columns = ids.shape[0] // window[0], ids.shape[1] // window[1]
    ids = ids.reshape(rows, window[0], columns, window[1]).transpose(0, 2, 1, 3)
    return ids.reshape(rows * columns, window[0] * window[1]).astype(np.int32)


def tiled_ids(tiles: tuple[int, int], config: configs.Molmo2Config,
              inputs: configs.InputConfig) -> np.ndarray:
    """Returns int64[rows, columns]: for each place in the stitched image the crop patch that shows it.

    Where two crops overlap, each gives up its margin towards the other. Ids count from the first tile.
    """
    window, margin = _window(config, inputs)
    grid = config.vision.grid
    crop, local = [], []
    for count in tiles:
        place = np.arange(count * window + margin)
        owner = np.clip((place - inputs.overlap_margins[0]) // window, 0, count - 1)
        crop.append(owner)
        local.append(place - owner * window)
    return ((crop[0][:, None] * tiles[1] + crop[1]) * grid ** 2 + local[0][:, None] * grid + local[1])


def _tokens_across(size: int, window: int) -> int:
    return math.ceil(size / window)


@functools.lru_cache(maxsize=256)
def _image_layout(tiles, config, inputs) -> tuple[np.ndarray, np.ndarray]:
    """Returns of one image int32[R, W] pooled patch ids and int32[T] tokens (read only, shared)."""
    grid, window = config.vision.grid, config.connector.image_window
    overview = pool(np.arange(grid ** 2).reshape(grid, grid), window)
    ids = tiled_ids(tiles, config, inputs) + grid ** 2
    rows, columns = (_tokens_across(size, q) for size, q in zip(ids.shape, window))
    patch, column = config.special_id("<im_patch>"), config.special_id("<im_col>")
    tokens = np.concatenate((
        [config.special_id("<low_res_im_start>")], np.full(len(overview), patch),
        [config.special_id("<im_end>"), config.special_id("<im_start>")],
        np.tile(np.append(np.full(columns, patch), column), rows), [config.special_id("<im_end>")]))
    return _frozen(np.concatenate((overview, pool(ids, window)))), _frozen(tokens.astype(np.int32))


@functools.lru_cache(maxsize=16)
def _frame_pooling(config) -> np.ndarray:
    grid = config.vision.grid
    return _frozen(pool(np.arange(grid ** 2).reshape(grid, grid), config.connector.video_window))


def _frozen(array):
    array.flags.writeable = False
    return array


# Crops


def crops_of_images(images: Sequence[np.ndarray], config: configs.Molmo2Config,
                    inputs: configs.InputConfig, tokenizer, *, high_res: float = 0.0,
                    rng: np.random.Generator | None = None) -> types.Crops:
    """Returns the crops and visual tokens of one or several images uint8[H, W, 3].

    Several images are each preceded by the text `Image 1`, `Image 2`, ...; overview and tiles of an image
    share one number in `image`.

    Args:
      high_res: probability that a single image takes `high_res_crops` tiles; 0 and 1 need no rng.

    Raises:
      ValueError: no image, more than `max_images` (the reference drops the rest while the text still
        names them), an image that is not uint8[H, W, 3], a draw without rng, or a tokenizer made for
        another model.
    """
    _check_ids(config, tokenizer)
    if not 1 <= len(images) <= inputs.max_images:
        raise ValueError(f"an example must have 1 .. {inputs.max_images} images; got {len(images)}")
    max_crops = inputs.max_crops
    if len(images) == 1 and _draw(high_res, rng):
        max_crops = inputs.high_res_crops
    patches, pooled, visual = [], [], _VisualTokens()
    count = 0
    for number, pixels in enumerate(images):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"an image must be uint8[H, W, 3]; got {pixels.dtype}{list(pixels.shape)}")
        tiles = tiling(pixels.shape[0], pixels.shape[1], max_crops, config, inputs)
        patches.append(_image_patches(pixels, tiles, config, inputs))
        ids, tokens = _image_layout(tiles, config, inputs)
        pooled.append(np.where(ids < 0, -1, ids + count * config.vision.num_patches).astype(np.int32))
        count += len(patches[-1])
        if len(images) > 1:
            visual.text(tokenizer.encode(f"Image {number + 1}"))
        visual.see(tokens, number)
    return types.Crops(np.concatenate(patches), np.concatenate(pooled), *visual.arrays())


def _draw(probability: float, rng) -> bool:
    if 0 < probability < 1 and rng is None:
        raise ValueError(f"high_res between 0 and 1 needs a random generator; got {probability} and None")
    return probability >= 1 or (probability > 0 and rng.random() < probability)


def crops_of_frames(frames: types.Frames, config: configs.Molmo2Config, inputs: configs.InputConfig,
                    tokenizer, subtitles: str | Sequence[tuple[float, float, str]] = ()) -> types.Crops:
    """Returns one crop per frame, and the visual tokens of the video, subtitles after the last frame.

    Frames not yet at the crop size are resized. `subtitles` are (start, end, text) in the time base of
    `frames.seconds`, kept where they come within a second of a frame, or one ready text.

    Raises:
      ValueError: no frame, a subtitle with markup of the model, or a tokenizer made for another model.
    """
    _check_ids(config, tokenizer)
    if not len(frames.seconds) or len(frames.seconds) != len(frames.pixels):
        raise ValueError(f"a video must have frames, each with its time; got {len(frames.pixels)} frames "
                         f"and {len(frames.seconds)} times")
    size = config.vision.image_size
    pixels = frames.pixels
    if pixels.shape[1:3] != (size, size):
        pixels = np.stack([resize(frame, size, size) for frame in pixels])
    count = len(pixels)
    ids = _frame_pooling(config)
    pooled = np.where(ids < 0, -1, ids + np.arange(count)[:, None, None] * config.vision.num_patches)
    tokens, image = _frame_tokens(frames.seconds, len(ids), config, inputs, tokenizer, subtitles)
    return types.Crops(patchify(pixels, config.vision.patch_size),
                       pooled.reshape(-1, ids.shape[1]).astype(np.int32), tokens, image)


def _frame_tokens(seconds, tokens_each, config, inputs, tokenizer, subtitles):
    """Returns int32[T] tokens and int32[T] frame numbers: time text, markers and patches of all frames."""
    start, end = ([config.special_id(token)] for token in prompt.frame_markers(inputs))
    patches = [config.special_id("<im_patch>")] * tokens_each
    visual = _VisualTokens()
    if not inputs.per_frame_special_tokens:
        visual.see(start, 0)
    for number, second in enumerate(seconds):
        if inputs.frame_time_text:
            visual.text(tokenizer.encode(prompt.frame_time_text(float(second), number == 0)))
        visual.see(start + patches + end if inputs.per_frame_special_tokens else patches, number)
    if not inputs.per_frame_special_tokens:
        visual.see(end, len(seconds) - 1)
    text = prompt.subtitle_text(subtitles, seconds)
    if text:
        prompt.refuse_reserved(text, tokenizer.reserved)
        visual.text(tokenizer.encode(text))
    return visual.arrays()


def _check_ids(config, tokenizer):
    ids = {text: config.special_id(text) for text in configs.SPECIAL_TOKENS}
    if tokenizer.special != ids:
        raise ValueError(f"the tokenizer's special tokens must follow the model's vocab_size of "
                         f"{config.text.vocab_size}; got {tokenizer.special}")


class _VisualTokens:
    """Collects token ids with the number of the image they show, -1 for text."""

    def __init__(self):
        self._tokens, self._image = [], []

    def text(self, ids):
        self._tokens.extend(ids)
        self._image.extend([-1] * len(ids))

    def see(self, ids, number):
        self._tokens.extend(ids)
        self._image.extend([number] * len(ids))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self._tokens, np.int32), np.array(self._image, np.int32)
