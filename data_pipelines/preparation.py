"""One example becomes one Sequence: media, branches, tokens. Training and evaluation both come through here.

What happens to media and text lies in molmo2_jax.inputs, where inference finds it too; here is only the order
of the steps, and what to do with an example that cannot be used.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines import annotations
from data_pipelines import formats
from data_pipelines import ledger
from data_pipelines import order as orders
from data_pipelines import tasks
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import media as media_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import tokenizer as tokenizers

FIELDS = tuple(field.name for field in dataclasses.fields(types.Sequence))
_CAREFUL_SECONDS = 0.3  # a result has left the process by then, even if the next example kills it


class Refused(ValueError):
    """An example that cannot be used; `reason` is one of the ledger's."""

    def __init__(self, reason: str, error: Exception):
        super().__init__(" ".join(str(error).split()) or type(error).__name__)
        self.reason = reason


@contextlib.contextmanager
def _refusing(reason: str) -> Iterator[None]:
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
      asking: how annotations become questions; for training, the order of branches is drawn, too.
      max_tokens: longest sequence; branches beyond it are left out, then the end is cut.
      weight: takes the place of the branches' LossWeight, or a number that of its scale.
      high_res_share: in training, probability that a single image is cut into up to high_res_crops tiles.
      point_modes: take the place of those of annotations of points; (): as they say.

    Raises:
      Refused: (a ValueError) the media cannot be read, an annotation does not fit them, or the visual
        tokens or every token to learn lie beyond max_tokens.
    Source: reference: olmo/preprocessing/multimodal_preprocessor.py.
    """
    with _refusing(ledger.MEDIA):
        crops, media = media_lib.see(example, model, inputs, tokenizer, rng=rng,
                                     high_res=high_res_share if asking.train else 0.0)
    with _refusing(ledger.ANNOTATION):
        branches = formats.to_branches(_asked(example, point_modes), media=media, rng=rng, asking=asking)
        places = rng.permutation(len(branches)) if asking.train else range(len(branches))
        branches = [_weighted(branches[place], weight) for place in places]
        result = sequences.build(crops, branches, tokenizer, max_tokens=max_tokens,
                                 length_factor=asking.weights.length_factor)
    with _refusing(ledger.SIZE):
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
    """Returns the generator of an example: its index and epoch alone decide (as in the reference)."""
    return np.random.Generator(np.random.MT19937(np.random.SeedSequence(index, spawn_key=(epoch,))))


def _refused(note: ledger.Note, reason: str, message: str) -> tuple[ledger.Note, None]:
    return dataclasses.replace(note, reason=reason, message=message), None


def _num_annotations(result: types.Sequence, example: types.Example) -> int:
    """Returns how many annotations are in a sequence: its branches, of a conversation made of several its
    answers."""
    branches = max(int(result.branch[-1]), 0) + 1
    if not example.dialogue_share or branches > 1:
        return branches
    is_learnt = np.append(False, result.weights > 0)
    return max(int(np.sum(is_learnt[1:] & ~is_learnt[:-1])), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparer:
    """Maps a number of the stream to (Note, arrays of its Sequence), or (Note, None) where it is skipped.

    Runs in worker processes, so it holds nothing but plain values.

    max_tokens, max_crops, max_visual_tokens: budgets of a row.
    killers: (data set, index) that must not be touched again, as they kill the process.
    careful: numbers among which such an example is suspected: results leave the process one by one.
    """
    order: orders.Order
    examples: tuple[Sequence[types.Example], ...]
    members: tuple[tasks.Member, ...]
    model: config.Molmo2Config
    inputs: config.InputConfig
    tokenizer: tokenizers.Tokenizer
    max_tokens: int
    max_crops: int
    max_visual_tokens: int
    asking: formats.Asking = formats.Asking()
    killers: frozenset[tuple[int, int]] = frozenset()
    careful: range = range(0)

    def __call__(self, number: int) -> tuple[ledger.Note, dict[str, np.ndarray] | None]:
        dataset, index, epoch = self.order(number)
        example, member = self.examples[dataset][index], self.members[dataset]
        note = ledger.Note(number=number, task=member.task, key=example.key,
                           annotations=len(example.annotations))
        if (dataset, index) in self.killers:
            return _refused(note, ledger.WORKER, "reading it ends the process")
        if number in self.careful:
            time.sleep(_CAREFUL_SECONDS)
        try:
            result = self.prepare(example, member, generator(index, epoch))
        except Refused as refused:
            return _refused(note, refused.reason, str(refused))
        note = dataclasses.replace(note, branches=_num_annotations(result, example),
                                   is_cut=bool(result.targets[-1] != self.tokenizer.eos_id))
        return note, {name: getattr(result, name) for name in FIELDS}

    def prepare(self, example: types.Example, member: tasks.Member, rng: np.random.Generator
                ) -> types.Sequence:
        """Returns the Sequence of an example, which fits a row.

        Raises:
          Refused: it cannot be used, or is too large.
        """
        result = prepare(example, self.model, self.inputs, self.tokenizer, rng, asking=self.asking,
                         max_tokens=self.max_tokens, weight=member.weight,
                         high_res_share=member.high_res_share, point_modes=member.point_modes)
        for what, used, limit in (("crops", len(result.patches), self.max_crops),
                                  ("visual tokens", len(result.pooled), self.max_visual_tokens)):
            if used > limit:
                raise Refused(ledger.SIZE, ValueError(f"must fit a row of {limit} {what}; got {used}"))
        return result
