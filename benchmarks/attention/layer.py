"""Attention of one layer of Molmo2-4B or 8B, to be compiled for TPUs that are not there."""

import os

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from molmo2_jax import sharding
from molmo2_jax.attention import tiling as tiling_lib
from molmo2_jax.attention import tpu
from molmo2_jax.attention import tree_mask

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
jax.config.update("jax_platforms", "cpu")


def mesh_of(topology: str):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return sharding.make_mesh(sharding.MeshConfig(), devices[:1])


def arrays(mesh, length: int):
    """Returns the shapes of queries, keys and a mask of one row, on the mesh's device."""
    place = NamedSharding(mesh, PartitionSpec())
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    integers = array(1, length, dtype=jnp.int32)
    return (array(1, length, HEADS, HEAD_DIM), array(1, length, KV_HEADS, HEAD_DIM),
            tree_mask.TreeMask(integers, integers))


def both_ways(function, q, k, v, grad, mask):
    out, pull = jax.vjp(lambda *x: function(*x, mask), q, k, v)
    return out, *pull(grad)


def tiling_on(mesh, length: int) -> tiling_lib.Tiling:
    """Returns the tiles in which a row of this length is walked on the mesh's device."""
    with jax.set_mesh(mesh):
        return tpu.choose_tiling(1, length, length, HEADS // KV_HEADS, HEAD_DIM)
