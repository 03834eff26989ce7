"""(video or images, questions) -> text, points and tracks, with the input pipeline of training.

All questions about one visual input share one prefill (decode.py). Shapes are rounded up to a few sizes, so
that programs are compiled once per size, not once per clip.

T tokens of a row, M crops, R visual tokens, W patches per visual token, Q questions per row.
"""

import copy
import dataclasses
import hashlib
import math
import pathlib
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from molmo2_jax import config as configs
from molmo2_jax import decode
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax import types
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import media as media_lib
from molmo2_jax.inputs import points as points_lib
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import stops
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.inputs import writer as writer_lib
from molmo2_jax.model import molmo2

STREAM_EVERY = 4  # tokens between pieces of a streamed answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation whose next turn is wanted: a prompt, or prompt, answer, prompt ...

    `about` is for the caller and is returned unchanged.

    Raises:
      ValueError: the number of turns is even.
    """
    turns: tuple[str, ...]
    max_new_tokens: int | None = None   # None: the answerer's
    about: Any = None

    def __post_init__(self):
        if len(self.turns) % 2 != 1:
            raise ValueError(f"a question must have an odd number of turns; got {len(self.turns)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The model's text, and the points and tracks parsed from it.

    points: of all tags, in pixels of the source; index is the image number (from 1) or, if is_video, the time
      in seconds.
    tracks: of <tracks> tags, by time.
    is_complete: whether EOS or a stop string ended the answer within the limit of new tokens; the text
      excludes both.
    logprob: sum of the log-probabilities of the tokens.
    seconds: "read" is the time to read the media, "answer" that of the device call, which may answer several
      questions.
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
        """Whether all logits were finite: a NaN or infinite one makes every log-probability NaN."""
        return math.isfinite(self.logprob)

    def __str__(self):
        where = "{:g} s" if self.is_video else "image {:g}"
        return "\n".join([self.text, *(
            f"  {point.id} at ({point.x:.0f}, {point.y:.0f}), {where.format(point.index)}"
            for point in self.points)])


class NotFinite(ValueError):
    """The logits of an answer contain NaN or infinity, so its tokens are meaningless."""


class Piece(NamedTuple):
    """New text of the answer to one question; the last piece of a question has the whole Answer."""
    question: int             # number of the question, from 0
    text: str
    answer: Answer | None


class Prompt(NamedTuple):
    """The questions about one visual input as one message tree."""
    tree: types.Sequence
    last: tuple[int, ...]          # position in the tree of each question's last token
    questions: tuple[Question, ...]
    media: types.Media
    shape: "PromptShape"           # the rounded sizes it needs
    read_seconds: float

    def fingerprint(self) -> int:
        """Returns a positive number that differs where tokens or pixels of two prompts do."""
        check = zlib.crc32(self.tree.patches.tobytes(), zlib.crc32(self.tree.tokens.tobytes()))
        return 1 + check % (2**31 - 2)


class PromptShape(NamedTuple):
    """Fixed sizes of a row that holds one prompt: those of its tree, and its number of questions."""
    row: types.RowShape
    Q: int

    @classmethod
    def of(cls, tree: types.Sequence, num_questions: int, window: int, parts: int = 1) -> "PromptShape":
        """Returns the rounded sizes for a tree and its questions.

        Args:
          window: W, patches per visual token.
          parts: devices that share the crops of a row, of which M is a multiple.
        """
        M = -(-coarse_size(len(tree.patches)) // parts) * parts
        row = types.RowShape(T=coarse_size(len(tree.tokens), 128), M=M, R=coarse_size(len(tree.pooled), 16),
                             W=window)
        return cls(row, coarse_size(num_questions))

    @classmethod
    def largest(cls, shapes: Sequence["PromptShape"]) -> "PromptShape":
        """Returns the smallest shape that covers all of these."""
        rows, counts = zip(*shapes)
        return cls(types.RowShape(*map(max, zip(*rows))), max(counts))

    def covers(self, other: "PromptShape") -> bool:
        """Returns whether a prompt of the other shape fits into this one."""
        return self == self.largest([self, other])


def coarse_size(size: int, least: int = 1) -> int:
    """Returns the smallest of 0, least, 1.5 least, 2 least, 3 least, 4 least, 6 least ... >= size."""
    if size <= 0:
        return 0
    power = least << max(0, math.ceil(math.log2(size / least)))
    smaller = power * 3 // 4
    return smaller if power > least and smaller >= size else power


class Answerer:
    """A model ready to answer: configs, parameters on the devices, tokenizer, sampling.

    On a mesh, weights are sharded over `tensor` and stored in parts over `fsdp` and `context`, rows over
    `data` and `fsdp`, keys and values over rows, key heads and, in prompts, `context`; crops of the ViT over
    all devices. Several processes must make the same calls in the same order; all get the answers, and only
    those whose devices hold a visual input read it.

    params: the parameter tree, of numpy arrays, or of jax arrays on any mesh (`launch/support/trained.py`
      reads them directly onto their shards).
    stop: strings that end an answer like EOS; the answer excludes them.
    cache_dtype: of the stored keys and values; None: the dtype of the computation.
    weights: "int8" stores the decoder's matrices in 8 bits (decode.stored); None: in the dtype of the
      computation.
    is_copied: False uses the parameters where and as they are, those of a run that trains, for example.
    mesh: sizes of the mesh over the first devices, or a mesh. None: that of the parameters if they are on
      several devices, else one device, or with several processes one replica per device.
    shapes: the row sizes compiled so far.
    model, params: what computes; the parameters on the devices, as decode.ready returns them.

    Raises:
      ValueError: max_new_tokens is below 1, a stop string is empty, or there are too few devices.
    """

    def __init__(self, params, config: configs.Molmo2Config, inputs: configs.InputConfig,
                 tokenizer: tokenizers.Tokenizer, *, max_new_tokens: int = 512,
                 sampling: decode.Sampling = decode.GREEDY, dtype: str = "float32",
                 cache_dtype: str | None = None, weights: str | None = None, is_copied: bool = True,
                 stop: Sequence[str] = (), mesh: sharding.MeshConfig | jax.sharding.Mesh | None = None):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1; got {max_new_tokens}")
        self.config, self.inputs, self.tokenizer = config, inputs, tokenizer
        self.cache_dtype = cache_dtype
        self.max_new_tokens, self.sampling, self.stop = max_new_tokens, sampling, stops.check(stop)
        self.shapes: set[PromptShape] = set()
        self.model = molmo2.Molmo2(config, dtype=dtype, remat="none")
        self.mesh = _mesh_of(params) if mesh is None else (
            sharding.mesh_of_first(mesh) if isinstance(mesh, sharding.MeshConfig) else mesh)
        self.params = params if not is_copied else decode.ready(
            params, dtype, weights=weights, shardings=jax.tree.map(
                lambda leaf: leaf.sharding, state.abstract_params(self.model, self.mesh)))
        table = stops.token_table(self.stop, tokenizer)
        self._options = dict(
            eos=tokenizer.eos_id, num_new=coarse_size(max_new_tokens, 32), sampling=sampling,
            stops=None if table is None else sharding.distribute(table, sharding.replicated(self.mesh)),
            cache_dtype=cache_dtype)
        windows = (config.connector.image_window, config.connector.video_window)
        self._window = max(math.prod(window) for window in windows)

    def answer(self, example: types.Example, questions: Sequence[Question | str]) -> list[Answer]:
        """Returns the answers to questions about one visual input; its annotations are not read.

        Raises:
          ValueError: the media cannot be read, or media, question and answer do not fit the model.
          NotFinite: logits are NaN or infinite. (`run` reports this in Answer.is_finite instead.)
        """
        if jax.process_count() == 1:
            answers = self.run([self.prompt(example, questions)])[0]
        else:
            prompt, shape = self._agreed_prompt(example, questions)
            made = self.run([] if prompt is None else [prompt], shape, rows=1)
            answers = next(one[0] for one in sharding.of_processes(made) if one)
        if not all(answer.is_finite for answer in answers):
            raise self.not_finite()
        return answers

    def limited(self, *, max_new_tokens: int, inputs: configs.InputConfig | None = None,
                sampling: decode.Sampling | None = None) -> "Answerer":
        """Returns an answerer of the same weights, which are not copied, with other limits.

        Raises:
          ValueError: max_new_tokens is below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1; got {max_new_tokens}")
        other = copy.copy(self)
        other.max_new_tokens, other.inputs = max_new_tokens, inputs or self.inputs
        other.sampling, other.shapes = sampling or self.sampling, set()
        other._options = self._options | {"num_new": coarse_size(max_new_tokens, 32),
                                          "sampling": other.sampling}
        return other

    def fingerprint(self) -> str:
        """Returns a digest of weights, config and dtypes, the same on every mesh."""
        said = repr((state.digest(self.params), self.config, str(self.model.dtype), self.cache_dtype))
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def not_finite(self) -> NotFinite:
        """Returns an error that names the weights that are NaN or infinite; checks all of them."""
        is_finite = jax.jit(lambda leaf: jax.numpy.isfinite(leaf).all())
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.params)
        names = [jax.tree_util.keystr(path, simple=True, separator="/")
                 for path, leaf in leaves if not is_finite(leaf)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        why = (f"so are the weights {', '.join(names[:3])}{more}" if names else
               f"all weights are finite: the computation in {self.model.dtype} overflowed")
        return NotFinite(f"logits must be finite; got NaN or infinity, and {why}")

    def stream(self, example: types.Example, questions: Sequence[Question | str], *,
               every: int = STREAM_EVERY) -> Iterator[Piece]:
        """Returns an iterator over the text of all answers as it is generated.

        The joined pieces of a question are the text of its Answer. If the caller stops iterating, computation
        stops.

        Args:
          every: new tokens per question between pieces; the first piece has one token. A process that does
            not read the media gets each answer as one piece, at the end.

        Raises:
          ValueError: every is below 1, or as `answer`.
          NotFinite: as `answer`.
        """
        if every < 1:
            raise ValueError(f"every must be >= 1 token; got {every}")
        if jax.process_count() == 1:
            prompt = self.prompt(example, questions)
            return self._stream(prompt, prompt.shape, len(questions), every)
        return self._stream(*self._agreed_prompt(example, questions), len(questions), every)

    def _stream(self, prompt: Prompt | None, shape: PromptShape, num_questions: int, every: int,
                ) -> Iterator[Piece]:
        start, is_shared = time.perf_counter(), jax.process_count() > 1
        self.shapes.add(shape)
        batch, wanted = self._batch([prompt] if prompt else [], shape, 1, None, is_shared)
        own = range(num_questions if prompt else 0)
        writers = [writer_lib.Writer(self.tokenizer, self.stop) for _ in own]
        states = decode.stream(self.model, self.params, batch, wanted, every=every, **self._options)
        made: dict[int, Answer] = {}
        while True:
            with sharding.using(self.mesh):  # not across a yield, which would set it for the caller
                answers = next(states, None)
            if answers is None:
                break
            if not np.isfinite(answers.logprob[0, :num_questions]).all():
                raise self.not_finite()
            for q, writer in enumerate(writers):
                if writer.is_over:
                    continue
                length = int(answers.length[0, q])
                is_over = bool(answers.ended[0, q]) or length >= wanted.limit[0, q]
                choices = None if answers.choice is None else answers.choice[0, q]
                text = writer.write(answers.tokens[0, q, :length], is_over, choices)
                if is_over:
                    made[q] = self._read(prompt, answers, 0, q, time.perf_counter() - start)
                if text or is_over:
                    yield Piece(q, text, made.get(q))
        if is_shared:
            told = next(filter(None, sharding.of_processes(made)))
            yield from (Piece(q, one.text, one) for q, one in told.items() if prompt is None)

    def _agreed_prompt(self, example: types.Example, questions: Sequence[Question | str],
                       ) -> tuple[Prompt | None, PromptShape]:
        """Returns the prompt, in processes whose devices hold the first row of a batch, and its shape.

        Raises:
          ValueError: in every process: as `answer`, or the processes read different media.
        """
        prompt, told = None, None
        if sharding.row_share(self.mesh)[0] == 0:
            try:
                prompt = self.prompt(example, questions)
                told = prompt.shape, prompt.fingerprint(), ""
            except (ValueError, OSError) as error:
                told = None, 0, str(error)
        found = [one for one in sharding.of_processes(told) if one]
        if len(set(found)) > 1 or found[0][0] is None:
            raise ValueError(next((refusal for *_, refusal in found if refusal),
                                  "all processes must read the same media; their files differ"))
        return prompt, found[0][0]

    def prompt(self, example: types.Example, questions: Sequence[Question | str]) -> Prompt:
        """Returns the questions about one visual input, ready for `run`.

        Raises:
          ValueError: as `answer`.
        """
        start = time.perf_counter()
        crops, media = self.see(example)
        return self.ask(crops, media, questions, time.perf_counter() - start)

    def see(self, example: types.Example) -> tuple[types.Crops | None, types.Media]:
        """Returns the crops of the media, and the sizes and times that answers refer to.

        Raises:
          ValueError: the media cannot be read.
        """
        return media_lib.see(example, self.config, self.inputs, self.tokenizer)

    def ask(self, crops, media: types.Media, questions, read_seconds: float = 0.0) -> Prompt:
        """Returns the prompt of questions about media that `see` has read.

        Raises:
          ValueError: media, question and answer do not fit the model.
        """
        questions = tuple(Question(turns=(one,)) if isinstance(one, str) else one for one in questions)
        tree, last = sequences.ask(crops, [question.turns for question in questions], self.tokenizer)
        if tree.choice is not None:
            grounded.fed(tree.choice.tolist(), media.cells)   # refuses choices that do not exist
        shape = PromptShape.of(tree, len(questions), self._window,
                               self.mesh.shape["tensor"] * self.mesh.shape["context"])
        prompt = Prompt(tree, last, questions, media, shape, read_seconds)
        self._check_length(prompt)
        return prompt

    def run(self, prompts: Sequence[Prompt], shape: PromptShape | None = None, rows: int | None = None,
            draws: Sequence[int] | None = None) -> list[list[Answer]]:
        """Returns the answers to each prompt's questions, from one device call.

        Of several processes that give `rows`, each gives the prompts of its share of them
        (sharding.rows_of_share) and gets the answers to these; `shape` must be the same. Without `rows` all
        give the same prompts.

        Args:
          shape: sizes of a row, at least those of every prompt; None: the smallest rounded ones.
          rows: of the batch, rounded up to a multiple of the mesh's data x fsdp; rows after the prompts stay
            empty. None: one per prompt.
          draws: number of each prompt's first question, which with the seed determines what is sampled. None:
            questions are numbered consecutively.
        """
        start = time.perf_counter()
        shape = shape or PromptShape.largest([prompt.shape for prompt in prompts])
        self.shapes.add(shape)
        is_shared = rows is not None and jax.process_count() > 1
        batch, wanted = self._batch(prompts, shape, rows or len(prompts), draws, is_shared)
        with sharding.using(self.mesh):
            answers = decode.generate(self.model, self.params, batch, wanted, **self._options)
        answers = jax.device_get(answers)
        seconds = time.perf_counter() - start
        places = range(len(prompts))
        if is_shared:
            places = sharding.rows_read(self.mesh, len(answers.length))[jax.process_index()]
        return [[self._read(prompt, answers, row, q, seconds) for q in range(len(prompt.questions))]
                for row, prompt in zip(places, prompts)]

    def _batch(self, prompts, shape: PromptShape, rows: int, draws: Sequence[int] | None,
               is_shared: bool = False):
        """Returns (batch, questions) on the devices; is_shared: the prompts are of this process's share."""
        groups = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = sharding.rows_of_share(self.mesh, rows) if is_shared else -(-rows // groups) * groups
        trees = [[prompt.tree] for prompt in prompts] + [[]] * (rows - len(prompts))
        batch = rows_lib.stack([rows_lib.join_for(self.config, tree, shape.row) for tree in trees])
        counts = [len(prompt.questions) for prompt in prompts]
        draws = np.cumsum([0, *counts[:-1]]) if draws is None else draws
        last, limit, draw = (np.full((rows, shape.Q), fill, np.int32) for fill in (-1, 0, 0))
        for row, prompt in enumerate(prompts):
            count = counts[row]
            last[row, :count] = prompt.last
            limit[row, :count] = [self._limit(question) for question in prompt.questions]
            draw[row, :count] = draws[row] + np.arange(count)
        if is_shared:
            return sharding.put(batch, self.mesh), decode.Questions(*self._gathered(last, limit, draw))
        layout = sharding.of_batch(self.mesh, batch)
        return jax.tree.map(sharding.distribute, batch, layout), decode.Questions(last, limit, draw)

    def _gathered(self, *values: np.ndarray) -> list[np.ndarray]:
        """Returns the values [rows, Q] of a whole batch, given those of this process's rows."""
        found = multihost_utils.process_allgather(np.stack(values))
        held = sharding.rows_read(self.mesh, found.shape[2] * sharding.row_share(self.mesh)[1])
        whole = np.zeros((len(values), 1 + max(map(max, held)), *found.shape[3:]), found.dtype)
        for rows, part in zip(held, found, strict=True):
            whole[:, rows] = part
        return list(whole)

    def _limit(self, question: Question) -> int:
        wanted = question.max_new_tokens
        return self.max_new_tokens if wanted is None else min(wanted, self.max_new_tokens)

    def _check_length(self, prompt: Prompt) -> None:
        """Checks that the model has positions for every question and its answer.

        Raises:
          ValueError: the longest does not fit.
        """
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
        ids = answers.tokens[row, q, :int(answers.length[row, q])]
        text = self.tokenizer.decode(ids)
        if answers.choice is not None:
            text = grounded.join(text, [one for one in answers.choice[row, q].tolist() if one != -1])
        return read_answer(
            stops.cut(text, self.stop), prompt.media,
            is_complete=bool(answers.ended[row, q]), new_tokens=len(ids),
            prompt_tokens=int(prompt.tree.positions[prompt.last[q]]) + 1,
            logprob=float(answers.logprob[row, q]),
            seconds={"read": prompt.read_seconds, "answer": seconds})


def _mesh_of(params) -> jax.sharding.Mesh:
    """Returns the mesh that the parameters are on; of one device, or of all with several processes."""
    found = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(found, jax.sharding.NamedSharding) and found.mesh.axis_names == sharding.AXES:
        return found.mesh
    is_alone = jax.process_count() == 1
    return sharding.mesh_of_first(sharding.MeshConfig(data=1 if is_alone else -1, fsdp=1))


def read_answer(text: str, media: types.Media, **fields) -> Answer:
    """Returns the Answer with a text, and the points and tracks in it; `fields` are the other ones."""
    found, tracks = grounded.read(text, media)
    return Answer(text=text, points=found, tracks=tracks, is_video=media.is_video, **fields)


def answer(params, config: configs.Molmo2Config, inputs: configs.InputConfig,
           tokenizer: tokenizers.Tokenizer, prompt: str, *, video: str | None = None,
           images: Sequence[str] = (), **options) -> Answer:
    """Returns the answer to one question; `options` are those of Answerer, which answers many.

    Raises:
      ValueError: the media cannot be read, or media, question and answer do not fit the model.
      NotFinite: logits are NaN or infinite.
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
