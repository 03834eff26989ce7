"""Compiles a train step for absent TPUs, and reports memory, communication and the minimum time of a step.

libtpu compiles on any x86 machine for a named slice ("v5p:4x4x8"). The result is the compiler's memory layout
and the program, from which collectives are read; operations are counted by formula (cost/flops.py).
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
import numpy as np
from jax.experimental import topologies

from molmo2_jax import config as config_lib
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax import types
from molmo2_jax.aot import hints as hints_lib
from molmo2_jax.attention import tpu
from molmo2_jax.cost import bounds
from molmo2_jax.cost import chips as chips_lib
from molmo2_jax.cost import flops as flops_lib
from molmo2_jax.cost import hlo
from molmo2_jax.cost import links

# Values per patch, in ViT widths, that a layer keeps for its backward pass; its MLP is 3.7 widths wide.
KEPT_BY_VIT = {"full": 1, "attention": 1, "dots": 10, "none": 12}
_QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8",
          "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled",
          "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # otherwise libtpu allows one process at a time, even to compile


class DoesNotFit(ValueError):
    """A program needs more memory than a chip has; both in bytes. `hints` say what may help."""

    def __init__(self, needed: float, available: float, hints: list[str]):
        self.needed, self.available, self.hints = needed, available, hints
        wanted, there = needed / chips_lib.GIB, available / chips_lib.GIB
        super().__init__(f"a step must fit into {there:.1f} GiB per chip; it needs {wanted:.1f} GiB, "
                         f"{wanted - there:.1f} too many; what may help: {'; '.join(hints)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """Properties of a compiled step; bytes per device (a chip, or half of a TPU7x), operations of the whole
    step."""
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    rows: int
    accumulate: int             # micro-batches of a step
    remat: str
    vision_remat: str
    parameters: int
    frozen: int = 0             # of these, of the base of adapters, which has no gradient
    optimiser: int
    offloaded: int              # bytes of the optimiser's state in the hosts' memory
    data: int
    temporaries: int            # activations, gradients, gathered parameters, as laid out, with gaps
    vision: int                 # kept by the ViT for its backward pass, by formula; not all of it need be
                                # alive at the peak
    peak: int                   # as reported by the compiler, state and data included
    available: int
    flops: flops_lib.Flops
    hardware_flops: float       # recomputation included
    collectives: dict[str, float]   # "ici all-gather": bytes that each chip sends or receives per step;
                                    # "host": moments, both ways, not in the bound on time
    traffic: tuple[links.Traffic, ...]
    seconds_bound: float        # lower bound on the time of a step
    bounded_by: str             # "compute", "ici" or "dcn"
    mfu_bound: float
    strict: bounds.Strict       # with what the chip does beyond these operations, over the links of the slice
    compile_seconds: float      # CPU time, because machines are shared

    @property
    def activations(self) -> int:
        """Remaining bytes at the peak: activations, gradients, gathered parameters."""
        return max(self.peak - self.parameters - self.optimiser - self.data - self.vision, 0)

    @property
    def headroom(self) -> int:
        return self.available - self.peak


def prepare(draft: bool = False) -> None:
    """Sets this process up to compile for TPU on a CPU; must be called before JAX initialises a device.

    draft: compile with the least effort, in a fifth of the time. A run compiles with the usual effort, which
    overlaps more collectives; its peak was 3% higher (8B pretraining on v5e:8x8: 14.8 instead of 14.4 GiB).
    """
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    if draft:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
        jax.config.update("jax_memory_fitting_effort", -1.0)


def devices(name: str, slices: int = 1) -> list:
    """Returns the devices of `slices` slices called `name`.

    Raises:
      ValueError: there is no such slice (the message lists those that exist), or libtpu is not installed.
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


def abstract_batch(model: config_lib.Molmo2Config, shape: types.RowShape, rows: int, mesh,
                   micro_batches: int = 1) -> types.Batch:
    """Returns ShapeDtypeStructs of `rows` rows of `shape`, sharded over the mesh.

    Raises:
      ValueError: rows or tokens cannot be split evenly across the mesh.
    """
    batch = types.batch_shapes(rows, shape, model.vision.patch_shape, model.pointer is not None)
    sharding.check_batch(mesh, rows, shape.T, micro_batches)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch,
                        sharding.of_batch(mesh, batch))


def lower(model_config, config: train.TrainConfig, optimiser: optim.OptimConfig, shape: types.RowShape,
          rows: int, mesh):
    """Returns (the lowered train step, its abstract state, batch and frozen parameters, None without).

    Raises:
      ValueError: rows or tokens cannot be split evenly across the mesh.
    """
    model = config.model(model_config)
    tx = optim.make(optimiser, config.steps)
    with jax.set_mesh(mesh):
        state = state_lib.abstract(model, tx, mesh, config.lora)
        base = state_lib.abstract_base(model, mesh, config.lora, config.dtype)
        batch = abstract_batch(model_config, shape, rows, mesh, config.accumulate)
        layout = jax.tree.map(lambda x: x.sharding, state)
        lowered = train.jitted_step(model, tx, config, layout, mesh).lower(state, batch, base)
        return lowered, state, batch, base


