"""The few shapes of roots that are compiled: whatever media a server accepts, one of them is large enough.

T tokens, M crops, R visual tokens, W patches per visual token.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from molmo2_jax import config as configs
from molmo2_jax import types
from molmo2_jax.inputs import crops as crops_lib

_LONGEST = 9999.5     # seconds of a frame; one more digit makes a time one token longer


class TooLarge(ValueError):
    """Media need more crops or tokens than any bucket has."""


def of_model(config: configs.Molmo2Config, inputs: configs.InputConfig, tokenizer, *, most_tokens: int,
             counts: Sequence[int] = (), parts: int = 1, step: int = 2) -> list[types.RowShape]:
    """Returns the shapes of roots, of images and of videos, ascending by crops.

    Args:
      most_tokens: of a root; larger ones are refused before they are computed.
      counts: crops of each shape; the most that media may have is always one. (): powers of `step`.
      parts: devices that share the crops and tokens of a row; M and T are multiples of it.
    """
    found = []
    for most, tokens_of, window in (_images(config, inputs, tokenizer), _frames(config, inputs, tokenizer)):
        for crops in _counts(counts, most, step):
            tokens, visual = tokens_of(crops)
            if not visual:
                continue
            shape = types.RowShape(T=min(_up(tokens, 128, parts), _up(most_tokens, 128, parts)),
                                   M=_up(crops, 1, parts), R=_up(visual, 16, 1), W=math.prod(window))
            if not any(_covers(one, shape) and one.M <= shape.M for one in found):
                found.append(shape)
    return found


def _up(size: int, step: int, parts: int) -> int:
    step = math.lcm(step, parts)
    return -(-size // step) * step


def _counts(counts: Sequence[int], most: int, step: int) -> list[int]:
    wanted = counts or [step ** power for power in range(most.bit_length())]
    return [*sorted({count for count in wanted if count < most}), most]


def _frames(config, inputs, tokenizer):
    """Returns (most frames, function from frames to most (tokens, visual tokens), window)."""
    side = config.vision.image_size

    def root(count):
        frames = types.Frames(np.zeros((count, side, side, 3), np.uint8), np.full(count, _LONGEST), side,
                              side, _LONGEST, 1.0)
        crops = crops_lib.crops_of_frames(frames, config, inputs, tokenizer)
        return 1 + len(crops.tokens), len(crops.pooled)

    (first, visual), (second, _) = root(1), root(2)
    return inputs.max_frames, lambda count: (first + (count - 1) * (second - first), count * visual), (
        config.connector.video_window)


def _images(config, inputs, tokenizer):
    """Returns (most crops, function from crops to most (tokens, visual tokens), window), of images."""
    of_one: dict[int, tuple[int, int]] = {}     # crops of an image -> most tokens, visual tokens
    most = inputs.max_crops
    for i, j in itertools.product(range(1, most + 1), repeat=2):
        if i * j <= most:
            pooled, tokens = crops_lib.image_layout((i, j), config, inputs)
            before = of_one.get(1 + i * j, (0, 0))
            of_one[1 + i * j] = max(before[0], len(tokens)), max(before[1], len(pooled))
    label = max(len(tokenizer.encode(f"Image {number}")) for number in range(1, inputs.max_images + 1))
    best: list[dict[int, tuple[int, int]]] = [of_one]    # by number of images, then by crops
    for _ in range(1, inputs.max_images):
        longer: dict[int, tuple[int, int]] = {}
        for (crops, (tokens, visual)), (more, (t, v)) in itertools.product(best[-1].items(), of_one.items()):
            before = longer.get(crops + more, (0, 0))
            longer[crops + more] = max(before[0], tokens + t), max(before[1], visual + v)
        best.append(longer)

    def most_of(count):
        fitting = [(tokens + (number and (number + 1) * label), visual)
                   for number, of in enumerate(best) for crops, (tokens, visual) in of.items()
                   if crops <= count]
        return 1 + max((t for t, _ in fitting), default=0), max((v for _, v in fitting), default=0)

    return inputs.max_images * (1 + most), most_of, config.connector.image_window


def _covers(shape: types.RowShape, needed: types.RowShape) -> bool:
    return all(have >= need for have, need in zip(shape, needed))


def choose(buckets: Sequence[types.RowShape], root: types.Sequence) -> types.RowShape:
    """Returns the smallest bucket that holds a root.

    Raises:
      TooLarge: none does.
    """
    needed = types.RowShape(len(root.tokens), len(root.patches), *root.pooled.shape)
    fitting = [shape for shape in buckets if _covers(shape, needed)]
    if not fitting:
        raise TooLarge(f"media must fit {max(shape.M for shape in buckets)} crops and "
                       f"{max(shape.T for shape in buckets)} tokens; got {needed.M} and {needed.T}")
    return min(fitting, key=lambda shape: (shape.M, shape.T))
