"""Compiles a run's train step for a TPU slice without a TPU; reports memory, traffic and the least time.

  python -m launch.compile --gin_file=gin_configs/runs/sft_8b.gin --topology=v5p:4x4x8
  python -m launch.compile --gin_file=gin_configs/runs/sft_4b.gin --topology=v6e-256 --output=plan.json

--topology is the chip and the sides of the slice ("v5p:4x4x8", 128 chips) or the cloud's name for it
("v5p-256"). The step is the one that launch.train runs there: with the mesh that the run sets, or the default
one (16-way fsdp, one row per group of devices), and with the same compiler options. Its mesh is printed as
--gin flags. --fit tries several meshes and kinds of rematerialisation, within --tries and --minutes, and
recommends the fastest that fits. Needs libtpu (pip install libtpu==0.0.42.1). An 8B step takes 10 minutes of
one core and 3 GB, with --draft 2 minutes.

--device_gib=24 compiles nothing: it estimates by formula what the step needs on one device with so much
memory, such as a GPU, with one row in each micro-batch; if that is too much, what would fit.

--what=generate compiles the prefill of prompts, as long as a row of training, and the decoding of answers,
as launch.generate and launch.evaluate run them on the chips of a host: on the mesh of --mesh or gin, or on
the smallest that fits. --prompts are answered at a time.

The least time of a step is given twice. The first counts products and recomputation, and lets collectives
use all links of a chip. The strict one also counts widths that the matrix units pad, tiles that attention
computes whole, products that its backward pass repeats, and the links that the groups of the mesh can use;
its MFU counts only the part of the rows that is filled (--fill). benchmarks/aot.md explains both.
"""

import dataclasses
import functools
import math
import pathlib
import time

import jax
from absl import flags

from launch.support import cli
from molmo2_jax import files
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax.aot import fit as aot_fit
from molmo2_jax.aot import generate as aot_generate
from molmo2_jax.aot import step as aot_step
from molmo2_jax.cost import bounds
from molmo2_jax.cost import chips
from molmo2_jax.cost import memory

_TOPOLOGY = flags.DEFINE_string("topology", None, 'TPU slice, such as "v5p:4x4x8" or "v5p-256".')
_SLICES = flags.DEFINE_integer(
    "slices", 1, "Number of slices, connected by the data centre network.", lower_bound=1)
