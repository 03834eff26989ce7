"""Pixels to crops, and crops to visual tokens, for both still images and video frames.

An image becomes one overview crop and a tiling of overlapping crops; a frame becomes one crop. Crops are
cut into patches; each visual token pools a window of patches, named by `crop * P + patch`.

H x W source pixels; M crops of P patches of C values; R visual tokens pooling up to W patches; T tokens.

Source: paper, section 3.1; reference: olmo/preprocessing/multicrop_preprocessor.py,
olmo/preprocessing/image_preprocessor.py, olmo/preprocessing/video_preprocessor.py.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from molmo2_jax import config as configs
from molmo2_jax import types
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import prompt

# Crops and patches


def tiling(height: int, width: int, max_crops: int, config: configs.Molmo2Config,
           inputs: configs.InputConfig) -> tuple[int, int]:
    """Returns (rows, columns) of crops: the tiling that enlarges least, or shrinks least if all must shrink.

    Raises:
      ValueError: overlap_margins leave nothing of a crop.
    """
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
    """Returns, in patches per side, what each crop adds to the tiling, and the sum of both margins."""
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


def unpatchify(patches: np.ndarray, patch: int) -> np.ndarray:
    """Returns the square crops uint8[M, S, S, 3] of `patchify`'s result."""
    crops, side = patches.shape[0], math.isqrt(patches.shape[1])
    pixels = patches.reshape(crops, side, side, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(crops, side * patch, side * patch, 3)


def _image_patches(pixels, tiles, config, inputs) -> np.ndarray:
    """Returns uint8[1 + i * j, P, C]: the overview, then the crops of an i x j tiling, row-major."""
    window, margin = _window(config, inputs)
    size, patch = config.vision.image_size, config.vision.patch_size
    step = window * patch
    stitched = pixels_lib.resize(pixels, *(n * step + margin * patch for n in tiles))
    crops = [stitched[a * step:a * step + size, b * step:b * step + size]
             for a in range(tiles[0]) for b in range(tiles[1])]
    return patchify(np.stack([pixels_lib.resize(pixels, size, size), *crops]), patch)


# Pooling


def pool(ids: np.ndarray, window: tuple[int, int]) -> np.ndarray:
    """Returns int32[tokens, W]: the patch ids in each pooling window, row-major; -1 outside the grid.

    The grid is padded to whole windows; odd padding puts the extra row or column at the bottom or right.
    """
    pads = [((-size % q) // 2, -(-(-size % q) // 2)) for size, q in zip(ids.shape, window)]
    ids = np.pad(ids, pads, constant_values=-1)
    rows, columns = ids.shape[0] // window[0], ids.shape[1] // window[1]
    ids = ids.reshape(rows, window[0], columns, window[1]).transpose(0, 2, 1, 3)
    return ids.reshape(rows * columns, window[0] * window[1]).astype(np.int32)


@functools.lru_cache(maxsize=256)
def tiled_ids(tiles: tuple[int, int], config: configs.Molmo2Config,
              inputs: configs.InputConfig) -> np.ndarray:
    """Returns int64[rows, columns]: for each patch of the stitched image, the crop patch that shows it.

    Where two crops overlap, each drops its margin towards the other. Ids count from the first tile. Cached,
    read-only.
    """
    window, margin = _window(config, inputs)
    grid = config.vision.grid
    crop, local = [], []
    for count in tiles:
        place = np.arange(count * window + margin)
        owner = np.clip((place - inputs.overlap_margins[0]) // window, 0, count - 1)
        crop.append(owner)
        local.append(place - owner * window)
    return _frozen((crop[0][:, None] * tiles[1] + crop[1]) * grid ** 2 + local[0][:, None] * grid + local[1])


def _tokens_across(size: int, window: int) -> int:
    return math.ceil(size / window)


@functools.lru_cache(maxsize=256)
def image_layout(tiles, config, inputs) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32[R, W] pooled patch ids and int32[T] tokens of one image (cached, read-only)."""
    grid, window = config.vision.grid, config.connector.image_window
    overview = pool(np.arange(grid ** 2).reshape(grid, grid), window)
    ids = tiled_ids(tiles, config, inputs) + grid ** 2
    rows, columns = (_tokens_across(size, q) for size, q in zip(ids.shape, window))
    patch, column = config.special_id("<im_patch>"), config.special_id("<im_col>")
    low = config.special_id(config.overview_token)
    tokens = np.concatenate((
        [config.special_id("<low_res_im_start>")], np.full(len(overview), low),
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

    With several images, each is preceded by the text `Image 1`, `Image 2`, ...; the overview and the tiles of
    an image share one number in `image`.

    Args:
      high_res: probability that a single image may use up to `high_res_crops` tiles; 0 and 1 need no rng.

    Raises:
      ValueError: there is no image, there are more than `max_images` (the reference drops the rest although
        the text still mentions them), an image is not uint8[H, W, 3], a draw has no rng, or the tokenizer
        belongs to another model.
    """
    _check_ids(config, tokenizer)
    if not 1 <= len(images) <= inputs.max_images:
        raise ValueError(f"an example must have 1 .. {inputs.max_images} images; got {len(images)}")
    max_crops = inputs.max_crops
    if len(images) == 1 and _draw(high_res, rng):
        max_crops = inputs.high_res_crops
    patches, pooled, grids, visual = [], [], [], _VisualTokens()
    count = 0
    for number, pixels in enumerate(images):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"an image must be uint8[H, W, 3]; got {pixels.dtype}{list(pixels.shape)}")
        tiles = tiling(pixels.shape[0], pixels.shape[1], max_crops, config, inputs)
        patches.append(_image_patches(pixels, tiles, config, inputs))
        ids, tokens = image_layout(tiles, config, inputs)
        pooled.append(np.where(ids < 0, -1, ids + count * config.vision.num_patches).astype(np.int32))
        grids.append(tiled_ids(tiles, config, inputs) + (count + 1) * config.vision.num_patches)
        count += len(patches[-1])
        if len(images) > 1:
            visual.text(tokenizer.encode(f"Image {number + 1}"))
        visual.see(tokens, number)
    return types.Crops(np.concatenate(patches), np.concatenate(pooled), *visual.arrays(), tuple(grids))


def _draw(probability: float, rng) -> bool:
    if 0 < probability < 1 and rng is None:
        raise ValueError(f"high_res between 0 and 1 needs a random generator; got {probability} and None")
    return probability >= 1 or (probability > 0 and rng.random() < probability)


def crops_of_frames(frames: types.Frames, config: configs.Molmo2Config, inputs: configs.InputConfig,
                    tokenizer, subtitles: str | Sequence[tuple[float, float, str]] = ()) -> types.Crops:
    """Returns one crop per frame and the visual tokens of the video, with subtitles after the last frame.

    Frames of another size are resized to the crop size. `subtitles` are (start, end, text) in the time base
    of `frames.seconds`, of which those within a second of a frame are kept, or one text to use as it is.

    Raises:
      ValueError: there is no frame, frames and times differ in number, a subtitle contains special tokens, or
        the tokenizer belongs to another model.
    """
    _check_ids(config, tokenizer)
    if not len(frames.seconds) or len(frames.seconds) != len(frames.pixels):
        raise ValueError(f"a video must have frames, each with its time; got {len(frames.pixels)} frames "
                         f"and {len(frames.seconds)} times")
    size = config.vision.image_size
    pixels = frames.pixels
    if pixels.shape[1:3] != (size, size):
        pixels = np.stack([pixels_lib.resize(frame, size, size) for frame in pixels])
    count = len(pixels)
    ids = _frame_pooling(config)
    pooled = np.where(ids < 0, -1, ids + np.arange(count)[:, None, None] * config.vision.num_patches)
    tokens, image = _frame_tokens(frames.seconds, len(ids), config, inputs, tokenizer, subtitles)
    side = config.vision.grid
    return types.Crops(patchify(pixels, config.vision.patch_size),
                       pooled.reshape(-1, ids.shape[1]).astype(np.int32), tokens, image,
                       tuple(np.arange(count * side * side).reshape(count, side, side)))


def _frame_tokens(seconds, tokens_each, config, inputs, tokenizer, subtitles):
    """Returns int32[T] tokens and int32[T] frame numbers of all frames: time text, markers and patches."""
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
