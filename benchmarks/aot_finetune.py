"""Fine-tuning with adapters compiled for absent TPU hosts: does it fit, and how fast can it be at most.

  nice -n 19 python -m benchmarks.aot_finetune [--only=finetune_4b] [--again]
  python -m benchmarks.aot_finetune --table

As benchmarks/aot.py: each arm is a run of gin_configs/runs, a slice and a number of micro-batches, and
becomes a line of --lines.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app

from benchmarks import aot
from benchmarks import arms as arms_lib
from molmo2_jax.aot import step as aot_step
from molmo2_jax.cost import chips

ARMS = [("finetune_4b", "v5e:2x4", 1), ("finetune_4b", "v6e:2x2", 1), ("finetune_8b", "v5e:2x4", 1),
        ("finetune_8b", "v6e:2x2", 1), ("finetune_o_7b", "v5e:2x4", 1), ("finetune_4b", "v5e:2x2", 2)]
COLUMNS = ("run", "slice (cloud's name)", "micro-batches", "data x fsdp x tensor x context", "frozen",
           "trained and moments", "activations", "peak", "left", "s a step at least")
HEAD = """# Fine-tuning compiled ahead of time

Written by `python -m benchmarks.aot_finetune`; {count} of {all} arms so far. Nothing here ran on a TPU. GiB
per chip, 8 rows of 16,384 tokens and 128 frames in total, adapters of rank 16 on the decoder, remat "full",
compiled as drafts (a run needs about 3% more).

"""


def row(arm: dict) -> list[str]:
    """Returns the cells of an arm's row of the table."""
    slice_ = chips.find(arm["topology"])
    start = [arm["run"], f"{slice_.name} ({slice_.cloud_name})", str(arm.get("accumulate", 1))]
    gib = lambda size: f"{size / chips.GIB:.1f}"
    if "report" not in arm:
        why = arm.get("refused") or f"does not fit; {'; '.join(arm['miss']['help'])}"
        return [*start, *[""] * (len(COLUMNS) - len(start) - 1), why]
    report = arm["report"]
    return [*start, " x ".join(str(size) for size in report["mesh"].values()), gib(report["frozen"]),
            gib(report["parameters"] - report["frozen"] + report["optimiser"]), gib(report["activations"]),
            gib(report["peak"]), gib(report["headroom"]), f"{report['seconds_bound']:.2f}"]


def table(arms: dict) -> str:
    """Returns the page."""
    known = [arms[arm] for arm in ARMS if arm in arms]
    return HEAD.format(count=len(known), all=len(ARMS)) + arms_lib.markdown(COLUMNS, map(row, known))


def main(_) -> None:
    arms_lib.fill("aot_finetune", ARMS, aot.arm_of, aot.compile_arm, lambda: aot_step.prepare(draft=True),
                  table)


if __name__ == "__main__":
    app.run(main)
