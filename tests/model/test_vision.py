"""Attention among patches, by a kernel and sharded over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax import sharding
from molmo2_jax.model import vision
from tests import tiny

KERNEL_TOLERANCE = 1e-5  # float32, outputs and gradients of size 1


@pytest.mark.slow(6)
def test_the_kernel_equals_plain_softmax_with_crops_sharded_over_devices():
    q, k, v, grad = (jax.random.normal(key, (4, 9, 2, 12)) for key in jax.random.split(jax.random.key(0), 4))
    kernel = functools.partial(vision.kernel_attention, implementation="pallas_tpu_interpret")
    divided = functools.partial(sharding.on_own_part, kernel, "all_crops")
    expected, pull = jax.vjp(vision.full_attention, q, k, v)
    with jax.set_mesh(tiny.mesh(fsdp=2, context=2)):
        got, pull_kernel = jax.jit(lambda *x: jax.vjp(divided, *x))(q, k, v)
        grads = jax.jit(pull_kernel)(grad)
    for one, other in zip((got, *grads), (expected, *pull(grad))):
        np.testing.assert_allclose(one, other, rtol=0, atol=KERNEL_TOLERANCE)
    assert float(jnp.abs(expected).max()) > 0.5
