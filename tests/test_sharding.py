"""A mesh changes where numbers lie, not what they are."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax.model import molmo2
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


@pytest.mark.parametrize("sizes", [{"data": -1}, {"tensor": 0}, {"context": -2}])
def test_sizes_that_make_no_sense_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh sizes must be >= 1"):
        sharding.MeshConfig(**sizes)


def test_parameters_lie_along_their_logical_axes_where_these_divide():
    mesh = tiny.mesh(fsdp=2, tensor=4)
    params = state_lib.abstract_params(molmo2.Molmo2(tiny.MODEL), mesh)

    def spec(*path):
        leaf = params
        for name in path:
            leaf = leaf[name]
        return tuple(leaf.sharding.spec)

    assert spec("text", "layers", "attn", "q", "kernel") == (None, "fsdp", "tensor", None)
    assert spec("text", "layers", "attn", "k", "kernel") == (None, "fsdp", None, None)  # 2 heads, 4 devices
    assert spec("text", "layers", "attn", "o", "kernel") == (None, "tensor", None, "fsdp")
    assert spec("text", "layers", "mlp", "down", "kernel") == (None, "tensor", "fsdp")
    assert spec("base_embedding") == ("tensor", "fsdp") and spec("head") == ("fsdp", "tensor")
    assert spec("text", "layers", "attn", "q_norm", "scale") == (None, None)


def test_a_batch_lies_by_rows_and_by_length():
    mesh = tiny.mesh(data=2, fsdp=2, context=2)
    batch = tiny.batch(0)
    placed = sharding.put(batch, mesh)
    for name, value, host in zip(batch._fields, placed, batch):
        np.testing.assert_array_equal(value, host)
        along = "context" if name in sharding.LENGTH_FIELDS else None
        assert value.sharding.spec == PartitionSpec(("data", "fsdp"), along), name
        assert value.addressable_shards[0].data.shape[0] == 1


def test_rows_that_do_not_divide_over_the_devices_are_refused():
    with pytest.raises(ValueError, match="data x fsdp = 8 devices; got 4"):
        sharding.put(tiny.batch(0), make_mesh(data=2, fsdp=4))


def loss_and_gradients(mesh):
    """Returns those of one train step, dropout included: an update by plain descent is the gradient."""
    model, tx = molmo2.Molmo2(tiny.MODEL), optax.sgd(1.0)
    config = train.TrainConfig(steps=1, dtype="float32", loss_chunk=10)
    with jax.set_mesh(mesh):
        start = state_lib.create(model, tx, mesh, 0)
        batch = sharding.put(tiny.batch(0), mesh)
        after, measured = jax.jit(train.train_step, static_argnums=(0, 1, 2))(model, tx, config, start, batch)
    return measured, jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), start.params, after.params)


@pytest.fixture(scope="module")
def on_one_device():
    return loss_and_gradients(tiny.mesh())


@pytest.mark.parametrize("sizes", [(2, 2, 1, 1), (1, 2, 2, 1)])
def test_loss_and_gradients_on_a_mesh_are_those_on_one_device(sizes, on_one_device):
    measured, grads = loss_and_gradients(tiny.mesh(*sizes))
    for name, value in on_one_device[0].items():
        assert float(measured[name]) == pytest.approx(float(value), rel=TOLERANCE), name
    for path, expected in jax.tree_util.tree_leaves_with_path(on_one_device[1]):
        got = grads
        for key in path:
            got = got[key.key]
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE, err_msg=jax.tree_util.keystr(path))
    assert max(np.abs(x).max() for x in jax.tree.leaves(on_one_device[1])) > 0.01
