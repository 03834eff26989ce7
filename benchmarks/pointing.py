"""Points as coordinates against points as choices among visual tokens, by the number of training examples.

  nice -n 12 python -m benchmarks.pointing --workdir=runs/pointing [--num_seeds=3] [--steps=N]
  nice -n 12 python -m benchmarks.pointing --workdir=runs/pointing --world=full   # goes on from those runs

Draws the world of the quickstart once. Arms differ in three things: how points are written, of how many
distinct examples they learn (the first quarter, the first half, all), and the seed of weights and order.
Steps, curriculum, tokenizer, questions and held-out examples are the same; with fewer examples each is seen
more often. Runs of --world=full start from the run of the quickstart's world with all examples, the same
grammar and the same seed.

Arms are trained one after the other, all of a seed before the next, and scored on the held-out examples. The
same command resumes; with --examples_scale=0.02 --steps=60 it is a trial. Prints F1 of points and writes it
to WORKDIR/WORLD/table.md, again after each arm.
"""

import contextlib
import fractions
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from benchmarks import arms as tables
from launch import draw
from launch import run
from launch import sweep
from launch.quickstart import __main__ as quickstart
from launch.support import arms as arms_lib
from launch.support import cli
from launch.support import comparison
from launch.support import places

_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Number of seeds of each arm.", lower_bound=1)
_SHARES = flags.DEFINE_list("shares", ["1/4", "1", "1/2"], "Shares of the examples, in order of training.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of a run; default: those of the world.", lower_bound=1)

GRAMMARS = {"text": (), "tokens": quickstart.TOKENS}
SCORES = {"video F1": "heldout: video_point_f1", "image F1": "heldout: image_point_f1"}


class Cell(NamedTuple):
    """What an arm differs in: a key of GRAMMARS, a share of the examples, and a seed."""
    grammar: str
    share: fractions.Fraction
    seed: int

    @property
    def name(self) -> str:
        return f"{self.grammar}_{str(self.share).replace('/', '-')}_seed-{self.seed}"


def cells(shares: Sequence[fractions.Fraction], num_seeds: int) -> list[Cell]:
    """Returns the arms in the order of training."""
    return [Cell(grammar, share, seed)
            for seed, share, grammar in itertools.product(range(num_seeds), shares, GRAMMARS)]


def first_part(folder: pathlib.Path, share: fractions.Fraction) -> pathlib.Path:
    """Returns a data folder with the first `share` of a folder's examples, and its media."""
    if share == 1:
        return folder
    part = folder.with_name(f"{folder.name}_{str(share).replace('/', '-')}")
    part.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.symlink(folder.absolute() / "media", part / "media")
    lines = (folder / "annotations.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    text, target = "".join(lines[:round(len(lines) * share)]), part / "annotations.jsonl"
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")
    return part


def arm(job: quickstart.Job, cell: Cell, steps: int | None) -> arms_lib.Arm:
    """Returns the run of a cell on the data of `job`."""
    assert job.config.data and job.config.train
    train = tuple((str(first_part(pathlib.Path(folder), cell.share)), *rates)
                  for folder, *rates in job.config.data.train)
    settings = {"run.RunConfig.tokenizer": job.config.tokenizer, "pipeline.DataConfig.train": train,
                "train.TrainConfig.steps": steps or job.config.train.steps}
    seeds = dict.fromkeys(comparison.SEED_FIELDS, cell.seed)
    bindings = [f"{field} = {value!r}" for field, value in (settings | seeds).items()]
    return arms_lib.Arm(cell.name, (f"gin_configs/runs/{job.world}.gin",),
                        (*GRAMMARS[cell.grammar], *bindings))


def start_of(cell: Cell, world: str, root: pathlib.Path) -> str | None:
    """Returns the folder of the run that a run of the full world goes on from; None for the quickstart's.

    Raises:
      ValueError: it is not there.
    """
    if world == "quickstart":
        return None
    start = root / "quickstart" / cell._replace(share=fractions.Fraction(1)).name
    if not (start / "scores.json").is_file():
        raise ValueError(f"--world={world} needs a finished run of the quickstart's world in {start}")
    return str(start)


def table(folder: pathlib.Path, arms: dict[Cell, arms_lib.Arm], examples: int) -> str:
    """Returns F1 by number of examples in Markdown; ± is the 95 % interval of the mean over seeds.

    examples: of the share 1. Differences are taken seed by seed.
    """
    rows = []
    for share in sorted({cell.share for cell in arms}):
        done = {grammar: [one for cell, arm in arms.items()
                          if cell.share == share and cell.grammar == grammar
                          and (folder / arm.name / "scores.json").is_file()
                          for one in comparison.read(folder, {arm.name: [*arm.gin_files, *arm.bindings]})]
                for grammar in GRAMMARS}
        found = {grammar: comparison.means(members) for grammar, members in done.items()}
        apart = comparison.differences(done["tokens"], done["text"])
        rows.append([f"{round(examples * share):,}", " / ".join(str(len(one)) for one in done.values()),
                     *(str(one.get(score, "")) for score in SCORES.values()
                       for one in (found["text"], found["tokens"], apart))])
    columns = ["examples", "runs: text / tokens", *(f"{name}, {what}" for name in SCORES
                                                    for what in ("text", "tokens", "tokens - text"))]
    return tables.markdown(columns, rows)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    world, root, steps = draw.WORLD.value, cli.workdir().absolute(), _STEPS.value
    folder, shares = root / world, list(map(fractions.Fraction, _SHARES.value))
    found = cells(shares, _NUM_SEEDS.value)
    starts = {cell: start_of(cell, world, root) for cell in found}
    config = quickstart.settings(world, folder, [], 0)
    job = quickstart.Job(world=world, workdir=folder, config=config, seed=0,
                         scale=quickstart.SCALE.value, start=starts[found[0]])
    with contextlib.chdir(places.base()):
        quickstart.draw(job)
        if not pathlib.Path(job.config.tokenizer, "tokenizer.json").exists():
            quickstart.make_tokenizer(job)
    arms = {cell: arm(job, cell, steps) for cell in found}
    sweep.check_settings(folder, {one.name: run.resolve(one.gin_files, one.bindings)
                                  for one in arms.values()})
    examples = sum(count for name, (_, _, count) in job.worlds.items() if name != quickstart.HELDOUT)
    for cell, one in arms.items():
        failed = sweep.train_all([one], folder, {one.name: steps or job.config.train.steps}, 1, "",
                                 starts[cell], [str(job.data / quickstart.HELDOUT)])
        if failed:
            raise ValueError(f"every arm must finish; failed: {one.name} (see {folder / one.name}.log)")
        text = table(folder, arms, examples)
        (folder / "table.md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    cli.start(main)
