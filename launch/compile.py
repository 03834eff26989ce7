"""Compiles a run's train step for a TPU slice, on this machine and without a TPU: fits, moves, could take.

  python -m launch.compile --gin_file=gin_configs/runs/sft_8b.gin --topology=v5p:4x4x8
  python -m launch.compile --gin_file=gin_configs/runs/sft_4b.gin --topology=v6e-256 --output=plan.json

--topology is chip and sides ("v5p:4x4x8", 128 chips) or the cloud's name ("v5p-256"). Unless the run names
the sizes of its mesh (sharding.MeshConfig), a group of devices has one row, and fsdp is 16-way. --fit tries
several meshes and kinds of rematerialisation and recommends the fastest that fits. Needs libtpu (pip install
libtpu==0.0.42.1); a full-size step takes one to several minutes and 2 GB.
"""

import dataclasses
import json
import math
import pathlib

from absl import flags

from launch import cli
from molmo2_jax import aot
from molmo2_jax import chips
from molmo2_jax import sharding

_TOPOLOGY = flags.DEFINE_string("topology", None, 'Slice, such as "v5p:4x4x8" or "v5p-256".')
_SLICES = flags.DEFINE_integer("slices", 1, "Slices, joined over the data centre network.", lower_bound=1)
_FIT = flags.DEFINE_bool("fit", False, "Search mesh and rematerialisation for the fastest that fits.")
_TRIES = flags.DEFINE_integer("tries", 6, "Most compilations of --fit.", lower_bound=1)
for _name in ("gin_file", "gin", "output", "traceback"):
    flags.declare_key_flag(_name)

OWN = sharding.MeshConfig()


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    if not _TOPOLOGY.value:
        raise ValueError("--topology must name a TPU slice, such as v5p:4x4x8; known are "
                         + ", ".join(one.name for one in chips.known()))
    chips.find(_TOPOLOGY.value)
    config = cli.resolve("data", "optim", "train")
    aot.prepare()
    if _FIT.value:
        report = fit(config, _TOPOLOGY.value, _SLICES.value, _TRIES.value)
    else:
        report = compile_one(config, None if config.mesh == OWN else config.mesh, config.train.remat)
    print(table(report))
    if cli.OUTPUT.value:
        pathlib.Path(cli.OUTPUT.value).write_text(json.dumps(as_dict(report), indent=1), encoding="utf-8")


def compile_one(config, mesh: sharding.MeshConfig | None, remat: str) -> aot.Report:
    return aot.compile_step(
        config.model, dataclasses.replace(config.train, remat=remat), config.optim,
        config.data.shape(config.model), config.data.batch_rows, _TOPOLOGY.value, slices=_SLICES.value,
        mesh_config=mesh)[0]


def candidates(rows: int, length: int, num_devices: int) -> list[tuple[sharding.MeshConfig, str]]:
    """Returns (mesh, remat) to try: least communication first, with one row per group of devices or fewer."""
    found = []
    for context in (1, 2, 4, 8):
        groups = num_devices // context
        if num_devices % context or length % context or rows % groups:
            continue
        for fsdp in (16, 32, 8):
            if groups % fsdp == 0:
                mesh = sharding.MeshConfig(data=groups // fsdp, fsdp=fsdp, context=context)
                found += [(mesh, "dots"), (mesh, "full")]
    return found


def fit(config, topology: str, slices: int, tries: int) -> aot.Report:
    """Returns the report with the lowest bound on a step's time among the first candidates that fit.

    Raises:
      ValueError: none fits; the nearest miss is told.
    """
    num_devices = chips.find(topology).chips * slices
    best, misses = None, []
    shape = config.data.shape(config.model)
    for mesh, remat in candidates(config.data.batch_rows, shape["T"], num_devices)[:tries]:
        try:
            report = compile_one(config, mesh, remat)
        except aot.DoesNotFit as miss:
            misses.append(miss)
            too_many = (miss.needed - miss.available) / aot.GIB
            print(f"{mesh}, remat {remat!r}: {too_many:.1f} GiB too many")
            continue
        print(f"{mesh}, remat {remat!r}: {report.seconds_bound:.2f} s, "
              f"{report.headroom / aot.GIB:.1f} GiB left")
        if best is None or report.seconds_bound < best.seconds_bound:
            best = report
    if best is None:
        raise min(misses, key=lambda miss: miss.needed) if misses else ValueError(
            f"the rows of a batch must divide over the {num_devices} devices, alone or in groups of 2, 4 or "
            f"8; got {config.data.batch_rows}")
    return best


def as_dict(report: aot.Report) -> dict:
    return dataclasses.asdict(report) | {"flops": report.flops._asdict(), "headroom": report.headroom}


def table(report: aot.Report) -> str:
    """Returns what a person reads."""
    gib = lambda size: f"{size / aot.GIB:8.2f} GiB"
    share = lambda part: f"{part:.3g} ({part / report.flops.total:.0%})"
    activations = max(report.temporaries - report.vision, 0)
    moved = [f"  {name:24s} {gib(size)}" for name, size in sorted(report.collectives.items())]
    sizes = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    return "\n".join([
        f"{report.slices} x {report.topology}: {report.chips} chips, {sizes}; {report.rows} rows, "
        f"remat {report.remat!r}",
        "bytes per chip",
        f"  parameters               {gib(report.parameters)}",
        f"  optimiser                {gib(report.optimiser)}",
        f"  data                     {gib(report.data)}",
        f"  activations, gradients   {gib(activations)}",
        f"  ViT, kept for backward   {gib(report.vision)}",
        f"  peak                     {gib(report.peak)} of {report.available / aot.GIB:.2f}, "
        f"{report.headroom / aot.GIB:.2f} left",
        f"operations of a step       {report.flops.total:.4g}: ViT {share(report.flops.vit)}, connector "
        f"{share(report.flops.connector)}, decoder {share(report.flops.decoder)}, attention "
        f"{share(report.flops.attention)}",
        f"  with recomputation       {report.hardware_flops:.4g}",
        "bytes moved per chip and step", *moved,
        f"no step takes less than    {report.seconds_bound:.3f} s (bounded by {report.bounded_by}); "
        f"MFU {report.mfu_bound:.1%} at most" if math.isfinite(report.mfu_bound) else "",
        f"compiled in                {report.compile_seconds:.0f} s"])


if __name__ == "__main__":
    cli.start(main)
