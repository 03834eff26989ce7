"""The search for a mesh and a kind of rematerialisation, with a stub compiler."""

import types

import pytest

from molmo2_jax import sharding
from molmo2_jax.aot import fit as aot_fit
from molmo2_jax.aot import step as aot_step
from molmo2_jax.cost import chips as chips_lib

MESHES = [sharding.MeshConfig(data=8, fsdp=16), sharding.MeshConfig(data=4, fsdp=32)]


def compiler(sizes):
    """Returns a stub compiler for 30 GiB chips and the list of its calls; `sizes`: GiB by (fsdp, remat)."""
    asked = []

    def compile_one(mesh, remat):
        asked.append((mesh.fsdp, remat))
        needed = sizes[mesh.fsdp, remat]
        if needed > 30:
            raise aot_step.DoesNotFit(needed * chips_lib.GIB, 30 * chips_lib.GIB, [])
        return types.SimpleNamespace(seconds_bound=100 - needed, headroom=(30 - needed) * chips_lib.GIB,
                                     fsdp=mesh.fsdp, remat=remat)

    return compile_one, asked


SIZES = {(16, "full"): 28, (16, "attention"): 33, (16, "dots"): 60, (32, "full"): 20, (32, "attention"): 25,
         (32, "dots"): 29}


def search(sizes, **limits):
    compile_one, asked = compiler(sizes)
    said = []
    limits = {"tries": 10, "seconds": 1e6} | limits
    return lambda: aot_fit.search(compile_one, MESHES, say=said.append, **limits), asked, said


def test_the_fastest_that_fits_is_found_and_nothing_larger_than_a_miss_is_tried():
    find, asked, said = search(SIZES)
    best = find()
    assert (best.fsdp, best.remat) == (32, "dots")
    assert asked == [(16, "full"), (16, "attention"), (32, "full"), (32, "attention"), (32, "dots")]
    assert "3.0 GiB too many" in said[1] and "1.0 GiB left" in said[-1]


@pytest.mark.parametrize("limits, count", [({"tries": 2}, 2), ({"seconds": -1.0}, 1)])
def test_a_search_is_bounded(limits, count):
    find, asked, _ = search(SIZES, **limits)
    assert find().remat == "full" and len(asked) == count


def test_if_nothing_fits_the_nearest_miss_is_reported():
    find, asked, _ = search({key: size + 12 for key, size in SIZES.items()})
    with pytest.raises(aot_step.DoesNotFit, match="it needs 32.0 GiB, 2.0 too many"):
        find()
    assert asked == [(16, "full"), (32, "full")]


def test_meshes_share_the_rows_of_a_batch_evenly():
    for rows, length, chips, slices in ((128, 16384, 128, 1), (128, 36864, 256, 1), (128, 16384, 256, 2)):
        for mesh in aot_fit.candidates(rows, length, chips, slices):
            assert mesh.data * mesh.fsdp * mesh.context == chips * slices
            assert rows % (mesh.data * mesh.fsdp) == length % mesh.context == mesh.data % slices == 0
    first = aot_fit.candidates(128, 36864, 256)[0]
    assert (first.data, first.fsdp, first.context) == (8, 16, 2)


def test_rows_that_no_mesh_divides_are_refused():
    with pytest.raises(ValueError, match="must be a multiple of the 128 devices.*got 100"):
        aot_fit.candidates(100, 16384, 128)


def test_a_far_miss_ends_the_search():
    find, asked, _ = search({key: size + 20 for key, size in SIZES.items()})
    with pytest.raises(aot_step.DoesNotFit):
        find()
    assert asked == [(16, "full")]


@pytest.mark.parametrize("fits, expected", [(1, [1]), (4, [1, 2, 4]), (64, [1, 2, 4, 8])])
def test_micro_batches_are_doubled_until_a_step_fits_or_rows_run_out(fits, expected):
    tried = []

    def search_one(accumulate):
        tried.append(accumulate)
        if accumulate < fits:
            raise aot_step.DoesNotFit(50.0, 30.0, [])
        return accumulate

    if fits <= 8:
        assert aot_fit.with_micro_batches(search_one, 8, 1) == fits
    else:
        with pytest.raises(aot_step.DoesNotFit):
            aot_fit.with_micro_batches(search_one, 8, 1)
    assert tried == expected
