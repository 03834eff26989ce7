"""Compiles a run's train step for a TPU slice, on this machine and without a TPU: fits, moves, could take.

  python -m launch.compile --gin_file=gin_configs/runs/sft_8b.gin --topology=v5p:4x4x8
  python -m launch.compile --gin_file=gin_configs/runs/sft_4b.gin --topology=v6e-256 --output=plan.json

--topology is chip and sides ("v5p:4x4x8", 128 chips) or the cloud's name ("v5p-256"). Unless the run names
the sizes of its mesh (sharding.MeshConfig), a group of devices has one row, and fsdp is 16-way. --fit tries
several meshes and kinds of rematerialisation and recommends the fastest that fits, within --tries and
--minutes. Needs libtpu (pip install libtpu==0.0.42.1); a full-size step takes minutes and 2 GB.

--what=generate compiles reading a prompt, as long as a row of training, and writing an answer to it, as
launch.generate does: on one chip.
"""

import dataclasses
import functools
import json
import math
import pathlib

from absl import flags

from launch import cli
from molmo2_jax import aot
from molmo2_jax import aot_fit
from molmo2_jax import aot_generate
from molmo2_jax import chips
from molmo2_jax import sharding

_TOPOLOGY = flags.DEFINE_string("topology", None, 'Slice, such as "v5p:4x4x8" or "v5p-256".')
_SLICES = flags.DEFINE_integer("slices", 1, "Slices, joined over the data centre network.", lower_bound=1)
_FIT = flags.DEFINE_bool("fit", False, "Search mesh and rematerialisation for the fastest that fits.")
_TRIES = flags.DEFINE_integer("tries", 6, "Most compilations of --fit.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 30.0, "Time after which --fit begins no more compilations.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "generate"], "The step of training, or answering.")
for _name in ("gin_file", "gin", "output", "max_new_tokens", "dtype", "traceback"):
    flags.declare_key_flag(_name)

OWN = sharding.MeshConfig()


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    if not _TOPOLOGY.value:
        raise ValueError("--topology must name a TPU slice, such as v5p:4x4x8; known are "
                         + ", ".join(one.name for one in chips.known()))
    chips.find(_TOPOLOGY.value)
    config = cli.resolve("data", *(("optim", "train") if _WHAT.value == "train" else ()))
    aot.prepare()
    if _WHAT.value == "generate":
        report = aot_generate.compile_answers(config.model, config.data.shape(config.model), _TOPOLOGY.value,
                                              new_tokens=cli.MAX_NEW_TOKENS.value, dtype=cli.DTYPE.value)
    elif _FIT.value:
        report = fit(config, _TOPOLOGY.value, _SLICES.value)
    else:
        report = compile_one(config, _TOPOLOGY.value, _SLICES.value)
    print(table(report) if _WHAT.value == "train" else answers_table(report))
    if cli.OUTPUT.value:
        pathlib.Path(cli.OUTPUT.value).write_text(json.dumps(as_dict(report), indent=1), encoding="utf-8")


def fit(config, topology: str, slices: int) -> aot.Report:
    """Returns the report of the fastest of the candidates that fits; see aot_fit.search."""
    def compile_candidate(mesh, remat):
        train = dataclasses.replace(config.train, remat=remat)
        return compile_one(dataclasses.replace(config, train=train, mesh=mesh), topology, slices)

    found = aot_fit.candidates(config.data.batch_rows, config.data.row_tokens, chips.find(topology).chips,
                               slices)
    return aot_fit.search(compile_candidate, found, tries=_TRIES.value, seconds=60 * _MINUTES.value,
                          say=functools.partial(print, flush=True))


def compile_one(config, topology: str, slices: int = 1) -> aot.Report:
    """Returns the report of the run's step, on its own mesh or, if it names none, on the default one."""
    return aot.compile_step(
        config.model, config.train, config.optim, config.data.shape(config.model), config.data.batch_rows,
        topology, slices=slices, mesh_config=None if config.mesh == OWN else config.mesh)[0]


def as_dict(report: aot.Report | aot_generate.Report) -> dict:
    derived = {name: getattr(report, name) for name in ("headroom", "activations") if hasattr(report, name)}
    return dataclasses.asdict(report) | {"flops": report.flops._asdict()} | derived


def answers_table(report: aot_generate.Report) -> str:
    """Returns what a person reads of --what=generate."""
    gib = lambda size: f"{size / aot.GIB:8.2f} GiB"
    return "\n".join([
        f"{report.topology}, one chip: a prompt of {report.prompt_tokens} tokens and {report.crops} crops, "
        f"answer of up to {report.new_tokens} tokens, {report.dtype}",
        f"  parameters               {gib(report.parameters)}",
        f"  kept keys and values     {gib(report.memory)}",
        f"  peak, reading            {gib(report.prefill_peak)} of {report.available / aot.GIB:.2f}",
        f"  peak, writing            {gib(report.decode_peak)}, {report.headroom / aot.GIB:.2f} left",
        f"operations to read it      {report.flops.total:.4g}: no faster than {report.prefill_seconds:.3f} s",
        f"a token takes at least     {report.token_seconds * 1000:.2f} ms: all weights and keys are read",
        f"compiled in                {report.compile_seconds:.0f} s of a core"])


def table(report: aot.Report) -> str:
    """Returns what a person reads."""
    gib = lambda size: f"{size / aot.GIB:8.2f} GiB"
    share = lambda part: f"{part:.3g} ({part / report.flops.total:.0%})"
    moved = [f"  {name:24s} {gib(size)}" for name, size in sorted(report.collectives.items())]
    sizes = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    return "\n".join([
        f"{report.slices} x {report.topology}: {report.chips} chips, {sizes}; {report.rows} rows, "
        f"remat {report.remat!r}, ViT {report.vision_remat!r}",
        "bytes per chip",
        f"  parameters               {gib(report.parameters)}",
        f"  optimiser                {gib(report.optimiser)}"
        + (f", and {gib(report.offloaded).strip()} in the host's memory" if report.offloaded else ""),
        f"  data                     {gib(report.data)}",
        f"  activations, gradients   {gib(report.activations)}",
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
        f"compiled in                {report.compile_seconds:.0f} s of a core"])


if __name__ == "__main__":
    cli.start(main)
