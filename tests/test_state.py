"""The state of step 0, and the sharding of its parts."""

import jax
import numpy as np
import pytest

from molmo2_jax import optim
from molmo2_jax import state as state_lib
from molmo2_jax.model import molmo2
from tests import tiny

MODEL = molmo2.Molmo2(tiny.MODEL)
ADAMW, MUON = (optim.make(optim.OptimConfig(muon=muon), 10) for muon in (None, optim.Muon()))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def bits(state):
    return jax.tree.map(np.asarray, state._replace(rng=jax.random.key_data(state.rng)))


@pytest.fixture(scope="module")
def on_one_device():
    return state_lib.create(MODEL, ADAMW, tiny.mesh(), 3)


@pytest.mark.parametrize("tx", [ADAMW, MUON], ids=["adamw", "muon"])
def test_moments_are_sharded_like_their_parameters(tx):
    mesh = tiny.mesh(fsdp=2, tensor=2)
    state = state_lib.abstract(MODEL, tx, mesh)
    params = {tuple(key.key for key in path): leaf
              for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    moments = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        owners = [params[names[i:]] for i in range(len(names)) if names[i:] in params]
        if owners and owners[0].shape == leaf.shape:
            moments += 1
            assert leaf.sharding == owners[0].sharding and leaf.dtype == np.float32, names
        else:
            assert not owners and leaf.sharding.is_fully_replicated, names  # counts, coefficients
    trained = [path for path in params if path[0] != "base_embedding"]
    kernels = [path for path in trained if path[-1] == "kernel"]
    assert moments == 2 * len(trained) - (len(kernels) if tx is MUON else 0)


def test_offloaded_moments_are_in_the_hosts_memory_with_the_same_sharding():
    mesh = tiny.mesh(fsdp=2, tensor=2)
    here, there = (jax.tree.leaves(state_lib.abstract(MODEL, tx, mesh))
                   for tx in (ADAMW, optim.offloaded(ADAMW)))
    moved = [b for a, b in zip(here, there, strict=True) if a.sharding != b.sharding]
    assert all(a.sharding.spec == b.sharding.spec for a, b in zip(here, there))
    moments = jax.tree.leaves(state_lib.abstract(MODEL, ADAMW, mesh).opt_state)
    assert len(moved) == sum(leaf.ndim > 0 for leaf in moments)
    assert {leaf.sharding.memory_kind for leaf in moved} == {"pinned_host"}


def test_devices_without_the_memory_for_moments_are_refused_in_a_sentence():
    nowhere = ADAMW._replace(memory_kind="tape")
    with pytest.raises(ValueError, match="OptimConfig.offload needs .*'tape'; got cpu with"):
        state_lib.abstract(MODEL, nowhere, tiny.mesh())


@pytest.mark.slow(15)
def test_the_created_state_has_the_abstract_layout_and_equal_values_on_every_mesh(on_one_device):
    mesh = tiny.mesh(fsdp=2, tensor=2)
    state, abstract = state_lib.create(MODEL, ADAMW, mesh, 3), state_lib.abstract(MODEL, ADAMW, mesh)
    for made, announced in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (made.shape, made.dtype) == (announced.shape, announced.dtype)
        assert made.sharding.is_equivalent_to(announced.sharding, made.ndim)
    assert_equal(bits(state), bits(on_one_device))
    assert int(state.step) == 0 and {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def test_seeds_decide_parameters_and_the_key_of_the_run(on_one_device):
    other = state_lib.create(MODEL, ADAMW, tiny.mesh(), 4)
    assert (np.asarray(other.params["head"]) != np.asarray(on_one_device.params["head"])).any()
    assert (jax.random.key_data(other.rng) != jax.random.key_data(on_one_device.rng)).any()


def test_given_parameters_are_where_the_run_starts():
    given = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32),
                         state_lib.abstract_params(MODEL, tiny.mesh()))
    state = state_lib.create(MODEL, ADAMW, tiny.mesh(), 3, given)
    assert_equal(state.params, given)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(state.opt_state))
