"""Online packing: chooses which sequences share a row, within a budget of tokens and one of crops.

Sequences wait in a small buffer. Once it is full, each new sequence triggers a rule that chooses a row from
those waiting. There are two rules: `OldestFirst`, the default, and `Knapsack`, the reference's
(olmo/data/dynamic_packer.py). Both count tokens in steps, rounded up.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from typing import Any

import numpy as np

from molmo2_jax import config
from molmo2_jax import types

_WIDENING = 1.5  # factor on the tolerances when no good row is found

Pack = list[tuple[types.Sequence, Any]]


def knapsack(tokens: Listing[int], crops: Listing[int], values: Listing[float], max_tokens: int,
             max_crops: int) -> list[int]:
    """Returns the item numbers, descending, with the largest total value within both capacities.

    Exact 0/1 dynamic programme in float32; ties are resolved in favour of earlier items.
    """
    best = np.zeros((max_tokens + 1, max_crops + 1), np.float32)
    is_taken = np.zeros((len(values), max_tokens + 1, max_crops + 1), bool)
    for item, (t, c, value) in enumerate(zip(tokens, crops, values, strict=True)):
        if t > max_tokens or c > max_crops:
            continue
        with_item = best[:max_tokens + 1 - t, :max_crops + 1 - c] + np.float32(value)
        without = best[t:, c:]
        np.greater(with_item, without, out=is_taken[item, t:, c:])
        np.maximum(with_item, without, out=without)
    chosen, t, c = [], max_tokens, max_crops
    for item in range(len(values) - 1, -1, -1):
        if is_taken[item, t, c]:
            chosen.append(item)
            t, c = t - tokens[item], c - crops[item]
    return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knapsack:
    """The reference's rule: exactly the row of greatest value. Some sequences may wait forever.

    buffer: sequences that wait before the first row is chosen.
    text_weight, image_weight: values of a token and of a crop. They help 128-frame videos find partners.
    emit_full_crops_alone: a sequence that fills the crop budget is emitted at once (off in all recipes).
    """
    buffer: int = 48
    text_weight: float = 1.0
    image_weight: float = 30.0
    emit_full_crops_alone: bool = False

    def __post_init__(self):
        config.require(self.buffer >= 1, "buffer must be >= 1 sequence", self.buffer)

    def stands_alone(self, tokens: int, crops: int, max_tokens: int, max_crops: int) -> bool:
        """Returns whether a sequence is a row of its own and need not wait."""
        return (_fills(tokens, max_tokens, self._step(max_tokens))
                or self.emit_full_crops_alone and crops >= max_crops)

    def is_ready(self, num_waiting: int, fit_one_row: bool) -> bool:
        """Returns whether a row is to be chosen of those waiting."""
        return num_waiting >= self.buffer

    def _step(self, max_tokens: int) -> int:
        return max(1, max_tokens // 512)

    def choose(self, tokens: Listing[int], crops: Listing[int], waits: Listing[int], max_tokens: int,
               max_crops: int) -> list[int]:
        """Returns the places in the buffer of a row, in the order in which they are joined."""
        step = self._step(max_tokens)
        values = [t * self.text_weight + c * self.image_weight for t, c in zip(tokens, crops, strict=True)]
        return knapsack([math.ceil(t / step) for t in tokens], crops, values, math.ceil(max_tokens / step),
                        max_crops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OldestFirst:
    """Fills a row almost completely with the sequences that have waited longest.

    The set of reachable (tokens, crops) totals grows by one sequence at a time, oldest first, until it
    contains a good row. A good row leaves at most `waste` of the budget that is scarcer among the waiting
    sequences, and uses about as much of the other budget as they need on average, so that the sequences left
    can fill further rows. Both tolerances widen after every eight sequences examined. A sequence that has
    waited `max_wait` rows is in the next row, so none waits longer than max_wait + buffer rows.

    For speed, the set is one Python integer with one bit per pair of remaining budgets.

    buffer: sequences that wait before the first row is chosen; more while all of them fit one row, so that
      short texts fill rows too.
    waste, slack: shares of a budget.
    steps: resolution of the token budget.
    """
    buffer: int = 80
    max_wait: int = 96
    waste: float = 0.01
    slack: float = 0.1
    steps: int = 512

    def __post_init__(self):
        config.require(self.buffer >= 1, "buffer must be >= 1 sequence", self.buffer)
        config.require(self.max_wait >= 0, "max_wait must be >= 0 rows", self.max_wait)
        config.require(0 < self.waste <= 1 and 0 <= self.slack <= 1,
                       "waste must be in (0, 1] and slack in [0, 1]", (self.waste, self.slack))
        config.require(self.steps >= 1, "steps must be >= 1", self.steps)

    def stands_alone(self, tokens: int, crops: int, max_tokens: int, max_crops: int) -> bool:
        """Returns whether a sequence is a row of its own and need not wait."""
        return _fills(tokens, max_tokens, self._step(max_tokens))

    def is_ready(self, num_waiting: int, fit_one_row: bool) -> bool:
        """Returns whether a row is to be chosen of those waiting."""
        return num_waiting >= self.buffer and not fit_one_row

    def _step(self, max_tokens: int) -> int:
        return max(1, max_tokens // self.steps)

    def choose(self, tokens: Listing[int], crops: Listing[int], waits: Listing[int], max_tokens: int,
               max_crops: int) -> list[int]:
        """Returns the places in the buffer of a row, in the order in which they are joined."""
        step, width = self._step(max_tokens), max_crops + 1
        size = max_tokens // step
        costs = [-(-t // step) * width + c for t, c in zip(tokens, crops, strict=True)]
        all_crops = sum(crops)
        needs = _needs((sum(costs) - all_crops) / width / size, all_crops / max(max_crops, 1))
        at_least, at_most = _masks(size, max_crops)
        spare = [self.waste + (self.slack if need < 1 else 0.0) for need in needs]

        def good(widening: float) -> int:
            """Returns the bits of the remaining budgets that a good row may leave."""
            left_tokens = min(1.0, widening * spare[0] + 1 - needs[0])
            left_crops = min(1.0, widening * spare[1] + 1 - needs[1])
            return ((1 << (int(left_tokens * size) + 1) * width) - 1) & at_most[int(left_crops * max_crops)]

        first = int(waits[0] >= self.max_wait)
        full = size * width + max_crops - (costs[0] if first else 0)
        goal, widening, reached, before = good(1.0), 1.0, 1 << full, []
        for start in range(0, len(costs), 8):
            looked = slice(start or first, start + 8)
            for cost, c in zip(costs[looked], crops[looked]):
                before.append(reached)  # the shift below drops totals that exceed the tokens
                reached |= (reached & at_least[c] if c else reached) >> cost
            if reached & goal:
                break
            if start + 8 <= len(costs):
                widening *= _WIDENING
                goal = good(widening)
        while not reached & goal:
            widening *= _WIDENING
            goal = good(widening)
        hits = reached & goal
        left = (hits & -hits).bit_length() - 1  # fewest tokens, then fewest crops
        return list(range(first)) + _trace(left, full, before, costs, first)


def _fills(tokens: int, max_tokens: int, step: int) -> bool:
    return math.ceil(tokens / step) >= math.ceil(max_tokens / step)


def _needs(tokens: float, crops: float) -> tuple[float, float]:
    """Returns the share of each budget that a row should fill, from what the waiting sequences need.

    It is 1 for the scarcer budget.
    """
    larger = max(tokens, crops)
    return tokens / larger, crops / larger


@functools.lru_cache(maxsize=8)
def _masks(size: int, max_crops: int) -> tuple[list[int], list[int]]:
    """Returns, for c = 0 ... max_crops, the bits with at least and those with at most c crops remaining.

    Bit t * (max_crops + 1) + c represents t steps and c crops remaining, t <= size.
    """
    width = max_crops + 1
    every = sum(1 << row * width for row in range(size + 1))  # bit c = 0 of each t
    at_least = [((1 << width) - (1 << c)) * every for c in range(width)]
    at_most = [((1 << c + 1) - 1) * every for c in range(width)]
    return at_least, at_most


def _trace(left: int, full: int, before: Listing[int], costs: Listing[int], first: int) -> list[int]:
    """Returns the buffer indices, oldest first, of sequences that leave `left`; prefers older sequences.

    costs: of all waiting sequences; the first may already be in the row.
    before[i]: what could remain using only sequences older than the i-th of the others; these sets only grow.
    """
    chosen, place = [], len(before)
    while left != full:
        bit = 1 << left
        place = bisect.bisect_left(before, True, hi=place, key=lambda left_before: left_before & bit != 0) - 1
        chosen.append(place + first)
        left += costs[place + first]
    return chosen[::-1]


Rule = Knapsack | OldestFirst


def _size(sequence: types.Sequence) -> tuple[int, int, int]:
    """Returns (tokens, crops, pooled rows)."""
    return len(sequence.tokens), len(sequence.patches), len(sequence.pooled)


class Packer:
    """Collects sequences and emits packs chosen by its rule.

    A pack is a list of (sequence, tag) in the order in which rows.join concatenates them. Tags belong to the
    caller and are returned unchanged. `pending` and `state()` are the whole state: a new Packer that
    `resume`s from them continues exactly where this one stopped.

    max_tokens, max_crops, max_pooled: budgets of a row; max_pooled defaults to max_tokens.

    Raises:
      ValueError: max_tokens < 1 or max_crops < 0.
    """

    def __init__(self, rule: Rule, max_tokens: int, max_crops: int,
                 max_pooled: int | None = None):
        config.require(max_tokens >= 1 and max_crops >= 0, "max_tokens must be >= 1 and max_crops >= 0",
                       (max_tokens, max_crops))
        self._rule, self._max_tokens, self._max_crops = rule, max_tokens, max_crops
        self._max_pooled = max_tokens if max_pooled is None else max_pooled
        self._waiting: Pack = []
        self._sizes: list[tuple[int, int, int]] = []  # tokens, crops, pooled rows
        self._waits: list[int] = []  # rows emitted while it waited
        self._totals: tuple[int, ...] = (0, 0, 0)     # of sizes
        self._longest_wait = 0

    @property
    def pending(self) -> list[Any]:
        """Tags of the sequences in the buffer, oldest first."""
        return [tag for _, tag in self._waiting]

    def state(self) -> dict[str, Any]:
        """Returns `waits` of the pending sequences and the `longest_wait` of any emitted one, in rows."""
        return {"waits": list(self._waits), "longest_wait": self._longest_wait}

    def resume(self, pending: Pack, state: Mapping[str, Any]) -> None:
        """Restores the sequences that were `pending` when `state` was taken."""
        self._waiting, self._waits = list(pending), list(state["waits"])
        self._sizes = [_size(sequence) for sequence, _ in pending]
        self._totals = tuple(map(sum, zip((0, 0, 0), *self._sizes, strict=True)))
        self._longest_wait = state["longest_wait"]

    def push(self, sequence: types.Sequence, tag: Any = None) -> Pack | None:
        """Returns a pack, or None while the buffer fills.

        A sequence that fills the token budget alone is returned at once, and so is one that exceeds it: cut
        sequences first (sequence.truncate).

        Raises:
          ValueError: the sequence has more crops or pooled rows than any row may have.
        """
        tokens, crops, pooled = size = _size(sequence)
        if crops > self._max_crops or pooled > self._max_pooled:
            raise ValueError(f"a sequence must fit a row of {self._max_crops} crops and {self._max_pooled} "
                             f"pooled rows; got {crops} and {pooled} ({tag!r})")
        if self._rule.stands_alone(tokens, crops, self._max_tokens, self._max_crops):
            return [(sequence, tag)]
        pack = self._take() if self._rule.is_ready(len(self._waiting), self._fit_one_row()) else None
        self._waiting.append((sequence, tag))
        self._sizes.append(size)
        self._waits.append(0)
        self._totals = (self._totals[0] + tokens, self._totals[1] + crops, self._totals[2] + pooled)
        return pack

    def _fit_one_row(self) -> bool:
        """Returns whether all waiting sequences fit one row."""
        tokens, crops, pooled = self._totals
        return tokens <= self._max_tokens and crops <= self._max_crops and pooled <= self._max_pooled

    def flush(self) -> list[Pack]:
        """Returns all waiting sequences as packs and empties the buffer."""
        packs = []
        while self._waiting:
            packs.append(self._take())
        return packs

    def _take(self) -> Pack:
        """Removes the next pack from the buffer and returns it."""
        tokens, crops, _ = zip(*self._sizes, strict=True)
        chosen = self._rule.choose(tokens, crops, self._waits, self._max_tokens, self._max_crops)
        pack, kept, total, pooled = [], [], 0, 0
        for item in chosen:  # items beyond the third budget, or the first by rounding, keep waiting
            total_with, pooled_with = total + tokens[item], pooled + self._sizes[item][2]
            if total_with <= self._max_tokens and pooled_with <= self._max_pooled:
                pack.append(self._waiting[item])
                kept.append(item)
                total, pooled = total_with, pooled_with
        self._longest_wait = max(self._longest_wait, max(self._waits[item] for item in kept))
        self._totals = (self._totals[0] - total, self._totals[1] - sum(crops[item] for item in kept),
                        self._totals[2] - pooled)
        for item in sorted(kept, reverse=True):
            del self._waiting[item], self._sizes[item], self._waits[item]
        self._waits = [waited + 1 for waited in self._waits]
        return pack
