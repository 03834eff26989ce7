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
from molmo2_jax.inputs import media

MOST_WASTE = 2            # a compiled row size serves batches that need at least half its tokens and crops
DRAWS_PER_EXAMPLE = 1024  # so that what is sampled does not depend on which examples share a batch

# (example, Frames without pixels or sizes of images) -> questions, each with what the score needs in `about`.
Ask = Callable[[types.Example, media.View], Sequence[generate.Question]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """One question with its answer."""
    example: types.Example
    view: media.View
    question: generate.Question
    answer: generate.Answer


Score = Callable[[Sequence[Answered]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """refused: one sentence for each example that could not be read or asked."""
    scores: Mapping[str, float]
    answered: tuple[Answered, ...]
    refused: tuple[str, ...]
    seconds: float


class _Read(NamedTuple):
    index: int
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
    """
    start = time.perf_counter()
    answered: dict[int, list[Answered]] = {}
    refused: list[str] = []
    with bars.bar(total=len(examples), desc=title, unit="example", disable=title is None) as bar:
        for reads in _windows(answerer, examples, ask, window, readers):
            refused += [read.refusal for read in reads if read.refusal]
            if max_refused is not None and len(refused) > max_refused:
                raise ValueError(f"at most {max_refused} examples may be refused; got {'; '.join(refused)}")
            bar.update(sum(read.prompt is None for read in reads))
            for batch in _batches([read for read in reads if read.prompt is not None], rows):
                answered |= _answer(answerer, batch, rows)
                bar.update(len(batch))
    flat = tuple(one for index in sorted(answered) for one in answered[index])
    if not flat:
        raise ValueError("no example could be answered" + (f": {'; '.join(refused[:5])}" if refused else ""))
    return Result(scores=score(flat), answered=flat, refused=tuple(refused),
                  seconds=time.perf_counter() - start)


def _windows(answerer, examples, ask: Ask, window: int, readers: int) -> Iterator[list[_Read]]:
    """Yields windows of examples that were read; the next one is read meanwhile."""
    def read(index: int) -> _Read:
        example = examples[index]
        try:
            began = time.perf_counter()
            crops, view = answerer.see(example)
            questions = tuple(ask(example, view))
            if not questions:
                return _Read(index, example, None)
            return _Read(index, example, answerer.ask(crops, view, questions, time.perf_counter() - began))
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
    ordered = sorted(reads, key=lambda read: _size(generate.shape_of(read.prompt)), reverse=True)
    return [ordered[begin:begin + rows] for begin in range(0, len(ordered), rows)]


def _size(shape: generate.Shape) -> tuple[int, int, int]:
    return shape.T, shape.M, shape.Q


def choose_shape(needed: generate.Shape, compiled: set[generate.Shape]) -> generate.Shape:
    """Returns the smallest compiled shape that covers `needed` without much waste, else `needed` itself."""
    fitting = [shape for shape in compiled if shape.covers(needed)
               and shape.T <= MOST_WASTE * needed.T and shape.M <= MOST_WASTE * needed.M]
    return min(fitting, key=_size, default=needed)


def _answer(answerer, batch: Sequence[_Read], rows: int) -> dict[int, list[Answered]]:
    prompts = [read.prompt for read in batch]
    needed = generate.Shape(*(max(sizes) for sizes in zip(*map(generate.shape_of, prompts))))
    answers = answerer.run(prompts, choose_shape(needed, answerer.shapes), rows,
                           [read.index * DRAWS_PER_EXAMPLE for read in batch])
    return {read.index: [Answered(example=read.example, view=read.prompt.view, question=question, answer=one)
                         for question, one in zip(read.prompt.questions, row)]
            for read, row in zip(batch, answers)}
