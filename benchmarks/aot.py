"""The recipe's steps compiled for TPU slices that are not there: what fits, what is moved, how fast at best.

  nice -n 19 python -m benchmarks.aot [--only=sft_8b] [--again]
  python -m benchmarks.aot --table

Each arm is a run of gin_configs/runs and a slice, named by chips ("v5p:4x4x8" has 128 chips, and is
"v5p-256" in the cloud). An arm that is compiled becomes a line of --cache, also if it does not fit; the same
command goes on with the others, and at last writes --page. --table only writes it.
"""

import datetime
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tqdm
from absl import app
from absl import flags

from launch import compile as compile_lib
from launch import run
from molmo2_jax import aot
from molmo2_jax import chips

_HERE = pathlib.Path(__file__).parent
_CACHE = flags.DEFINE_string("cache", str(_HERE / "aot.jsonl"), "One line per arm.")
_PAGE = flags.DEFINE_string("page", str(_HERE / "aot.md"), "The table.")
_ONLY = flags.DEFINE_string("only", "", "Part of the names of the arms to compile.")
_AGAIN = flags.DEFINE_bool("again", False, "Compile arms again that are known.")
_TABLE = flags.DEFINE_bool("table", False, "Compile nothing.")

# The batch of 128 rows divides over up to 128 groups of devices; more chips share rows (context).
SLICES = {
    "sft": ("v5p:4x4x8", "v6e:16x16", "v5p:8x8x16", "v5p:2x4x4", "v6e:8x16", "v5p:4x4x4", "v5p:8x8x8"),
    "long_context": ("v6e:16x16", "v5p:4x8x8", "v5p:8x8x16", "v5p:4x4x8"),
    "pretrain": ("v5p:2x2x4", "v6e:4x4", "v5p:8x8x16", "v5e:8x8", "v5p:4x4x8"),
}
# 8B on all of these, the other sizes on the first two of each stage; the most asked for come first.
ARMS = [(f"{stage}_{size}", slice_)
        for first, last, sizes in ((0, 1, ("8b", "4b", "o_7b")), (1, 2, ("8b",)), (2, 3, ("8b",)),
                                   (1, 2, ("4b", "o_7b")), (3, None, ("8b",)))
        for stage, slices in SLICES.items() for slice_ in slices[first:last] for size in sizes]


def compile_arm(name: str, topology: str) -> dict:
    """Returns what is known of a run's step on a slice: a report, or a miss with both sizes and the hints."""
    config = run.resolve([f"gin_configs/runs/{name}.gin"])
    arm = {"run": name, "topology": topology, "date": datetime.date.today().isoformat()}
    try:
        return arm | {"report": compile_lib.as_dict(compile_lib.compile_one(config, topology))}
    except aot.DoesNotFit as miss:
        return arm | {"miss": {"needed": miss.needed, "available": miss.available, "help": miss.hints}}
    except ValueError as refused:
        return arm | {"refused": str(refused)}


def read(path: pathlib.Path) -> dict[tuple[str, str], dict]:
    """Returns the cached arms; later lines win."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    arms = map(json.loads, lines)
    return {(arm["run"], arm["topology"]): arm for arm in arms}


def row(arm: dict) -> list[str]:
    """Returns the cells of an arm's row of the table."""
    slice_ = chips.find(arm["topology"])
    start = [arm["run"], f"{slice_.name} ({slice_.cloud_name})", str(slice_.chips)]
    gib = lambda size: f"{size / chips.GIB:.1f}"
    if "refused" in arm:
        return [*start, *[""] * 9, arm["refused"]]
    if "miss" in arm:
        miss = arm["miss"]
        return [*start, *[""] * 4, gib(miss["needed"]), gib(miss["available"] - miss["needed"]), *[""] * 3,
                "does not fit; " + "; ".join(miss["help"])]
    report = arm["report"]
    mesh = " x ".join(str(size) for size in report["mesh"].values())
    moved = ", ".join(f"{kind.removeprefix('ici ')} {gib(size)}"
                      for kind, size in sorted(report["collectives"].items(), key=lambda one: -one[1])
                      if size > chips.GIB / 20)
    return [*start, f"{mesh}, {report['remat']}", gib(report["parameters"] + report["optimiser"]),
            gib(report["activations"]), gib(report["vision"]),
            gib(report["peak"]), gib(report["headroom"]),
            f"{report['seconds_bound']:.2f} ({report['bounded_by']})", f"{report['mfu_bound']:.0%}",
            f"{report['compile_seconds']:.0f}", moved]


COLUMNS = ("run", "slice (cloud's name)", "chips", "data x fsdp x tensor x context, remat",
           "parameters and optimiser", "activations", "kept by the ViT", "peak", "left",
           "s a step at least (bounded by)", "MFU at most", "s of a core to compile",
           "moved per chip, GiB; or why not")
HEAD = """# Steps compiled ahead of time

Written by `python -m benchmarks.aot`, which goes on where `aot.jsonl` ends; {count} of {all} arms so far.
Nothing here ran on a TPU. GiB per chip, of a batch of 128 rows in all; `left` is what the chip has beyond the
peak, less than nothing where a step does not fit. The bound on MFU counts the ViT and knows products,
recomputation and collectives, all of which overlap; it does not know memory traffic. The cloud's names count
cores on v5p: v5p-256 has 128 chips.
"""


def table(arms: dict) -> str:
    """Returns the page."""
    by_size = lambda arm: (arm[0], chips.find(arm[1]).chips, arm[1])
    known = [arms[arm] for arm in sorted(ARMS, key=by_size) if arm in arms]
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(row, known)]
    head = HEAD.format(count=len(known), all=len(ARMS))
    return head + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def main(_) -> None:
    cache = pathlib.Path(_CACHE.value)
    arms = read(cache)
    if not _TABLE.value:
        aot.prepare()
        todo = [arm for arm in ARMS if _ONLY.value in "@".join(arm) and (_AGAIN.value or arm not in arms)]
        for arm in tqdm.tqdm(todo, unit="arm"):
            arms[arm] = compile_arm(*arm)
            with open(cache, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(arms[arm]) + "\n")
            pathlib.Path(_PAGE.value).write_text(table(arms), encoding="utf-8")
    pathlib.Path(_PAGE.value).write_text(table(arms), encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
