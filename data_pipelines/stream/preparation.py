"""Converts one example to one Sequence: media, branches, tokens. Training and seqio_bridge share it.

Media and text are processed by molmo2_jax.inputs, as in inference. This module only orders the steps, and
decides what happens to an unusable example.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from data_pipelines import annotations
from data_pipelines import formats
from data_pipelines import records
from data_pipelines import sources as sources_lib
from data_pipelines import tasks
from data_pipelines.stream import ledger
from data_pipelines.stream import order as orders
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import media as media_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import tokenizer as tokenizers

FIELDS = tuple(field.name for field in dataclasses.fields(types.Sequence))
_SUSPECT_SECONDS = 0.3  # by then the previous result has left the process, even if this example kills it


class Refused(ValueError):
    """An unusable example; `reason` is one of the ledger's."""

    def __init__(self, reason: str, error: Exception):
        super().__init__(" ".join(str(error).split()) or type(error).__name__)
        self.reason = reason


@contextlib.contextmanager
def refusing(reason: str) -> Iterator[None]:
    """Turns the errors of unusable examples in the block into Refused."""
    try:
        yield
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise Refused(reason, error) from error


def prepare(example: types.Example, model: config.Molmo2Config, inputs: config.InputConfig,
            tokenizer: tokenizers.Tokenizer, rng: np.random.Generator, *,
            asking: formats.Asking = formats.Asking(), max_tokens: int | None = None,
            weight: types.LossWeight | float | None = None, high_res_share: float = 0.0,
            point_modes: tuple[str, ...] = ()) -> types.Sequence:
    """Returns the Sequence of an example; every random choice comes from `rng`.

    Args:
      asking: how annotations become questions; in training, branches are also shuffled.
      max_tokens: longest sequence; branches beyond it are dropped, then the end is cut.
      weight: replaces the LossWeight of all branches; a number replaces only its scale.
      high_res_share: in training, probability that a single image is cut into up to high_res_crops tiles.
      point_modes: replace the modes of points annotations; (): keep them.

    Raises:
      Refused: (a ValueError) the media cannot be read, an annotation does not match them, or the visual
        tokens or all target tokens lie beyond max_tokens.
    Source: reference: olmo/preprocessing/multimodal_preprocessor.py.
    """
    with refusing(ledger.MEDIA):
        crops, media = media_lib.see(example, model, inputs, tokenizer, rng=rng,
                                     high_res=high_res_share if asking.train else 0.0)
    return compose(example, crops, media, tokenizer, rng, asking=asking, max_tokens=max_tokens, weight=weight,
                   point_modes=point_modes)


def compose(example: types.Example, crops: types.Crops | None, media: types.Media,
            tokenizer: tokenizers.Tokenizer, rng: np.random.Generator, *, asking: formats.Asking,
            max_tokens: int | None = None, weight: types.LossWeight | float | None = None,
            point_modes: tuple[str, ...] = ()) -> types.Sequence:
    """Returns the Sequence of an example whose media have been read; arguments as in `prepare`.

    Raises:
      Refused: (a ValueError) an annotation does not fit the media, or max_tokens cuts a visual token or every
        learnt token.
    """
    with refusing(ledger.ANNOTATION):
        branches = formats.to_branches(_asked(example, point_modes), media=media, rng=rng, asking=asking)
        places = rng.permutation(len(branches)) if asking.train else range(len(branches))
        branches = [_weighted(branches[place], weight) for place in places]
        result = sequences.build(crops, branches, tokenizer, max_tokens=max_tokens,
                                 length_factor=asking.weights.length_factor)
    with refusing(ledger.SIZE):
        return result if max_tokens is None else sequences.truncate(result, max_tokens)


def _asked(example: types.Example, point_modes: tuple[str, ...]) -> types.Example:
    if not point_modes:
        return example
    return dataclasses.replace(example, annotations=tuple(
        dataclasses.replace(one, modes=point_modes) if isinstance(one, annotations.Points) else one
        for one in example.annotations))


