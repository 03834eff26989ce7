"""Trains a small Molmo2 on drawn videos and shows what it learnt: the whole path in one command.

  bash launch/quickstart.sh [--workdir=runs/quickstart] [--gin='train.TrainConfig.steps = 300']
  bash launch/quickstart.sh --world=full --init_from=assets/nano   # up to six objects that hide each other
  python -m launch.quickstart ...    # the same, inside the environment that the script made

Draws clips and stills whose answers are known, makes a tokenizer, trains, answers questions about clips that
training never saw, exports to the Hugging Face format, and writes summary.json and report.html. Ctrl-C may
come at any time: the same command goes on where it was, and keeps what is finished. Every line of this file
calls what large runs call as well.
"""

import contextlib
import dataclasses
import json
import pathlib

import jax
from absl import flags

from data_pipelines import sources
from data_pipelines import synthetic
from data_pipelines import workers
from launch import cli
from launch import corpus
from launch import draw as draw_lib
from launch import places
from launch import progress
from launch import questions
from launch import record
from launch import run
from launch import scoreboard
from launch import showcase
from launch import train
from launch import trained
from molmo2_jax import evaluate
from molmo2_jax import files
from molmo2_jax import generate
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2

_SCALE = flags.DEFINE_float(
    "examples_scale", 1.0, "Share of the usual number of examples, for training and for scores; small for a "
    "quick look.", lower_bound=0.0)
for _name in ("gin", "init_from", "world", "workdir", "seed", "traceback"):
    flags.declare_key_flag(_name)

HELDOUT = "heldout"
HELDOUT_EXAMPLES, UNTRAINED_EXAMPLES, FEWEST = 128, 32, 4
MAX_NEW_TOKENS, UNTRAINED_NEW_TOKENS = 640, 48
WORKERS = 2                     # processes that draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """world: name in synthetic.WORLDS. workdir: absolute. scale: share of the usual number of examples.
    start: folder of the model whose weights and tokenizer training begins with; None: from nothing."""
    world: str
    workdir: pathlib.Path
    config: run.RunConfig
    seed: int
    scale: float
    start: str | None = None

    @property
    def data(self) -> pathlib.Path:
        return self.workdir / "data"

    @property
    def worlds(self) -> dict[str, tuple[synthetic.WorldConfig, int, int]]:
        """Returns folder -> (world, seed, number of examples); lessons and held-out data share no seed."""
        world, lessons = synthetic.WORLDS[self.world]
        found = {name: (lesson, 2 * self.seed, count) for name, (lesson, count) in lessons().items()}
        found[HELDOUT] = world(), 2 * self.seed + 1, HELDOUT_EXAMPLES
        return {name: (world, seed, max(FEWEST, round(count * self.scale)))
                for name, (world, seed, count) in found.items()}

    def heldout(self) -> list:
        return sources.read_jsonl(self.data / HELDOUT / "annotations.jsonl")

    def answers(self, who: str) -> pathlib.Path:
        return self.workdir / "answers" / f"{who}.json"


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    world, seed = draw_lib.WORLD.value, cli.SEED.value
    workdir = cli.workdir(places.base() / "runs" / world).absolute()
    job = Job(world=world, workdir=workdir, config=settings(world, workdir, cli.bindings(), seed), seed=seed,
              scale=_SCALE.value, start=cli.INIT_FROM.value)
    try:
        with contextlib.chdir(places.base()):  # paths in configurations are relative to it
            quickstart(job)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped")
        raise


def settings(world: str, workdir: pathlib.Path, bindings: list[str], seed: int) -> run.RunConfig:
    """Returns the configuration of a world's run with its folders in `workdir`, its seeds moved by `seed`."""
    config, folder = run.resolve([f"gin_configs/runs/{world}.gin"], bindings), f"runs/{world}"

    def moved(path: str) -> str:
        inside = path.removeprefix(f"{folder}/")
        return path if inside == path or workdir == places.base() / folder else str(workdir / inside)

    folders = tuple(moved(one) if isinstance(one, str) else (moved(one[0]), *one[1:])
                    for one in config.data.train)
    return dataclasses.replace(
        config, tokenizer=moved(config.tokenizer),
        data=dataclasses.replace(config.data, train=folders, seed=config.data.seed + seed),
        train=dataclasses.replace(config.train, seed=config.train.seed + seed))


