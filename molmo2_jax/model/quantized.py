"""Matrices in 8 bits: int8 values and a float32 factor per output channel.

Symmetric, rounded to the nearest; the largest magnitude of a channel is 127. A product multiplies the values,
cast to the dtype of the computation, and scales its outputs (layers.contract), so a device stores, moves and
reads one byte per weight. Activations are not quantised.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LARGEST = 127


class Int8(NamedTuple):
    """A matrix or stack of matrices in 8 bits, in the place of the array in a parameter tree."""
    values: Any  # int8; same shape as the matrix
    scale: Any   # float32; the shape without the axes that a product sums over

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


def is_int8(leaf) -> bool:
    return isinstance(leaf, Int8)


def summed_axes(path: str) -> tuple[int, ...]:
    """Returns the axes of a kernel that its product sums over.

    Args:
      path: of the parameter in the tree, such as "text/layers/attn/q/kernel". Kernels of stacks have a
        leading axis of layers, and those called "o" two axes of inputs: heads and head width.
    """
    names = path.split("/")
    first = int("layers" in names)
    return tuple(range(first, first + 1 + (names[-2:] == ["o", "kernel"])))


@functools.partial(jax.jit, static_argnames="axes")
def quantize(matrix, axes: tuple[int, ...]) -> Int8:
    """Returns the matrix in 8 bits, each element within half of `scale`; NaN makes the factor NaN.

    Args:
      axes: `summed_axes` of its path.
    """
    matrix = jnp.asarray(matrix, jnp.float32)
    largest = jnp.abs(matrix).max(axes, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest) / LARGEST
    return Int8(jnp.round(matrix / scale).astype(jnp.int8), scale.squeeze(axes))


def dequantize(leaf: Int8, axes: tuple[int, ...]):
    """Returns float32, the matrix that products with `leaf` use."""
    return leaf.values.astype(jnp.float32) * jnp.expand_dims(leaf.scale, axes)


def shardings(of_matrix, ndim: int, axes: tuple[int, ...]) -> Int8:
    """Returns the shardings of a matrix in 8 bits: its own, and the factors as its outputs."""
    if not isinstance(of_matrix, jax.sharding.NamedSharding):
        return Int8(of_matrix, of_matrix)
    parts = (*of_matrix.spec, *(None,) * (ndim - len(of_matrix.spec)))
    kept = jax.sharding.PartitionSpec(*(part for axis, part in enumerate(parts) if axis not in axes))
    return Int8(of_matrix, jax.sharding.NamedSharding(of_matrix.mesh, kept))


def abstract(matrix: jax.ShapeDtypeStruct, axes: tuple[int, ...]) -> Int8:
    """Returns the shapes and shardings of `quantize` of an array of this shape and sharding."""
    values, scale = shardings(matrix.sharding, len(matrix.shape), axes)
    outputs = tuple(size for axis, size in enumerate(matrix.shape) if axis not in axes)
    return Int8(jax.ShapeDtypeStruct(matrix.shape, jnp.int8, sharding=values),
                jax.ShapeDtypeStruct(outputs, jnp.float32, sharding=scale))
