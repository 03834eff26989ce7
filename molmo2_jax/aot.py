"""Compiles a train step for TPUs that are not there: does it fit, what does it move, how fast could it be.

libtpu compiles on any x86 machine for a named slice ("v5p:4x4x8"). What comes back is memory as the compiler
laid it out, and the program, from which collectives are read; operations are counted by formula (flops.py).
"""

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from molmo2_jax import chips as chips_lib
from molmo2_jax import config as config_lib
from molmo2_jax import flops as flops_lib
from molmo2_jax import hlo
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax import types

# Widths of a patch that a layer of the ViT keeps for its backward pass; MLPs are 3.7 wide.
KEPT_BY_VIT = {"full": 1, "attention": 1, "dots": 10, "none": 12}
_QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8",
          "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled",
          "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # libtpu else allows one process at a time, even to compile
# libtpu 0.0.42.1 aborts where it gives sums of a small TPU7x slice to the SparseCores.
_OPTIONS = {"tpu7x": {"xla_tpu_enable_sparse_core_collective_offload_all_reduce": False}}


class DoesNotFit(ValueError):
    """A program that needs more memory than a chip has; both in bytes. `hints` say what may help."""

    def __init__(self, needed: float, available: float, hints: list[str]):
        self.needed, self.available, self.hints = needed, available, hints
        wanted, there = needed / chips_lib.GIB, available / chips_lib.GIB
        super().__init__(f"a step must fit into {there:.1f} GiB per chip; it needs {wanted:.1f} GiB, "
                         f"{wanted - there:.1f} too many; what may help: {'; '.join(hints)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What is known of a compiled step; bytes are those of one device (a chip, or half of a TPU7x),
    operations those of the whole step."""
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    rows: int
    remat: str
    vision_remat: str
    parameters: int
    optimiser: int
    offloaded: int              # the optimiser's, in the hosts' memory
    data: int
    temporaries: int            # activations, gradients, gathered parameters, as laid out, with gaps
    vision: int                 # what the ViT keeps for its backward pass, by formula; not all of it need be
                                # alive at the peak
    peak: int                   # as the compiler reports it, state and data included
    available: int
    flops: flops_lib.Flops
    hardware_flops: float       # recomputation included
    collectives: dict[str, float]   # "ici all-gather": bytes that each chip sends or receives, a step;
                                    # "host": moments, both ways, for which the bound knows no time
    seconds_bound: float        # no step is faster
    bounded_by: str             # "compute", "ici" or "dcn"
    mfu_bound: float
    compile_seconds: float      # of processors, not of the clock: machines are shared

    @property
    def activations(self) -> int:
        """Bytes at the peak that belong to nothing else: activations, gradients, gathered parameters."""
        return max(self.peak - self.parameters - self.optimiser - self.data - self.vision, 0)

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
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
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


def default_mesh(rows: int, num_devices: int, slices: int = 1) -> sharding.MeshConfig:
    """Returns one row per group of devices: 16-way fsdp, data around it, devices that are left in context.

    Wider fsdp needs less memory, but the compiler may then replace gathers by sums, which cost twice as much.
    Slices hold replicas: only gradients cross the network between them.
    """
    groups = math.gcd(rows // slices, num_devices // slices)
    fsdp = math.gcd(groups, 16)
    return sharding.MeshConfig(data=slices * groups // fsdp, fsdp=fsdp,
                               context=num_devices // slices // groups)


def abstract_batch(model: config_lib.Molmo2Config, shape: types.RowShape, rows: int, mesh) -> types.Batch:
    """Returns ShapeDtypeStructs of `rows` rows of `shape`, laid out over the mesh."""
    batch = types.batch_shapes(rows, shape, model.vision.patch_shape)
    sharding.check_batch(mesh, rows, shape.T)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch,
                        sharding.of_batch(mesh, batch))


def lower(model_config, config: train.TrainConfig, optimiser: optim.OptimConfig, shape: types.RowShape,
          rows: int, mesh):
    """Returns (the lowered train step, its abstract state and batch)."""
    model = config.model(model_config)
    tx = optim.make(optimiser, config.steps)
    with jax.set_mesh(mesh):
        state = state_lib.abstract(model, tx, mesh)
        batch = abstract_batch(model_config, shape, rows, mesh)
        layout = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(functools.partial(train.train_step, model, tx, config), donate_argnums=0,
                       out_shardings=(layout, None))
        return step.lower(state, batch), state, batch


def bytes_per_device(tree, on_host: bool = False) -> int:
    """Returns the bytes that one device holds, or has in its host's memory, of a tree of ShapeDtypeStructs
    with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree)
               if on_host == (leaf.sharding.memory_kind not in (None, "device")))


