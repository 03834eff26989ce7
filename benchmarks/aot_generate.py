"""Answering compiled for TPU slices that are absent: bytes per chip, bounds, the largest batch.

  nice -n 19 python -m benchmarks.aot_generate [--only=8b@v6e] [--again]
  python -m benchmarks.aot_generate --table

An arm is a model, a slice and a number of frames; weights are in bfloat16, split over all chips of the slice
(`--mesh=tensor=CHIPS`). Each compiled arm becomes a line of --lines, also if it does not fit; the same
command continues with the others and writes --page. --table only writes it.
"""

import datetime
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app

from benchmarks import arms as arms_lib
from launch import compile as compile_lib
from molmo2_jax import config as config_lib
from molmo2_jax import sharding
from molmo2_jax import types
from molmo2_jax.aot import generate as aot_generate
from molmo2_jax.aot import step as aot_step
from molmo2_jax.cost import chips

NEW_TOKENS = 512
TOKENS = {128: 16384, 384: 36864}   # of a prompt by its frames, as in the recipe's rows
SLICES = ("v6e:2x2", "v5p:2x2x1", "v5e:2x4", "v5e:2x2", "v6e:2x4")
MODELS = ("molmo2_8b", "molmo2_4b", "molmo2_o_7b")
ARMS = [(model, slice_, frames) for model in MODELS for slice_ in SLICES for frames in TOKENS]


def compile_arm(model: str, topology: str, frames: int) -> dict:
    """Returns what is known of answering one prompt: a report, or a miss with both sizes."""
    arm = {"model": model, "topology": topology, "frames": frames, "date": datetime.date.today().isoformat()}
    config = getattr(config_lib, model)()
    side = config.vision.grid // config.connector.video_window[0]
    shape = types.RowShape(T=TOKENS[frames], M=frames, R=frames * side**2, W=9)
    mesh = sharding.MeshConfig(fsdp=1, tensor=chips.find(topology).devices)
    try:
        report = aot_generate.compile_answers(config, shape, topology, new_tokens=NEW_TOKENS,
                                              dtype="bfloat16", mesh_config=mesh)
    except aot_step.DoesNotFit as miss:
        return arm | {"miss": {"needed": miss.needed, "available": miss.available}}
    return arm | {"report": compile_lib.as_dict(report)}


def arm_of(line: dict) -> tuple[str, str, int]:
    """Returns model, slice and frames of a line of --lines."""
    return line["model"], line["topology"], line["frames"]


def row(arm: dict) -> list[str]:
    """Returns the cells of an arm's row of the table."""
    slice_ = chips.find(arm["topology"])
    gib = lambda size: f"{size / chips.GIB:.1f}"
    start = [arm["model"].removeprefix("molmo2_"), f"{slice_.name} ({slice_.cloud_name})",
             f"{arm['frames']} / {TOKENS[arm['frames']]}"]
    if "miss" in arm:
        needed, available = arm["miss"]["needed"], arm["miss"]["available"]
        return [*start, "", "", gib(needed), "", gib(available - needed), "", "", "does not fit"]
    report = arm["report"]
    return [*start, gib(report["parameters"]), f"{report['memory'] / chips.GIB:.2f}",
            gib(report["prefill_peak"]), gib(report["decode_peak"]), gib(report["headroom"]),
            f"{1000 * report['prefill_seconds']:.0f}", f"{1 / report['token_seconds']:.0f}",
            str(report["most_rows"])]


COLUMNS = ("model", "slice (cloud's name)", "frames / tokens", "weights", "keys and values", "peak, prefill",
           "peak, decoding", "left", "prefill, ms at least", "tokens/s at most", "rows that fit")
HEAD = """# Answering compiled ahead of time

Written by `python -m benchmarks.aot_generate`, which continues where `aot_generate.jsonl` ends; {count} of
{all} arms so far. Nothing here ran on a TPU. GiB per chip for one prompt and an answer of up to {new} tokens,
in bfloat16, with `--mesh=tensor=CHIPS`; `left` is what the chip has beyond the larger peak, negative where a
program does not fit. The bound on prefill counts operations alone. The bound on tokens/s is for one answer:
weights, keys and values are read once per token, and exchanged bytes take the time of all links; it does not
know the latency of the two sums over chips in each layer, some microseconds each. `rows that fit` divides the
memory besides the weights by what one row needs.
"""


def table(arms: dict) -> str:
    """Returns the page."""
    known = [arms[arm] for arm in sorted(ARMS) if arm in arms]
    head = HEAD.format(count=len(known), all=len(ARMS), new=NEW_TOKENS)
    return f"{head}\n{places(known)}\n" + arms_lib.markdown(COLUMNS, map(row, known))


def places(known: list[dict]) -> str:
    """Returns where prompts with the most frames fit, a line per model."""
    most, lines = max(TOKENS), []
    for model in sorted(MODELS):
        fits = [chips.find(arm["topology"]).cloud_name for arm in known
                if (arm["model"], arm["frames"]) == (model, most) and arm.get("report", {}).get("most_rows")]
        lines.append(f"- {model.removeprefix('molmo2_')}: {', '.join(fits) or 'not known yet'}\n")
    return f"{most} frames in {TOKENS[most]} tokens fit on:\n\n" + "".join(lines)


def main(_) -> None:
    arms_lib.fill("aot_generate", ARMS, arm_of, compile_arm, lambda: aot_step.prepare(draft=True), table)


if __name__ == "__main__":
    app.run(main)
