"""A mesh changes the layout of values, not the values."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax.model import molmo2
from tests import packs
from tests import tiny

TOLERANCE = 1e-5  # float32, loss and gradients of size 1


def make_mesh(**sizes):
    return sharding.make_mesh(sharding.MeshConfig(**sizes))


def test_one_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    assert dict(make_mesh(data=2, tensor=-1, fsdp=2).shape) == {
        "data": 2, "fsdp": 2, "tensor": 2, "context": 1}


@pytest.mark.parametrize("sizes", [
    {"fsdp": 3}, {"data": 2, "fsdp": 2}, {"fsdp": 16}, {"data": 3, "fsdp": -1}, {"data": 16, "fsdp": -1}])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes):
    with pytest.raises(ValueError, match="must multiply to the number of devices; got 8 devices"):
        make_mesh(**sizes)


def test_a_run_that_sets_no_sizes_has_the_default_mesh_of_its_batch():
    unset = sharding.MeshConfig()
    sizes = {number: sharding.mesh_sizes(unset, number, rows=128) for number in (1, 8, 16, 128, 256)}
    assert sizes == {1: [1, 1, 1, 1], 8: [1, 8, 1, 1], 16: [1, 16, 1, 1], 128: [8, 16, 1, 1],
                     256: [8, 16, 1, 2]}
    assert sharding.mesh_sizes(unset, 256, rows=128, slices=2) == [8, 16, 1, 2]
    assert dict(sharding.make_mesh(unset, rows=4).shape) == {"data": 1, "fsdp": 4, "tensor": 1, "context": 2}


@pytest.mark.parametrize("given, sizes", [
    ({"data": 1, "fsdp": -1, "tensor": 1, "context": 1}, [1, 128, 1, 1]),   # the record of an old run
    ({"context": 2}, [1, 64, 1, 2]), ({"fsdp": 16, "data": -1}, [8, 16, 1, 1]),
    ({"data": -1}, [128, 1, 1, 1])])
def test_sizes_that_are_set_are_kept(given, sizes):
    assert sharding.mesh_sizes(sharding.MeshConfig(**given), 128, rows=128) == sizes


@pytest.mark.parametrize("sizes", [{"data": -1, "fsdp": -1}, {"tensor": 0}, {"context": -2}])
def test_sizes_that_make_no_sense_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh sizes must be >= 1"):
        sharding.MeshConfig(**sizes)


def test_parameters_are_sharded_along_their_logical_axes_where_these_divide():
    mesh = tiny.mesh(fsdp=2, tensor=4)
    params = state_lib.abstract_params(molmo2.Molmo2(tiny.MODEL), mesh)

    def spec(*path):
        leaf = params
        for name in path:
            leaf = leaf[name]
        return tuple(leaf.sharding.spec)

    assert spec("text", "layers", "attn", "q", "kernel") == (None, "fsdp", "tensor", None)
    # 2 heads cannot be split across 4 devices: they are stored, but not multiplied, sharded by width.
    assert spec("text", "layers", "attn", "k", "kernel") == (None, "tensor", None, None)
    assert spec("text", "layers", "attn", "o", "kernel") == (None, "tensor", None, "fsdp")
    assert spec("text", "layers", "mlp", "down", "kernel") == (None, "tensor", "fsdp")
    assert spec("base_embedding") == ("tensor", "fsdp") and spec("head") == ("fsdp", "tensor")
    assert spec("text", "layers", "attn", "q_norm", "scale") == (None, None)
    assert spec("vision", "layers", "fc1", "kernel") == (None, ("fsdp", "tensor"), None)  # used gathered


@pytest.mark.parametrize("sizes, kernel, fc1, head", [
    ({"fsdp": 2, "context": 2}, (None, ("context", "fsdp"), None, None), (None, ("context", "fsdp"), None),
     (("context", "fsdp"), None)),
    ({"fsdp": 8}, (None, "fsdp", None, None), (None, "fsdp", None), (None, "fsdp")),
    ({"data": 8}, (None, None, None, None), (None, None, None), (None, None)),
])
def test_parameters_are_stored_sharded_over_every_axis_but_data(sizes, kernel, fc1, head):
    text = dataclasses.replace(tiny.MODEL.text, width=16 if sizes.get("fsdp") == 8 else 12, tied_head=False)
    if sizes.get("fsdp") == 8:
        head = ("fsdp", None)
    model = molmo2.Molmo2(dataclasses.replace(tiny.MODEL, text=text))
    params = state_lib.abstract_params(model, tiny.mesh(**sizes))
    assert tuple(params["text"]["layers"]["attn"]["q"]["kernel"].sharding.spec) == kernel
    assert tuple(params["vision"]["layers"]["fc1"]["kernel"].sharding.spec) == fc1
    assert tuple(params["head"].sharding.spec) == head


def test_if_the_width_does_not_divide_the_other_dimension_is_sharded():
    params = state_lib.abstract_params(molmo2.Molmo2(tiny.MODEL), tiny.mesh(fsdp=8))  # the decoder is 12 wide
    assert tuple(params["text"]["layers"]["mlp"]["gate"]["kernel"].sharding.spec) == (None, None, "fsdp")
    assert tuple(params["base_embedding"].sharding.spec) == ("fsdp", None)


def test_a_batch_is_sharded_by_rows_and_by_length():
    mesh = tiny.mesh(data=2, fsdp=2, context=2)
    batch = tiny.batch(0)
    placed = sharding.put(batch, mesh)
    for name, value, host in zip(batch._fields, placed, batch):
        if host is None:   # of models that choose where to point
            assert value is None
            continue
        np.testing.assert_array_equal(value, host)
        along = "context"  # length, crops and windows
        assert value.sharding.spec == PartitionSpec(("data", "fsdp"), along), name
        assert value.addressable_shards[0].data.shape[0] == 1


def test_rows_and_tokens_that_cannot_be_split_evenly_are_refused():
    with pytest.raises(ValueError, match="data x fsdp = 8 devices; got 4"):
        sharding.put(tiny.batch(0), make_mesh(data=2, fsdp=4))
    with pytest.raises(ValueError, match="context = 8 devices; got 12"):
        sharding.check_batch(make_mesh(context=8), 4, 12)


def loss_and_gradients(start, mesh):
    """Returns metrics and gradients of one train step with dropout, and its lowered and compiled program.

    With plain gradient descent at rate 1 the update is the gradient.
    """
    model, tx, layout = molmo2.Molmo2(tiny.MODEL), DESCENT, sharding.of_batch(mesh, EIGHT_ROWS)
    config = train.TrainConfig(steps=1, dtype="float32", loss_chunk=10)
    with jax.set_mesh(mesh):
        state = jax.device_put(start, jax.tree.map(lambda x: x.sharding, state_lib.abstract(model, tx, mesh)))
        batch = jax.device_put(EIGHT_ROWS, layout)
        lowered = jax.jit(functools.partial(train.train_step, model, tx, config)).lower(state, batch)
        compiled = lowered.compile()
        after, measured = compiled(state, batch)
    grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), start.params, after.params)
    return measured, grads, lowered.as_text(), compiled.as_text()


DESCENT = optim.Optimiser(*optax.sgd(1.0))
EIGHT_ROWS = packs.random_rows(0, tiny.MODEL, 8, tiny.T, tiny.M, tiny.R)  # one for each of 8 devices


@pytest.fixture(scope="module")
def start():
    return state_lib.create(molmo2.Molmo2(tiny.MODEL), DESCENT, tiny.mesh(), 0)


@pytest.fixture(scope="module")
def on_one_device(start):
    return loss_and_gradients(start, tiny.mesh())


# data, fsdp, tensor, context: each axis alone and products, on 2, 4 and 8 devices. 2 key heads cannot be
# split across 4 devices, nor 4 crops across 8: there the axis is left out, and nothing else changes.
MESHES = [(2, 1, 1, 1), (8, 1, 1, 1), (1, 4, 1, 1), (1, 1, 2, 1), (1, 1, 4, 1), (1, 1, 1, 8), (2, 1, 2, 1),
          (1, 2, 2, 1), (2, 1, 1, 4), (2, 2, 1, 2), (1, 2, 2, 2)]
QUICK = ((1, 2, 2, 2),)  # every axis along which the model is divided


def compiled(meshes):
    """Returns the meshes as test parameters; those that are not QUICK are marked slow."""
    return [mesh if mesh in QUICK else pytest.param(mesh, marks=pytest.mark.slow(11)) for mesh in meshes]


@pytest.mark.parametrize("sizes", MESHES)
def test_devices_differ_in_loss_tokens(sizes):
    mesh = tiny.mesh(*sizes)
    placed = jax.device_put(EIGHT_ROWS.weights, sharding.of_batch(mesh, EIGHT_ROWS).weights)
    parts = {str(shard.index): int((shard.data > 0).sum()) for shard in placed.addressable_shards}
    assert len(parts) == mesh.size // mesh.shape["tensor"]
    assert len(parts) == 1 or max(parts.values()) > min(parts.values())


@pytest.fixture(scope="module")
def on_mesh(start):
    return functools.cache(lambda *sizes: loss_and_gradients(start, tiny.mesh(*sizes)))


@pytest.mark.parametrize("sizes", compiled(MESHES))
def test_loss_and_gradients_on_a_mesh_are_those_on_one_device(sizes, on_mesh, on_one_device):
    measured, grads, *_ = on_mesh(*sizes)
    for name, value in on_one_device[0].items():
        assert float(measured[name]) == pytest.approx(float(value), rel=TOLERANCE), name
    for path, expected in jax.tree_util.tree_leaves_with_path(on_one_device[1]):
        got = grads
        for key in path:
            got = got[key.key]
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE, err_msg=jax.tree_util.keystr(path))
    assert max(np.abs(x).max() for x in jax.tree.leaves(on_one_device[1])) > 0.01


def test_constraints_are_emitted_on_a_mesh_and_only_there(on_mesh, on_one_device):
    count = lambda text: len(re.findall("sharding_constraint .*<@mesh, ", text))
    assert count(on_mesh(2, 2, 1, 2)[2]) >= 60  # 83; without jax.set_mesh they vanish silently
    assert count(on_one_device[2]) == 0


# Meshes that shard weights. On (2, 2, 1, 2) activations of the connector have the shape of a stack.
@pytest.mark.parametrize("sizes", compiled(s for s in MESHES if s[1] * s[3] > 1 and s != (2, 2, 1, 2)))
def test_no_stack_of_layers_is_gathered_whole(sizes, on_mesh):
    """The scan over layers gathers one layer at a time, so no collective sees the leading axis of a stack."""
    stacks = {",".join(map(str, leaf.shape))
              for path, leaf in jax.tree_util.tree_leaves_with_path(
                  state_lib.abstract_params(molmo2.Molmo2(tiny.MODEL), tiny.mesh()))
              if "layers" in jax.tree_util.keystr(path) and leaf.ndim > 2}
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", on_mesh(*sizes)[3])
    assert len(stacks) > 8 and len(gathered) > 8
    assert not stacks & set(gathered)
