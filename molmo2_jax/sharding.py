"""Mesh axes, and the mesh axes of each logical axis; the only file that names mesh axes.

`data` replicas (also across slices), `fsdp` batch rows and parameters, `tensor` heads and MLP columns,
`context` the sequence. All four always exist; a laptop has one device and sizes of 1.

Parameters are stored sharded over all axes but `data`. Where they are used, the decoder's are gathered over
fsdp and context and stay sharded over tensor. Those of ViT and connector are gathered completely, because
there the crops are sharded over every axis, so that no device repeats another's work on pixels.
"""

import contextlib
import dataclasses
import functools
import math
import pickle
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from molmo2_jax import types

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
PARAMETER_RULES = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
STORAGE_AXES = ("context", "fsdp")
# Logical axes of activations: rows of a batch, rows not split over fsdp, positions, crops or windows of a
# row, crops of all rows, and a width sharded as stored parameters are, or over context alone.
ACTIVATION_RULES = {"rows": BATCH_AXES, "replicas": ("data",), "length": ("context",),
                    "crops": ("tensor", "context"), "all_crops": AXES, "stored": STORAGE_AXES,
                    "partly_stored": ("context",),
                    **{name: (axis,) for name, axis in PARAMETER_RULES.items()}}
LENGTH_FIELDS = frozenset({"tokens", "targets", "weights", "positions", "end", "group", "image", "example",
                           "branch", "choice"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; at most one may be -1 and takes the remaining devices.

    If no axis is set, a training run uses `default_mesh`. If one is set, the others are 1, and fsdp is -1
    unless another axis is.
    """
    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None
    context: int | None = None

    def __post_init__(self):
        sizes = [size for size in dataclasses.astuple(self) if size is not None]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"mesh sizes must be >= 1, one of them may be -1; got {tuple(sizes)}")


def default_mesh(rows: int, num_devices: int, slices: int = 1) -> MeshConfig:
    """Returns the mesh of a run that sets no sizes, for batches of `rows` rows on `num_devices` devices.

    Each group of devices has one row: fsdp is 16-way, its replicas are along data, and devices that are left
    share rows along context. Wider fsdp needs less memory, but the compiler may then replace gathers by sums,
    which cost twice as much. Slices hold replicas: only gradients cross the network between them.
    """
    groups = math.gcd(rows // slices, num_devices // slices)
    fsdp = math.gcd(groups, 16)
    return MeshConfig(data=slices * groups // fsdp, fsdp=fsdp, tensor=1,
                      context=num_devices // slices // groups)


def mesh_sizes(config: MeshConfig, num_devices: int, rows: int | None = None, slices: int = 1) -> list[int]:
    """Returns the devices along each of AXES; `rows`: of a batch, if the mesh is for training."""
    if rows and config == MeshConfig():
        config = default_mesh(rows, num_devices, slices)
    given = dataclasses.astuple(config)
    unset = {"fsdp": 1 if -1 in given else -1}
    sizes = [unset.get(axis, 1) if size is None else size for axis, size in zip(AXES, given)]
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, num_devices // -math.prod(sizes))
    return sizes


def make_mesh(config: MeshConfig, devices=None, rows: int | None = None) -> Mesh:
    """Returns the mesh over `devices` (all of them by default); `rows`: of a batch, if it is for training.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = mesh_sizes(config, len(devices), rows, slices)
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh sizes {dict(zip(AXES, sizes))} must multiply to the number of devices; "
                         f"got {len(devices)} devices for {math.prod(sizes)} (-1 takes what is left)")
    # Explicit axes, the default, make Linen's logical partitioning raise.
    kinds = (AxisType.Auto,) * len(AXES)
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


def mesh_of_first(config: MeshConfig, devices=None) -> Mesh:
    """Returns the mesh over the first `devices` (default: of jax), as many as the sizes need.

    It is over all of them if a size is -1, as fsdp is unless it or another size of -1 is set.

    Raises:
      ValueError: there are fewer devices, or several processes of which some would have no part in the mesh.
    """
    devices = jax.devices() if devices is None else devices
    takes_all = config.fsdp is None or -1 in dataclasses.astuple(config)
    if not takes_all and jax.process_count() == 1:
        devices = devices[:math.prod(size or 1 for size in dataclasses.astuple(config))]
    return make_mesh(config, devices)


def using(mesh: Mesh):
    """Returns a context in which computations are sharded over the mesh; one device needs none."""
    return contextlib.nullcontext() if mesh.size == 1 else jax.set_mesh(mesh)


def _dividing(axes, size: int, mesh) -> tuple[str, ...]:
    """Returns the adjacent axes among `axes` with the largest product that divides `size`."""
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    runs = [axes[i:j] for i in range(len(axes)) for j in range(i + 1, len(axes) + 1)]
    parts = lambda run: math.prod(mesh.shape[axis] for axis in run)
    return max((run for run in runs if size % parts(run) == 0), key=parts, default=())


def _spec_of(per_dimension) -> PartitionSpec:
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in per_dimension))


