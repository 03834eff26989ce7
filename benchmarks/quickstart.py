"""Runs the quickstart with several seeds and prints its scores and times as a table.

  python -m benchmarks.quickstart --seed=0 --seed=1 --seed=2 [--folder=runs/seeds]

Each seed draws its own data, initial weights and order. Finished runs are read, not repeated.
"""

import json
import pathlib
import subprocess
import sys

from absl import app
from absl import flags

_SEEDS = flags.DEFINE_multi_integer("seed", [0, 1, 2], "Seed of a run; may be repeated.")
_FOLDER = flags.DEFINE_string("folder", "runs/seeds", "Folder of the work directories.")
KEYS = ("video_point_f1", "image_point_f1", "count_accuracy", "track_jf", "choice_accuracy",
        "train_seconds", "total_seconds", "peak_memory_gib")


def summary(seed: int) -> dict[str, float]:
    """Returns the summary of a seed's run, and runs it if there is none."""
    workdir = pathlib.Path(_FOLDER.value) / str(seed)
    path = workdir / "summary.json"
    if not path.exists():
        subprocess.run([sys.executable, "-m", "launch.quickstart", f"--workdir={workdir}", f"--seed={seed}"],
                       check=True)
    return json.loads(path.read_text())


def main(_) -> None:
    rows = {seed: summary(seed) for seed in _SEEDS.value}
    print("| seed | " + " | ".join(KEYS) + " |\n|" + "---|" * (len(KEYS) + 1))
    for seed, values in rows.items():
        print(f"| {seed} | " + " | ".join(f"{values[key]:.3g}" for key in KEYS) + " |")


if __name__ == "__main__":
    app.run(main)
