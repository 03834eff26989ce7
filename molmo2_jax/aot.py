"""Compiles a train step for TPUs that are not there: does it fit, what does it move, how fast could it be.

libtpu compiles on any x86 machine for a named slice ("v5p:4x4x8"). What comes back is memory as the compiler
laid it out, and the program, from which collectives are read; operations are counted by formula (flops.py).
"""

import collections
import dataclasses
import functools
import math
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from molmo2_jax import chips as chips_lib
from molmo2_jax import config as config_lib
from molmo2_jax import flops as flops_lib
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax import types
from molmo2_jax.model import molmo2

GIB = 2**30
_QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8",
          "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled",
          "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # libtpu else allows one process at a time, even to compile


class DoesNotFit(ValueError):
    """A program that needs more memory than a chip has; both in bytes."""

    def __init__(self, needed: float, available: float, hints: list[str]):
        self.needed, self.available = needed, available
        super().__init__(f"a step must fit into {available / GIB:.1f} GiB per chip; it needs "
                         f"{needed / GIB:.1f} GiB, {(needed - available) / GIB:.1f} too many; what may help: "
                         + "; ".join(hints))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What is known of a compiled step; bytes are those of one chip, operations those of the whole step."""
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    rows: int
    remat: str
    parameters: int
    optimiser: int
    data: int
    temporaries: int            # activations, gradients, gathered parameters
    vision: int                 # what the ViT keeps for its backward pass, by formula; part of temporaries
    peak: int                   # as the compiler reports it
    available: int
    flops: flops_lib.Flops
    hardware_flops: float       # recomputation included
    collectives: dict[str, float]   # "ici all-gather": bytes that each chip sends or receives, a step
    seconds_bound: float        # no step is faster
    bounded_by: str             # "compute", "ici" or "dcn"
    mfu_bound: float
    compile_seconds: float

    @property
    def headroom(self) -> int:
        return self.available - self.peak


def prepare() -> None:
    """Makes this process one that compiles for TPU on a CPU; call it before anything touches a device."""
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    # A fifth of the time; peak memory differs by a few percent.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    jax.config.update("jax_memory_fitting_effort", -1.0)


def devices(name: str, slices: int = 1) -> list:
    """Returns the devices of `slices` slices called `name`.

    Raises:
      ValueError: there is no such slice; those that exist are listed. Or libtpu is not installed.
    """
    chips_lib.find(name)
    options = {"num_slices": slices} if slices > 1 else {}
    if chips_lib.find(name).chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=chips_lib.find(name).name, **options)
        return list(described.devices)
    except Exception as error:
        if "libtpu" in str(error) or "UNIMPLEMENTED" in str(error):
            raise ValueError("compiling for TPU needs libtpu: pip install libtpu==0.0.42.1") from error
        raise


def default_mesh(rows: int, num_devices: int) -> sharding.MeshConfig:
    """Returns one row per group of devices: 16-way fsdp, data around it, devices that are left in context.

    Wider fsdp needs less memory, but the compiler may then replace gathers by sums, which cost twice as much.
    """
    groups = math.gcd(rows, num_devices)
    fsdp = math.gcd(groups, 16)
    return sharding.MeshConfig(data=groups // fsdp, fsdp=fsdp, context=num_devices // groups)


def abstract_batch(model: config_lib.Molmo2Config, shape: dict[str, int], rows: int, mesh) -> types.Batch:
    """Returns ShapeDtypeStructs of `rows` rows of `shape` (T, M, R and W), laid out over the mesh."""
    T, M, R, W = (shape[letter] for letter in "TMRW")
    ints = jax.ShapeDtypeStruct((rows, T), jnp.int32)
    batch = types.Batch(*(ints,) * len(types.Batch._fields))._replace(
        weights=jax.ShapeDtypeStruct((rows, T), jnp.float32),
        patches=jax.ShapeDtypeStruct((rows, M, model.vision.num_patches, model.vision.patch_values),
                                     jnp.uint8),
        pooled=jax.ShapeDtypeStruct((rows, R, W), jnp.int32))
    sharding.check_batch(mesh, rows, T)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch,
                        sharding.of_batch(mesh, batch))


def lower(model_config, config: train.TrainConfig, optimiser: optim.OptimConfig, shape: dict[str, int],
          rows: int, mesh):
    """Returns (the lowered train step, its abstract state and batch)."""
    model = molmo2.Molmo2(model_config, config.dtype, config.remat, config.attention)
    tx = optim.make(optimiser, config.steps)
    with jax.set_mesh(mesh):
        state = state_lib.abstract(model, tx, mesh)
        batch = abstract_batch(model_config, shape, rows, mesh)
        layout = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(functools.partial(train.train_step, model, tx, config), donate_argnums=0,
                       out_shardings=(layout, None))
        return step.lower(state, batch), state, batch


def bytes_per_device(tree) -> int:
    """Returns the bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def compile_step(model_config, config: train.TrainConfig, optimiser: optim.OptimConfig,
                 shape: dict[str, int], rows: int, topology: str, *, slices: int = 1,
                 mesh_config: sharding.MeshConfig | None = None):
    """Returns (Report, text of the compiled program) of one train step.

    Raises:
      ValueError: unknown topology; rows or tokens do not divide over the mesh.
      DoesNotFit: a ValueError that says by how much, and what would help.
    """
    slice_ = chips_lib.find(topology)
    found = devices(topology, slices)
    mesh = sharding.make_mesh(mesh_config or default_mesh(rows, len(found)), found)
    lowered, state, batch = lower(model_config, config, optimiser, shape, rows, mesh)
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"\(([\d.]+)G\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        raise DoesNotFit(float(sizes[0]) * GIB, float(sizes[1]) * GIB,
                         _hints(config, shape, rows, mesh)) from None
    seconds = time.monotonic() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    report = _report(slice_, slices, mesh, rows, config, model_config, shape, state, batch, memory, text,
                     seconds)
    return report, text