def _stored(names, shape, mesh) -> PartitionSpec:
    """Returns the mesh axes of each dimension of a parameter as it is stored.

    Heads, MLP columns and vocabulary get the axis of their rule; the rest of STORAGE_AXES and tensor goes to
    "embed", or else to the largest dimension that they divide. Vectors are sharded by the rules only.
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
    """Returns the mesh axes of each dimension of a parameter where it is multiplied."""
    rules = [PARAMETER_RULES.get(name) for name in names]
    return PartitionSpec(*(rule if rule and size % mesh.shape[rule] == 0 else None
                           for rule, size in zip(rules, shape)))


def _mesh_in_use():
    """Returns the mesh of jax.set_mesh; None for one device, and inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def gathered(x, names):
    """Returns a parameter (or its cast) gathered as its multiplication needs it on each device.

    `names` None: it is gathered already.
    """
    mesh = _mesh_in_use()
    if mesh is None or names is None:
        return x
    return jax.lax.with_sharding_constraint(x, _used(names, x.shape, mesh))


def scattered(x, names):
    """Returns a parameter sharded as it is stored; a gradient is summed over devices into that sharding."""
    mesh = _mesh_in_use()
    if mesh is None or names is None:
        return x
    return jax.lax.with_sharding_constraint(x, _stored(names, x.shape, mesh))


def along(x, names, shape, dims: slice):
    """Returns an activation whose last dimensions are `dims` of a parameter, sharded as these are stored.

    Rows stay sharded over `data` alone: a product with a parameter that is not gathered needs all rows that
    share its parts.
    """
    mesh = _mesh_in_use()
    if mesh is None:
        return x
    parts = tuple(_stored(names, shape, mesh))[dims]
    rows = _dividing(("data",), x.shape[0], mesh)
    return jax.lax.with_sharding_constraint(
        x, PartitionSpec(*_spec_of([rows]), *(None,) * (x.ndim - len(parts) - 1), *parts))


def replicate(tree):
    """Returns arrays of which every device has a whole copy, so that every process can read them."""
    if _mesh_in_use() is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def constrain(x, *names):
    """Returns `x` constrained to the sharding that ACTIVATION_RULES gives its axes, one name or None each.

    A mesh axis that does not divide its dimension is left out.
    """
    mesh = _mesh_in_use()
    if mesh is None:
        return x
    parts = [_dividing(ACTIVATION_RULES.get(name, ()), size, mesh) for name, size in zip(names, x.shape)]
    return jax.lax.with_sharding_constraint(x, _spec_of(parts))


def of_activation(mesh: Mesh, shape, *names) -> NamedSharding:
    """Returns the sharding that `constrain` gives an array of this shape on a mesh."""
    return NamedSharding(mesh, _spec_of([_dividing(ACTIVATION_RULES.get(name, ()), size, mesh)
                                         for name, size in zip(names, shape)]))