_FIT = flags.DEFINE_bool("fit", False, "Search for the fastest mesh and rematerialisation that fit.")
_TRIES = flags.DEFINE_integer(
    "tries", 6, "Maximum number of compilations of --fit for each number of micro-batches.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 30.0, "Time after which --fit starts no further compilation.")
_DRAFT = flags.DEFINE_bool(
    "draft", False, "Compile with the least effort, in a fifth of the time. The program of launch.train "
    "overlaps more collectives and needs a few percent more memory.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "generate"],
                          "What to compile: the train step, or answering a question.")
_FILL = flags.DEFINE_list(
    "fill", ["1", "1"], "Shares of tokens and crops of a row that are not padding, as token_fill and "
    "crop_fill in the metrics of a run, such as 0.84,0.99.")
_DEVICE_GIB = flags.DEFINE_float(
    "device_gib", None, "Instead of compiling, estimate the step on one device (a GPU) with so many GiB.",
    lower_bound=1.0)
_PROMPTS = flags.DEFINE_integer("prompts", 1, "Answered at a time by --what=generate.", lower_bound=1)
for _name in ("gin_file", "gin", "workdir", "output", "max_new_tokens", "dtype", "weights", "mesh",
              "traceback"):
    flags.declare_key_flag(_name)


_USABLE = 0.92   # of a GPU's memory, which jax can have: the rest is for its context and for gaps


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    if _DEVICE_GIB.value:
        print(estimated(cli.resolve("data", "optim", "train"), _DEVICE_GIB.value))
        return
    if not _TOPOLOGY.value:
        raise ValueError("--topology must name a TPU slice, such as v5p:4x4x8; known slices: "
                         + ", ".join(f"{one.name} ({one.cloud_name})" for one in chips.known()))
    chips.find(_TOPOLOGY.value)
    config = cli.resolve("data", *(("optim", "train") if _WHAT.value == "train" else ()))
    fill = fill_of_rows()
    aot_step.prepare(_DRAFT.value)
    mesh = cli.mesh()
    if _WHAT.value == "generate":
        answers = aot_generate.compile_answers(
            config.model, config.data.shape(config.model), _TOPOLOGY.value, rows=_PROMPTS.value,
            new_tokens=cli.MAX_NEW_TOKENS.value, dtype=cli.DTYPE.value, weights=cli.WEIGHTS.value,
            mesh_config=mesh or (None if config.mesh == sharding.MeshConfig() else config.mesh))
        result = as_dict(answers)
        print(answers_table(answers))
    else:
        config = dataclasses.replace(config, mesh=mesh or config.mesh)
        report = (fit if _FIT.value else compile_one)(config, _TOPOLOGY.value, _SLICES.value, fill)
        result = as_dict(report) | {"gin": bindings(report, with_remat=_FIT.value)}
        print(table(report), f"for launch.train           {shown(result['gin'])}", sep="\n")
    if cli.OUTPUT.value:
        pathlib.Path(cli.OUTPUT.value).write_text(files.to_json(result, indent=1), encoding="utf-8")


def fill_of_rows() -> bounds.Fill:
    """Returns the fill of rows that --fill gives.

    Raises:
      ValueError: it is not two numbers above 0 and up to 1.
    """
    try:
        tokens, crops = map(float, _FILL.value)
    except ValueError:
        tokens = crops = 0.0
    if not (0 < tokens <= 1 and 0 < crops <= 1):
        raise ValueError("--fill must be two shares above 0 and up to 1, of tokens and of crops; got "
                         f"{','.join(_FILL.value)}")
    return bounds.Fill(tokens, crops)


def estimated(config, gib: float) -> str:
    """Returns the printed estimate of a step on one device with `gib` GiB, a row at a time."""
    usable = _USABLE * gib * chips.GIB
    need = _estimate(config)
    shape = config.data.shape(config.model)
    lines = ["an estimate by formula; nothing was compiled",
             f"{config.data.batch_rows} rows of {shape.T} tokens and {shape.M} crops, one at a time "
             f"(train.TrainConfig.accumulate = {config.data.batch_rows}), remat 'full'"]
    lines += [f"  {name:24s} {_bytes(size)}" for name, size in (
        ("frozen parameters", need.frozen), ("trained, moments", need.trained),
        ("kept activations", need.kept), ("most alive at a time", need.working))]
    lines.append(f"  sum                      {_bytes(need.total)} of {usable / chips.GIB:.1f} GiB usable")
    if need.total <= usable:
        return "\n".join([*lines, "fits"])
    return "\n".join([*lines, "does not fit; what would: " + (
        "; ".join(_smaller(config, usable)) or "none of 8-bit weights with an eighth of tokens and crops")])


def _estimate(config) -> memory.Memory:
    model, lora = config.train.model(config.model), config.train.lora
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    base = state.abstract_base(model, mesh, lora, config.train.dtype)
    return memory.estimate(
        config.model, rows=1, shape=config.data.shape(config.model), parts=state.trained_parts(model, lora),
        frozen=aot_step.bytes_per_device(base), loss_chunk=config.train.loss_chunk,
        trained=aot_step.bytes_per_device(state.abstract_params(model, mesh, lora)))


def _smaller(config, usable: float) -> list[str]:
    """Returns the bindings of the largest rows that fit, with the base as it is and with one of 8 bits."""
    found = []
    for base in (None, "int8") if config.train.lora else (None,):
        for part in (1, 2, 4, 8):
            tokens, crops = config.data.row_tokens // part, config.data.row_crops // part
            data = dataclasses.replace(config.data, row_tokens=tokens, row_crops=crops)
            lora = config.train.lora and dataclasses.replace(config.train.lora, base=base)
            need = _estimate(dataclasses.replace(
                config, data=data, train=dataclasses.replace(config.train, lora=lora)))
            if need.total <= usable:
                settings = ["finetune.LoraConfig.base = 'int8'"] if base else []
                settings += [f"pipeline.DataConfig.row_tokens = {tokens}",
                             f"pipeline.DataConfig.row_crops = {crops}",
                             f"config.InputConfig.max_frames = {crops}"] if part > 1 else []
                found.append(f"{shown(settings)} ({need.total / chips.GIB:.1f} GiB)")
                break
    return found


def fit(config, topology: str, slices: int, fill: bounds.Fill) -> aot_step.StepReport:
    """Returns the report of the fastest candidate that fits; see aot_fit.search.

    Raises:
      ValueError: no candidate fits.
    """
    rows, end = config.data.batch_rows, time.monotonic() + 60 * _MINUTES.value

    def search(accumulate):
        def compile_candidate(mesh, remat):
            train = dataclasses.replace(config.train, remat=remat, accumulate=accumulate)
            changed = dataclasses.replace(config, train=train, mesh=mesh)
            return compile_one(changed, topology, slices, fill)

        meshes = aot_fit.candidates(rows // accumulate, config.data.row_tokens, chips.find(topology).devices,
                                    slices)
        print(f"{accumulate} micro-batches", flush=True)
        return aot_fit.search(compile_candidate, meshes, tries=_TRIES.value,
                              seconds=end - time.monotonic(), say=functools.partial(print, flush=True))

    return aot_fit.with_micro_batches(search, rows, config.train.accumulate)


def compile_one(config, topology: str, slices: int = 1, fill: bounds.Fill = bounds.Fill()
                ) -> aot_step.StepReport:
    """Returns the report of the step that launch.train would run on the slices."""
    return aot_step.compile_step(
        config.model, config.train, config.optim, config.data.shape(config.model), config.data.batch_rows,
        topology, slices=slices, mesh_config=config.mesh, fill=fill)[0]


def as_dict(report: aot_step.StepReport | aot_generate.AnswersReport) -> dict:
    derived = {name: getattr(report, name) for name in ("headroom", "activations") if hasattr(report, name)}
    if isinstance(report, aot_step.StepReport):
        strict = report.strict
        derived |= {"traffic": [one._asdict() for one in report.traffic],
                    "strict": strict._asdict() | {name: getattr(strict, name) for name in (
                        "seconds", "bounded_by", "apart")}}
    return dataclasses.asdict(report) | {"flops": report.flops._asdict()} | derived


def bindings(report: aot_step.StepReport, with_remat: bool) -> list[str]:
    """Returns the bindings that give a run the mesh of the report; axes left out have their default, 1."""
    found = [f"sharding.MeshConfig.{axis} = {size}" for axis, size in report.mesh.items()
             if axis in ("data", "fsdp") or size > 1]
    if report.accumulate > 1:
        found.append(f"train.TrainConfig.accumulate = {report.accumulate}")
    return [*found, f"train.TrainConfig.remat = {report.remat!r}"] if with_remat else found


def shown(settings: list[str]) -> str:
    """Returns gin bindings as shell flags; strings inside them have single quotes."""
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
    """Returns the printed report of --what=generate."""
    sizes = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    return "\n".join([
        f"{report.topology}, {sizes}: {report.rows} prompts of {report.prompt_tokens} tokens and "
        f"{report.crops} crops, answers of up to {report.new_tokens} tokens, {report.dtype}"
        + (f", weights in {report.weights}" if report.weights else ""),
        "bytes per device",
        f"  parameters               {_bytes(report.parameters)}",
        f"  KV cache                 {_bytes(report.memory)}",
        f"  peak, prefill            {_bytes(report.prefill_peak)} of {report.available / chips.GIB:.2f} GiB",
        f"  peak, decoding           {_bytes(report.decode_peak)}, "
        f"{report.headroom / chips.GIB:.2f} GiB left",
        f"rows that fit              {report.most_rows}, by the bytes of these",
        f"FLOPs of prefill           {report.flops.total:.4g}: "
        f"at least {_seconds(report.prefill_seconds)}",
        f"each token takes at least  {_seconds(report.token_seconds)}: weights, keys and values are read, "
        f"{_bytes(report.exchanged).strip()} exchanged",
        f"compiled in                {report.compile_seconds:.0f} s of one core"])


def table(report: aot_step.StepReport) -> str:
    """Returns the printed report of a train step."""
    share = lambda part: f"{part:.3g} ({part / report.flops.total:.0%})"
    moved = [f"  {name:24s} {_bytes(size)}" for name, size in sorted(report.collectives.items())]
    sizes = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    device = "chip" if math.prod(report.mesh.values()) == report.chips else "device (two per chip)"
    strict = report.strict
    rest = report.peak - report.parameters - report.optimiser - report.data
    return "\n".join([
        f"{report.slices} x {report.topology}: {report.chips} chips, {sizes}; {report.rows} rows"
        + (f" in {report.accumulate} micro-batches" if report.accumulate > 1 else "")
        + f", remat {report.remat!r}, ViT {report.vision_remat!r}",
        f"bytes per {device}",
        f"  parameters               {_bytes(report.parameters)}"
        + (f", of them {_bytes(report.frozen).strip()} frozen" if report.frozen else ""),
        f"  optimiser                {_bytes(report.optimiser)}"
        + (f", and {_bytes(report.offloaded).strip()} in the host's memory" if report.offloaded else ""),
        f"  data                     {_bytes(report.data)}",
        f"  all else at the peak     {_bytes(max(rest, 0))}: activations, gradients, gathered parameters",
        f"    of the ViT, at most    {_bytes(report.vision)}: kept for its backward pass, by formula",
        f"  peak                     {_bytes(report.peak)} of {report.available / chips.GIB:.2f} GiB, "
        f"{report.headroom / chips.GIB:.2f} GiB left",
        f"FLOPs of a step            {report.flops.total:.4g}: ViT {share(report.flops.vit)}, connector "
        f"{share(report.flops.connector)}, decoder {share(report.flops.decoder)}, attention "
        f"{share(report.flops.attention)}",
        f"  with recomputation       {report.hardware_flops:.4g}",
        f"bytes moved in a step, per {device}", *moved,
        f"a step takes at least      {_seconds(report.seconds_bound)} (bounded by {report.bounded_by}); "
        f"MFU at most {report.mfu_bound:.1%}" if math.isfinite(report.mfu_bound) else "",
        f"strictly, at least         {_seconds(strict.seconds)} (bounded by {strict.bounded_by}), "
        f"{_seconds(strict.apart)} if nothing overlaps; useful MFU at most {strict.mfu:.1%}",
        f"  FLOPs executed           {strict.flops:.4g}: padded widths, whole tiles, repeated products",
        f"  busiest link             {_seconds(strict.ici)}; "
        f"{_seconds(strict.ici_bfloat16)} with gradients in bfloat16",
        f"compiled in                {report.compile_seconds:.0f} s of one core"])


if __name__ == "__main__":
    cli.start(main)