def quickstart(job: Job) -> None:
    """Does every step that is not finished yet."""
    watch = progress.Progress(job.workdir, workers=max(WORKERS, job.config.data.num_workers))
    drawn = progress.fingerprint(job.worlds)
    _refuse_other_data(job, watch, drawn)
    count = sum(number for _, _, number in job.worlds.values())
    watch.run("data", f"drawing {count} clips and stills with known answers", drawn,
              lambda: draw(job), *(job.data / name / "annotations.jsonl" for name in job.worlds))
    worded = progress.fingerprint(drawn, job.start, job.config.model.text.vocab_size,
                                  job.config.data.num_templates)
    watch.run("tokenizer", "making a tokenizer of their questions and answers", worded,
              lambda: make_tokenizer(job), pathlib.Path(job.config.tokenizer))
    learnt = progress.fingerprint(worded, record.gin_text(job.config))
    watch.run("train", f"training {job.config.train.steps} steps (Ctrl-C saves; the same command goes on)",
              learnt, lambda: fit(job), job.workdir / "checkpoints")
    watch.run("untrained", "asking the model as it was before training", learnt,
              lambda: ask_untrained(job), job.answers("untrained"))
    watch.run("trained", "asking the trained model about clips it never saw", learnt,
              lambda: ask_trained(job), job.answers("trained"))
    watch.run("export", "exporting to the Hugging Face format", learnt,
              lambda: export(job), job.workdir / "hf")
    watch.run("report", "writing the report", learnt, lambda: report(job, watch),
              job.workdir / "report.html", job.workdir / "summary.json")
    print(scoreboard.table(json.loads((job.workdir / "summary.json").read_text(encoding="utf-8"))))
    print(f"\nThe report: {_shown(job.workdir / 'report.html')}\nTo try next:\n\n{next_commands(job)}\n")


def _refuse_other_data(job: Job, watch: progress.Progress, drawn: str) -> None:
    if (job.workdir / "checkpoints").exists() and not watch.is_finished("data", drawn):
        raise ValueError("seed, examples_scale and the drawn world must stay as they were when training "
                         f"began; name another --workdir or remove this one; got {job.workdir}")


def draw(job: Job) -> None:
    with workers.hidden_main():
        for name, (world, seed, count) in job.worlds.items():
            synthetic.write(job.data, world, seed, count, split=name, workers=WORKERS,
                            has_masks=name == HELDOUT)


def make_tokenizer(job: Job) -> None:
    config = job.config
    if job.start:
        trained.load(job.start).tokenizer.save(config.tokenizer)
        return
    folders = [job.data / name for name in job.worlds if name != HELDOUT]
    texts = corpus.texts(folders, config.inputs, num_templates=config.data.num_templates)
    tokenizers.train_small(texts, config.model.text.vocab_size).save(config.tokenizer)


def fit(job: Job) -> None:
    """Raises KeyboardInterrupt if training was interrupted (and saved)."""
    params = train.first_params(job.config, job.start, job.workdir)
    if not train.fit(job.config, job.workdir, params).finished:
        print("training is not finished, so nothing is scored yet")
        raise KeyboardInterrupt


def ask_untrained(job: Job) -> None:
    config = job.config
    mesh, model = sharding.make_mesh(config.mesh), molmo2.Molmo2(config.model, config.train.dtype)
    with jax.set_mesh(mesh):
        fresh = state.create(model, optim.make(config.optim, config.train.steps), mesh, config.train.seed,
                             train.first_params(config, job.start, job.workdir))
    tokenizer = tokenizers.Tokenizer.from_file(config.tokenizer, config.model.text.vocab_size)
    source = trained.Trained(config.model, config.inputs, tokenizer, fresh.params)
    _ask(job, source, "untrained", job.heldout()[:UNTRAINED_EXAMPLES], UNTRAINED_NEW_TOKENS)


def ask_trained(job: Job) -> None:
    _ask(job, trained.load(job.workdir), "trained", job.heldout(), MAX_NEW_TOKENS)


def _ask(job: Job, source: trained.Trained, who: str, examples: list, max_new_tokens: int) -> None:
    """Writes scores and answers."""
    answerer = generate.Answerer(source.params, source.model, source.inputs, source.tokenizer,
                                 max_new_tokens=max_new_tokens, dtype="float32")
    result = evaluate.evaluate(answerer, examples, questions.ask, questions.score, title=who)
    content = {"scores": dict(result.scores), "refused": result.refused, "examples": len(examples),
               "answers": showcase.as_rows(examples, result.answered)}
    files.write_json(job.answers(who), content)


def export(job: Job) -> None:
    source = trained.load(job.workdir)
    hf_checkpoint.export_checkpoint(source.params, source.model, source.inputs, source.tokenizer,
                                    job.workdir / "hf", overwrite=True)


def report(job: Job, watch: progress.Progress) -> None:
    answers = {who: json.loads(job.answers(who).read_text(encoding="utf-8"))
               for who in ("trained", "untrained")}
    costs = {"train_seconds": watch.seconds("train"), "total_seconds": watch.seconds(),
             "peak_memory_gib": watch.peak_gib()}
    loss = scoreboard.losses(job.workdir)
    summary = scoreboard.summary(answers["trained"]["scores"], answers["untrained"]["scores"], loss, costs)
    showcase.write(job.workdir / "report.html", job.config, job.workdir, job.heldout(),
                   answers["trained"]["answers"], summary, next_commands(job))
    files.write_json(job.workdir / "summary.json",
                     summary | {"total_seconds": round(watch.seconds(), 3)})


def next_commands(job: Job) -> str:
    """Returns commands that the reader of the report may try next, one per line."""
    return showcase.commands(_shown(job.workdir), job.heldout(), _shown)


def _shown(path: str | pathlib.Path) -> str:
    """Returns a path as a person would type it at places.base(), the root of a repository."""
    path = pathlib.Path(path)
    return str(path.relative_to(places.base()) if path.is_relative_to(places.base()) else path)


if __name__ == "__main__":
    cli.start(main)