def _hints(config, shape, rows, mesh) -> list[str]:
    hints = []
    if config.remat != "full":
        hints.append("train.TrainConfig.remat = 'full'")
    if config.loss_chunk > 1024:
        hints.append("train.TrainConfig.loss_chunk = 1024")
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows > groups:
        hints.append(f"fewer rows per group of devices (here {rows // groups})")
    context = 2 * mesh.shape["context"]
    if shape["T"] % context == 0:
        hints.append(f"context = {context} (each device then holds half as many tokens and crops)")
    if mesh.shape["data"] > 1:
        hints.append(f"fsdp = {2 * mesh.shape['fsdp']} instead of data (halves parameters and moments)")
    return [*hints, "a larger slice"]


def _report(slice_, slices, mesh, rows, config, model_config, shape, state, batch, memory, text,
            seconds) -> Report:
    chips = slice_.chips * slices
    model_flops = flops_lib.train_step(model_config, rows=rows, **shape)
    once = flops_lib.train_step(model_config, rows=rows, **shape).times(1 / 3)
    hardware = model_flops.total + flops_lib.recomputed(once, config.remat).total
    moved = collectives(text, mesh.size // slices)
    over = lambda network: sum(size for name, size in moved.items() if name.startswith(network))
    times = {"compute": hardware / (chips * slice_.chip.flops), "ici": over("ici") / slice_.chip.ici_rate,
             "dcn": over("dcn") / slice_.chip.dcn_rate}
    bounded_by = max(times, key=times.get)
    crops = rows * shape["M"] / mesh.size
    v = model_config.vision
    kept = v.num_layers if config.remat != "none" else 12 * v.num_layers
    return Report(
        topology=slice_.name, slices=slices, chips=chips, mesh=dict(mesh.shape), rows=rows,
        remat=config.remat,
        parameters=bytes_per_device(state.params), optimiser=bytes_per_device(state.opt_state),
        data=bytes_per_device(batch), temporaries=memory.temp_size_in_bytes,
        vision=int(crops * v.num_patches * v.width * jnp.dtype(config.dtype).itemsize * kept),
        peak=memory.peak_memory_in_bytes, available=slice_.chip.memory, flops=model_flops,
        hardware_flops=hardware, collectives=moved, seconds_bound=times[bounded_by], bounded_by=bounded_by,
        mfu_bound=flops_lib.mfu(model_flops.total, times[bounded_by], chips, slice_.chip.flops),
        compile_seconds=seconds)


# ---- collectives of a compiled program ----

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "s64": 8, "u64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: its kind, bytes of its larger side on one device, devices that take part in each group,
    how often it runs in a step, whether its groups span slices, and the shapes of its result."""
    kind: str
    size: int
    group: int
    times: int
    spans_slices: bool
    shapes: tuple[tuple[int, ...], ...]

    @property
    def traffic(self) -> float:
        """Bytes that a device sends in all, by the usual ring algorithms."""
        factor = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.times * self.size * factor * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str, devices_per_slice: int) -> dict[str, float]:
    """Returns bytes of one step by network and kind, "ici all-gather" and so on."""
    totals = collections.Counter()
    for one in find_collectives(text, devices_per_slice):
        totals[f"{'dcn' if one.spans_slices else 'ici'} {one.kind}"] += one.traffic
    return dict(totals)


def find_collectives(text: str, devices_per_slice: int) -> list[Collective]:
    """Returns the collectives of a compiled program; those of one device alone are left out.

    The compiler writes a reduce-scatter as an all-reduce in a fusion that is called all-reduce-scatter.
    """
    bodies = _computations(text)
    times, found = _times(bodies), []
    for name, lines in bodies.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(", line)
            if not match or not times[name]:
                continue
            kind = "reduce-scatter" if "all-reduce-scatter" in name else match[2]
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            arrays = [(width, tuple(map(int, filter(None, dims.split(","))))) for width, dims in arrays]
            sizes = [_WIDTH.get(width, 4) * math.prod(dims) for width, dims in arrays]
            size = max(sizes) if match[3] or kind == "collective-permute" else sum(sizes)
            group, spans = _groups(line, devices_per_slice)
            if kind == "reduce-scatter" and match[2] == "reduce-scatter":
                size *= group
            if group > 1:
                found.append(Collective(kind, size, group, times[name], spans,
                                        tuple(dims for _, dims in arrays)))
    return found


def _computations(text: str) -> dict[str, list[str]]:
    bodies, name = {}, None
    for line in text.splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if start:
            name = start[1]
            bodies[name] = []
            if line.startswith("ENTRY"):
                bodies[""] = [f"calls=%{name}"]
        elif name is not None:
            bodies[name].append(line)
    return bodies


def _times(bodies: dict[str, list[str]]) -> collections.Counter:
    """Returns how often each computation runs in a step.

    A loop runs as often as the one constant in its condition says; with none or several, it counts once.
    """
    def length(line):
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        found = re.findall(r"constant\((\d+)\)", "".join(bodies.get(condition[1], ()) if condition else ()))
        return int(found[0]) if len(found) == 1 else 1

    calls = collections.defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            for what, called in re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line):
                calls[name].append((called, length(line) if what == "body" else 1))
            for several in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
                calls[name] += [(called.strip().lstrip("%"), 1) for called in several.split(",")]
    times, waiting = collections.Counter(), [("", 1)]
    while waiting:
        name, factor = waiting.pop()
        times[name] += factor
        waiting += [(called, factor * count) for called, count in calls[name]]
    return times


def _groups(line: str, devices_per_slice: int) -> tuple[int, bool]:
    """Returns (devices in a group, whether groups span slices)."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        ids = list(map(int, listed[1].split(",")))
        return len(ids), len({i // devices_per_slice for i in ids}) > 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        ids = np.arange(int(iota[1]) * int(iota[2])).reshape(list(map(int, iota[3].split(","))))
        if iota[4]:
            ids = ids.transpose(list(map(int, iota[4].split(","))))
        first = ids.reshape(int(iota[1]), int(iota[2]))[0]
        return len(first), len(set(first // devices_per_slice)) > 1
    named = re.search(r"replica_groups=mesh\[(.*?)\]"
                      r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        ids = np.arange(math.prod(map(int, axes.values())))
        if named[2]:
            ids = ids.reshape(list(map(int, named[2].split(","))))
            ids = ids.transpose(list(map(int, named[3].split(",")))) if named[3] else ids
        inside = re.findall(r"'(\w+)'", named[4])
        first = ids.reshape(list(map(int, axes.values())))[
            tuple(slice(None) if axis in inside else 0 for axis in axes)].ravel()
        return len(first), len(set(first // devices_per_slice)) > 1
    pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
    spans = any(int(a) // devices_per_slice != int(b) // devices_per_slice for a, b in pairs)
    return 2 if pairs else 1, spans
