"""Mesh axes and which logical axis goes where; the only file that names mesh axes.

`data` replicas (also across slices), `fsdp` batch rows and parameters, `tensor` heads and MLP columns,
`context` the sequence. All four always exist; a laptop has one device and sizes of 1.

Parameters are stored in parts over all axes but `data`. Where they are used, the decoder's are gathered over
fsdp and context and stay divided over tensor; those of ViT and connector are gathered whole, because there
every axis divides the crops: no device repeats another's work on pixels.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from molmo2_jax import types

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
PARAMETER_RULES = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
STORAGE_AXES = ("context", "fsdp")
# Logical axes of activations: rows of a batch, rows that still lie together in fsdp, positions, crops or
# windows of a row, crops of all rows, a width in the parts in which parameters are stored or in some of them.
ACTIVATION_RULES = {"rows": BATCH_AXES, "replicas": ("data",), "length": ("context",),
                    "crops": ("tensor", "context"), "all_crops": AXES, "stored": STORAGE_AXES,
                    "partly_stored": ("context",),
                    **{name: (axis,) for name, axis in PARAMETER_RULES.items()}}
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
                         f"got {len(devices)} devices for {math.prod(sizes)} (-1 takes what is left)")
    # Explicit axes, the default, make Linen's logical partitioning raise.
    kinds = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise ValueError(f"data must be a multiple of the {slices} slices; got {sizes[0]}")
        hybrid = mesh_utils.create_hybrid_device_mesh([sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1],
                                                      devices, allow_split_physical_axes=True)
        return Mesh(hybrid, AXES, axis_types=kinds)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # no axis is a product of whole sides of the torus
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES,
                    axis_types=kinds)


def _dividing(axes, size: int, mesh) -> tuple[str, ...]:
    """Returns the run of neighbours among `axes` with the largest product that divides `size`."""
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    runs = [axes[i:j] for i in range(len(axes)) for j in range(i + 1, len(axes) + 1)]
    parts = lambda run: math.prod(mesh.shape[axis] for axis in run)
    return max((run for run in runs if size % parts(run) == 0), key=parts, default=())


def _spec_of(per_dimension) -> PartitionSpec:
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in per_dimension))


def _stored(names, shape, mesh) -> PartitionSpec:
    """Returns mesh axes per dimension of a parameter as it is stored.

    Heads, MLP columns and vocabulary by the rule's axis; what is left of STORAGE_AXES and tensor on "embed",
    or else on the largest dimension that they divide. Vectors are stored whole but for the rules.
    """
    parts: list[tuple[str, ...]] = [
        (rule,) if rule and size % mesh.shape[rule] == 0 and mesh.shape[rule] > 1 else ()
        for rule, size in zip(map(PARAMETER_RULES.get, names), shape)]
    if len(shape) - ("layers" in names) < 2 or "embed" not in names:
        return _spec_of(parts)
    left = STORAGE_AXES + (() if any(parts) else ("tensor",))
    places = [place for place, name in enumerate(names) if name != "layers" and not parts[place]]
    options = {place: _dividing(left, shape[place], mesh) for place in places}
    worth = lambda place: (math.prod(mesh.shape[axis] for axis in options[place]), names[place] == "embed",
                           shape[place])
    best = max(places, key=worth)
    parts[best] = options[best]
    return _spec_of(parts)


def _used(names, shape, mesh) -> PartitionSpec:
    """Returns mesh axes per dimension of a parameter where it is multiplied."""
    rules = [PARAMETER_RULES.get(name) for name in names]
    return PartitionSpec(*(rule if rule and size % mesh.shape[rule] == 0 else None
                           for rule, size in zip(rules, shape)))


def _mesh_in_use():
    """Returns the mesh of jax.set_mesh; None for one device, and inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def gathered(x, names):
    """Returns a parameter (or its cast) with all that its multiplication needs on each device.

    `names` None: it is there already.
    """
    mesh = _mesh_in_use()
    if mesh is None or names is None:
        return x
    return jax.lax.with_sharding_constraint(x, _used(names, x.shape, mesh))


def scattered(x, names):
    """Returns the gradient of a parameter, added up over devices into the parts in which it is stored."""
    mesh = _mesh_in_use()
    if mesh is None or names is None:
        return x
    return jax.lax.with_sharding_constraint(x, _stored(names, x.shape, mesh))


def constrain(x, *names):
    """Returns an activation divided by ACTIVATION_RULES, one logical name or None per dimension.

    An axis that does not divide its dimension is left out.
    """
    mesh = _mesh_in_use()
    if mesh is None:
        return x
    parts = [_dividing(ACTIVATION_RULES.get(name, ()), size, mesh) for name, size in zip(names, x.shape)]
    return jax.lax.with_sharding_constraint(x, _spec_of(parts))


