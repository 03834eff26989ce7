"""Hints are computed; those that were compiled too agree."""

import pytest

from molmo2_jax import config as config_lib
from molmo2_jax.aot import hints

GIB = 2**30
FIXED = hints.gathered(config_lib.molmo2_8b(), 1)


def hinted(needed, available=31.25, *, rows_per_group, data_axis=8):
    """Returns the hints for an 8B step on v6e with 16-way fsdp, whose sizes are in GiB."""
    return hints.fitting(
        needed=needed * GIB, available=available * GIB, parameters=int(2.02 * GIB), optimiser=int(3.75 * GIB),
        data=int(0.21 * GIB), fixed=FIXED, accumulate=1, rows_per_group=rows_per_group, data_axis=data_axis,
        fsdp_axis=16)


def test_micro_batches_are_offered_with_the_memory_that_compiling_them_showed():
    """128 rows on 32 chips need 60.7 GiB; with 4 micro-batches 27.5 GiB were compiled."""
    found = hinted(60.71, rows_per_group=4, data_axis=2)
    assert found[0].startswith("train.TrainConfig.accumulate = 4 (micro-batches): ")
    assert float(found[0].split()[-3]) == pytest.approx(27.5, abs=1.0)
    assert not any("accumulate = 2" in one or "offload" in one or "fsdp" in one for one in found)


def test_changes_that_were_compiled_and_did_not_fit_are_not_offered():
    """long_context_8b on 128 chips: context 2, fsdp 32 and offload still missed by 10.9 GiB and more."""
    found = hinted(49.6, rows_per_group=1)
    assert all("times the chips" in one for one in found)


def test_a_near_miss_is_offered_the_small_changes():
    found = hinted(33.0, rows_per_group=1)
    assert any("offload" in one for one in found) and any("MeshConfig.fsdp = 32" in one for one in found)


def test_if_nothing_is_enough_the_only_hint_says_so():
    assert hinted(4000.0, rows_per_group=2) == [
        "none of accumulate, offload, a wider fsdp or 8 times the chips is enough by itself"]
