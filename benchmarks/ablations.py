"""Draws the worlds of docs/ablations.md, trains its arms with launch.sweep, and prints its tables.

  python -m benchmarks.ablations                      # everything that is not finished
  python -m benchmarks.ablations --only=small --draw  # the data of one sweep alone
  python -m benchmarks.ablations --table              # the tables of what there is
  python -m benchmarks.ablations --count              # annotations in a step of each arm; trains nothing

Each sweep has a base run, gin files that change one thing in it, and held-out data. Data are in
runs/ablations/data, runs in runs/ablations/SWEEP. The same command resumes.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipelines import pipeline
from data_pipelines.stream import workers
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch import run
from launch.support import comparison
from launch.support import places
from molmo2_jax.inputs import tokenizer as tokenizers

ROOT = pathlib.Path("runs/ablations")
SEED = 100   # of the worlds; those of held-out data follow from their names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """A data folder: a drawn world, or the records of other folders, changed."""
    world: world_config.WorldConfig | None = None
    examples: int = 0
    of: tuple[str, ...] = ()
    change: str = ""   # of the records of `of`: a key of CHANGES


def one_object(**fields) -> world_config.WorldConfig:
    """Returns clips of one object of the quickstart's world, with four questions each."""
    settings: dict[str, Any] = {
        "objects": (1, 1), "object_rates": (), "vfr_share": 0.0, "image_share": 0.0, "image_set_share": 0.0,
        "branches": (4, 4), "point_modes": ("bare",),
        "annotations": (("points", 2.0), ("tracks", 2.0), ("choice", 1.0), ("qa", 2.0))}
    return dataclasses.replace(world_config.quickstart_world(), **settings | fields)


def counting() -> world_config.WorldConfig:
    """Returns clips of two frames with one to five small objects at rest, of any colours and kinds."""
    return one_object(objects=(1, 5), unique="none", radius=(0.09, 0.12), speed=(0.0, 0.0),
                      duration=(0.5, 0.5), phrases=("colour", "any"), branches=(2, 2),
                      annotations=(("points", 1.0),), point_modes=("point_count",))


# Durations such that all frames lie on the 0.5 s grid of masks: 0, 0.5, 1, 1.5 and 0, 1, 2, 3 seconds.
NEAR, FAR = one_object(duration=(1.5, 1.5)), one_object(duration=(3.0, 3.0))
FOLDERS = {
    "near": Folder(world=NEAR, examples=1500),
    "far": Folder(world=FAR, examples=1500),
    "near_heldout": Folder(world=NEAR, examples=48),
    "far_heldout": Folder(world=FAR, examples=48),
    "single": Folder(of=("near", "far"), change="one_each"),
    "heldout": Folder(of=("near_heldout", "far_heldout"), change="same"),
    "points_then_count": Folder(world=counting(), examples=1500),
    "points_then_count_heldout": Folder(world=counting(), examples=96),
    "count_alone": Folder(of=("points_then_count",), change="count_alone"),
    "count_alone_heldout": Folder(of=("points_then_count_heldout",), change="count_alone"),
}


def _one_each(record: dict) -> Iterable[dict]:
    return ({**record, "annotations": [one]} for one in record["annotations"])


def _count_alone(record: dict) -> Iterable[dict]:
    return [{**record, "annotations": [{**one, "mode": "count"} for one in record["annotations"]]}]


CHANGES = {"one_each": _one_each, "count_alone": _count_alone, "same": lambda record: [record]}


def draw(names: Sequence[str], root: pathlib.Path, folders: Mapping[str, Folder] = FOLDERS) -> None:
    """Writes data folders, those that they are made of first."""
    for name in names:
        folder = folders[name]
        if folder.world is not None:
            world_write.write(root, folder.world, SEED, folder.examples, split=name, workers=2,
                              has_masks=name.endswith("heldout"))
            continue
        draw(folder.of, root, folders)
        (root / name).mkdir(parents=True, exist_ok=True)
        with open(root / name / "annotations.jsonl", "w", encoding="utf-8") as lines:
            for source in folder.of:
                for line in (root / source / "annotations.jsonl").read_text(encoding="utf-8").splitlines():
                    record = json.loads(line)
                    record["video"] = f"../{source}/{record['video']}"
                    lines.writelines(json.dumps(one) + "\n" for one in CHANGES[folder.change](record))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the table: an arm, what the paper finds when the same is changed, and scores to compare.

    number: of the claim in the paper's list (docs/ablations.md). scores: {words: score of the arm}.
    base_scores: those of the base run where they have other names.
    """
    number: str
    arm: str
    paper: str
    scores: Mapping[str, str]
    base_scores: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A base run, its arms, the data that they train on and are scored on, and the model they start from."""
    base: str
    claims: tuple[Claim, ...]
    data: tuple[str, ...]
    heldout: tuple[str, ...]
    init_from: str | None = None

    @property
    def arms(self) -> list[str]:
        """Returns the gin files: the base, then one for each claim."""
        return [f"gin_configs/runs/{self.base}.gin",
                *(f"gin_configs/ablations/small/{claim.arm}.gin" for claim in self.claims)]


def _scores(*names: str, folder: str = "heldout") -> dict[str, str]:
    return {_WORDS[name]: f"{folder}: {name}" for name in names}


_WORDS = {"video_point_f1": "pointing F1", "track_jf": "tracks J&F", "qa_accuracy": "short answers",
          "choice_accuracy": "choices", "count_accuracy": "counts"}
