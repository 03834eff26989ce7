"""Regions of a kernel for TPUs in the compiler's schedule, and the cycles of whole rows of tokens by them."""

import dataclasses
import re

FLOPS_PER_CYCLE = 2 * 4 * 128 * 128  # of a core: four units of 128 x 128, or two of 256 x 256
PRODUCTS = {"forward": 2, "gradients": 5}


@dataclasses.dataclass(frozen=True)
class Regions:
    """Bundles of a kernel's loop: bodies of the kinds of tile in program order, of a row, of every step."""
    kinds: tuple[int, ...]
    row: int
    step: int


def read_regions(path: str) -> Regions:
    """Returns the regions of the kernel whose final bundles are in the file.

    A body is what a conditional jump skips. The kinds of tile are the bodies longer than half the longest.
    """
    jumps, bodies, address, start, stop = {}, [], 0, None, 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if found := re.match(r"\s*0x([0-9a-f]+)\s+(LB|PF)?\s*:", line):
                address = int(found[1], 16)
                if found[2] == "LB" and start is None:
                    start = address
                if found[2] == "PF":
                    stop = address
                    bodies += [(jumps[n], address) for n in re.findall(r"empty region (\d+)", line)
                               if jumps.get(n, 0) > (start or 0)]
            if found := re.search(r"sbr\.rel.*target = \$region(\d+)", line):
                jumps[found[1]] = address + 5  # a jump is taken after four bundles more
    lengths = {body: body[1] - body[0] for body in bodies}
    longest = max(x for body, x in lengths.items() if not any(_inside(other, body) for other in bodies))
    inner = [body for body in bodies if lengths[body] <= longest and not any(
        _inside(body, other) and lengths[other] <= longest for other in bodies)]
    kinds = tuple(lengths[body] for body in inner if lengths[body] > longest / 2)
    first = min(body[0] for body in inner if lengths[body] > longest / 2)
    around = [body for body in bodies if _inside((first, first + 1), body) and lengths[body] > longest]
    once = [body for body in inner if any(_inside(body, other) for other in around)]
    row = sum(map(lengths.get, once)) - sum(kinds)
    return Regions(kinds, row, stop - start - row - sum(kinds))


def _inside(body, other) -> bool:
    return body != other and other[0] <= body[0] and body[1] <= other[1]


def least_cycles(kernel, tile, heads) -> float:
    return 2 * PRODUCTS[kernel] * heads * tile[0] * tile[1] * 128 / FLOPS_PER_CYCLE


def cycles(kernel, regions, classes, tile, heads) -> float:
    """Returns cycles of one group of `heads` for tiles of these classes, int[Q, K]; 0: not visited."""
    kinds = regions.kinds if len(regions.kinds) == 3 else (min(regions.kinds), *[max(regions.kinds)] * 2)
    least = least_cycles(kernel, tile, heads)
    tiles = sum((classes == kind + 1).sum() * max(length, least) for kind, length in enumerate(kinds))
    return tiles + (classes > 0).sum() * regions.step + classes.shape[0] * regions.row