def on_own_part(function, name: str, *arrays):
    """Returns `function(*arrays)`, each device working on its own part of the arrays' leading dimension,
    which is divided as activations called `name` are."""
    mesh = _mesh_in_use()
    if mesh is None:
        return function(*arrays)
    spec = _spec_of([_dividing(ACTIVATION_RULES[name], arrays[0].shape[0], mesh)])
    return jax.shard_map(function, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_rounded(part, axes, place: int, dtype: str):
    """Returns all parts along dimension `place`, rounded to `dtype` on the way but of part's own type."""
    return jax.lax.all_gather(part.astype(dtype), axes, axis=place, tiled=True).astype(part.dtype)


_gather_rounded.defvjp(
    lambda part, axes, place, dtype: (_gather_rounded(part, axes, place, dtype), None),
    lambda axes, place, dtype, _, grad: (
        jax.lax.psum_scatter(grad, axes, scatter_dimension=place, tiled=True),))


def sum_over_tokens(function, parameter, names, tokens, dtype: str):
    """Returns the sums over devices of `function(parameter, *tokens)`, a tree of scalars, and its gradients.

    Each device applies the function to its own tokens ([B, T, ...] arrays) and the whole parameter, gathered
    once, so that gradients of the parameter meet once and not in every turn of a loop inside the function.
    """
    mesh = _mesh_in_use()
    # axes of one device stay out: where all are such, the partitioner refuses to sum over them
    manual = () if mesh is None else tuple(a for a in (*BATCH_AXES, "context") if mesh.shape[a] > 1)
    if not manual:
        return function(parameter, *tokens)
    stored = [tuple(axis for axis in ((parts,) if isinstance(parts, str) else parts or ()) if axis in manual)
              for parts in _stored(names, parameter.shape, mesh)]

    def part(parameter, *tokens):
        for place, axes in enumerate(stored):
            if axes:
                parameter = _gather_rounded(parameter, axes, place, dtype)
        return jax.tree.map(lambda total: total[None, None], function(parameter, *tokens))

    spec = _spec_of([tuple(axis for axis in axes if axis in manual) for axes in (BATCH_AXES, ("context",))])
    partial = jax.shard_map(part, in_specs=(_spec_of(stored), *(spec,) * len(tokens)), out_specs=spec,
                            axis_names=set(manual), check_vma=False)
    return jax.tree.map(jnp.sum, partial(parameter, *tokens))


def of_parameters(boxed, mesh: Mesh):
    """Returns NamedShardings for a tree of parameters as `model.init` (or its eval_shape) returns it."""
    def sharding(leaf):
        names, value = (leaf.names, leaf.value) if isinstance(leaf, nn.LogicallyPartitioned) else ((), leaf)
        names = tuple(names) + (None,) * (len(value.shape) - len(names))
        return NamedSharding(mesh, _stored(names, value.shape, mesh))
    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def check_memory(mesh: Mesh, kind: str) -> None:
    """Raises ValueError if the mesh's devices cannot reach memory of this kind, such as "pinned_host"."""
    device = mesh.devices.flat[0]
    known = sorted(memory.kind for memory in device.addressable_memories())
    if kind not in known:
        raise ValueError(f"optim.OptimConfig.offload needs devices that reach memory of kind {kind!r}; got "
                         f"{device.device_kind} with {', '.join(known)}")


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


def check_batch(mesh: Mesh, rows: int, length: int) -> None:
    """Raises ValueError if the devices cannot share `rows` (of all hosts) and their tokens evenly."""
    groups, parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES), mesh.shape["context"]
    if rows % groups:
        raise ValueError(f"the rows of a batch must divide over data x fsdp = {groups} devices; got {rows}")
    if length % parts:
        raise ValueError(f"the tokens of a row must divide over context = {parts} devices; got {length}")


def of_batch(mesh: Mesh, batch: types.Batch) -> types.Batch:
    """Returns the NamedSharding of each field of a batch of these shapes: rows over (data, fsdp), length over
    context, crops and windows over tensor and context where these divide them."""
    def sharding(field, value):
        second = "length" if field in LENGTH_FIELDS else "crops"
        second_axes = _dividing(ACTIVATION_RULES[second], value.shape[1], mesh)
        return NamedSharding(mesh, _spec_of((BATCH_AXES, second_axes)))
    return types.Batch(*(sharding(field, value) for field, value in zip(batch._fields, batch)))


def _row_blocks(mesh: Mesh) -> list[list[int]]:
    """Returns for each process which of the data x fsdp blocks of rows its devices hold."""
    per_block = mesh.shape["tensor"] * mesh.shape["context"]
    blocks = np.arange(mesh.size).reshape(mesh.devices.shape) // per_block
    held = [set() for _ in range(1 + max(device.process_index for device in mesh.devices.flat))]
    for block, device in zip(blocks.flat, mesh.devices.flat):
        held[device.process_index].add(int(block))
    return [sorted(one) for one in held]


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): which of `count` equal shares of a batch's rows this process reads.

    Processes that hold parts of the same rows read the same share.

    Raises:
      ValueError: the processes' rows overlap in part.
    """
    held = _row_blocks(mesh)
    shares = sorted(map(list, set(map(tuple, held))))
    if sum(map(len, shares)) != len(set().union(*map(set, shares))) or len(set(map(len, shares))) > 1:
        raise ValueError("every process must hold as many rows, alone or with others that hold the "
                         f"same ones; got {shares} of {dict(mesh.shape)}: tensor x context should divide a "
                         "host's devices or be a multiple of them")
    return shares.index(held[jax.process_index()]), len(shares)


def put(batch: types.Batch, mesh: Mesh) -> types.Batch:
    """Returns the batch as global arrays; `batch` holds the rows of this process's `row_share`.

    Raises:
      ValueError: rows or tokens do not divide over the devices.
    """
    index, count = row_share(mesh)
    own = batch.tokens.shape[0]
    check_batch(mesh, own * count, batch.tokens.shape[1])
    blocks = _row_blocks(mesh)[jax.process_index()]
    size = own // len(blocks)
    place = {block * size + row: i * size + row for i, block in enumerate(blocks) for row in range(size)}

    def whole(sharding, value):
        def part(where):
            rows = range(own * count)[where[0]]
            return value[place[rows[0]]:place[rows[-1]] + 1][(slice(None), *where[1:])]
        return jax.make_array_from_callback((own * count, *value.shape[1:]), sharding, part)

    values = types.Batch(*map(np.asarray, batch))
    return types.Batch(*map(whole, of_batch(mesh, values), values))
