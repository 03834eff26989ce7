"""A data folder as examples that can be scored, and the scores of a model's answers about them."""

import collections
import functools
from collections.abc import Callable
from typing import NamedTuple

from data_pipelines import sources
from launch.support import questions
from molmo2_jax import evaluate
from molmo2_jax import generate
from molmo2_jax import types


class Scorable(NamedTuple):
    """What a folder holds: the examples that can be scored, a sentence about each unusable record, one about
    each annotation that a score leaves out, and their number as {"KIND_left_out": number}."""
    examples: list[types.Example]
    left_out: list[str]
    obstacles: list[str]
    unscored: dict[str, float]


class Scored(NamedTuple):
    """The answers, all scores with the numbers of what they leave out, and a sentence about each record."""
    result: evaluate.Result
    scores: dict[str, float]
    left_out: list[str]


def read(folder: str, limit: int | None = None, cache: str | None = None) -> Scorable:
    """Returns the content of a folder, of its first `limit` records; reads no media.

    cache: as sources.read_folder.

    Raises:
      ValueError: the folder has no annotations or holds nothing usable.
    """
    examples, errors = sources.read_folder(folder, limit=limit, cache=cache)
    found = [(kind, sentence) for example in examples for kind, sentence in questions.obstacles(example)]
    counts = collections.Counter(f"{kind}_left_out" for kind, _ in found)
    return Scorable(list(filter(questions.is_scored, examples)), list(map(str, errors)),
                    [sentence for _, sentence in found],
                    {name: float(number) for name, number in counts.items()})


def score(answerer: generate.Answerer, data: Scorable, *, rows: int, is_pretraining: bool,
          title: str | None = None, watch: Callable[[types.Example], None] = lambda example: None) -> Scored:
    """Returns the scores of a model's answers about a folder.

    Args:
      rows: examples answered in one device call.
      is_pretraining: as trained.Trained.
      title: of the progress bar; None shows none.
      watch: called for each example as its media are read.

    Raises:
      ValueError: no example could be answered. generate.NotFinite: logits are NaN or infinite.
    """
    ask = functools.partial(questions.ask, is_pretraining=is_pretraining)

    def watched(example, media):
        watch(example)
        return ask(example, media)

    result = evaluate.evaluate(answerer, data.examples, watched, questions.score, rows=rows, title=title)
    left_out = [*data.left_out, *result.refused]
    return Scored(result, {**result.scores, **data.unscored, "records_left_out": float(len(left_out))},
                  left_out)