def on_own_part(function, name: str, *arrays):
    """Returns `function(*arrays)`; each device computes its own part of the arrays' leading dimension,
    which is sharded like the activation axis `name`."""
    mesh = _mesh_in_use()
    if mesh is None:
        return function(*arrays)
    spec = _spec_of([_dividing(ACTIVATION_RULES[name], arrays[0].shape[0], mesh)])
    return jax.shard_map(function, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_rounded(part, axes, place: int, dtype: str):
    """Returns all parts along dimension `place`, sent as `dtype` and returned in the dtype of `part`."""
    return jax.lax.all_gather(part.astype(dtype), axes, axis=place, tiled=True).astype(part.dtype)


def _sum_scattered(grad, axes, place: int):
    """Returns a device's part along dimension `place` of the sum over devices.

    The parts get a dimension of their own: the compiler for TPU sums [4096, 151936] whole otherwise, with
    twice the traffic, as it cannot halve 151936 = 128 x 1187 columns.
    """
    parts = jax.lax.psum(1, axes)
    grad = grad.reshape(*grad.shape[:place], parts, -1, *grad.shape[place + 1:])
    return jax.lax.psum_scatter(grad, axes, scatter_dimension=place, tiled=False)


_gather_rounded.defvjp(
    lambda part, axes, place, dtype: (_gather_rounded(part, axes, place, dtype), None),
    lambda axes, place, dtype, _, grad: (_sum_scattered(grad, axes, place),))


def sum_over_tokens(function, parameter, names, tokens, dtype: str):
    """Returns the sums over devices of `function(parameter, *tokens)`, a tree of scalars, and its gradients.

    Each device applies the function to its own tokens ([B, T, ...] arrays) and the whole parameter, gathered
    once. Gradients of the parameter are then summed over devices once, not in every iteration of a loop
    inside the function.
    """
    mesh = _mesh_in_use()
    # Axes of size 1 are left out: the partitioner refuses to sum if all manual axes have size 1.
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
    """Returns the NamedShardings of a tree of boxed parameters, as `model.init` or its eval_shape returns."""
    def sharding(leaf):
        names, value = (leaf.names, leaf.value) if isinstance(leaf, nn.LogicallyPartitioned) else ((), leaf)
        names = tuple(names) + (None,) * (len(value.shape) - len(names))
        return NamedSharding(mesh, _stored(names, value.shape, mesh))
    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def check_memory(mesh: Mesh, kind: str) -> None:
    """Checks that the mesh's devices can address memory of this kind, such as "pinned_host".

    Raises:
      ValueError: they cannot; the kinds that they can address are listed.
    """
    device = mesh.devices.flat[0]
    known = sorted(memory.kind for memory in device.addressable_memories())
    if kind not in known:
        raise ValueError(f"optim.OptimConfig.offload needs devices that reach memory of kind {kind!r}; got "
                         f"{device.device_kind} with {', '.join(known)}")


class AttentionAxes(NamedTuple):
    """Mesh axes over which attention is sharded, and numbers of parts; empty or None if they do not divide.

    If the length is sharded, devices either exchange it for heads (`exchanges_heads`), or gather the keys and
    values of their whole rows.
    """
    rows: tuple[str, ...]
    heads: str | None
    length: str | None
    num_row_parts: int
    num_length_parts: int
    exchanges_heads: bool


def attention_axes(rows: int, num_heads: int, num_kv_heads: int, length: int) -> AttentionAxes | None:
    """Returns how attention is sharded over the current mesh; None for one device, and inside a shard_map.

    With N query and K key heads, an exchange moves (N + K) / parts heads of queries, outputs, keys and
    values, and gathering moves K heads of keys and values. An exchange needs K to be a multiple of the parts.
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


def check_batch(mesh: Mesh, rows: int, length: int, micro_batches: int = 1) -> None:
    """Checks that `rows` (of all hosts) and their tokens can be split evenly across the devices.

    micro_batches: number of equal parts in which the rows are processed, see train.TrainConfig.accumulate.

    Raises:
      ValueError: they cannot.
    """
    groups, parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES), mesh.shape["context"]
    if rows % groups:
        raise ValueError(f"the rows of a batch must be a multiple of data x fsdp = {groups} devices; "
                         f"got {rows}")
    if rows % (groups * micro_batches):
        raise ValueError("the rows of a batch must be a multiple of train.TrainConfig.accumulate x data x "
                         f"fsdp = {micro_batches} x {groups}; got {rows}")
    if length % parts:
        raise ValueError(f"the tokens of a row must be a multiple of context = {parts} devices; got {length}")


def of_batch(mesh: Mesh, batch: types.Batch) -> types.Batch:
    """Returns the NamedSharding of each field of a batch of these shapes: rows over (data, fsdp), or not at
    all if these do not divide them, length over context, crops and windows over those of tensor and context
    that divide them."""
    groups = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def sharding(field, value):
        if value is None:
            return None
        row_axes = BATCH_AXES if value.shape[0] % groups == 0 else ()
        second = "length" if field in LENGTH_FIELDS else "crops"
        second_axes = _dividing(ACTIVATION_RULES[second], value.shape[1], mesh)
        return NamedSharding(mesh, _spec_of((row_axes, second_axes)))
    return types.Batch(*(sharding(field, value) for field, value in zip(batch._fields, batch)))


def _row_blocks(mesh: Mesh) -> list[list[int]]:
    """Returns for each process the indices of the data x fsdp blocks of rows that its devices hold."""
    per_block = mesh.shape["tensor"] * mesh.shape["context"]
    blocks = np.arange(mesh.size).reshape(mesh.devices.shape) // per_block
    held = [set() for _ in range(1 + max(device.process_index for device in mesh.devices.flat))]
    for block, device in zip(blocks.flat, mesh.devices.flat):
        held[device.process_index].add(int(block))
    return [sorted(one) for one in held]


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): this process reads share `index` of `count` equal shares of a batch's rows.

    Processes that hold parts of the same rows read the same share.

    Raises:
      ValueError: rows of two processes overlap only partly.
    """
    held = _row_blocks(mesh)
    shares = sorted(map(list, set(map(tuple, held))))
    if sum(map(len, shares)) != len(set().union(*map(set, shares))) or len(set(map(len, shares))) > 1:
        raise ValueError("all processes must hold equally many rows, and two processes the same rows or "
                         f"none in common; got {shares} of {dict(mesh.shape)}: tensor x context should "
                         "divide a host's devices or be a multiple of them")
    return shares.index(held[jax.process_index()]), len(shares)


def first_reader(mesh: Mesh) -> int:
    """Returns the first process that reads the first row of a batch."""
    return next(number for number, blocks in enumerate(_row_blocks(mesh)) if 0 in blocks)


def rows_of_share(mesh: Mesh, rows: int) -> int:
    """Returns how many rows each share has of a batch of `rows`, rounded up to a multiple of data x fsdp."""
    groups = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return -(-rows // groups) * groups // row_share(mesh)[1]


def rows_read(mesh: Mesh, rows: int) -> list[list[int]]:
    """Returns for each process which rows of a batch of `rows` it reads, in its order."""
    size = rows // math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return [[block * size + row for block in blocks for row in range(size)] for blocks in _row_blocks(mesh)]


def of_processes(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order; each must call it."""
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int64(len(own))).ravel()
    padded = np.pad(own, (0, sizes.max() - len(own)))
    found = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(found, sizes, strict=True)]


def split(batch, micro_batches: int):
    """Returns the batch with rows [B, ...] as [B / n, n, ...]: micro-batch i has the rows r with r % n = i.

    A device keeps its rows, whatever the mesh: rows are sharded in contiguous blocks of a multiple of n.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), batch)


def micro_batch(split_batch: types.Batch, index) -> types.Batch:
    """Returns micro-batch `index` of a batch from `split`, sharded as a batch is."""
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False), split_batch)
    mesh = _mesh_in_use()
    return one if mesh is None else jax.tree.map(jax.lax.with_sharding_constraint, one, of_batch(mesh, one))


