"""Mesh axes and which logical axis goes where; the only file that names mesh axes.

`data` replicas (also across slices), `fsdp` batch rows and parameters, `tensor` heads and MLP columns,
`context` the sequence. All four always exist; a laptop has one device and sizes of 1.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from molmo2_jax import types

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
PARAMETER_RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
                   "vocab": "tensor"}
LENGTH_FIELDS = frozenset({"tokens", "targets", "weights", "positions", "end", "group", "image", "example",
                           "branch"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; at most one may be -1 and takes what is left."""
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"mesh sizes must be >= 1, one of them may be -1; got {sizes}")


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Returns the mesh over `devices` (all of them by default).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(dataclasses.astuple(config))
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // -math.prod(sizes))
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh sizes {dict(zip(AXES, sizes))} must multiply to the number of devices; "
                         f"got {len(devices)} devices")
    # Explicit axes, the default, make Linen's logical partitioning raise.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _spec(names, shape, mesh: Mesh) -> PartitionSpec:
    """Returns mesh axes per dimension: the rule's axis where it divides the dimension, else replicated."""
    axes = [PARAMETER_RULES.get(name) for name in names]
    return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None
                           for axis, size in zip(axes, shape)))


def of_parameters(boxed, mesh: Mesh):
    """Returns NamedShardings for a tree of parameters as `model.init` (or its eval_shape) returns it."""
    def sharding(leaf):
        names, value = (leaf.names, leaf.value) if isinstance(leaf, nn.LogicallyPartitioned) else ((), leaf)
        names = tuple(names) + (None,) * (len(value.shape) - len(names))
        return NamedSharding(mesh, _spec(names, value.shape, mesh))
    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


class AttentionAxes(NamedTuple):
    """Mesh axes that divide attention, none where one does not divide its dimension; and into how many.

    Where the length is divided, devices either exchange it for heads (`exchanges_heads`), or read the keys
    and values of their whole rows.
    """
    rows: tuple[str, ...]
    heads: str | None
    length: str | None
    num_row_parts: int
    num_length_parts: int
    exchanges_heads: bool


def attention_axes(rows: int, num_heads: int, num_kv_heads: int, length: int) -> AttentionAxes | None:
    """Returns how the mesh in use divides attention; None for one device, and inside a shard_map.

    Exchanging moves (N + K) / parts heads of queries, outputs, keys and values, reading moves K of keys and
    values; exchanging needs as many key heads as parts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    axis = lambda name, size: name if mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None
    groups = math.prod(mesh.shape[name] for name in BATCH_AXES)
    row_axes = BATCH_AXES if rows % groups == 0 else ()
    head_axis, length_axis = axis(PARAMETER_RULES["kv_heads"], num_kv_heads), axis("context", length)
    parts = mesh.shape[length_axis] if length_axis else 1
    own_kv_heads = num_kv_heads // (mesh.shape[head_axis] if head_axis else 1)
    is_less = num_heads + num_kv_heads < parts * num_kv_heads
    return AttentionAxes(row_axes, head_axis, length_axis, groups if row_axes else 1, parts,
                         exchanges_heads=is_less and own_kv_heads % parts == 0)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def of_batch(mesh: Mesh) -> types.Batch:
    """Returns the NamedSharding of each field: rows over (data, fsdp), length over context."""
    return types.Batch(**{
        field: NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context" if field in LENGTH_FIELDS else None))
        for field in types.Batch._fields})


def put(batch: types.Batch, mesh: Mesh) -> types.Batch:
    """Returns the batch as global arrays; `batch` holds this process's rows.

    Raises:
      ValueError: the rows do not divide over the devices.
    """
    rows = batch.tokens.shape[0] * jax.process_count()
    groups = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % groups:
        raise ValueError(f"the rows of a batch must divide over data x fsdp = {groups} devices; got {rows}")
    return types.Batch(*(jax.make_array_from_process_local_data(sharding, np.asarray(value))
                         for sharding, value in zip(of_batch(mesh), batch)))
