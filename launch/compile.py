"""Compiles a run's train step for a TPU slice, on this machine and without a TPU: fits, moves, could take.

  python -m launch.compile --gin_file=gin_configs/runs/sft_8b.gin --topology=v5p:4x4x8
  python -m launch.compile --gin_file=gin_configs/runs/sft_4b.gin --topology=v6e-256 --output=plan.json

--topology is chip and sides ("v5p:4x4x8", 128 chips) or the cloud's name ("v5p-256"). Unless the run names
the sizes of its mesh (sharding.MeshConfig), a group of devices has one row, and fsdp is 16-way: not the mesh
that launch.train takes without being told (fsdp over all devices), so the --gin flags for it are printed.
--fit tries several meshes and kinds of rematerialisation and recommends the fastest that fits, within --tries
and --minutes. Needs libtpu (pip install libtpu==0.0.42.1); a full-size step takes minutes and 2 GB.

--what=generate compiles reading a prompt, as long as a row of training, and writing an answer to it, as
launch.generate does: on one chip.
"""

import dataclasses
import functools
import math
import pathlib

from absl import flags

from launch import cli
from molmo2_jax import aot
from molmo2_jax import aot_fit
from molmo2_jax import aot_generate
from molmo2_jax import chips
from molmo2_jax import files
from molmo2_jax import sharding

_TOPOLOGY = flags.DEFINE_string("topology", None, 'Slice, such as "v5p:4x4x8" or "v5p-256".')
_SLICES = flags.DEFINE_integer("slices", 1, "Slices, joined over the data centre network.", lower_bound=1)
_FIT = flags.DEFINE_bool("fit", False, "Search mesh and rematerialisation for the fastest that fits.")
_TRIES = flags.DEFINE_integer("tries", 6, "Most compilations of --fit.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 30.0, "Time after which --fit begins no more compilations.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "generate"], "The step of training, or answering.")
for _name in ("gin_file", "gin", "workdir", "output", "max_new_tokens", "dtype", "traceback"):
    flags.declare_key_flag(_name)

OWN = sharding.MeshConfig()


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    if not _TOPOLOGY.value:
        raise ValueError("--topology must name a TPU slice, such as v5p:4x4x8; known are "
                         + ", ".join(f"{one.name} ({one.cloud_name})" for one in chips.known()))
    chips.find(_TOPOLOGY.value)
    config = cli.resolve("data", *(("optim", "train") if _WHAT.value == "train" else ()))
    aot.prepare()
    if _WHAT.value == "generate":
        answers = aot_generate.compile_answers(config.model, config.data.shape(config.model), _TOPOLOGY.value,
                                               new_tokens=cli.MAX_NEW_TOKENS.value, dtype=cli.DTYPE.value)
        result = as_dict(answers)
        print(answers_table(answers))
    else:
        report = (fit if _FIT.value else compile_one)(config, _TOPOLOGY.value, _SLICES.value)
        result = as_dict(report) | {"gin": bindings(report, with_remat=_FIT.value)}
        print(table(report), f"for launch.train           {shown(result['gin'])}", sep="\n")
    if cli.OUTPUT.value:
        pathlib.Path(cli.OUTPUT.value).write_text(files.to_json(result, indent=1), encoding="utf-8")


def fit(config, topology: str, slices: int) -> aot.StepReport:
    """Returns the report of the fastest of the candidates that fits; see aot_fit.search."""
    def compile_candidate(mesh, remat):
        train = dataclasses.replace(config.train, remat=remat)
        return compile_one(dataclasses.replace(config, train=train, mesh=mesh), topology, slices)

    found = aot_fit.candidates(config.data.batch_rows, config.data.row_tokens, chips.find(topology).devices,
                               slices)
    return aot_fit.search(compile_candidate, found, tries=_TRIES.value, seconds=60 * _MINUTES.value,
                          say=functools.partial(print, flush=True))


def compile_one(config, topology: str, slices: int = 1) -> aot.StepReport:
    """Returns the report of the run's step, on its own mesh or, if it names none, on the default one."""
    return aot.compile_step(
        config.model, config.train, config.optim, config.data.shape(config.model), config.data.batch_rows,
        topology, slices=slices, mesh_config=None if config.mesh == OWN else config.mesh)[0]