def _weighted(branch: types.Branch, weight: types.LossWeight | float | None) -> types.Branch:
    if weight is None:
        return branch
    if not isinstance(weight, types.LossWeight):
        weight = dataclasses.replace(branch.weight, scale=float(weight))
    return dataclasses.replace(branch, weight=weight)


def generator(index: int, epoch: int) -> np.random.Generator:
    """Returns the random generator of an example, seeded by index and epoch alone, as in the reference."""
    return np.random.Generator(np.random.MT19937(np.random.SeedSequence(index, spawn_key=(epoch,))))


def _refused(note: ledger.Note, reason: str, message: str) -> tuple[ledger.Note, None]:
    return dataclasses.replace(note, reason=reason, message=message), None


def num_annotations(result: types.Sequence, example: types.Example) -> int:
    """Returns how many annotations a sequence has: its branches, or the answers of a merged conversation."""
    branches = max(int(result.branch[-1]), 0) + 1
    if not example.dialogue_share or branches > 1:
        return branches
    is_learnt = np.append(False, result.weights > 0)
    return max(int(np.sum(is_learnt[1:] & ~is_learnt[:-1])), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparer:
    """Maps a number of the stream to (Note, arrays of its Sequence), or to (Note, None) if it is skipped.

    Runs in worker processes, into which it is pickled: it holds sources, not their records.

    max_tokens, max_crops, max_visual_tokens: budgets of a row.
    poison: (data set, index) of examples that kill the process, and are not read again.
    suspects: numbers among which such an example is: their results leave the process one by one.
    """
    order: orders.Order
    sources: tuple[sources_lib.Source, ...]
    members: tuple[tasks.Member, ...]
    model: config.Molmo2Config
    inputs: config.InputConfig
    tokenizer: tokenizers.Tokenizer
    max_tokens: int
    max_crops: int
    max_visual_tokens: int
    asking: formats.Asking = formats.Asking()
    poison: frozenset[tuple[int, int]] = frozenset()
    suspects: range = range(0)

    def __call__(self, number: int) -> tuple[ledger.Note, dict[str, np.ndarray] | None]:
        dataset, index, epoch = self.order(number)
        source, member = self.sources[dataset], self.members[dataset]
        note = ledger.Note(number=number, task=member.task, key=source.key(index))
        if (dataset, index) in self.poison:
            return _refused(note, ledger.WORKER, "reading it kills the worker process")
        if number in self.suspects:
            time.sleep(_SUSPECT_SECONDS)
        try:
            example = source[index]
            result = self.prepare(example, member, generator(index, epoch))
        except records.BrokenRecord as error:
            return _refused(note, ledger.LINE, error.rule)
        except Refused as refused:
            return _refused(note, refused.reason, str(refused))
        note = dataclasses.replace(note, annotations=len(example.annotations),
                                   branches=num_annotations(result, example),
                                   is_cut=bool(result.targets[-1] != self.tokenizer.eos_id))
        return note, {name: value for name in FIELDS
                      if (value := getattr(result, name)) is not None}

    def prepare(self, example: types.Example, member: tasks.Member, rng: np.random.Generator
                ) -> types.Sequence:
        """Returns the Sequence of an example; it fits in a row.

        Raises:
          Refused: the example is unusable or too large.
        """
        result = prepare(example, self.model, self.inputs, self.tokenizer, rng, asking=self.asking,
                         max_tokens=self.max_tokens, weight=member.weight,
                         high_res_share=member.high_res_share, point_modes=member.point_modes)
        for what, used, limit in (("crops", len(result.patches), self.max_crops),
                                  ("visual tokens", len(result.pooled), self.max_visual_tokens)):
            if used > limit:
                raise Refused(ledger.SIZE, ValueError(f"must fit in a row of {limit} {what}; got {used}"))
        return result
