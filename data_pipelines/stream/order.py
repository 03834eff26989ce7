"""The order of examples in the training stream: a pure function of (seed, number).

Every host and every worker computes the same order and reads its share of the numbers. Which example a number
denotes depends neither on the process that reads it nor on what was read before.

D data sets. Source: reference: olmo/data/iterable_dataset_mixture.py.
"""

from collections.abc import Sequence

import numpy as np

_BLOCK = 4096  # numbers drawn at a time


class Order:
    """Maps a number to (data set, index in it, epoch of it).

    Each number draws a data set independently, by rate; a data set permutes its examples anew every epoch.
    Numbers may be requested in any order; jumping ahead costs about 20 nanoseconds per number passed. Uses
    only generators whose streams numpy guarantees not to change.

    sizes: number of examples of each data set.
    lessons: (first number, rate of each data set, in any unit) of each part of the stream; the first starts
      at 0. One lesson is a plain mixture; several make a curriculum.

    Raises:
      ValueError: there is no data set, one is empty, a rate is negative, all rates of a lesson are 0, lessons
        are out of order, or the seed is not in [0, 2^32).
    """

    def __init__(self, sizes: Sequence[int], lessons: Sequence[tuple[int, Sequence[float]]], seed: int):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every data set must have at least one example; got sizes {list(sizes)}")
        for _, rates in lessons:
            if (len(rates) != len(sizes) or not all(np.isfinite(rate) and rate >= 0 for rate in rates)
                    or not sum(rates) > 0):
                raise ValueError(f"rates must be one number >= 0 per data set, not all of them 0; got "
                                 f"{list(rates)} for {len(sizes)} data sets")
        starts = [start for start, _ in lessons]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(f"lessons must begin at increasing numbers, the first at 0; got {starts}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32); got {seed}")
        self._arguments = (tuple(sizes), tuple((start, tuple(rates)) for start, rates in lessons), seed)
        self._starts = np.asarray(starts)
        shares = np.cumsum(np.asarray([rates for _, rates in lessons], np.float64), axis=1)
        self._shares = shares / shares[:, -1:]   # [lessons, D]
        self._random = np.random.RandomState(seed)
        self._drawn: list[np.ndarray] = []                      # data sets, uint16[_BLOCK] each
        self._used = [np.zeros(len(sizes), np.int64)]           # uses before each block, int64[D]
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def __reduce__(self):
        return Order, self._arguments

    def __call__(self, number: int) -> tuple[int, int, int]:
        """Returns (data set, index, epoch) of a number >= 0."""
        block, place = divmod(number, _BLOCK)
        while len(self._drawn) <= block:
            self._draw_block()
        drawn = self._drawn[block]
        dataset = int(drawn[place])
        use = int(self._used[block][dataset]) + int(np.count_nonzero(drawn[:place] == dataset))
        epoch, place = divmod(use, self._arguments[0][dataset])
        return dataset, int(self._permutation(dataset, epoch)[place]), epoch

    def _draw_block(self) -> None:
        draws = self._random.random_sample(_BLOCK)
        numbers = len(self._drawn) * _BLOCK + np.arange(_BLOCK)
        lesson = np.searchsorted(self._starts, numbers, side="right") - 1
        drawn = (draws[:, None] >= self._shares[lesson]).sum(axis=1)
        self._drawn.append(drawn.astype(np.uint16))
        self._used.append(self._used[-1] + np.bincount(drawn, minlength=self._shares.shape[1]))

    def _permutation(self, dataset: int, epoch: int) -> np.ndarray:
        """Returns the permutation of a data set in an epoch; the last two epochs are cached."""
        if (dataset, epoch) not in self._permutations:
            self._permutations.pop((dataset, epoch - 2), None)
            sizes, _, seed = self._arguments
            self._permutations[dataset, epoch] = random_state(seed, epoch, 1).permutation(
                sizes[dataset]).astype(np.uint32)
        return self._permutations[dataset, epoch]


def random_state(entropy: int, *spawn_key: int) -> np.random.RandomState:
    """Returns a generator whose stream is the same in all numpy versions (legacy MT19937)."""
    return np.random.RandomState(
        np.random.MT19937(np.random.SeedSequence(entropy, spawn_key=spawn_key)))
