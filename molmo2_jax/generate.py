"""(video or images, questions) -> text, points and tracks, with the inputs that training uses.

All questions about one visual input share one prefill (decode.py). Shapes are rounded up to a few sizes, so
that a program is compiled once per size and not once per clip.

T tokens of a row, M crops, R visual tokens, W patches per visual token, Q questions per row.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from molmo2_jax import config as configs
from molmo2_jax import decode
from molmo2_jax import types
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import media as media_lib
from molmo2_jax.inputs import packing
from molmo2_jax.inputs import points as points_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import stops
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2

STREAM_EVERY = 4  # tokens between pieces of a streamed answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation that asks for its next turn: a prompt, or prompt, answer, prompt ...

    `about` is the caller's and comes back untouched.
    """
    turns: tuple[str, ...]
    max_new_tokens: int | None = None   # None: the answerer's
    about: Any = None

    def __post_init__(self):
        if len(self.turns) % 2 != 1:
            raise ValueError(f"a question must have an odd number of turns; got {len(self.turns)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said, and what can be read from it.

    points: of all tags; index is the image number (from 1) or, if is_video, the time in seconds; pixels of
      the source.
    tracks: of <tracks> tags, by time.
    is_complete: whether EOS or a stop string ended the answer, within the limit of new tokens; the text ends
      before either.
    seconds: "read" the media, "answer" all questions of the same device call.
    """
    text: str
    points: tuple[points_lib.Point, ...] = ()
    tracks: tuple[points_lib.Tracked, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
    is_complete: bool = True
    logprob: float = 0.0
    is_video: bool = False
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether all logits were: one that is not makes every log-probability NaN."""
        return math.isfinite(self.logprob)

    def __str__(self):
        where = "{:g} s" if self.is_video else "image {:g}"
        return "\n".join([self.text, *(
            f"  {point.id} at ({point.x:.0f}, {point.y:.0f}), {where.format(point.index)}"
            for point in self.points)])


class NotFinite(ValueError):
    """The logits of an answer hold NaN or infinities, so that its tokens mean nothing."""


class Piece(NamedTuple):
    """Newly complete text of the answer to one question; the last one comes with the whole Answer."""
    question: int             # its number, from 0
    text: str
    answer: Answer | None


class Prompt(NamedTuple):
    """The questions about one visual input as one message tree."""
    tree: types.Sequence
    last: tuple[int, ...]          # position in the tree of each question's last token
    questions: tuple[Question, ...]
    media: types.Media
    shape: "PromptShape"           # rounded sizes that it needs
    read_seconds: float


class PromptShape(NamedTuple):
    """Fixed sizes of a row that holds a prompt: of its tree, and its number of questions."""
    row: types.RowShape
    Q: int

    @classmethod
    def of(cls, tree: types.Sequence, num_questions: int, window: int) -> "PromptShape":
        """Returns rounded sizes for a tree and its questions; `window`: W, patches per visual token."""
        row = types.RowShape(T=coarse_size(len(tree.tokens), 128), M=coarse_size(len(tree.patches)),
                             R=coarse_size(len(tree.pooled), 16), W=window)
        return cls(row, coarse_size(num_questions))

    @classmethod
    def largest(cls, shapes: Sequence["PromptShape"]) -> "PromptShape":
        """Returns the smallest shape that covers all of these."""
        rows, counts = zip(*shapes)
        return cls(types.RowShape(*map(max, zip(*rows))), max(counts))

    def covers(self, other: "PromptShape") -> bool:
        """Returns whether a prompt of the other shape fits."""
        return self == self.largest([self, other])


def coarse_size(size: int, least: int = 1) -> int:
    """Returns the smallest of 0, least, 1.5 least, 2 least, 3 least, 4 least, 6 least ... >= size."""
    if size <= 0:
        return 0
    power = least << max(0, math.ceil(math.log2(size / least)))
    smaller = power * 3 // 4
    return smaller if power > least and smaller >= size else power


class _Writer:
    """Turns the growing ids of an answer into text: whole characters, and never part of a stop string."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: Sequence[str]):
        self._decoder = tokenizers.StreamDecoder(tokenizer)
        self._stop, self._read, self._text, self._given = stop, 0, "", 0
        self.is_over = False

    def write(self, ids: Sequence[int], is_over: bool) -> str:
        """Returns the text that is new; `ids` are all of the answer so far."""
        self._text += "".join(self._decoder.feed(int(one)) for one in ids[self._read:])
        self._read, self.is_over = len(ids), is_over
        if is_over:
            shown = stops.cut(self._text + self._decoder.flush(), self._stop)
        else:
            shown = stops.settled(self._text, self._stop)
        new, self._given = shown[self._given:], len(shown)
        return new


class Answerer:
    """A model ready to answer: configs, parameters on the devices, tokenizer, way of sampling.

    stop: texts that end an answer like EOS does; they are not part of it.
    cache_dtype: of the kept keys and values; None keeps the dtype of the computation.
    shapes: the row sizes compiled so far.
    """

    def __init__(self, params, config: configs.Molmo2Config, inputs: configs.InputConfig,
                 tokenizer: tokenizers.Tokenizer, *, max_new_tokens: int = 512,
                 sampling: decode.Sampling = decode.GREEDY, dtype: str = "float32",
                 cache_dtype: str | None = None, stop: Sequence[str] = ()):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1; got {max_new_tokens}")
        self.config, self.inputs, self.tokenizer = config, inputs, tokenizer
        self.max_new_tokens, self.sampling, self.stop = max_new_tokens, sampling, stops.check(stop)
        self.shapes: set[PromptShape] = set()
        self._model = molmo2.Molmo2(config, dtype=dtype, remat="none")
        self._params = decode.ready(params, dtype)
        self._options = dict(
            eos=tokenizer.eos_id, num_new=coarse_size(max_new_tokens, 32), sampling=sampling,
            stops=jax.device_put(stops.token_table(self.stop, tokenizer)), cache_dtype=cache_dtype)
        windows = (config.connector.image_window, config.connector.video_window)
        self._window = max(math.prod(window) for window in windows)

    def answer(self, example: types.Example, questions: Sequence[Question | str]) -> list[Answer]:
        """Returns the answers to questions about one visual input; its annotations are not read.

        Raises:
          ValueError: the media cannot be read, or media, question and answer do not fit the model.
          NotFinite: logits are NaN or infinite. (`run` leaves that to Answer.is_finite.)
        """
        answers = self.run([self.prompt(example, questions)])[0]
        if not all(answer.is_finite for answer in answers):
            raise self.not_finite()
        return answers

    def not_finite(self) -> NotFinite:
        """Returns an error that says which weights are NaN or infinite, reading all of them."""
        is_finite = jax.jit(lambda leaf: jax.numpy.isfinite(leaf).all())
        leaves, _ = jax.tree_util.tree_flatten_with_path(self._params)
        names = [jax.tree_util.keystr(path, simple=True, separator="/")
                 for path, leaf in leaves if not is_finite(leaf)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        why = (f"so are the weights {', '.join(names[:3])}{more}" if names else
               f"all weights are finite: the computation in {self._model.dtype} overflowed")
        return NotFinite(f"logits must be finite; got NaN or infinity, and {why}")

    def stream(self, example: types.Example, questions: Sequence[Question | str], *,
               every: int = STREAM_EVERY) -> Iterator[Piece]:
        """Returns an iterator over the text of all answers while they are written; raises as `answer`.

        The pieces of a question joined are the text of its Answer. Whoever stops iterating stops the device.

        Args:
          every: tokens per question between pieces; after the first one, which comes alone.
        """
        if every < 1:
            raise ValueError(f"every must be >= 1 token; got {every}")
        return self._stream(self.prompt(example, questions), every)

    def _stream(self, prompt: Prompt, every: int) -> Iterator[Piece]:
        start = time.perf_counter()
        self.shapes.add(prompt.shape)
        batch, wanted = self._batch([prompt], prompt.shape, 1, None)
        writers = [_Writer(self.tokenizer, self.stop) for _ in prompt.questions]
        for answers in decode.stream(self._model, self._params, batch, wanted, every=every, **self._options):
            if not np.isfinite(answers.logprob[0, :len(writers)]).all():
                raise self.not_finite()
            for q, writer in enumerate(writers):
                if writer.is_over:
                    continue
                length = int(answers.length[0, q])
                is_over = bool(answers.ended[0, q]) or length >= wanted.limit[0, q]
                text = writer.write(answers.tokens[0, q, :length], is_over)
                if is_over:
                    yield Piece(q, text, self._read(prompt, answers, 0, q, time.perf_counter() - start))
                elif text:
                    yield Piece(q, text, None)

    def prompt(self, example: types.Example, questions: Sequence[Question | str]) -> Prompt:
        """Returns the questions about one visual input, ready for `run`; raises as `answer`."""
        start = time.perf_counter()
        crops, media = self.see(example)
        return self.ask(crops, media, questions, time.perf_counter() - start)

    def see(self, example: types.Example) -> tuple[types.Crops | None, types.Media]:
        """Returns the crops of the media and what answers are relative to."""
        return media_lib.see(example, self.config, self.inputs, self.tokenizer)

    def ask(self, crops, media: types.Media, questions, read_seconds: float = 0.0) -> Prompt:
        """Returns the prompt of questions about media that were seen; raises as `answer`."""
        questions = tuple(Question(turns=(one,)) if isinstance(one, str) else one for one in questions)
        tree, last = sequences.ask(crops, [question.turns for question in questions], self.tokenizer)
        shape = PromptShape.of(tree, len(questions), self._window)
        prompt = Prompt(tree, last, questions, media, shape, read_seconds)
        self._check_length(prompt)
        return prompt

    def run(self, prompts: Sequence[Prompt], shape: PromptShape | None = None, rows: int | None = None,
            draws: Sequence[int] | None = None) -> list[list[Answer]]:
        """Returns the answers to each prompt's questions; one device call.

        Args:
          shape: sizes of a row, at least those of every prompt; None: the smallest rounded ones.
          rows: of the batch; those behind the prompts stay empty. None: one per prompt.
          draws: number of each prompt's first question; with the seed it decides what is sampled. None:
            questions are counted through.
        """
        start = time.perf_counter()
        shape = shape or PromptShape.largest([prompt.shape for prompt in prompts])
        self.shapes.add(shape)
        batch, wanted = self._batch(prompts, shape, rows or len(prompts), draws)
        answers = decode.generate(self._model, self._params, batch, wanted, **self._options)
        answers = jax.device_get(answers)
        seconds = time.perf_counter() - start
        return [[self._read(prompt, answers, row, q, seconds) for q in range(len(prompt.questions))]
                for row, prompt in enumerate(prompts)]

    def _batch(self, prompts, shape: PromptShape, rows: int, draws: Sequence[int] | None):
        trees = [[prompt.tree] for prompt in prompts] + [[]] * (rows - len(prompts))
        batch = packing.stack([packing.join(tree, shape.row, self.config.vision.patch_shape)
                               for tree in trees])
        counts = [len(prompt.questions) for prompt in prompts]
        draws = np.cumsum([0, *counts[:-1]]) if draws is None else draws
        last, limit, draw = (np.full((rows, shape.Q), fill, np.int32) for fill in (-1, 0, 0))
        for row, prompt in enumerate(prompts):
            count = counts[row]
            last[row, :count] = prompt.last
            limit[row, :count] = [self._limit(question) for question in prompt.questions]
            draw[row, :count] = draws[row] + np.arange(count)
        return batch, decode.Questions(last, limit, draw)

    def _limit(self, question: Question) -> int:
        wanted = question.max_new_tokens
        return self.max_new_tokens if wanted is None else min(wanted, self.max_new_tokens)

    def _check_length(self, prompt: Prompt) -> None:
        """Raises ValueError if the longest question and its answer have no positions left."""
        limit, tree = self.config.text.max_positions, prompt.tree
        needed = [int(tree.positions[last]) + 1 + self._limit(question)
                  for last, question in zip(prompt.last, prompt.questions)]
        worst = int(np.argmax(needed))
        if needed[worst] <= limit:
            return
        root = int((tree.branch < 0).sum())
        new = self._limit(prompt.questions[worst])
        remedy = "shorten the question or lower max_new_tokens"
        if prompt.media.is_video:
            remedy = f"lower max_frames (now {len(prompt.media.seconds)} frames) or max_new_tokens"
        elif prompt.media.sizes:
            remedy = f"lower max_crops (now {self.inputs.max_crops} per image), images or max_new_tokens"
        raise ValueError(
            f"prompt and answer must fit {limit} positions; got {needed[worst]} tokens ({root} for the "
            f"visual input, {needed[worst] - root - new} for the question, {new} for the answer): {remedy}")

    def _read(self, prompt: Prompt, answers: decode.Answers, row: int, q: int, seconds: float) -> Answer:
        length = int(answers.length[row, q])
        text = stops.cut(self.tokenizer.decode(answers.tokens[row, q, :length]), self.stop)
        found, tracks = read_points(text, prompt.media)
        return Answer(
            text=text, points=found, tracks=tracks, is_complete=bool(answers.ended[row, q]),
            prompt_tokens=int(prompt.tree.positions[prompt.last[q]]) + 1, new_tokens=length,
            logprob=float(answers.logprob[row, q]), is_video=prompt.media.is_video,
            seconds={"read": prompt.read_seconds, "answer": seconds})


def read_points(text: str, media: types.Media) -> tuple[tuple[points_lib.Point, ...],
                                                        tuple[points_lib.Tracked, ...]]:
    """Returns (points, tracks) in an answer, in pixels of the video or of the image they name."""
    if media.is_video:
        [size] = media.sizes
        tracks = points_lib.parse_tracks(text, *size, media.fps) if "<tracks" in text else ()
        return tuple(points_lib.parse_points(text, *size)), tuple(tracks)
    return tuple(points_lib.parse_points(text, sizes=media.sizes)) if media.sizes else (), ()


def answer(params, config: configs.Molmo2Config, inputs: configs.InputConfig,
           tokenizer: tokenizers.Tokenizer, prompt: str, *, video: str | None = None,
           images: Sequence[str] = (), **options) -> Answer:
    """Returns the answer to one question; `options` are those of Answerer, which serves many.

    Raises:
      ValueError: the media cannot be read, or media, question and answer do not fit the model.
    """
    example = types.Example(annotations=(), video=video, images=tuple(images))
    return Answerer(params, config, inputs, tokenizer, **options).answer(example, [prompt])[0]


def load(folder: str | pathlib.Path, **options) -> Answerer:
    """Returns the model in a Hugging Face folder; `options` are those of Answerer.

    Raises:
      ValueError: the folder is incomplete or its parts contradict each other.
    """
    params, config, inputs = hf_checkpoint.import_checkpoint(folder)
    tokenizer = tokenizers.Tokenizer.from_file(folder, config.text.vocab_size)
    return Answerer(params, config, inputs, tokenizer, **options)
