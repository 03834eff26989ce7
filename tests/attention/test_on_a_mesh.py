"""Attention sharded over devices, also inside the whole model, equals attention on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax.attention import attend
from molmo2_jax.attention import tree_mask
from molmo2_jax.model import molmo2
from tests import packs
from tests import tiny
from tests.attention import rows

TOLERANCE = 1e-5  # float32, values up to 10; measured 4e-6
B, T, N, K, H = 2, 128, 8, 4, 16


@functools.cache
def expected():
    mask, (q, k, v, grad) = rows.random_mask(1, B, T), rows.random_tensors(1, B, T, N, K, H)
    attend_densely = lambda *x: attend.attend_visible(*x, tree_mask.dense(mask))
    out, pull = jax.jit(lambda *x: jax.vjp(attend_densely, *x))(q, k, v)
    return mask, (q, k, v, grad), (out, *pull(grad))


@pytest.mark.parametrize("sizes, way, implementation", [
    (dict(data=2, tensor=2), "rows and heads", "pallas_tpu_interpret"),
    (dict(fsdp=2, tensor=2, context=2), "all, keys read", "pallas_tpu_interpret"),
    (dict(fsdp=2, tensor=2, context=2), "all, keys read", "pallas_gpu_interpret"),
    (dict(context=4), "length exchanged for heads", "pallas_tpu_interpret"),
    (dict(context=2), "keys read", "blocked"),
    (dict(tensor=3), "nothing that divides", "blocked"),
])
def test_outputs_and_gradients_on_a_mesh_are_those_on_one_device(sizes, way, implementation):
    mask, (q, k, v, grad), wanted = expected()
    with jax.set_mesh(tiny.mesh(**sizes)):
        @jax.jit
        def run(q, k, v, mask, grad):
            plan = attend.plan(mask, N, K, H, implementation)
            assert (plan.axes.length is not None) == ("context" in sizes)
            assert plan.axes.exchanges_heads == ("exchanged" in way)
            out, pull = jax.vjp(lambda *x: attend.attend(*x, plan), q, k, v)
            return out, *pull(grad)

        for got, want in zip(run(q, k, v, mask, grad), wanted):
            np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.slow(6)
def test_loss_and_gradients_of_the_whole_model_with_the_kernel_equal_the_dense_path():
    params, batch = packs.random_params(tiny.MODEL), tiny.batch(0)

    def loss(implementation):
        model = molmo2.Molmo2(tiny.MODEL, attention=implementation)

        def value(params):
            logits_BTV = model.apply({"params": params}, batch)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), batch.targets[..., None] % 64, -1)
            return -(chosen[..., 0] * batch.weights).sum() / batch.weights.sum()

        return jax.jit(jax.value_and_grad(value))(params)

    value, grads = loss("pallas_tpu_interpret")
    wanted, wanted_grads = loss("dense")
    assert float(value) == pytest.approx(float(wanted), rel=TOLERANCE)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted_grads)):
        np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0, err_msg=jax.tree_util.keystr(path))
    assert max(np.abs(x).max() for x in jax.tree.leaves(wanted_grads)) > 0.01
