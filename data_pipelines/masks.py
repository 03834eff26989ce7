"""Binary masks as run lengths: COCO's uncompressed form, so masks of common tools can be pasted in.

{"size": [height, width], "counts": [n0, n1, ...]}: the mask is read column by column; counts alternate
between pixels outside and pixels inside, starting with outside (n0 may be 0).
"""

from collections.abc import Mapping

import numpy as np


def encode(mask: np.ndarray) -> dict:
    """Returns {"size": [H, W], "counts": [...]} of bool[H, W]."""
    flat = np.asarray(mask, bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": list(mask.shape), "counts": counts}


def decode(rle: Mapping) -> np.ndarray:
    """Returns bool[H, W].

    Raises:
      ValueError: the counts do not add up to height x width.
    """
    height, width = rle["size"]
    counts = np.asarray(rle["counts"], np.int64)
    if counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"counts of a mask must be >= 0 and sum to height x width = {height * width}; "
                         f"got a sum of {counts.sum()}, smallest {counts.min(initial=0)}")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(height, width, order="F")
