"""The recipe's steps compiled for TPU slices that are absent: memory, communication, a bound on speed.

  nice -n 19 python -m benchmarks.aot [--only=sft_8b] [--again]
  python -m benchmarks.aot --table

Each arm is a run of gin_configs/runs and a slice, named by chips ("v5p:4x4x8" has 128 chips, and is
"v5p-256" in the cloud). A compiled arm becomes a line of --lines, also if it does not fit; the same command
resumes with the others, and finally writes --page. --table only writes the page.
"""

import datetime
import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app

from benchmarks import arms as arms_lib
from launch import compile as compile_lib
from launch import run
from molmo2_jax.aot import step as aot_step
from molmo2_jax.cost import bounds
from molmo2_jax.cost import chips
from molmo2_jax.cost import links

# A batch of 128 rows can be split across up to 128 groups of devices; more chips share rows (context).
SLICES = {
    "sft": ("v5p:4x4x8", "v6e:16x16", "v5p:8x8x16", "v5p:2x4x4", "v6e:8x16", "v5p:4x4x4", "v5p:8x8x8"),
    "long_context": ("v6e:16x16", "v5p:4x8x8", "v5p:8x8x16", "v5p:4x4x8"),
    "pretrain": ("v5p:2x2x4", "v6e:4x4", "v5p:8x8x16", "v5e:8x8", "v5p:4x4x8"),
}
# 8B on all of these, the other sizes on the first two of each stage; the most important come first.
ARMS = [(f"{stage}_{size}", slice_, 1)
        for first, last, sizes in ((0, 1, ("8b", "4b", "o_7b")), (1, 2, ("8b",)), (2, 3, ("8b",)),
                                   (1, 2, ("4b", "o_7b")), (3, None, ("8b",)))
        for stage, slices in SLICES.items() for slice_ in slices[first:last] for size in sizes]

# Shares of tokens and crops in rows of the default packer, by stage: benchmarks/README.md, "Packing".
FILL = {"pretrain": bounds.Fill(0.930, 0.609), "sft": bounds.Fill(0.844, 0.996),
        "long_context": bounds.Fill(0.993, 0.918)}

# Fewer chips than the batch needs at once: run, slice, micro-batches.
ARMS += [("sft_8b", slice_, accumulate)
         for slice_, accumulate in (("v6e:4x8", 1), ("v6e:4x8", 4), ("v5e:8x8", 4), ("v5e:8x8", 8))]

# Pointing by choosing visual tokens, with the rows of sft_8b, to compare the two.
ARMS += [("molmo_point_sft_8b", "v5p:4x4x8", 1)]
BINDINGS = {"molmo_point_sft_8b": ["pipeline.DataConfig.batch_rows = 128"]}


def stage_of(name: str) -> str:
    """Returns the stage of a run, by its name."""
    return next(stage for stage in FILL if name.removeprefix("molmo_point_").startswith(stage))


def compile_arm(name: str, topology: str, accumulate: int) -> dict:
    """Returns the result for a run's step on a slice: a report, or a miss with both sizes and the hints."""
    config = run.resolve([f"gin_configs/runs/{name}.gin"],
                         [f"train.TrainConfig.accumulate = {accumulate}", *BINDINGS.get(name, ())])
    arm = {"run": name, "topology": topology, "accumulate": accumulate,
           "date": datetime.date.today().isoformat()}
    try:
        return arm | {"report": compile_lib.as_dict(compile_lib.compile_one(config, topology))}
    except aot_step.DoesNotFit as miss:
        return arm | {"miss": {"needed": miss.needed, "available": miss.available, "help": miss.hints}}
    except ValueError as refused:
        return arm | {"refused": str(refused)}


def arm_of(line: dict) -> tuple[str, str, int]:
    """Returns run, slice and micro-batches of a line of --lines."""
    return line["run"], line["topology"], line.get("accumulate", 1)


@functools.cache
def config_of(name: str) -> run.RunConfig:
    """Returns the settings of a run."""
    return run.resolve([f"gin_configs/runs/{name}.gin"])


def strict(arm: dict) -> bounds.Strict:
    """Returns the strict bound of a compiled arm, for rows that are filled as those of its stage."""
    config, report = config_of(arm["run"]), arm["report"]
    slice_, shape = chips.find(arm["topology"]), config.data.shape(config.model)
    how = aot_step.execution(config.model, slice_, shape, report["mesh"]["tensor"])
    traffic = [links.Traffic(**one) for one in report["traffic"]]
    fill = FILL[stage_of(arm["run"])]
    return bounds.strict(config.model, report["remat"], report["vision_remat"], rows=report["rows"],
                         shape=shape, how=how, traffic=traffic, slice_=slice_, fill=fill)


