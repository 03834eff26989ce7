"""Masks of random packed rows: trees with videos, images or text, then padding; some rows are all padding."""

import numpy as np

from molmo2_jax.attention import tree_mask


def random_mask(seed: int, rows: int, length: int) -> tree_mask.TreeMask:
    """Returns numpy end and group [rows, length]; about every eighth row is all padding.

    A row has up to 8 examples, an example up to 12 branches of 1 token or more and up to 4 runs of visual
    tokens with a timestamp of 1 to 3 tokens before each.
    """
    rng = np.random.default_rng(seed)
    end = np.tile(np.arange(1, length + 1, dtype=np.int32), (rows, 1))
    group = np.full((rows, length), -1, np.int32)
    for row in range(rows):
        if rng.random() < 0.125:
            continue
        start = number = 0
        for _ in range(rng.integers(1, 9)):
            inside, branches = random_example(rng, length)
            stop = start + len(inside) + sum(branches)
            if stop > length:
                break
            first = start + len(inside)
            end[row, start:first] = stop
            if any(inside):
                group[row, start:first] = np.where(inside, number, -1)
                number += 1
            for branch in branches:
                end[row, first:first + branch] = first + branch
                first += branch
            start = stop
    return tree_mask.TreeMask(end, group)


def random_example(rng, length: int):
    """Returns (whether each token of the root is visual, lengths of the branches)."""
    inside = [False] * int(rng.integers(1, 4))
    for _ in range(rng.integers(0, 5)):
        inside += [False] * int(rng.integers(0, 4)) + [True] * int(rng.integers(1, max(2, length // 10)))
    return np.array(inside), rng.integers(1, max(2, length // 12), rng.integers(0, 13)).tolist()


def random_tensors(seed: int, rows: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int):
    """Returns float32 queries, keys, values, and an output gradient."""
    rng = np.random.default_rng((seed, 1))
    return tuple(rng.standard_normal((rows, length, heads, head_dim), np.float32)
                 for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads))