_ALL = _scores("video_point_f1", "track_jf", "qa_accuracy", "choice_accuracy")
SWEEPS = {
    "small": Sweep(
        base="small", data=("near", "far", "single"), heldout=("heldout",), claims=(
            Claim(number="A1", arm="causal", paper="answers −0.4, captions −1.0", scores=_ALL),
            Claim(number="A1", arm="within_image", paper="not published", scores=_ALL),
            Claim(number="A2", arm="even_weights", paper="answers −0.8, captions +0.5", scores=_ALL),
            Claim(number="A3", arm="no_frame_times", paper="answers −0.3, captions −2.1", scores=_ALL),
            Claim(number="A4", arm="pool_5x5", paper="(4×4) answers −0.5, captions −2.5", scores=_ALL),
            Claim(number="A5", arm="pool_2x2", paper="not published", scores=_ALL),
            Claim(number="A6", arm="one_example_per_row", paper="1/15 of the annotations a step",
                  scores=_ALL),
            Claim(number="A6", arm="one_annotation_per_row", paper="the same", scores=_ALL))),
    "counting": Sweep(
        base="small_counting", data=("points_then_count", "count_alone"),
        heldout=("points_then_count_heldout", "count_alone_heldout"), init_from="assets/nano", claims=(
            Claim(number="A10", arm="count_alone", paper="counts −6.4",
                  scores=_scores("count_accuracy", folder="count_alone_heldout"),
                  base_scores=_scores("count_accuracy", folder="points_then_count_heldout")),)),
}


def table(sweep: Sweep, folder: pathlib.Path) -> str:
    """Returns the rows of a sweep in Markdown: the base's scores, then every arm's difference to them."""
    described = folder / "sweep.json"
    arms = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    named = {name.partition("_seed-")[0]: members
             for name, members in comparison.groups(comparison.read(folder, arms)).items()}
    lines = []
    for claim in sweep.claims:
        base, members = named.get(sweep.base, []), named.get(claim.arm, [])
        cells = []
        for words, score in claim.scores.items():
            renamed = [_renamed(arm, claim.base_scores.get(words, score), score) for arm in base]
            before = comparison.means(renamed).get(score)
            after = comparison.differences(members, renamed).get(score)
            if before and after:
                half = "" if after.half is None else f" ± {after.half:.3f}"
                cells.append(f"{words} {before.mean:.3f}, {after.mean:+.3f}{half}")
        lines.append(f"| {claim.number} | `{claim.arm}` | {claim.paper} | {'; '.join(cells) or 'not run'} |")
    return "\n".join(["| | arm | paper | ours |", "|---|---|---|---|", *lines])


def _renamed(arm: comparison.Trained, old: str, new: str) -> comparison.Trained:
    values = {**arm.values, new: arm.values[old]} if old in arm.values else arm.values
    return dataclasses.replace(arm, values=values)


def count(path: str, steps: int = 20) -> dict[str, float]:
    """Returns what a run's first batches hold: annotations and examples a step, filled shares of rows."""
    config = run.resolve([path])
    assert config.data and config.tokenizer
    data = dataclasses.replace(config.data, num_workers=0)
    tokenizer = tokenizers.Tokenizer.from_file(places.model(config.tokenizer), config.model.text.vocab_size)
    with contextlib.chdir(places.base()), contextlib.closing(
            pipeline.make_iterator(data, config.model, config.inputs, tokenizer)) as batches:
        for _ in range(steps):
            next(batches)
        totals = batches.counters()
    return {"annotations": totals["branches"] / steps, "examples": totals["examples"] / steps,
            "token_fill": totals["token_fill"], "crop_fill": totals["crop_fill"]}


def counts(sweep: Sweep) -> str:
    """Returns a table in Markdown of what a step of each arm learns from."""
    lines = []
    for path in sweep.arms:
        annotations, examples, tokens, crops = count(path).values()
        lines.append(f"| `{pathlib.Path(path).stem}` | {annotations:.1f} | {examples:.1f} | {tokens:.0%} "
                     f"| {crops:.0%} |")
    return "\n".join(["| arm | annotations a step | clips a step | tokens filled | frames filled |",
                      "|---|---|---|---|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(SWEEPS), help="a sweep; may be repeated")
    parser.add_argument("--seeds", default="0,1,2", help="of every arm")
    parser.add_argument("--draw", action="store_true", help="only draw the data")
    parser.add_argument("--count", action="store_true", help="only print what a step of each arm learns from")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    for name in options.only or SWEEPS:
        sweep, folder = SWEEPS[name], places.base() / ROOT / name
        if options.count:
            print(counts(sweep), flush=True)
            continue
        if not options.table:
            with workers.hidden_main():
                draw([*sweep.data, *sweep.heldout], places.base() / ROOT / "data")
        if not (options.table or options.draw):
            subprocess.run([
                sys.executable, "-m", "launch.sweep", *(f"--arm={path}" for path in sweep.arms),
                f"--seeds={options.seeds}", f"--workdir={folder}",
                *(f"--evaluate={ROOT / 'data' / one}" for one in sweep.heldout),
                *([f"--init_from={sweep.init_from}"] if sweep.init_from else [])],
                check=True, cwd=places.base())
        if not options.draw:
            print(table(sweep, folder))


if __name__ == "__main__":
    main()
