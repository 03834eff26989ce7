"""The example of docs/finetune.md, with adapters and with all weights: what is learnt, forgotten, and spent.

  nice -n 19 python -m benchmarks.finetune --folder=runs/mugs [--only=adapters]

Draws and converts the example unless it is there, trains each arm from assets/nano, scores it on the held-out
clips and on what the model knew, and prints a table: F1 of points in videos, and the times of training (wall
and processor, start and compilation included).
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time

from absl import app
from absl import flags

from benchmarks import arms as arms_lib

_FOLDER = flags.DEFINE_string("folder", "runs/mugs", "Folder of the example and of the runs.")
_ROOT = pathlib.Path(__file__).parents[1]
# Full fine-tuning is the quickstart's run at a third of its rates, as long as the adapters'.
ARMS = {"before": (), "adapters": ("gin_configs/runs/finetune_nano.gin",), "all weights": (
    "gin_configs/runs/quickstart.gin", "run.RunConfig.tokenizer = 'assets/nano'",
    "pipeline.DataConfig.lessons = ()", "optim.Muon.lr = 0.002", "optim.Tower.lr = 1e-3",
    "optim.Tower.warmup = 10", "train.TrainConfig.steps = 300")}


def run(*words: str) -> tuple[float, float]:
    """Returns the seconds and the processor seconds of a command."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", *words], check=True, cwd=_ROOT, stdout=subprocess.DEVNULL,
                   env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (
                       str(_ROOT), os.environ.get("PYTHONPATH"))))})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return time.monotonic() - began, spent


def measure(name: str, folder: pathlib.Path) -> list[str]:
    """Returns the row of an arm."""
    model, times = "assets/nano", None
    if ARMS[name]:
        file, *bindings = ARMS[name]
        model = str(folder / name.replace(" ", "_"))
        data = f"(('{folder}/data/train', 0.7), ('{folder}/general', 0.3))"
        times = run("launch.train", f"--gin_file={file}", f"--workdir={model}", "--init_from=assets/nano",
                    f"--gin=pipeline.DataConfig.train = {data}", *(f"--gin={one}" for one in bindings))
    parts, output = (folder / "data" / "heldout", folder / "known"), folder / f"{name.replace(' ', '_')}.json"
    run("launch.evaluate", f"--model={model}", *(f"--data={part}" for part in parts), f"--output={output}",
        "--max_new_tokens=128")
    scores = json.loads(output.read_text())
    cells = [f"{scores[str(part)]['video_point_f1']:.3f}" for part in parts]
    return [name, *cells, *(f"{one:.0f}" for one in times or ())]


def main(_) -> None:
    folder = pathlib.Path(_FOLDER.value).resolve()
    if not (folder / "data").is_dir():
        run("data_pipelines.world.example", str(folder))
        run("launch.prepare", "--from=davis", f"--input={folder / 'export'}", f"--output={folder / 'data'}",
            "--heldout=0.25", "--frames_fps=4")
    rows = [measure(name, folder) for name in ARMS if flags.FLAGS.only in name]
    print(arms_lib.markdown(("arm", "F1 of mugs", "F1 of what was known", "s", "s of processors"), rows))


if __name__ == "__main__":
    app.run(main)
