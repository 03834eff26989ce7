"""Examples and questions -> answers -> scores. What is asked and what counts as right comes from the caller.

Media are read by threads while the devices answer. Examples are answered many at a time, the largest of a
window first, and a row size once compiled serves everything that is not much smaller.
"""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from molmo2_jax import bars
from molmo2_jax import generate
from molmo2_jax import types

MOST_WASTE = 2            # a compiled row size serves batches that need at least half its tokens and crops
DRAWS_PER_EXAMPLE = 1024  # so that what is sampled does not depend on which examples share a batch

# (example, its media) -> questions, each with what the score needs in `about`.
Ask = Callable[[types.Example, types.Media], Sequence[generate.Question]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """One question with its answer."""
    example: types.Example
    media: types.Media
    question: generate.Question
    answer: generate.Answer


Score = Callable[[Sequence[Answered]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """refused: one sentence for each example that could not be read, asked or answered with finite logits.

    not_finite: how many of these were answered, with logits that are NaN or infinite.
    """
    scores: Mapping[str, float]
    answered: tuple[Answered, ...]
    refused: tuple[str, ...]
    seconds: float
    not_finite: int = 0


class _Read(NamedTuple):
    index: int  # type: ignore[assignment]  # hides tuple.index
    example: types.Example
    prompt: generate.Prompt | None   # None: refused, or there is nothing to ask
    refusal: str = ""


def evaluate(answerer: generate.Answerer, examples: Sequence[types.Example], ask: Ask, score: Score, *,
             rows: int = 8, window: int = 64, readers: int = 2, max_refused: int | None = None,
             title: str | None = "evaluate") -> Result:
    """Returns answers to everything that `ask` asks about the examples, in their order, and their scores.

    Args:
      rows: examples answered in one device call.
      window: examples held in memory at a time; larger windows waste less on unequal sizes.
      readers: threads that read media.
      max_refused: examples that may be refused; one more raises. None: any number.
      title: of the progress bar; None shows none.

    Raises:
      ValueError: no example could be answered, or more than max_refused were refused.
      generate.NotFinite: no answer of the first batch has finite logits.
    """
    start = time.perf_counter()
    answered: dict[int, list[Answered]] = {}
    refused: list[str] = []
    not_finite = 0
    with bars.bar(total=len(examples), desc=title, unit="example", disable=title is None) as bar:
        for reads in _windows(answerer, examples, ask, window, readers):
            refused += [read.refusal for read in reads if read.refusal]
            if max_refused is not None and len(refused) > max_refused:
                raise ValueError(f"at most {max_refused} examples may be refused; got {'; '.join(refused)}")
            bar.update(sum(read.prompt is None for read in reads))
            for batch in _batches([read for read in reads if read.prompt is not None], rows):
                made = _answer(answerer, batch, rows)
                broken = [read for read in batch if not _are_finite(made[read.index])]
                if len(broken) == len(batch) and not answered:
                    raise answerer.not_finite()
                refused += [f"{read.example.key or read.index}: its logits are not finite" for read in broken]
                not_finite += len(broken)
                answered |= {index: found for index, found in made.items() if _are_finite(found)}
                bar.update(len(batch))
    flat = tuple(one for index in sorted(answered) for one in answered[index])
    if not flat:
        why = "; ".join(refused[:5]) or "none has a question that can be scored"
        raise ValueError(f"no example could be answered: {why}")
    return Result(scores=score(flat), answered=flat, refused=tuple(refused),
                  seconds=time.perf_counter() - start, not_finite=not_finite)


def _are_finite(found: Sequence[Answered]) -> bool:
    return all(one.answer.is_finite for one in found)


def _windows(answerer, examples, ask: Ask, window: int, readers: int) -> Iterator[list[_Read]]:
    """Yields windows of examples that were read; the next one is read meanwhile."""
    def read(index: int) -> _Read:
        example = examples[index]
        try:
            began = time.perf_counter()
            crops, media = answerer.see(example)
            questions = tuple(ask(example, media))
            if not questions:
                return _Read(index, example, None)
            return _Read(index, example, answerer.ask(crops, media, questions, time.perf_counter() - began))
        except (ValueError, OSError) as error:
            return _Read(index, example, None, f"{example.key or index}: {error}")

    with concurrent.futures.ThreadPoolExecutor(readers) as pool:
        pending: collections.deque = collections.deque()
        for begin in range(0, len(examples), window):
            indices = range(begin, min(begin + window, len(examples)))
            pending.append([pool.submit(read, index) for index in indices])
            if len(pending) > 1:
                yield [future.result() for future in pending.popleft()]
        for futures in pending:
            yield [future.result() for future in futures]


def _batches(reads: Sequence[_Read], rows: int) -> list[list[_Read]]:
    """Returns batches of up to `rows` examples of similar size, the largest first."""
    ordered = sorted(reads, key=lambda read: _size(read.prompt.shape), reverse=True)
    return [ordered[begin:begin + rows] for begin in range(0, len(ordered), rows)]


def _size(shape: generate.PromptShape) -> tuple[int, int, int]:
    return shape.row.T, shape.row.M, shape.Q


def choose_shape(needed: generate.PromptShape, compiled: set[generate.PromptShape]
                 ) -> generate.PromptShape:
    """Returns the smallest compiled shape that covers `needed` without much waste, else `needed` itself."""
    fitting = [shape for shape in compiled if shape.covers(needed)
               and shape.row.T <= MOST_WASTE * needed.row.T and shape.row.M <= MOST_WASTE * needed.row.M]
    return min(fitting, key=_size, default=needed)


def _answer(answerer, batch: Sequence[_Read], rows: int) -> dict[int, list[Answered]]:
    prompts = [read.prompt for read in batch]
    needed = generate.PromptShape.largest([prompt.shape for prompt in prompts])
    answers = answerer.run(prompts, choose_shape(needed, answerer.shapes), rows,
                           [read.index * DRAWS_PER_EXAMPLE for read in batch])
    return {read.index: [Answered(example=read.example, media=read.prompt.media, question=question,
                                  answer=one)
                         for question, one in zip(read.prompt.questions, row)]
            for read, row in zip(batch, answers)}