def compile_lowered(lowered, hints: Callable[[], list[str]], chip: chips_lib.Chip):
    """Returns (the program compiled for this kind of chip, seconds of processors that took).

    Raises:
      DoesNotFit: with `hints()`.
    """
    began = time.process_time()
    try:
        return lowered.compile(_OPTIONS.get(chip.name)), time.process_time() - began
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"\(([\d.]+)G\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        raise DoesNotFit(float(sizes[0]) * chips_lib.GIB, float(sizes[1]) * chips_lib.GIB, hints()) from None


def compile_step(model_config, config: train.TrainConfig, optimiser: optim.OptimConfig,
                 shape: types.RowShape, rows: int, topology: str, *, slices: int = 1,
                 mesh_config: sharding.MeshConfig | None = None):
    """Returns (StepReport, text of the compiled program) of one train step.

    Raises:
      ValueError: unknown topology; rows or tokens do not divide over the mesh.
      DoesNotFit: a ValueError that says by how much, and what would help.
    """
    slice_ = chips_lib.find(topology)
    found = devices(topology, slices)
    mesh = sharding.make_mesh(mesh_config or default_mesh(rows, len(found), slices), found)
    lowered, state, batch = lower(model_config, config, optimiser, shape, rows, mesh)
    compiled, seconds = compile_lowered(lowered, lambda: _hints(config, optimiser, shape, rows, mesh),
                                        slice_.chip)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    report = _report(slice_, slices, mesh, rows, config, model_config, shape, state, batch, memory, text,
                     seconds)
    return report, text


def _hints(config, optimiser, shape, rows, mesh) -> list[str]:
    hints = [f"train.TrainConfig.{field} = 'full'" for field in ("remat", "vision_remat")
             if getattr(config, field) not in (None, "full")]
    if config.loss_chunk > 1024:
        hints.append("train.TrainConfig.loss_chunk = 1024")
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows > groups:
        hints.append(f"fewer rows per group of devices (here {rows // groups})")
    context = 2 * mesh.shape["context"]
    if shape.T % context == 0:
        hints.append(f"context = {context} (each device then holds half as many tokens and crops)")
    if mesh.shape["data"] > 1:
        hints.append(f"fsdp = {2 * mesh.shape['fsdp']} instead of data (halves parameters and moments)")
    if not optimiser.offload:
        hints.append("optim.OptimConfig.offload = True (moments in the hosts' memory)")
    return [*hints, "a larger slice"]


def _report(slice_, slices, mesh, rows, config, model_config, shape, state, batch, memory, text,
            seconds) -> StepReport:
    devices = slice_.devices * slices
    model_flops = flops_lib.train_step(model_config, rows=rows, shape=shape)
    again = flops_lib.recomputed(model_config, config.remat, config.vision_remat, rows=rows, shape=shape)
    hardware = model_flops.plus(again).total
    moved = hlo.collectives(text, mesh.size // slices)
    over = lambda network: sum(size for name, size in moved.items() if name.startswith(network))
    times = {"compute": hardware / (devices * slice_.chip.flops), "ici": over("ici") / slice_.chip.ici_rate,
             "dcn": over("dcn") / slice_.chip.dcn_rate}
    bounded_by = max(times, key=times.get)
    crops = rows * shape.M / mesh.size
    v, vision_remat = model_config.vision, config.vision_remat or config.remat
    kept = v.num_layers * KEPT_BY_VIT[vision_remat]
    offloaded = bytes_per_device(state.opt_state, on_host=True)
    moved |= {"host": 2.0 * offloaded} if offloaded else {}
    return StepReport(
        topology=slice_.name, slices=slices, chips=slice_.chips * slices, mesh=dict(mesh.shape), rows=rows,
        remat=config.remat, vision_remat=vision_remat, offloaded=offloaded,
        parameters=bytes_per_device(state.params), optimiser=bytes_per_device(state.opt_state),
        data=bytes_per_device(batch), temporaries=memory.temp_size_in_bytes,
        vision=int(crops * v.num_patches * v.width * jnp.dtype(config.dtype).itemsize * kept),
        peak=memory.peak_memory_in_bytes, available=slice_.chip.memory, flops=model_flops,
        hardware_flops=hardware, collectives=moved, seconds_bound=times[bounded_by], bounded_by=bounded_by,
        mfu_bound=flops_lib.mfu(model_flops.total, times[bounded_by], devices, slice_.chip.flops),
        compile_seconds=seconds)
