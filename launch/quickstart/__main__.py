"""Trains a small Molmo2 on drawn videos and shows what it learnt: the whole workflow in one command.

  bash launch/quickstart.sh [--workdir=runs/quickstart] [--gin='train.TrainConfig.steps = 300']
  bash launch/quickstart.sh --world=full --init_from=assets/nano   # up to six objects, with occlusion
  bash launch/quickstart.sh --pointing=tokens   # points by choosing visual tokens, as MolmoPoint does
  python -m launch.quickstart ...    # the same, in the environment that the script created

Draws video clips and images with known answers, trains a tokenizer and the model, answers questions about
held-out clips, exports to the Hugging Face format, and writes summary.json and report.html. After Ctrl-C the
same command resumes and keeps the finished steps. Large runs use the same functions.
"""

import contextlib
import dataclasses
import json
import pathlib

import jax
from absl import flags

from data_pipelines import sources
from data_pipelines.stream import workers
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch import draw as draw_lib
from launch import run
from launch import train
from launch.quickstart import corpus
from launch.quickstart import progress
from launch.quickstart import scoreboard
from launch.quickstart import showcase
from launch.support import cli
from launch.support import lock
from launch.support import places
from launch.support import questions
from launch.support import record
from launch.support import trained
from molmo2_jax import evaluate
from molmo2_jax import files
from molmo2_jax import generate
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2

SCALE = flags.DEFINE_float(
    "examples_scale", 1.0, "Factor on the number of training and held-out examples; below 1 for a quick "
    "trial.", lower_bound=0.0)
_POINTING = flags.DEFINE_enum(
    "pointing", "text", ["text", "tokens"], "How the model points: text: with coordinates, as Molmo2 does. "
    "tokens: by choosing visual tokens, as MolmoPoint does; data and steps are the same.")
for _name in ("gin", "init_from", "world", "workdir", "seed", "traceback"):
    flags.declare_key_flag(_name)

# Those of gin_configs/ablations/points_as_tokens.gin.
TOKENS = ("config.Molmo2Config.pointer = @config.PointerConfig()",
          "optim.OptimConfig.pointer = @optim.Tower()")
