"""Chooses mesh and rematerialisation for a slice by compiling what may be fastest and fit."""

import time
from collections.abc import Callable, Iterable

from molmo2_jax import aot
from molmo2_jax import chips
from molmo2_jax import sharding

REMATS = ("full", "attention", "dots")  # from the least memory to the least work
_CONTEXTS, _FSDPS = (1, 2, 4, 8), (16, 32, 8)


def candidates(rows: int, length: int, chips: int, slices: int = 1) -> list[sharding.MeshConfig]:
    """Returns meshes for slices of so many chips: those that move least first, then those that need less.

    Raises:
      ValueError: `rows` divide over none.
    """
    found = []
    for context in _CONTEXTS:
        groups = chips * slices // context
        if chips % context or length % context or rows % groups:
            continue
        fsdps = [fsdp for fsdp in _FSDPS if chips // context % fsdp == 0] or [chips // context]
        found += [sharding.MeshConfig(data=groups // fsdp, fsdp=fsdp, context=context) for fsdp in fsdps]
    if not found:
        raise ValueError(f"the rows of a batch must divide over the {chips * slices} devices, alone or in "
                         f"groups of 2, 4 or 8; got {rows}")
    return found


def search(compile_one: Callable[[sharding.MeshConfig, str], aot.StepReport],
           meshes: Iterable[sharding.MeshConfig], *, tries: int, seconds: float,
           say: Callable[[str], None]) -> aot.StepReport:
    """Returns the report with the lowest bound on a step's time of those that fit.

    On each mesh "full" comes first: where that does not fit, nothing does. After `tries` compilations, or
    when `seconds` are over, no other begins. `say` hears of each.

    Raises:
      aot.DoesNotFit: nothing that was tried fits; the nearest miss.
    """
    end = time.monotonic() + seconds
    fitting, misses = [], []
    for mesh in meshes:
        for remat in REMATS:
            if len(fitting) + len(misses) >= tries or (fitting or misses) and time.monotonic() > end:
                return _best(fitting, misses)
            try:
                report = compile_one(mesh, remat)
            except aot.DoesNotFit as miss:
                misses.append(miss)
                say(f"{mesh}, remat {remat!r}: {(miss.needed - miss.available) / chips.GIB:.1f} GiB too many")
                break
            fitting.append(report)
            say(f"{mesh}, remat {remat!r}: {report.seconds_bound:.2f} s at least, "
                f"{report.headroom / chips.GIB:.1f} GiB left")
    return _best(fitting, misses)


def _best(fitting: list[aot.StepReport], misses: list[aot.DoesNotFit]) -> aot.StepReport:
    if not fitting:
        raise min(misses, key=lambda miss: miss.needed)
    return min(fitting, key=lambda report: report.seconds_bound)
