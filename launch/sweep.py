"""Trains the arms of an experiment, and gathers what came out.

  python -m launch.sweep --gin_file=gin_configs/runs/quickstart.gin --workdir=runs/pooling --jobs=2 \\
      --axis='config.ConnectorConfig.video_window=[(2, 2), (3, 3)]' --axis='train.TrainConfig.seed=[0, 1, 2]'
  python -m launch.sweep --arm=gin_configs/ablations/pool_4x4.gin --arm=gin_configs/runs/quickstart.gin \\
      --workdir=runs/ablations
  python -m launch.sweep summary --workdir=runs/pooling

An arm is a combination of the values of all axes (--zip: the first values, the second values, ...), or a gin
file given by --arm, or both; all of them start from --init_from, if given. Each has a folder below --workdir,
which bears its name. The same command goes on: arms that are finished are left alone. --through starts the
arms by another command, {name} standing for the arm:
--through='launch/tpu_run.sh --name={name} --type=v6e-8 --zone=... --project=... --version=...'. Then
--workdir must be on a disk that this machine shares with those of the arms.
`summary` writes summary.md, summary.json and summary.html: the last losses, and the scores that
`launch.evaluate --output=FOLDER/ARM/scores.json` left.
"""

import concurrent.futures
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from launch import arms as arms_lib
from launch import cli
from launch import places
from launch import run
from molmo2_jax import files
from molmo2_jax import metrics
from molmo2_jax.render import report

_AXIS = flags.DEFINE_multi_string("axis", [], "FIELD=[VALUE, ...]")
_ARM = flags.DEFINE_multi_string("arm", [], "gin file that is an arm of its own")
_ZIP = flags.DEFINE_bool("zip", False, "Take the axes' values in step instead of all combinations.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Arms trained at a time.", lower_bound=1)
_THROUGH = flags.DEFINE_string("through", "", "Command in front of each arm's own, {name} its name.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands instead.")
for _name in ("gin_file", "gin", "workdir", "init_from", "traceback"):
    flags.declare_key_flag(_name)

RECORD = "sweep.json"
_LAST = 5  # lines of metrics.jsonl that the final values are means of


def main(arguments: list[str]) -> None:
    if arguments == ["summary"]:
        print(summarise(cli.workdir()))
        return
    cli.no_arguments(arguments)
    arms = make_arms(cli.gin_files(), list(map(cli.located, _ARM.value)),
                     list(map(arms_lib.parse_axis, _AXIS.value)), cli.bindings(), _ZIP.value)
    # A mistake in any arm ends the sweep before the first one starts.
    steps = {arm.name: run.resolve(arm.gin_files, arm.bindings).train.steps for arm in arms}
    folder, start = cli.workdir(), cli.INIT_FROM.value
    if start and pathlib.Path(start).exists():  # arms start in another folder; a path of the pods stays
        start = str(pathlib.Path(start).absolute())
    if _DRY_RUN.value:
        for arm in arms:
            print(shlex.join(arm.command(sys.executable, str(folder / arm.name), _THROUGH.value, start)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps({arm.name: [*arm.gin_files, *arm.bindings] for arm in arms},
                                            indent=1), encoding="utf-8")
    failed = train_all(arms, folder, steps, _JOBS.value, _THROUGH.value, start)
    if failed:
        raise ValueError("all arms must end well; failed: "
                         + ", ".join(f"{name} (see {folder / name}.log)" for name in failed))


def make_arms(gin_files: Sequence[str], arm_files: Sequence[str], axes: Sequence[arms_lib.Axis],
              bindings: Sequence[str], is_zipped: bool) -> list[arms_lib.Arm]:
    """Returns the arms of the flags.

    Raises:
      ValueError: neither axes nor files describe arms, or a base file is missing or one too many.
    """
    if arm_files:
        if gin_files:
            raise ValueError(f"--arm files are whole runs and take no --gin_file; got {list(gin_files)}")
        arms = arms_lib.of_files(arm_files, bindings)
        return arms_lib.product(arms, axes, is_zipped=is_zipped) if axes else arms
    if not (gin_files and axes):
        raise ValueError("a sweep must have --arm files, or a --gin_file and at least one --axis")
    return arms_lib.of_axes(gin_files, axes, bindings, is_zipped=is_zipped)


def is_finished(workdir: pathlib.Path, steps: int) -> bool:
    lines = metrics.read(str(workdir / "metrics.jsonl"))
    return bool(lines) and lines[-1]["step"] >= steps


def train_all(arms: Sequence[arms_lib.Arm], folder: pathlib.Path, steps: dict[str, int], jobs: int,
              through: str = "", init_from: str | None = None) -> list[str]:
    """Trains the arms that are not finished, `jobs` at a time; returns the names of those that failed."""
    def train(arm: arms_lib.Arm) -> bool:
        if is_finished(folder / arm.name, steps[arm.name]):
            print(f"{arm.name}: finished before")
            return True
        command = arm.command(sys.executable, str((folder / arm.name).absolute()), through,
                              init_from)
        print(f"{arm.name}: started", flush=True)
        with open(folder / f"{arm.name}.log", "a", encoding="utf-8") as log:
            code = subprocess.run(command, cwd=places.base(), stdin=subprocess.DEVNULL, stdout=log,
                                  stderr=subprocess.STDOUT, check=False).returncode
        print(f"{arm.name}: " + ("finished" if code == 0 else f"ended with status {code}"), flush=True)
        return code == 0

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return [arm.name for arm, is_good in zip(arms, pool.map(train, arms)) if not is_good]


def summarise(folder: pathlib.Path) -> str:
    """Writes the summary of a sweep's folder; returns its table.

    Raises:
      ValueError: the folder holds no sweep.
    """
    record = folder / RECORD
    if not record.is_file():
        raise ValueError(f"a summary needs the folder of a sweep, with {RECORD}; got {folder}")
    lines = {name: metrics.read(str(folder / name / "metrics.jsonl"))
             for name in json.loads(record.read_text(encoding="utf-8"))}
    results = {name: _final(arm_lines) | _scores(folder / name) for name, arm_lines in lines.items()}
    table = _table(results)
    (folder / "summary.md").write_text(table, encoding="utf-8")
    (folder / "summary.json").write_text(files.to_json(results, indent=1), encoding="utf-8")
    curves = {name: [(line["step"], line["loss"]) for line in arm_lines]
              for name, arm_lines in lines.items() if arm_lines}
    report.write_report(folder / "summary.html", report.Report(
        title=folder.name, curves={"loss": curves} if curves else {}, command=table))
    return table


def _final(lines: list[dict]) -> dict[str, float]:
    """Returns the last step, and means of the last values."""
    if not lines:
        return {"step": 0}
    names = ("loss", "accuracy", "examples_per_second", "tokens_per_second")
    return {"step": lines[-1]["step"]} | {
        name: float(np.mean([line[name] for line in lines[-_LAST:]])) for name in names if name in lines[-1]}


def _scores(workdir: pathlib.Path) -> dict[str, float]:
    """Returns what launch.evaluate wrote into the arm's folder, under "data set: score"."""
    found = {}
    for path in sorted(workdir.glob("scores*.json")):
        for data, scores in json.loads(path.read_text(encoding="utf-8")).items():
            found |= {f"{pathlib.Path(data).name}: {name}": value for name, value in scores.items()}
    return found


def _table(results: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(name for values in results.values() for name in values))
    rows = [["arm", *columns], ["---"] * (1 + len(columns))]
    rows += [[arm, *("" if values.get(name) is None else f"{values[name]:.5g}" for name in columns)]
             for arm, values in results.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    cli.start(main)
