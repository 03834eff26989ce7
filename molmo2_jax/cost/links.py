"""How much of a collective each link of a torus carries.

A chip has one link in each direction of each dimension of its slice. A ring of chips is used both ways; a
line is not a ring: its last chip receives everything over one link. Chips of a group that are not neighbours
share the links between them with other groups. Sizes in bytes.

Source: "How to Scale Your Model" (jax-ml.github.io/scaling-book), "How to Think About TPUs" and "Sharded
Matrices": rings of v4, v5p and TPU7x need whole cubes of 4x4x4, those of v5e and v6e 16 chips.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from molmo2_jax.cost import chips
from molmo2_jax.cost import hlo

SUMS = ("all-reduce", "reduce-scatter", "collective-permute")


class Traffic(NamedTuple):
    """Collectives of one kind in a step: bytes that a device sends, and those that the busiest link of each
    dimension carries upwards and downwards, [dimensions][2]. `width`: bytes of a value."""
    network: str
    kind: str
    width: int
    sent: float
    loads: tuple[tuple[float, float], ...]


def is_ring(slice_: chips.Slice, dimension: int) -> bool:
    """Returns whether the last chip along a dimension is linked with the first."""
    if slice_.chip.dimensions == 2:
        return slice_.sides[dimension] == 16
    return all(side % 4 == 0 for side in slice_.sides)


def loads(one: hlo.Collective, places: np.ndarray, slice_: chips.Slice) -> tuple[tuple[float, float], ...]:
    """Returns the bytes that a collective moves over the busiest link of each dimension, each way.

    Args:
      places: int[devices, dimensions], coordinates of the devices in the order of the program.
    """
    if one.kind == "collective-permute":
        crossings = _crossings(one.pairs, places, slice_)
        return tuple((one.size * one.times * up, one.size * one.times * down) for up, down in crossings)
    members = places[list(one.members)]
    # If a group has one device of each chip, the groups of the other devices use the same links.
    sharing = slice_.chip.devices_per_chip * len(np.unique(members, axis=0)) / len(members)
    spread = [_spread(members[:, dimension]) for dimension in range(len(slice_.sides))]
    rings = [is_ring(slice_, dimension) and number * gap == side
             for dimension, ((number, gap), side) in enumerate(zip(spread, slice_.sides))]
    if one.kind == "all-to-all":  # the middle of a line is crossed by half of what each half sends
        crossing = [gap * (number // 2) * -(-number // 2) / number / (1 + ring)
                    for (number, gap), ring in zip(spread, rings)]
        return tuple((sharing * one.times * one.size * share,) * 2 for share in crossing)
    links = [(1 + ring) / gap if number > 1 else 0.0 for (number, gap), ring in zip(spread, rings)]
    return tuple((sharing * one.traffic / sum(links) if used else 0.0,) * 2 for used in links)


def _spread(positions: np.ndarray) -> tuple[int, int]:
    """Returns how many positions along a dimension a group has, and the distance between two of them."""
    found = np.unique(positions)
    return len(found), int(np.diff(found).min()) if len(found) > 1 else 1


def _crossings(pairs: Sequence[tuple[int, int]], places: np.ndarray, slice_: chips.Slice):
    """Returns for each dimension how many messages cross its busiest link, upwards and downwards.

    A message goes along the dimensions in turn, the shorter way round a ring.
    """
    counts = [np.zeros((2, *slice_.sides), int) for _ in slice_.sides]
    for source, target in pairs:
        at = list(places[source])
        for dimension, side in enumerate(slice_.sides):
            way = int(places[target][dimension]) - at[dimension]
            if is_ring(slice_, dimension) and abs(way) > side / 2:
                way -= int(math.copysign(side, way))
            for _ in range(abs(way)):
                counts[dimension][(int(way < 0), *at)] += 1
                at[dimension] = (at[dimension] + (1 if way > 0 else -1)) % side
    return [(int(up.max()), int(down.max())) for up, down in counts]


def traffic(found: Sequence[hlo.Collective], places: np.ndarray, slice_: chips.Slice) -> tuple[Traffic, ...]:
    """Returns the traffic of a program's collectives, those of one network, kind and width added up."""
    totals: dict[tuple[str, str, int], tuple[float, np.ndarray]] = {}
    for one in found:
        key = ("dcn" if one.spans_slices else "ici", one.kind, one.width)
        load = np.zeros((len(slice_.sides), 2)) if one.spans_slices else np.array(loads(one, places, slice_))
        sent, before = totals.get(key, (0.0, 0.0))
        totals[key] = (sent + one.traffic, before + load)
    return tuple(Traffic(*key, sent, tuple(map(tuple, load.tolist())))
                 for key, (sent, load) in totals.items())


def seconds(moved: Sequence[Traffic], slice_: chips.Slice, gradient_width: int | None = None) -> float:
    """Returns the least time of the busiest link: collectives over different dimensions overlap.

    gradient_width: bytes of a value of sums, if these were not as wide as they are. Where there are no rings,
      the compiler sums by messages (collective-permute).
    """
    def share(one):
        return min(1.0, gradient_width / one.width) if gradient_width and one.kind in SUMS else 1.0

    total = sum((np.array(one.loads) * share(one) for one in moved if one.network == "ici"),
                np.zeros((len(slice_.sides), 2)))
    return float(total.max()) / slice_.chip.link_rate