def distribute(value, sharding: NamedSharding) -> jax.Array:
    """Returns an array with this sharding; of a host's array every process holds the whole.

    On a mesh of one device it is an ordinary array of that device, as programs return them.
    """
    if sharding.num_devices == 1:
        return jax.device_put(value, next(iter(sharding.device_set)))
    if isinstance(value, jax.Array):
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def put(batch: types.Batch, mesh: Mesh, micro_batches: int = 1) -> types.Batch:
    """Returns the batch as global arrays; `batch` holds the rows of this process's `row_share`.

    Raises:
      ValueError: rows or tokens cannot be split evenly across the devices.
    """
    index, count = row_share(mesh)
    own = batch.tokens.shape[0]
    check_batch(mesh, own * count, batch.tokens.shape[1], micro_batches)
    place = {row: number for number, row in enumerate(rows_read(mesh, own * count)[jax.process_index()])}

    def whole(sharding, value):
        def part(where):
            rows = range(own * count)[where[0]]
            return value[place[rows[0]]:place[rows[-1]] + 1][(slice(None), *where[1:])]
        return jax.make_array_from_callback((own * count, *value.shape[1:]), sharding, part)

    values = jax.tree.map(np.asarray, batch)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((own * count, *x.shape[1:]), x.dtype), values)
    return jax.tree.map(whole, of_batch(mesh, shapes), values)
