"""Traffic over the links of a torus, by hand-computed cases."""

import itertools

import numpy as np
import pytest

from molmo2_jax.cost import chips
from molmo2_jax.cost import hlo
from molmo2_jax.cost import links

SIZE = 1600


def places_of(slice_):
    """Returns the coordinates of all chips, the last dimension first to change."""
    return np.array(list(itertools.product(*map(range, slice_.sides))))


def chips_at(slice_, *positions):
    """Returns the chips whose coordinates are in the given ranges, one for each dimension."""
    wanted = set(itertools.product(*positions))
    return tuple(number for number, place in enumerate(places_of(slice_).tolist()) if tuple(place) in wanted)


def group(kind, members, **fields):
    return hlo.Collective(kind, SIZE, len(members), 1, False, (), members=members, **fields)


def loads(name, kind, *positions):
    slice_ = chips.find(name)
    one = group(kind, chips_at(slice_, *positions))
    return [up for up, down in links.loads(one, places_of(slice_), slice_) if up == down]


@pytest.mark.parametrize("name, positions, shares", [
    # 16 chips in a plane of a v5p of whole cubes: two rings, 4 of the chip's 6 links.
    ("v5p:4x4x8", (range(4), range(4), [0]), (1 / 4, 1 / 4, 0)),
    ("v5p:4x4x8", ([0], [0], range(8)), (0, 0, 1 / 2)),
    # Less than a cube has no rings.
    ("v5p:2x2x4", (range(2), range(2), range(4)), (1 / 3, 1 / 3, 1 / 3)),
    # Half of a ring is a line.
    ("v5p:4x8x8", ([0], range(4), [0]), (0, 1, 0)),
    # v6e: a ring of 16, lines of 8.
    ("v6e:8x16", ([0], range(16)), (0, 1 / 2)),
    ("v6e:8x16", (range(8), [0]), (1, 0)),
    # Every other chip of a ring, and of a line: half of their links belong to other groups.
    ("v6e:16x16", (range(0, 16, 2), [0]), (1, 0)),
    ("v5e:8x8", ([0], range(0, 8, 2)), (0, 2)),
    ("v5e:8x8", (range(8), range(2)), (1 / 2, 1 / 2))])
@pytest.mark.parametrize("kind, sides", [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)])
def test_a_group_uses_the_links_of_its_rings_and_lines(name, positions, shares, kind, sides):
    number = len(list(itertools.product(*positions)))
    sent = sides * SIZE * (number - 1) / number
    assert loads(name, kind, *positions) == pytest.approx([sent * share for share in shares])


@pytest.mark.parametrize("name, positions, load", [
    # A line of 8: each chip of one half sends an eighth of SIZE to each of the other half.
    ("v6e:8x16", (range(8), [0]), 4 * 4 * SIZE / 8),
    # A ring of 8: over each link come messages 1 to 3 chips far, and half of those 4 chips far.
    ("v5p:4x4x8", ([0], [0], range(8)), (1 + 2 + 3 + 4 / 2) * SIZE / 8),
    ("v6e:8x16", ([0], range(16)), (sum(range(8)) + 8 / 2) * SIZE / 16)])
def test_an_exchange_loads_each_link_with_the_messages_that_cross_it(name, positions, load):
    assert max(loads(name, "all-to-all", *positions)) == pytest.approx(load)


def test_messages_go_the_shorter_way_and_a_line_has_no_way_round():
    ring, line = chips.find("v5p:4x4x4"), chips.find("v6e:4x4")

    def shifted(slice_, *positions):
        members = chips_at(slice_, *positions)
        pairs = tuple(zip(members, members[1:] + members[:1]))
        one = group("collective-permute", members, pairs=pairs)
        return links.loads(one, places_of(slice_), slice_)

    assert shifted(ring, [0], [0], range(4)) == ((0, 0), (0, 0), (SIZE, 0))
    assert shifted(line, [0], range(4)) == ((0, 0), (SIZE, SIZE))
    swap = group("collective-permute", (0, 3), pairs=((0, 3), (3, 0)))
    assert links.loads(swap, places_of(line), line) == ((0, 0), (SIZE, SIZE))


def test_two_devices_of_a_chip_share_its_links():
    slice_ = chips.find("tpu7x:4x4x4")
    places = np.repeat(places_of(slice_), 2, axis=0)   # device 2n and 2n + 1 are those of chip n
    one_of_each, both = (range(0, 8, 2), range(8))
    load = lambda members: links.loads(group("all-gather", tuple(members)), places, slice_)[2][0]
    assert load(one_of_each) == 2 * SIZE * 3 / 4 / 2 and load(both) == SIZE * 7 / 8 / 2
    assert slice_.chip.link_rate == pytest.approx(1e11)   # 1.2 TB/s both ways over six links


def test_dimensions_overlap_and_directions_do_and_what_shares_a_link_does_not():
    slice_ = chips.find("v5p:4x4x8")
    places = places_of(slice_)
    plane = chips_at(slice_, range(4), range(4), [0])
    along = chips_at(slice_, [0], [0], range(8))
    gather, scatter = (group(kind, plane, width=width) for kind, width in (
        ("all-gather", 2), ("reduce-scatter", 4)))
    summed = group("all-reduce", along, width=4)
    across = hlo.Collective("all-reduce", SIZE, 2, 1, True, (), members=(0, 1))
    moved = links.traffic([gather, scatter, summed, summed, across], places, slice_)
    assert [(one.network, one.kind, one.width) for one in moved] == [
        ("ici", "all-gather", 2), ("ici", "reduce-scatter", 4), ("ici", "all-reduce", 4),
        ("dcn", "all-reduce", 4)]
    assert moved[2].sent == 2 * summed.traffic and moved[3].sent == SIZE
    plane_load, line_load = 2 * SIZE * 15 / 16 / 4, 2 * (2 * SIZE * 7 / 8) / 2
    assert line_load > plane_load
    assert links.seconds(moved, slice_) == pytest.approx(line_load / 1e11)
    # In bfloat16 the sums are half as long, the gathers of weights as long as before.
    assert links.seconds(moved[:2], slice_, 2) == pytest.approx(plane_load * 3 / 4 / 1e11)
