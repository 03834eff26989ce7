"""Packed rows like those of training, for benchmarks of attention: seeded, the same for all contenders."""

import dataclasses

import numpy as np

from molmo2_jax.attention import tree_mask

FRAME, TIMESTAMP = 83, 6  # visual tokens of a frame and text tokens before it


@dataclasses.dataclass(frozen=True)
class Pack:
    """What an example of a row is drawn from; every range is inclusive."""
    visual: tuple[int, int]            # visual tokens
    branches: tuple[int, int]          # how many
    branch_tokens: tuple[int, int]
    in_frames: bool = True             # with timestamps between; else one run


PACKS = {
    "video-4": Pack((3000, 4000), (5, 10), (20, 120)),
    "caption-video": Pack((3000, 4000), (1, 2), (300, 900)),
    "long-video": Pack((12_500, 13_500), (3, 8), (20, 120)),
    "image-pack": Pack((1000, 1600), (1, 20), (20, 80), in_frames=False),
    "short-mix": Pack((200, 900), (1, 6), (20, 120)),
    "causal": None,
}


def example(pack: Pack, rng: np.random.Generator):
    """Returns (which tokens of the root are visual, lengths of the branches)."""
    visual = int(rng.integers(*pack.visual, endpoint=True))
    lead = [False] * int(rng.integers(5, 20))
    frames = max(1, round(visual / FRAME)) if pack.in_frames else 1
    one = [False] * TIMESTAMP + [True] * FRAME if pack.in_frames else [True] * visual
    count = int(rng.integers(*pack.branches, endpoint=True))
    return np.array(lead + one * frames), rng.integers(*pack.branch_tokens, count, endpoint=True).tolist()


def row(pack: Pack | None, length: int, seed: int) -> tree_mask.TreeMask:
    """Returns numpy end and group [1, length]: examples one behind the other, the last ones made to fit.

    Without a pack it is one example without visual tokens.
    """
    end, group = np.arange(1, length + 1, dtype=np.int32), np.full(length, -1, np.int32)
    if pack is None:
        return tree_mask.TreeMask(np.full((1, length), length, np.int32), group[None])
    rng = np.random.default_rng(seed)
    start = number = 0
    while length - start >= 256:
        inside, branches = example(pack, rng)
        if start + len(inside) + sum(branches) > length:  # fill the row, as a packer does
            left = length - start
            pack = dataclasses.replace(pack, visual=(int(0.5 * left), int(0.6 * left)), branches=(1, 2),
                                       branch_tokens=(20, 60))
            inside, branches = example(pack, rng)
        first = start + len(inside)
        stop = first + sum(branches)
        end[start:first] = stop
        group[start:first] = np.where(inside, number, -1)
        for branch in branches:
            end[first:first + branch] = first + branch
            first += branch
        start, number = stop, number + 1
    return tree_mask.TreeMask(end[None], group[None])


def visible_pairs(mask: tree_mask.TreeMask) -> int:
    """Returns how many (query, key) pairs the mask allows."""
    causal = int((mask.end - np.arange(mask.end.shape[1])).sum(dtype=np.int64))
    members = np.unique(mask.group[mask.group >= 0], return_counts=True)[1].astype(np.int64)
    return causal + int((members * (members - 1) // 2).sum())  # the later half of a group is causal too
