"""Drawn worlds, the tokenizer's texts, batches and scores equal recorded.json bit for bit.

A refactoring must leave them as they are. After a change that is meant to alter one of them, write the new
values with `python -m tests.test_recorded` and say in the commit message why they changed.
"""

import dataclasses
import hashlib
import json
import pathlib
import tempfile

import numpy as np
import pytest

from data_pipelines import formats
from data_pipelines import pipeline
from data_pipelines import sources
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch import run
from launch.quickstart import corpus
from launch.support import questions
from molmo2_jax import evaluate
from molmo2_jax import generate
from molmo2_jax import types
from molmo2_jax.inputs import media
from molmo2_jax.inputs import tokenizer as tokenizers

RECORDED = pathlib.Path(__file__).parent / "recorded.json"
ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES, BATCHES = 8, 3
WRONG = str.maketrans("012345678", "123456780")
# Pixels of drawn videos depend on the encoder of another package.
FIELDS = [name for name in types.Batch._fields if name not in ("patches", "choice")]


def sha(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def draw(folder: pathlib.Path) -> None:
    """Draws the lessons of both worlds, and held-out examples with masks."""
    for world in ("quickstart", "full"):
        held_out, lessons = world_config.WORLDS[world]
        for name, (lesson, _) in lessons().items():
            world_write.write(folder / world, lesson, 4, EXAMPLES, split=name, has_masks=False,
                              progress=False)
        world_write.write(folder / world, held_out(), 5, EXAMPLES, split="heldout", progress=False)


def settings(folder: pathlib.Path, world: str, **changes):
    """Returns the run of a world whose data lie in `folder`, read by a thread of this process."""
    config = run.resolve([str(ROOT / f"gin_configs/runs/{world}.gin")],
                         ["pipeline.DataConfig.num_workers = 0"])
    folders = tuple((str(folder / world / pathlib.Path(name).name), rate) for name, rate in config.data.train)
    lessons = tuple(number // 1000 for number in config.data.lessons)
    data = {"train": folders, "lessons": lessons, **changes}
    return config.model, config.inputs, dataclasses.replace(config.data, **data)


def batches(folder: pathlib.Path, world: str, **changes) -> str:
    """Returns the checksum of the first batches of a world."""
    model, inputs, data = settings(folder, world, **changes)
    name = {"quickstart": "nano", "full": "nano_full"}[world]
    tokenizer = tokenizers.Tokenizer.from_file(ROOT / "assets" / name, model.text.vocab_size)
    iterator = pipeline.make_iterator(data, model, inputs, tokenizer)
    try:
        found = [next(iterator) for _ in range(BATCHES)]
        assert all(batch.choice is None for batch in found)   # of models that choose where to point
        parts = [np.ascontiguousarray(getattr(batch, field)).tobytes() for batch in found for field in FIELDS]
    finally:
        iterator.close()
    return sha(*parts)


def scores(folder: pathlib.Path, world: str) -> dict[str, float]:
    """Returns the scores of answers of which every third has other digits than the right one."""
    model, inputs, _ = settings(folder, world)
    tokenizer = tokenizers.Tokenizer.from_file(ROOT / "assets/nano", model.text.vocab_size)
    answered = []
    for example in sources.examples(folder / world / "heldout"):
        _, seen = media.see(example, model, inputs, tokenizer)
        right = formats.format_example(example, media=seen, rng=np.random.default_rng(0),
                                       asking=formats.PLAIN)
        texts = {id(example.annotations[number]): branch.turns[-1]
                 for number, branch in zip(right.annotations, right.branches)}
        for question in questions.ask(example, seen):
            text = texts[id(question.about)]
            text = text.translate(WRONG) if len(answered) % 3 == 2 else text
            answered.append(evaluate.Answered(example=example, media=seen, question=question,
                                              answer=generate.Answer(text=text)))
    return questions.score(answered)


def values(folder: pathlib.Path) -> dict:
    """Returns everything that is recorded."""
    draw(folder)
    found = {}
    for path in sorted(folder.rglob("annotations.jsonl")):
        found[f"drawn {path.parent.relative_to(folder)}"] = sha(path.read_bytes())
    for world in ("quickstart", "full"):
        _, inputs, data = settings(folder, world)
        for number in (data.num_templates, None):
            texts = corpus.texts([name for name, _ in data.train], inputs, num_templates=number)
            found[f"texts {world}, {number or 'all'} templates"] = sha(*(text.encode() for text in texts))
        found[f"batches {world}"] = batches(folder, world)
        found[f"scores {world}"] = {name: repr(value) for name, value in scores(folder, world).items()}
    found["batches quickstart, all templates"] = batches(folder, "quickstart", num_templates=None)
    found["batches full, first stage"] = batches(folder, "full", is_pretraining=True)
    return found


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    return values(tmp_path_factory.mktemp("drawn"))


@pytest.mark.parametrize("name", sorted(json.loads(RECORDED.read_text())) if RECORDED.exists() else [])
def test_what_was_recorded_is_unchanged(now, name):
    assert now[name] == json.loads(RECORDED.read_text())[name]


def test_everything_is_recorded(now):
    assert sorted(now) == sorted(json.loads(RECORDED.read_text()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        RECORDED.write_text(json.dumps(values(pathlib.Path(made)), indent=1) + "\n")