def as_dict(report: aot.StepReport | aot_generate.AnswersReport) -> dict:
    derived = {name: getattr(report, name) for name in ("headroom", "activations") if hasattr(report, name)}
    return dataclasses.asdict(report) | {"flops": report.flops._asdict()} | derived


def bindings(report: aot.StepReport, with_remat: bool) -> list[str]:
    """Returns what gives a run the mesh of the report; axes that are left out are 1 by default."""
    found = [f"sharding.MeshConfig.{axis} = {size}" for axis, size in report.mesh.items()
             if axis in ("data", "fsdp") or size > 1]
    return [*found, f"train.TrainConfig.remat = {report.remat!r}"] if with_remat else found


def shown(settings: list[str]) -> str:
    """Returns gin bindings as flags for a shell; text in them stands in single quotes."""
    return " ".join(f'--gin="{one}"' for one in settings)


def _bytes(count: float) -> str:
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    unit, name = next((one for one in units if count >= one[0] / 10), units[-1])
    return f"{count / unit:8.2f} {name}"


def _seconds(count: float) -> str:
    units = ((1, "s"), (1e-3, "ms"), (1e-6, "us"))
    unit, name = next((one for one in units if count >= one[0]), units[-1])
    return f"{count / unit:.3g} {name}"


def answers_table(report: aot_generate.AnswersReport) -> str:
    """Returns what a person reads of --what=generate."""
    return "\n".join([
        f"{report.topology}, one chip: a prompt of {report.prompt_tokens} tokens and {report.crops} crops, "
        f"answer of up to {report.new_tokens} tokens, {report.dtype}",
        f"  parameters               {_bytes(report.parameters)}",
        f"  kept keys and values     {_bytes(report.memory)}",
        f"  peak, reading            {_bytes(report.prefill_peak)} of {report.available / chips.GIB:.2f} GiB",
        f"  peak, writing            {_bytes(report.decode_peak)}, "
        f"{report.headroom / chips.GIB:.2f} GiB left",
        f"operations to read it      {report.flops.total:.4g}: "
        f"no faster than {_seconds(report.prefill_seconds)}",
        f"a token takes at least     {_seconds(report.token_seconds)}: all weights and keys are read",
        f"compiled in                {report.compile_seconds:.0f} s of a core"])


def table(report: aot.StepReport) -> str:
    """Returns what a person reads."""
    share = lambda part: f"{part:.3g} ({part / report.flops.total:.0%})"
    moved = [f"  {name:24s} {_bytes(size)}" for name, size in sorted(report.collectives.items())]
    sizes = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    device = "chip" if math.prod(report.mesh.values()) == report.chips else "device, two of a chip"
    rest = report.peak - report.parameters - report.optimiser - report.data
    return "\n".join([
        f"{report.slices} x {report.topology}: {report.chips} chips, {sizes}; {report.rows} rows, "
        f"remat {report.remat!r}, ViT {report.vision_remat!r}",
        f"bytes per {device}",
        f"  parameters               {_bytes(report.parameters)}",
        f"  optimiser                {_bytes(report.optimiser)}"
        + (f", and {_bytes(report.offloaded).strip()} in the host's memory" if report.offloaded else ""),
        f"  data                     {_bytes(report.data)}",
        f"  all else at the peak     {_bytes(max(rest, 0))}: activations, gradients, gathered parameters",
        f"    the ViT's, at most     {_bytes(report.vision)}: kept for its backward pass, by formula",
        f"  peak                     {_bytes(report.peak)} of {report.available / chips.GIB:.2f} GiB, "
        f"{report.headroom / chips.GIB:.2f} GiB left",
        f"operations of a step       {report.flops.total:.4g}: ViT {share(report.flops.vit)}, connector "
        f"{share(report.flops.connector)}, decoder {share(report.flops.decoder)}, attention "
        f"{share(report.flops.attention)}",
        f"  with recomputation       {report.hardware_flops:.4g}",
        f"bytes moved in a step, per {device}", *moved,
        f"no step takes less than    {_seconds(report.seconds_bound)} (bounded by {report.bounded_by}); "
        f"MFU {report.mfu_bound:.1%} at most" if math.isfinite(report.mfu_bound) else "",
        f"compiled in                {report.compile_seconds:.0f} s of a core"])


if __name__ == "__main__":
    cli.start(main)
