"""Trains the arms of an experiment and summarises their results.

  python -m launch.sweep --gin_file=gin_configs/runs/quickstart.gin --workdir=runs/pooling --jobs=2 \\
      --axis='config.ConnectorConfig.video_window=[(2, 2), (3, 3)]' --seeds=0,1,2
  python -m launch.sweep --arm=gin_configs/ablations/pool_4x4.gin --arm=gin_configs/runs/quickstart.gin \\
      --workdir=runs/ablations
  python -m launch.sweep summary --workdir=runs/pooling --baseline=video_window-3x3

An arm is one combination of the values of all axes (with --zip: all first values, all second values, ...), or
a gin file given by --arm, or both. With --seeds each arm is trained once with every seed, of the run and of
its data. All arms start from --init_from, if given. Each arm has a folder of its name in --workdir. The same
command resumes the sweep: arms with a checkpoint of their last step are not trained again. The sweep is
refused if an arm was begun with other settings. Arms that a killed call left running on this machine are
waited for. --jobs arms are trained at a time, each on its share of the machine's cores. --through starts each
arm with another command, in which {name} is replaced by the name of the arm:
--through='launch/tpu_run.sh --name={name} --type=v6e-8 --zone=... --project=... --version=...'. --workdir
must then be on a disk that this machine shares with the machines of the arms.

With --evaluate=FOLDER each trained arm is scored on that data; without it, write the scores with
`launch.evaluate --output=WORKDIR/ARM/scores.json`. `summary` writes summary.md, summary.json and
summary.html: the last losses and the scores, their mean over seeds with its 95 % interval, the differences
to the --baseline seed by seed, and the curves of --metric.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from absl import flags

from launch import run
from launch.support import arms as arms_lib
from launch.support import cli
from launch.support import comparison
from launch.support import lock
from launch.support import places
from launch.support import record
from molmo2_jax import checkpoint
from molmo2_jax import files
from molmo2_jax.render import report

_AXIS = flags.DEFINE_multi_string("axis", [], "A field and its values: FIELD=[VALUE, ...]")
_ARM = flags.DEFINE_multi_string("arm", [], "gin file of one arm")
_ZIP = flags.DEFINE_bool("zip", False, "Pair the axes' values in order instead of combining all of them.")
_SEEDS = flags.DEFINE_list("seeds", [], "Seeds with which each arm is trained: 0,1,2.")
_EVALUATE = flags.DEFINE_multi_string("evaluate", [], "Data folder on which each trained arm is scored")
_METRIC = flags.DEFINE_list("metric", ["loss"], "Metrics that the summary draws by step.")
_BASELINE = flags.DEFINE_string("baseline", None, "Arm, without its seed, to which others are compared.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Number of arms trained at a time.", lower_bound=1)
_THROUGH = flags.DEFINE_string(
    "through", "", "Command that runs each arm's command; {name} is replaced by the arm's name.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands without running them.")
for _name in ("gin_file", "gin", "workdir", "init_from", "traceback"):
    flags.declare_key_flag(_name)

RECORD = "sweep.json"


def main(arguments: list[str]) -> None:
    if arguments == ["summary"]:
        print(summarise(cli.workdir(), _METRIC.value, _BASELINE.value))
        return
    cli.no_arguments(arguments)
    arms = make_arms(cli.gin_files(), list(map(cli.located, _ARM.value)),
                     list(map(arms_lib.parse_axis, _AXIS.value)), cli.bindings(), _ZIP.value, _seeds())
    if _EVALUATE.value and _THROUGH.value:
        raise ValueError("--evaluate scores arms on this machine and cannot be used with --through; got "
                         f"{_EVALUATE.value}")
    # Resolve every arm first, so that a mistake in any of them ends the sweep before training starts.
    configs = {arm.name: run.resolve(arm.gin_files, arm.bindings) for arm in arms}
    folder, start = cli.workdir(), cli.INIT_FROM.value
    if start and pathlib.Path(start).exists():  # arms run in another folder; a path on a pod stays as it is
        start = str(pathlib.Path(start).absolute())
    if _DRY_RUN.value:
        for arm in arms:
            print(shlex.join(arm.command(sys.executable, str(folder / arm.name), _THROUGH.value, start)))
        return
    check_settings(folder, configs)
    folder.mkdir(parents=True, exist_ok=True)
    described = {arm.name: [*arm.gin_files, *arm.bindings] for arm in arms}
    (folder / RECORD).write_text(json.dumps(_recorded(folder) | described, indent=1), encoding="utf-8")
    steps = {name: config.train.steps for name, config in configs.items()}
    heldout = [str(pathlib.Path(path).absolute()) for path in _EVALUATE.value]
    failed = train_all(arms, folder, steps, _JOBS.value, _THROUGH.value, start, heldout)
    if failed:
        raise ValueError("every arm must finish; failed arms: "
                         + ", ".join(f"{name} (see {folder / name}.log)" for name in failed))


def make_arms(gin_files: Sequence[str], arm_files: Sequence[str], axes: Sequence[arms_lib.Axis],
              bindings: Sequence[str], is_zipped: bool, seeds: Sequence[int] = ()) -> list[arms_lib.Arm]:
    """Returns the arms that the flags describe.

    Raises:
      ValueError: neither axes nor files describe arms, the base file is missing, or --arm files have one.
    """
    if arm_files:
        if gin_files:
            raise ValueError(f"--arm files are complete runs and take no --gin_file; got {list(gin_files)}")
        arms = arms_lib.of_files(arm_files, bindings)
        arms = arms_lib.product(arms, axes, is_zipped=is_zipped) if axes else arms
    else:
        if not (gin_files and (axes or seeds)):
            raise ValueError("a sweep must have --arm files, or a --gin_file and an --axis or --seeds")
        arms = arms_lib.of_axes(gin_files, axes, bindings, is_zipped=is_zipped)
    return arms_lib.with_seeds(arms, comparison.SEED_FIELDS, seeds) if seeds else arms


def _seeds() -> list[int]:
    """Returns --seeds as numbers.

    Raises:
      ValueError: one is not a number.
    """
    wrong = [text for text in _SEEDS.value if not text.strip().isdigit()]
    if wrong:
        raise ValueError(f"--seeds must be whole numbers such as 0,1,2; got {','.join(wrong)!r}")
    return [int(text) for text in _SEEDS.value]


def check_settings(folder: pathlib.Path, configs: Mapping[str, run.RunConfig]) -> None:
    """Compares the settings of arms with those that they were trained with; the mesh may differ.

    Raises:
      ValueError: an arm that has begun has other settings, each of which is named.
    """
    problems = []
    for name, config in configs.items():
        saved = folder / name / record.NAME
        if saved.is_file():
            before = dataclasses.replace(run.resolve([saved.absolute()]), mesh=config.mesh)
            problems += [f"{name} ({line})" for line in record.differences(before, config)]
    if problems:
        raise ValueError("an arm that has begun must keep its settings; use another --workdir or remove the "
                         f"arm's folder; got {'; '.join(problems)}")


def _recorded(folder: pathlib.Path) -> dict[str, list[str]]:
    """Returns the arms of earlier calls, {name: gin files and bindings}."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def unfinished(workdir: pathlib.Path, steps: int) -> str:
    """Returns why an arm must be trained, "" if the checkpoint of its last step is complete."""
    saved = checkpoint.saved_steps(str(workdir))
    if saved and saved[-1] >= steps:
        return ""
    return f"its last checkpoint is of step {saved[-1]} of {steps}" if saved else "it has no checkpoint"


