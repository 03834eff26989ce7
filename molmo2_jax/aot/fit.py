"""Chooses mesh and rematerialisation for a slice by compiling the most promising candidates."""

import time
from collections.abc import Callable, Iterable

from molmo2_jax import sharding
from molmo2_jax.aot import step as aot_step
from molmo2_jax.cost import chips

REMATS = ("full", "attention", "dots")  # from the least memory to the least work
_CONTEXTS, _FSDPS = (1, 2, 4, 8), (16, 32, 8)
_FAR = 1.4   # a step that needs so many times the memory fits on no other mesh of the same chips


def candidates(rows: int, length: int, chips: int, slices: int = 1) -> list[sharding.MeshConfig]:
    """Returns candidate meshes: least communication first, then less memory.

    Raises:
      ValueError: `rows` cannot be split evenly across any of them.
    """
    found = []
    for context in _CONTEXTS:
        groups = chips * slices // context
        if chips % context or length % context or rows % groups:
            continue
        fsdps = [fsdp for fsdp in _FSDPS if chips // context % fsdp == 0] or [chips // context]
        found += [sharding.MeshConfig(data=groups // fsdp, fsdp=fsdp, context=context) for fsdp in fsdps]
    if not found:
        raise ValueError(f"the rows of a batch must be a multiple of the {chips * slices} devices, or of "
                         f"their groups of 2, 4 or 8; got {rows}")
    return found


def search(compile_one: Callable[[sharding.MeshConfig, str], aot_step.StepReport],
           meshes: Iterable[sharding.MeshConfig], *, tries: int, seconds: float,
           say: Callable[[str], None]) -> aot_step.StepReport:
    """Returns the report with the lowest bound on a step's time among those that fit.

    On each mesh "full" is tried first: if it does not fit, no other does. A far miss ends the search. No
    compilation starts after `tries` of them, or after `seconds`. `say` receives a line about each.

    Raises:
      aot_step.DoesNotFit: no candidate fits; the error is that of the nearest miss.
    """
    end = time.monotonic() + seconds
    fitting, misses = [], []
    for mesh in meshes:
        for remat in REMATS:
            if len(fitting) + len(misses) >= tries or (fitting or misses) and time.monotonic() > end:
                return _best(fitting, misses)
            try:
                report = compile_one(mesh, remat)
            except aot_step.DoesNotFit as miss:
                misses.append(miss)
                say(f"{mesh}, remat {remat!r}: {(miss.needed - miss.available) / chips.GIB:.1f} GiB too many")
                if miss.needed > _FAR * miss.available:
                    return _best(fitting, misses)
                break
            fitting.append(report)
            say(f"{mesh}, remat {remat!r}: {report.seconds_bound:.2f} s at least, "
                f"{report.headroom / chips.GIB:.1f} GiB left")
    return _best(fitting, misses)


def _best(fitting: list[aot_step.StepReport], misses: list[aot_step.DoesNotFit]) -> aot_step.StepReport:
    if not fitting:
        raise min(misses, key=lambda miss: miss.needed)
    return min(fitting, key=lambda report: report.seconds_bound)


def with_micro_batches(search_one: Callable[[int], aot_step.StepReport], rows: int,
                       accumulate: int) -> aot_step.StepReport:
    """Returns `search_one` of the fewest micro-batches that fit: `accumulate`, or 2, 4, ... times as many.

    Raises:
      aot_step.DoesNotFit: none fits; the error is that of the most micro-batches tried.
      ValueError: `search_one(accumulate)` raised it.
    """
    miss = None
    while miss is None or rows % accumulate == 0:
        try:
            return search_one(accumulate)
        except aot_step.DoesNotFit as error:
            miss, accumulate = error, 2 * accumulate
        except ValueError:
            if miss is None:
                raise
            break
    raise miss
