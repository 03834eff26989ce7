"""Shows what a run would train on, without training.

  python -m launch.inspect batch --gin_file=gin_configs/runs/quickstart.gin --output=rows.html
  python -m launch.inspect record --data=my_data --index=17 --output=record.html
  python -m launch.inspect mixture --gin_file=gin_configs/runs/sft_4b.gin
  python -m launch.inspect mixture --gin_file=gin_configs/runs/sft_4b.gin --allow_missing --output=sft.json

batch writes the rows of the first batch, at most --rows, as one HTML page: frames with their times, message
trees, tokens with their loss weights, positions and what they choose, the attention mask, how full the rows
are, which records they hold, and what was cut. The page needs nothing else. record does so for record --index
(from 0) of a data folder: as the run of --gin_file reads it the first time, or else of any size, with the
model that ships.

mixture lists the data sets of the run: their records, their shares of the stream, and how often the run goes
through each. For that it prepares --sample records of each (default 20), drawn by --seed, and packs them;
--examples_per_row=N states the number of examples in a row instead, and no media are read. Data sets whose
folders are absent are listed with the source of their records; shares then follow from published sizes.
launch.train refuses to start without them, so the exit status is 1, unless --allow_missing (or
pipeline.DataConfig.allow_missing) leaves them out and others remain, whose shares then grow. Folders that are
there but cannot be opened are listed with the reason; they, too, end a run at its start. --output writes the
same values as JSON.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping

import numpy as np
from absl import flags

from data_pipelines import doctor
from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines.doctor import cost
from data_pipelines.doctor import mixture as mixtures_lib
from data_pipelines.doctor import packed
from launch import run
from launch.support import cli
from launch.support import examined
from launch.support import places
from molmo2_jax import config as configs
from molmo2_jax.attention import tree_mask
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.monitor import bars
from molmo2_jax.render import rows as rows_lib

_INDEX = flags.DEFINE_integer("index", None, "record: its number in the folder, from 0.", lower_bound=0)
_EXAMPLES_PER_ROW = flags.DEFINE_float(
    "examples_per_row", None, "mixture: examples that share a row. Default: measured.", lower_bound=0)
for _name in ("gin_file", "gin", "workdir", "data", "rows", "allow_missing", "cache", "sample", "seed",
              "output", "traceback"):
    flags.declare_key_flag(_name)

_SAMPLE = 20  # records of each data set that are prepared


def main(arguments: list[str]) -> None:
    commands = {"batch": batch, "record": record, "mixture": mixture}
    if len(arguments) != 1 or arguments[0] not in commands:
        raise ValueError(f"launch.inspect takes one of the words {', '.join(commands)}; "
                         f"got {' '.join(arguments) or 'none'}")
    commands[arguments[0]]()


def batch() -> None:
    """Writes the page of the first rows that a run trains on."""
    output, config = _page(), cli.resolve("tokenizer", "data")
    with contextlib.chdir(places.base()):  # paths in configurations are relative to it
        tokenizer = tokenizers.Tokenizer.from_file(
            places.model(config.tokenizer), config.model.text.vocab_size)
        found = packed.first_rows(config.data, config.model, config.inputs, tokenizer,
                                  cli.ROWS.value)
    rows = len(found.batch.tokens)
    _write(output, "The first rows of a run", {
        "run": ", ".join(cli.gin_files()) or str(cli.workdir()),
        "rows": f"{rows} of {config.data.batch_rows}",
        "data seed": str(config.data.seed)}, found, config.model, tokenizer)


def record() -> None:
    """Writes the page of one record."""
    output, config = _page(), cli.resolve("tokenizer", "data") if cli.gin_files() else None
    folders, index = cli.data(), _INDEX.value
    if len(folders) != 1 or index is None:
        raise ValueError(f"record needs one folder, --data, and --index; got {folders} and {index}")
    source = sources.open_source(folders[0])
    if index >= len(source):
        raise ValueError(f"--index must be below the {len(source)} records of {folders[0]}; got {index}")
    settings = examined.settings(config) if config else examined.settings_of_no_run()
    found = packed.of_record(source[index], settings, _member(folders[0], config), index)
    _write(output, "A record as training sees it", {
        "data": folders[0], "index": str(index), "run": ", ".join(cli.gin_files()) or "none"}, found,
        settings.model, settings.tokenizer)


def _page() -> pathlib.Path:
    """Returns the absolute path of --output.

    Raises:
      ValueError: it is not given, or cannot be written.
    """
    if not cli.OUTPUT.value:
        raise ValueError("--output must name the HTML page to write")
    return cli.output_file(cli.OUTPUT.value).absolute()


def _member(folder: str, config: run.RunConfig | None) -> tasks.Member:
    """Returns how the last lesson of a run uses a folder; unchanged if it does not use it."""
    if config:
        mixtures, known = tasks.mixtures_of(config.data.train, len(config.data.lessons) + 1)
        for member in tasks.members(mixtures[-1]):
            if (places.base() / known[member.task].folder).resolve() == pathlib.Path(folder).resolve():
                return member
    return tasks.Member(task=folder)


def _write(output: pathlib.Path, title: str, facts: dict[str, str], found: packed.Packed,
           model: configs.Molmo2Config, tokenizer: tokenizers.Tokenizer) -> None:
    group = np.asarray(tree_mask.from_batch(found.batch, model.visual_attention).group)
    members = [[dataclasses.asdict(one) for one in row] for row in found.members]
    skipped = [(f"{note.task}/{note.key}", f"{note.reason}: {note.message}") for note in found.skipped]
    page = rows_lib.page(title, facts | {"visual attention": model.visual_attention}, found.batch, group,
                         tokenizer, members, skipped)
    output.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files may be no text
    print(f"{output}: {sum(map(len, members))} examples in {len(members)} rows")


def mixture() -> None:
    """Prints the data sets of a run."""
    config = cli.resolve("tokenizer", "data")
    output = cli.output_file(cli.OUTPUT.value).absolute() if cli.OUTPUT.value else None
    with contextlib.chdir(places.base()):  # folders in configurations are relative to it
        mixtures, known = config.data.mixtures()
        per_row = _examples_per_row(config, mixtures[-1], known)
        steps = config.train.steps if config.train else None
        total = per_row * config.data.batch_rows * steps if per_row and steps else None
        rows = mixtures_lib.describe(mixtures, known, lessons=config.data.lessons, total=total,
                                     allow_missing=config.data.allow_missing)
    _print(rows, total, per_row, steps, config.data.allow_missing)
    if output:
        values = {"examples_per_row": per_row, "rows_per_step": config.data.batch_rows, "steps": steps,
                  "examples": total, "allow_missing": config.data.allow_missing,
                  "data_sets": [dataclasses.asdict(row) for row in rows]}
        pathlib.Path(output).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if not _can_start(rows, config.data.allow_missing):
        sys.exit(1)


def _can_start(rows: list[mixtures_lib.Row], allow_missing: bool) -> bool:
    """Returns whether launch.train would start with these data sets."""
    is_left = all(any(shares) for shares in zip(*(row.shares for row in rows), strict=True))
    return is_left and not any(row.problem or row.is_missing and not allow_missing for row in rows)


def _examples_per_row(config: run.RunConfig, mixture: tasks.Mixture, known: Mapping[str, tasks.Task]
                      ) -> float | None:
    """Returns how many examples share a row, measured on the folders that are there; None without any."""
    if _EXAMPLES_PER_ROW.value:
        return _EXAMPLES_PER_ROW.value
    present = tasks.without(mixture, tasks.missing(mixture, known))
    if not present:
        return None
    settings, sizes, records = examined.settings(config), {}, {}
    for member in bars.bar(tasks.members(present), desc="preparing samples", unit="data set"):
        found = doctor.examine(known[member.task].folder, settings, member=member,
                               sample=cli.SAMPLE.value or _SAMPLE, seed=cli.SEED.value,
                               cache=config.data.cache)
        sizes[member.task], records[member.task] = found.sizes, found.records
    usable = tasks.without(present, [task for task, found in sizes.items() if not len(found)])
    shares = tasks.rates(usable, records)
    if not shares:
        return None
    return cost.examples_per_row([sizes[task] for task in shares], list(shares.values()), config.data.packer,
                                 settings.shape, config.data.seed)


def _print(rows: list[mixtures_lib.Row], total: float | None, per_row: float | None, steps: int | None,
           allow_missing: bool) -> None:
    """Prints a line for each data set, then what is missing or cannot be opened."""
    width = max(len(row.task) for row in rows)
    print(f"{'data set':{width}}  {'records':>12}  {'share':>{10 * len(rows[0].shares) - 1}}  {'epochs':>9}")
    for row in rows:
        size = "?" if row.examples is None else f"{row.examples:,}{'*' if row.is_missing else ''}"
        shares = " ".join("        ?" if one is None else f"{100 * one:7.3f} %" for one in row.shares)
        epochs = "?" if row.epochs is None else f"{row.epochs:.3g}"
        note = "  missing" if row.is_missing else "  cannot be opened" if row.problem else ""
        print(f"{row.task:{width}}  {size:>12}  {shares}  {epochs:>9}{note}")
    if total:
        print(f"{steps:,} steps take about {total:,.0f} examples, {per_row:.3g} in a row")
    missing, broken = [row for row in rows if row.is_missing], [row for row in rows if row.problem]
    if missing:
        print(f"\n{len(missing)} of {len(rows)} data sets are missing; " + (
            "training needs them, or --allow_missing (* published size):" if not allow_missing
            else "no other is left to train on:" if len(missing) == len(rows)
            else "they are left out and the shares of the others are renormalised (allow_missing):"))
    for row in missing:
        print(f"  {row.task}: neither annotations.jsonl nor shards in {places.data(row.folder)}; "
              f"{row.origin}")
    if broken:
        print(f"\n{len(broken)} of {len(rows)} data sets cannot be opened; training would refuse to start:")
    for row in broken:
        print(f"  {row.task}: {row.problem}")


if __name__ == "__main__":
    cli.start(main)
