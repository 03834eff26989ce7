"""Checks data folders before training: lists everything in them that training would leave out.

  python -m launch.check --data=my_data
  python -m launch.check --data=my_data --nomedia
  python -m launch.check --data=my_data --sample=1000 --report=report.html --output=report.json
  python -m launch.check --gin_file=gin_configs/runs/quickstart.gin --report=report.html

Reads every line of annotations.jsonl, then opens every video and image and compares the annotations with it
(docs/data_format.md). --nomedia checks the annotations only, which takes seconds. --sample examines a seeded
sample of each folder. The exit status is 1 if there is any problem.

--report writes one HTML page: usable share, durations, frame rates, resolutions, keyframes, annotations,
tokens, crops, what reading costs on this machine, problems grouped by kind, and pictures of some records.
--output writes the same values as JSON. With --gin_file records are read as that run reads them and compared
with its rows, the folders are by default those of its mixture, and the page says how many cores its batches
need.
"""

import collections
import dataclasses
import json
import os
import pathlib
import sys

from absl import flags

from data_pipelines import doctor
from data_pipelines import pipeline
from data_pipelines import tasks
from data_pipelines.doctor import cost
from data_pipelines.doctor import examination
from launch.support import cli
from launch.support import examined
from launch.support import places
from molmo2_jax.monitor import bars
from molmo2_jax.render import checkup
from molmo2_jax.render import pictures

_NO_MEDIA = flags.DEFINE_bool("nomedia", False, "Do not open videos and images.")
_REPORT = flags.DEFINE_string("report", None, "HTML page to write.")
_STEP_SECONDS = flags.DEFINE_float(
    "step_seconds", None, "Duration of a training step (launch.compile gives a bound), for the number of "
    "cores that a host needs. Default: numbers for several durations.", lower_bound=1e-3)
_HOSTS = flags.DEFINE_integer("hosts", 1, "Hosts that prepare a batch together.", lower_bound=1)
for _name in ("data", "gin_file", "gin", "output", "sample", "seed", "cache", "traceback"):
    flags.declare_key_flag(_name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What to check and for which run, if any. folders: by task."""
    mixture: tasks.Mixture
    folders: dict[str, str]
    settings: examination.Settings
    data: pipeline.DataConfig | None = None


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    for path in (_REPORT.value, cli.OUTPUT.value):
        if path:
            cli.output_file(path)
    plan = _plan()
    members = {member.task: member for member in tasks.members(plan.mixture)}
    found = {task: check(folder, members[task], plan) for task, folder in plan.folders.items()}
    if _REPORT.value or cli.OUTPUT.value:
        _write(plan, found)
    if any(one.problems for one in found.values()):
        sys.exit(1)


def _plan() -> _Plan:
    """Returns what the flags ask for: the folders of --data or else of the run, read as the run does."""
    run = cli.resolve("tokenizer", "data") if cli.gin_files() else None
    if cli.DATA.value or run is None:
        (mixture,), known = tasks.of_folders(tuple(cli.data()))
        folders = {task: one.folder for task, one in known.items()}
    else:
        mixtures, known = run.data.mixtures()
        mixture = mixtures[-1]
        folders = {one.task: places.data(known[one.task].folder) for one in tasks.members(mixture)}
    if run is None:
        return _Plan(mixture=mixture, folders=folders,
                     settings=examined.settings_of_no_run(has_media=not _NO_MEDIA.value))
    settings = examined.settings(run, has_media=not _NO_MEDIA.value)
    return _Plan(mixture=mixture, folders=folders, settings=settings, data=run.data)


def check(folder: str, member: tasks.Member, plan: _Plan) -> doctor.Checkup:
    """Returns the examination of a folder; prints what training would leave out of it."""
    cache = plan.data.cache if plan.data else cli.cache()
    found = doctor.examine(folder, plan.settings, member=member, sample=cli.SAMPLE.value, seed=cli.SEED.value,
                           has_thumbnails=bool(_REPORT.value), cache=cache,
                           watch=lambda chosen: bars.bar(chosen, desc=folder, unit="record"))
    result = found.result
    kinds = collections.Counter({kind: one["amount"]["count"] for kind, one in result["annotations"].items()})
    sampled = (f" of a sample of {result['examined']} of {found.records} records"
               if result["is_sampled"] else "")
    good = result["examined"] - result["left_out"].get("line", 0)
    print(f"{folder}: {good} good lines{sampled}; annotations: "
          + (", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none")
          + f"; problems: {len(found.problems) or 'none'}")
    for problem in found.problems:
        print(f"  {problem}")
    return found


def _write(plan: _Plan, found: dict[str, doctor.Checkup]) -> None:
    """Writes the files of --report and --output; `found` is by task."""
    shape = plan.settings.shape
    settings = {"run": ", ".join(cli.gin_files()) or None,
                "model": None if plan.data else str(examined.MODEL),
                "row": f"{shape.T:,} tokens, {shape.M:,} crops" if shape else None,
                "sample": cli.SAMPLE.value, "seed": cli.SEED.value, "cores here": os.cpu_count()}
    report = {"settings": settings, "sources": [one.result for one in found.values()],
              "batch": _batch(plan, found)}
    if cli.OUTPUT.value:
        pathlib.Path(cli.OUTPUT.value).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if _REPORT.value:
        checkup.write(_REPORT.value, report, {one.name: _drawn(one) for one in found.values()})


def _batch(plan: _Plan, found: dict[str, doctor.Checkup]) -> dict | None:
    """Returns the cost of the run's batches; None without a run, or if a data set has no usable record."""
    if plan.data is None or not all(len(one.sizes) for one in found.values()):
        return None
    shares = tasks.rates(plan.mixture, {task: one.records for task, one in found.items()})
    return cost.of_batch(plan.data, plan.settings.shape, {task: one.sizes for task, one in found.items()},
                         shares, {task: one.seconds for task, one in found.items()}, hosts=_HOSTS.value,
                         step_seconds=_STEP_SECONDS.value)


def _drawn(found: doctor.Checkup) -> list[checkup.Picture]:
    """Returns the thumbnails with their points drawn."""
    return [checkup.Picture(key=one.key, texts=one.texts, frames=[
        pictures.draw(frame.pixels, true=frame.marks, label=frame.label, short_side=1)
        for frame in one.frames]) for one in found.pictures]


if __name__ == "__main__":
    cli.start(main)