def shares(jobs: int) -> list[list[int]]:
    """Returns the cores of each of `jobs` arms: a part of those that this process may use, at least one."""
    cores = sorted(os.sched_getaffinity(0))
    return [cores[job::jobs] or [cores[job % len(cores)]] for job in range(jobs)]


def train_all(arms: Sequence[arms_lib.Arm], folder: pathlib.Path, steps: dict[str, int], jobs: int,
              through: str = "", init_from: str | None = None, heldout: Sequence[str] = ()) -> list[str]:
    """Trains the arms that are not finished, `jobs` at a time, and scores them on the folders `heldout`.

    Returns the names of the failed arms.
    """
    free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for cores in shares(jobs):
        free.put(cores)
    _wait_for_earlier(arms, folder)

    def execute(arm: arms_lib.Arm, command: Sequence[str], cores: Sequence[int]) -> bool:
        with open(folder / f"{arm.name}.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen(command, cwd=places.base(), stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=subprocess.STDOUT)
            if jobs > 1 and not through:
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(process.pid, cores)  # its threads and workers inherit it
            code = process.wait()
        print(f"{arm.name}: " + ("finished" if code == 0 else f"ended with status {code}"), flush=True)
        return code == 0

    def work(arm: arms_lib.Arm) -> bool:
        workdir, cores = (folder / arm.name).absolute(), free.get()
        try:
            reason = unfinished(workdir, steps[arm.name])
            if not reason:
                print(f"{arm.name}: finished before")
            else:
                print(f"{arm.name}: started ({reason})", flush=True)
                if not execute(arm, arm.command(sys.executable, str(workdir), through, init_from), cores):
                    return False
            scores = workdir / "scores.json"
            if not heldout or (scores.is_file() and not reason):
                return True
            print(f"{arm.name}: being scored", flush=True)
            return execute(arm, [sys.executable, "-m", "launch.evaluate", f"--model={workdir}",
                                 *(f"--data={path}" for path in heldout), f"--output={scores}"], cores)
        finally:
            free.put(cores)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return [arm.name for arm, is_good in zip(arms, pool.map(work, arms)) if not is_good]


def _wait_for_earlier(arms: Sequence[arms_lib.Arm], folder: pathlib.Path) -> None:
    """Returns when no arm is being trained here: a sweep that was killed leaves its arms running."""
    for arm in arms:
        told = None
        while (process := lock.holder(folder / arm.name)) is not None:
            if process != told:
                print(f"{arm.name}: waiting for process {process}, which is training it", flush=True)
            told = process
            time.sleep(lock.BEAT)


def summarise(folder: pathlib.Path, names: Sequence[str] = ("loss",), baseline: str | None = None) -> str:
    """Writes the summary of a sweep into its folder and returns the tables.

    Args:
      names: metrics of metrics.jsonl to draw.
      baseline: the arm, without its seed, to which others are compared.

    Raises:
      ValueError: the folder is not that of a sweep, or has no such arm.
    """
    if not (folder / RECORD).is_file():
        raise ValueError(f"a summary needs the folder of a sweep, with {RECORD}; got {folder}")
    arms = comparison.read(folder, _recorded(folder))
    table = comparison.tables(arms, baseline)
    (folder / "summary.md").write_text(table, encoding="utf-8")
    (folder / "summary.json").write_text(files.to_json(comparison.to_json(arms), indent=1), encoding="utf-8")
    report.write_report(folder / "summary.html", comparison.page(folder.name, arms, names, table))
    return table


if __name__ == "__main__":
    cli.start(main)
