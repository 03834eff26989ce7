"""Examples and questions -> answers -> scores. The caller provides the questions and the scoring function.

Threads read media while the devices answer. Examples are answered in batches, the largest of a window first,
and a compiled row size is reused for examples that are not much smaller. Of several processes each reads the
media of its own rows; all get all answers.
"""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from molmo2_jax import generate
from molmo2_jax import sharding
from molmo2_jax import types
from molmo2_jax.inputs import grounded
from molmo2_jax.monitor import bars

MOST_WASTE = 2            # a compiled row size is reused for batches with at least half its tokens and crops
DRAWS_PER_EXAMPLE = 1024  # makes sampling independent of which examples share a batch

# (example, its media) -> questions, each with what the score function needs in `about`.
Ask = Callable[[types.Example, types.Media], Sequence[generate.Question]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """One question with its answer."""
    example: types.Example
    media: types.Media
    question: generate.Question
    answer: generate.Answer

    @property
    def text(self) -> str:
        """The answer as scores read it, with coordinates also where the model chose visual tokens."""
        cells = self.media.cells
        return self.answer.text if cells is None else grounded.numbered(self.answer.text, cells, self.media)


Score = Callable[[Sequence[Answered]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Scores and answers of an evaluation.

    refused: one message per example that could not be read or asked, or whose logits were not finite.
    not_finite: how many of these were answered, but with logits that are NaN or infinite.
    """
    scores: Mapping[str, float]
    answered: tuple[Answered, ...]
    refused: tuple[str, ...]
    seconds: float
    not_finite: int = 0


class Step(NamedTuple):
    """What one device call, or the reading of a window, brought.

    answered: number of an example -> its questions with their answers. refused: one message per example that
    could not be read or asked, or whose logits were not finite. not_finite: how many of these.
    """
    answered: Mapping[int, Sequence[Answered]]
    refused: Sequence[str] = ()
    not_finite: int = 0


class _Read(NamedTuple):
    """An example whose media are read, here or by another process.

    prompt: None if the media were refused, if there are no questions, or if another process read them. shape:
    of the prompt, wherever it is; None: there is nothing to ask. share: which of the shares of rows it is in.
    """
    index: int  # type: ignore[assignment]  # hides tuple.index
    example: types.Example
    prompt: generate.Prompt | None
    refusal: str = ""
    shape: generate.PromptShape | None = None
    share: int = 0


def evaluate(answerer: generate.Answerer, examples: Sequence[types.Example], ask: Ask, score: Score, *,
             rows: int = 8, window: int = 64, readers: int = 2, max_refused: int | None = None,
             title: str | None = "evaluate") -> Result:
    """Returns the answers to all questions that `ask` poses, in the order of the examples, and their scores.

    Args:
      rows, window, readers, title: as `each`.
      max_refused: examples that may be refused before an error is raised. None: any number.

    Raises:
      ValueError: no example could be answered, or more than max_refused were refused.
      generate.NotFinite: no answer of the first batch has finite logits.
    """
    start = time.perf_counter()
    answered: dict[int, Sequence[Answered]] = {}
    refused: list[str] = []
    not_finite = 0
    for step in each(answerer, examples, ask, rows=rows, window=window, readers=readers, title=title):
        answered |= step.answered
        refused += step.refused
        not_finite += step.not_finite
        if max_refused is not None and len(refused) > max_refused:
            raise ValueError(f"at most {max_refused} examples may be refused; got {'; '.join(refused)}")
    flat = tuple(one for index in sorted(answered) for one in answered[index])
    if not flat:
        why = "; ".join(refused[:5]) or "none has a question that can be scored"
        raise ValueError(f"no example could be answered: {why}")
    return Result(scores=score(flat), answered=flat, refused=tuple(refused),
                  seconds=time.perf_counter() - start, not_finite=not_finite)


def each(answerer: generate.Answerer, examples: Sequence[types.Example], ask: Ask, *, rows: int = 8,
         window: int = 64, readers: int = 2, title: str | None = "evaluate",
         done: Collection[int] = frozenset()) -> Iterator[Step]:
    """Yields the answers of one device call after the other, and what was refused before it.

    Several processes must iterate together; `ask` must be deterministic.

    Args:
      rows: examples answered in one device call.
      window: examples held in memory at a time; larger windows waste less on unequal sizes.
      readers: threads that read media.
      title: of the progress bar; None shows none.
      done: numbers of the examples that are not to be asked again.

    Raises:
      generate.NotFinite: no answer of the first batch has finite logits.
    """
    has_answer = False
    with bars.bar(total=len(examples), initial=len(done), desc=title, unit="example",
                  disable=title is None) as bar:
        for reads in _windows(answerer, examples, ask, window, readers, done):
            yield Step({}, [read.refusal for read in reads if read.refusal])
            bar.update(sum(read.shape is None for read in reads))
            for batch in _batches([read for read in reads if read.shape is not None], rows, answerer):
                made = _answer(answerer, batch, rows, ask)
                broken = [read for read in batch if not _are_finite(made[read.index])]
                if len(broken) == len(batch) and not has_answer:
                    raise answerer.not_finite()
                has_answer = True
                yield Step(
                    {index: found for index, found in made.items() if _are_finite(found)},
                    [f"{read.example.key or read.index}: its logits are not finite" for read in broken],
                    len(broken))
                bar.update(len(batch))


def _are_finite(found: Sequence[Answered]) -> bool:
    return all(one.answer.is_finite for one in found)


def _share(answerer) -> tuple[int, int]:
    """Returns (index, count): this process reads share `index` of `count` of the rows."""
    return sharding.row_share(answerer.mesh) if jax.process_count() > 1 else (0, 1)


def _windows(answerer, examples, ask: Ask, window: int, readers: int, done: Collection[int],
             ) -> Iterator[list[_Read]]:
    """Yields windows of examples whose media are read; the next window is read in the background."""
    own, count = _share(answerer)

    def read(index: int, share: int) -> _Read:
        example = examples[index]
        if share != own:
            return _Read(index, example, None, share=share)
        try:
            began = time.perf_counter()
            crops, media = answerer.see(example)
            questions = tuple(ask(example, media))
            if not questions:
                return _Read(index, example, None, share=share)
            prompt = answerer.ask(crops, media, questions, time.perf_counter() - began)
            return _Read(index, example, prompt, shape=prompt.shape, share=share)
        except (ValueError, OSError) as error:
            return _Read(index, example, None, f"{example.key or index}: {error}", share=share)

    with concurrent.futures.ThreadPoolExecutor(readers) as pool:
        pending: collections.deque = collections.deque()
        for begin in range(0, len(examples), window):
            indices = [index for index in range(begin, min(begin + window, len(examples)))
                       if index not in done]
            pending.append([pool.submit(read, index, place % count) for place, index in enumerate(indices)])
            if len(pending) > 1:
                yield _agreed([future.result() for future in pending.popleft()], own)
        for futures in pending:
            yield _agreed([future.result() for future in futures], own)


def _agreed(reads: list[_Read], own: int) -> list[_Read]:
    """Returns the window with what other processes found, so that all make equal device calls.

    Processes that hold parts of the same rows must have read the same.
    """
    if jax.process_count() == 1:
        return reads
    told = [(read.refusal, read.shape, 0 if read.prompt is None else read.prompt.fingerprint())
            for read in reads]
    every = sharding.of_processes((own, told))
    agreed = []
    for place, read in enumerate(reads):
        refusal, shape, check = next(one[place] for share, one in every if share == read.share)
        if any(one[place][2] != check for share, one in every if share == read.share):
            refusal = next((one[place][0] for _, one in every if one[place][0]), "") or (
                f"{read.example.key or read.index}: not all processes could read it, or read it differently")
        agreed.append(read._replace(prompt=None if refusal else read.prompt, refusal=refusal,
                                    shape=None if refusal else shape))
    return agreed


def _batches(reads: Sequence[_Read], rows: int, answerer) -> list[list[_Read]]:
    """Returns batches of up to `rows` examples of similar size, the largest first.

    Of several processes each has the rows of its share, so a batch has equally many examples of every share.
    """
    count = _share(answerer)[1]
    each_share = sharding.rows_of_share(answerer.mesh, rows) if count > 1 else rows
    shares = [sorted((read for read in reads if read.share == share), key=lambda read: _size(read.shape),
                     reverse=True) for share in range(count)]
    longest = max(map(len, shares), default=0)
    return [[read for one in shares for read in one[begin:begin + each_share]]
            for begin in range(0, longest, each_share)]


def _size(shape: generate.PromptShape) -> tuple[int, int, int]:
    return shape.row.T, shape.row.M, shape.Q


def choose_shape(needed: generate.PromptShape, compiled: set[generate.PromptShape]
                 ) -> generate.PromptShape:
    """Returns the smallest compiled shape that covers `needed` within MOST_WASTE, else `needed` itself."""
    fitting = [shape for shape in compiled if shape.covers(needed)
               and shape.row.T <= MOST_WASTE * needed.row.T and shape.row.M <= MOST_WASTE * needed.row.M]
    return min(fitting, key=_size, default=needed)


def _answer(answerer, batch: Sequence[_Read], rows: int, ask: Ask) -> dict[int, list[Answered]]:
    """Returns the answers to a batch, those that other processes asked for among them."""
    needed = generate.PromptShape.largest([read.shape for read in batch])
    own = [read for read in batch if read.prompt is not None]
    answers = answerer.run([read.prompt for read in own], choose_shape(needed, answerer.shapes), rows,
                           [read.index * DRAWS_PER_EXAMPLE for read in own])
    made = {read.index: [Answered(example=read.example, media=read.prompt.media, question=question,
                                  answer=one)
                         for question, one in zip(read.prompt.questions, row)]
            for read, row in zip(own, answers)}
    if jax.process_count() > 1:
        told = {index: (found[0].media, [one.answer for one in found]) for index, found in made.items()}
        others = {index: one for part in sharding.of_processes(told) for index, one in part.items()}
        for read in batch:
            if read.index not in made:
                media, given = others[read.index]
                made[read.index] = [
                    Answered(example=read.example, media=media, question=question, answer=one)
                    for question, one in zip(ask(read.example, media), given, strict=True)]
    return made