HELDOUT = "heldout"
HELDOUT_EXAMPLES, UNTRAINED_EXAMPLES, FEWEST = 128, 32, 4
MAX_NEW_TOKENS, UNTRAINED_NEW_TOKENS = 640, 48
WORKERS = 2                     # processes that draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Settings of one quickstart.

    world: name in world.config.WORLDS. workdir: absolute path. scale: factor on the number of examples.
    start: folder of the model whose weights and tokenizer training starts from; None: random weights.
    """
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
    def worlds(self) -> dict[str, tuple[world_config.WorldConfig, int, int]]:
        """Returns folder -> (world, seed, number of examples); held-out data has a seed of its own."""
        world, lessons = world_config.WORLDS[self.world]
        found = {name: (lesson, 2 * self.seed, count) for name, (lesson, count) in lessons().items()}
        found[HELDOUT] = world(), 2 * self.seed + 1, HELDOUT_EXAMPLES
        return {name: (world, seed, max(FEWEST, round(count * self.scale)))
                for name, (world, seed, count) in found.items()}

    def heldout(self) -> list:
        return sources.examples(self.data / HELDOUT)

    def answers(self, who: str) -> pathlib.Path:
        return self.workdir / "answers" / f"{who}.json"


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    world, seed = draw_lib.WORLD.value, cli.SEED.value
    name, pointer = (world, ()) if _POINTING.value == "text" else (f"{world}_tokens", TOKENS)
    workdir, bindings = cli.workdir(places.base() / "runs" / name).absolute(), [*pointer, *cli.bindings()]
    job = Job(world=world, workdir=workdir, config=settings(world, workdir, bindings, seed), seed=seed,
              scale=SCALE.value, start=cli.INIT_FROM.value)
    try:
        # Paths in configurations are relative to places.base().
        with lock.held(job.workdir), contextlib.chdir(places.base()):
            quickstart(job)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes")
        raise


def settings(world: str, workdir: pathlib.Path, bindings: list[str], seed: int) -> run.RunConfig:
    """Returns the configuration of a world's run: folders moved to `workdir`, `seed` added to its seeds.

    Raises:
      ValueError: a binding is wrong; see run.resolve.
    """
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
    """Runs every step that is not finished yet.

    Raises:
      ValueError: the work directory was begun with other data. KeyboardInterrupt: training was interrupted.
    """
    watch = progress.Progress(job.workdir, workers=max(WORKERS, job.config.data.num_workers))
    drawn = progress.fingerprint(job.worlds)
    _refuse_other_data(job, watch, drawn)
    count = sum(number for _, _, number in job.worlds.values())
    watch.run("data", f"drawing {count} clips and images with known answers", drawn,
              lambda: draw(job), *(job.data / name / "annotations.jsonl" for name in job.worlds))
    worded = progress.fingerprint(drawn, job.start, job.config.model.text.vocab_size,
                                  job.config.data.num_templates)
    watch.run("tokenizer", "training a tokenizer on their questions and answers", worded,
              lambda: make_tokenizer(job), pathlib.Path(job.config.tokenizer))
    learnt = progress.fingerprint(worded, record.gin_text(job.config))
    watch.run("train", f"training {job.config.train.steps} steps (Ctrl-C saves; the same command resumes)",
              learnt, lambda: fit(job), job.workdir / "checkpoints")
    watch.run("untrained", "questioning the model as it was before training", learnt,
              lambda: ask_untrained(job), job.answers("untrained"))
    watch.run("trained", "questioning the trained model about held-out clips", learnt,
              lambda: ask_trained(job), job.answers("trained"))
    watch.run("export", "exporting to the Hugging Face format", learnt,
              lambda: export(job), job.workdir / "hf")
    watch.run("report", "writing the report", learnt, lambda: report(job, watch),
              job.workdir / "report.html", job.workdir / "summary.json")
    print(scoreboard.table(json.loads((job.workdir / "summary.json").read_text(encoding="utf-8"))))
    print(f"\nThe report: {_shown(job.workdir / 'report.html')}\nTo try next:\n\n{next_commands(job)}\n")


def _refuse_other_data(job: Job, watch: progress.Progress, drawn: str) -> None:
    if (job.workdir / "checkpoints").exists() and not watch.is_finished("data", drawn):
        raise ValueError("--seed, --examples_scale and --world must not change once training has begun; "
                         f"use another --workdir or remove this one; got {job.workdir}")


def draw(job: Job) -> None:
    with workers.hidden_main():
        for name, (world, seed, count) in job.worlds.items():
            world_write.write(job.data, world, seed, count, split=name, workers=WORKERS,
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
    """Trains. Raises KeyboardInterrupt if training was interrupted (and saved)."""
    params = train.first_params(job.config, job.start, job.workdir)
    if not train.fit(job.config, job.workdir, params).finished:
        print("training is not finished, so nothing is scored yet")
        raise KeyboardInterrupt


def ask_untrained(job: Job) -> None:
    config = job.config
    mesh = sharding.make_mesh(config.mesh, rows=config.micro_batch_rows)
    model = molmo2.Molmo2(config.model, config.train.dtype)
    with jax.set_mesh(mesh):
        fresh = state.create(model, optim.make(config.optim, config.train.steps), mesh, config.train.seed,
                             train.first_params(config, job.start, job.workdir))
    tokenizer = tokenizers.Tokenizer.from_file(config.tokenizer, config.model.text.vocab_size)
    source = trained.Trained(config.model, config.inputs, tokenizer, fresh.params)
    _ask(job, source, "untrained", job.heldout()[:UNTRAINED_EXAMPLES], UNTRAINED_NEW_TOKENS)


def ask_trained(job: Job) -> None:
    _ask(job, trained.load(job.workdir), "trained", job.heldout(), MAX_NEW_TOKENS)


def _ask(job: Job, source: trained.Trained, who: str, examples: list, max_new_tokens: int) -> None:
    """Answers the examples' questions and writes scores and answers to job.answers(who)."""
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
    """Returns commands to try next, one per line."""
    return showcase.commands(_shown(job.workdir), job.heldout(), _shown)


def _shown(path: str | pathlib.Path) -> str:
    """Returns the path relative to places.base(), the root of a repository, if it is inside."""
    path = pathlib.Path(path)
    return str(path.relative_to(places.base()) if path.is_relative_to(places.base()) else path)


if __name__ == "__main__":
    cli.start(main)