def row(arm: dict) -> list[str]:
    """Returns the cells of an arm's row of the table."""
    slice_ = chips.find(arm["topology"])
    start = [arm["run"], f"{slice_.name} ({slice_.cloud_name})", str(slice_.chips),
             str(arm.get("accumulate", 1))]
    gib = lambda size: f"{size / chips.GIB:.1f}"
    if "refused" in arm:
        return [*start, *[""] * (len(COLUMNS) - len(start) - 1), arm["refused"]]
    if "miss" in arm:
        miss = arm["miss"]
        cells = [*start, *[""] * 4, gib(miss["needed"]), gib(miss["available"] - miss["needed"])]
        return [*cells, *[""] * (len(COLUMNS) - len(cells) - 1), "does not fit; " + "; ".join(miss["help"])]
    report, bound = arm["report"], strict(arm)
    mesh = " x ".join(str(size) for size in report["mesh"].values())
    moved = ", ".join(f"{kind.removeprefix('ici ')} {gib(size)}"
                      for kind, size in sorted(report["collectives"].items(), key=lambda one: -one[1])
                      if size > chips.GIB / 20)
    return [*start, f"{mesh}, {report['remat']}", gib(report["parameters"] + report["optimiser"]),
            gib(report["activations"]), gib(report["vision"]),
            gib(report["peak"]), gib(report["headroom"]),
            f"{report['seconds_bound']:.2f} ({report['bounded_by']})", f"{report['mfu_bound']:.0%}",
            f"{bound.seconds:.2f} ({bound.bounded_by})", f"{bound.apart:.2f}" if bound.ici else "",
            f"{bound.mfu:.0%}", f"{bound.ici:.2f} ({bound.ici_bfloat16:.2f})" if bound.ici else "",
            f"{report['compile_seconds']:.0f}", moved]


COLUMNS = ("run", "slice (cloud's name)", "chips", "micro-batches", "data x fsdp x tensor x context, remat",
           "parameters and optimiser", "activations", "kept by the ViT", "peak", "left",
           "s a step at least (bounded by)", "MFU at most", "strictly: s a step at least",
           "strictly: s if nothing overlaps", "strictly: useful MFU at most",
           "strictly: busiest link, s (gradients in bfloat16)", "s of a core to compile",
           "moved per chip, GiB; or why not")
HEAD = """# Steps compiled ahead of time

Written by `python -m benchmarks.aot`, which resumes where `aot.jsonl` ends; {count} of {all} arms so far.
Nothing here ran on a TPU. GiB per chip, for a batch of 128 rows in total; `left` is the chip's memory minus
the peak, negative where a step does not fit. The cloud's names count cores on v5p: v5p-256 has 128 chips.

Two bounds on the time of a step:

- `s a step at least` and `MFU at most` count products, the ViT's included, and recomputation, and divide
  bytes by the rate of all links of a chip in one direction. The larger of the two times is the bound.
- `strictly` (`molmo2_jax/cost/bounds.py`) also counts
  - the fill of rows, of tokens and of crops (benchmarks/README.md, "Packing"):
    {fill}.
    Padding takes time but is not useful. What is filled counts as one causal sequence; shorter ones need less
    attention;
  - widths that a matrix unit pads: it has 256 rows and columns on v6e and TPU7x, 128 on the others. The ViT's
    heads of 72 and widths of 588, 1152 and 4304 are rounded up, on v6e also the decoder's heads of 128;
  - whole tiles: attention computes tiles of up to 512 x 512, 1.97 times the pairs of a crop of 729 patches
    and 1.03 times those of a causal row;
  - products that gradients of attention repeat: the kernel keeps no scores, so they take 5 products of a tile
    and not 4;
  - links that an axis of the mesh can use: a ring is used both ways, a line is not, and rings need cubes of
    4x4x4, on v5e and v6e 16 chips. Chips of a group that are not neighbours share their links with other
    groups. The time is that of the busiest link;
  - the width of gradients: they are summed in float32, as compiled; in brackets, in bfloat16.

Both leave out memory traffic, input, everything that is not a product, and the time to start a program or a
message. Both assume that collectives overlap with products; `if nothing overlaps` is the sum of the times.
The `mfu` that a run reports counts the examples of its rows, whose attention is less than that of full rows.

`launch.train` runs these steps on these meshes, which are its default. They were compiled as drafts
(`launch.compile --draft`), in a fifth of the time. A run compiles with the usual effort, which overlaps more
collectives and, where both were compiled (pretrain_8b on v5e:8x8), needs 3% more memory: 14.8 GiB, not 14.4.
"""


def table(arms: dict) -> str:
    """Returns the page."""
    by_size = lambda arm: (arm[0], chips.find(arm[1]).chips, *arm[1:])
    known = [arms[arm] for arm in sorted(ARMS, key=by_size) if arm in arms]
    fill = ", ".join(f"{stage} {fill.tokens:.0%} and {fill.crops:.0%}" for stage, fill in FILL.items())
    head = HEAD.format(count=len(known), all=len(ARMS), fill=fill)
    return head + "\n" + arms_lib.markdown(COLUMNS, map(row, known))


def main(_) -> None:
    arms_lib.fill("aot", ARMS, arm_of, compile_arm, lambda: aot_step.prepare(draft=True), table)


if __name__ == "__main__":
    app.run(main)
