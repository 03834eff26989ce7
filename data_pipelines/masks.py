"""Binary masks as run lengths in COCO's form, so that masks of common tools work unchanged.

{"size": [height, width], "counts": [n0, n1, ...]}: the mask is read column by column; counts alternate
between runs of pixels outside and inside the mask, starting with outside (n0 may be 0). Compressed, counts
are a text.

Source: pycocotools, common/maskApi.c, for compressed run lengths.
"""

from collections.abc import Mapping

import numpy as np


def encode(mask: np.ndarray) -> dict:
    """Returns {"size": [H, W], "counts": [...]} for a mask bool[H, W]."""
    flat = np.asarray(mask, bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": list(mask.shape), "counts": counts}


def decode(rle: Mapping) -> np.ndarray:
    """Returns bool[H, W].

    Raises:
      ValueError: a count is negative, the counts do not sum to height x width, or `uncompressed` refuses
        them.
    """
    height, width = rle["size"]
    written = rle["counts"].decode("ascii") if isinstance(rle["counts"], bytes) else rle["counts"]
    counts = np.asarray(uncompressed(written) if isinstance(written, str) else written, np.int64)
    if counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"counts of a mask must be >= 0 and sum to height x width = {height * width}; "
                         f"got a sum of {counts.sum()}, smallest {counts.min(initial=0)}")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(height, width, order="F")


def uncompressed(text: str) -> list[int]:
    """Returns the run lengths of COCO's compressed text.

    A number is written in groups of five bits, lowest first, as characters from "0"; 32 marks that a further
    group follows, 16 in the last group a negative number. From the third run on, a run is stored as its
    difference to the one two before.

    Raises:
      ValueError: the text ends within a number.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError(f"compressed run lengths must end with a number; got {text[-8:]!r}")
    return counts