def bytes_per_device(tree, on_host: bool = False) -> int:
    """Returns the bytes per device of a tree of ShapeDtypeStructs with shardings, on the device or, with
    `on_host`, in its host's memory."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree)
               if on_host == (leaf.sharding.memory_kind not in (None, "device")))


def compile_lowered(lowered, hints: Callable[[float, float], list[str]]):
    """Returns (the compiled program, CPU seconds that took).

    Raises:
      DoesNotFit: with `hints(needed, available)`, both in bytes.
    """
    began = time.process_time()
    try:
        return lowered.compile(), time.process_time() - began
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"\(([\d.]+)G\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        needed, available = (float(size) * chips_lib.GIB for size in sizes[:2])
        raise DoesNotFit(needed, available, hints(needed, available)) from None


def compile_step(model_config, config: train.TrainConfig, optimiser: optim.OptimConfig,
                 shape: types.RowShape, rows: int, topology: str, *, slices: int = 1,
                 mesh_config: sharding.MeshConfig = sharding.MeshConfig(), fill: bounds.Fill = bounds.Fill()):
    """Returns (StepReport, text of the compiled program) of one train step.

    `fill` of the rows counts in the strict bound only.

    Raises:
      ValueError: unknown topology; rows or tokens cannot be split evenly across the mesh.
      DoesNotFit: a ValueError that says by how much, and what may help.
    """
    slice_ = chips_lib.find(topology)
    found = devices(topology, slices)
    mesh = sharding.make_mesh(mesh_config, found, rows // config.accumulate)
    lowered, state, batch, base = lower(model_config, config, optimiser, shape, rows, mesh)
    hints = functools.partial(_hints, model_config, config, state, batch, base, rows, mesh)
    compiled, seconds = compile_lowered(lowered, hints)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    report = _report(slice_, slices, mesh, rows, config, model_config, shape, state, batch, base, memory,
                     text, seconds, fill)
    return report, text


def _hints(model_config, config, state, batch, base, rows, mesh, needed, available) -> list[str]:
    """Returns changes that are computed to make the step fit, and the search that compiles others."""
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    computed = hints_lib.fitting(
        needed=needed, available=available, parameters=bytes_per_device(state.params),
        optimiser=bytes_per_device(state.opt_state), data=bytes_per_device(batch) + bytes_per_device(base),
        fixed=hints_lib.gathered(model_config, mesh.shape["tensor"]), accumulate=config.accumulate,
        rows_per_group=rows // groups // config.accumulate, data_axis=mesh.shape["data"],
        fsdp_axis=mesh.shape["fsdp"])
    return [*computed, "launch.compile --fit compiles combinations"]


def execution(model_config, slice_: chips_lib.Slice, shape: types.RowShape,
              tensor: int) -> flops_lib.Execution:
    """Returns how the chips execute a step's products: attention of decoder and ViT by the TPU's kernel."""
    patches, text = model_config.vision.num_patches, model_config.text
    return flops_lib.Execution(
        side=slice_.chip.matrix_side, tensor=tensor,
        tiles=tpu.tile_lengths(shape.T, shape.T, text.num_heads // text.num_kv_heads),
        vit_tiles=tpu.tile_lengths(patches, patches, 1), backward=tpu.BACKWARD_PRODUCTS)


def _report(slice_, slices, mesh, rows, config, model_config, shape, state, batch, base, memory, text,
            seconds, fill) -> StepReport:
    devices = slice_.devices * slices
    trained = state_lib.trained_parts(config.model(model_config), config.lora)
    model_flops = flops_lib.train_step(model_config, rows=rows, shape=shape, trained=trained)
    again = flops_lib.recomputed(model_config, config.remat, config.vision_remat, rows=rows, shape=shape,
                                 trained=trained)
    hardware = model_flops.plus(again).total
    found = hlo.find_collectives(text, mesh.size // slices)
    moved = hlo.totals(found)
    places = np.array([device.coords[:slice_.chip.dimensions] for device in mesh.devices.flat])
    traffic = links.traffic(found, places, slice_)
    strict = bounds.strict(model_config, config.remat, config.vision_remat, rows=rows, shape=shape,
                           how=execution(model_config, slice_, shape, mesh.shape["tensor"]), traffic=traffic,
                           slice_=slice_, slices=slices, fill=fill, trained=trained)
    over = lambda network: sum(size for name, size in moved.items() if name.startswith(network))
    times = {"compute": hardware / (devices * slice_.chip.flops), "ici": over("ici") / slice_.chip.ici_rate,
             "dcn": over("dcn") / slice_.chip.dcn_rate}
    bounded_by = max(times, key=times.get)
    crops = rows * shape.M / mesh.size / config.accumulate
    v, vision_remat = model_config.vision, config.vision_remat or config.remat
    kept = v.num_layers * KEPT_BY_VIT[vision_remat] if trained.reached("vit") else 0
    offloaded = bytes_per_device(state.opt_state, on_host=True)
    moved |= {"host": 2.0 * offloaded} if offloaded else {}
    return StepReport(
        topology=slice_.name, slices=slices, chips=slice_.chips * slices, mesh=dict(mesh.shape), rows=rows,
        accumulate=config.accumulate, remat=config.remat, vision_remat=vision_remat, offloaded=offloaded,
        parameters=bytes_per_device((state.params, base)), frozen=bytes_per_device(base),
        optimiser=bytes_per_device(state.opt_state),
        data=bytes_per_device(batch), temporaries=memory.temp_size_in_bytes,
        vision=int(crops * v.num_patches * v.width * jnp.dtype(config.dtype).itemsize * kept),
        peak=memory.peak_memory_in_bytes, available=slice_.chip.memory, flops=model_flops,
        hardware_flops=hardware, collectives=moved, traffic=traffic,
        strict=strict, seconds_bound=times[bounded_by], bounded_by=bounded_by,
        mfu_bound=flops_lib.mfu(model_flops.total, times[bounded_by], devices, slice_.chip.flops),
        compile_seconds=seconds)
