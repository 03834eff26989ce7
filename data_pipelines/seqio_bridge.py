"""Registers tasks and mixtures with seqio: the same examples, rates and metrics for users of seqio.

    seqio_bridge.register("sft", model=..., inputs=..., tokenizer=...)
    seqio.get_mixture_or_task("molmo2_sft").get_dataset(sequence_length=None, split="train", ...)

Needs the extra `seqio`, which installs TensorFlow; no other module imports this one. Every feature is an
array of types.Sequence. seqio shuffles and mixes here; the order in which training reads, and how it
resumes, belong to pipeline.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from data_pipelines import formats
from data_pipelines import records
from data_pipelines import sources
from data_pipelines import tasks as task_lib
from data_pipelines.scoring import suite
from data_pipelines.stream import preparation
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import tokenizer as tokenizers

PREFIX, SPLIT = "molmo2_", "train"
_RANKS = {"patches": 3, "pooled": 2}            # of fields of types.Sequence; the others are vectors
_DTYPES = {"weights": np.float32, "patches": np.uint8}
_FIELDS = tuple(field for field in preparation.FIELDS if field != "choice")


class Vocabulary(seqio.Vocabulary):
    """Our tokenizer with seqio's interface; ids beyond the base vocabulary are the visual tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        super().__init__(extra_ids=0)
        self.tokenizer = tokenizer

    @property
    def bos_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def unk_id(self) -> int:
        return self.tokenizer.eos_id  # byte-level: no text is unknown

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size + len(config.SPECIAL_TOKENS)

    def _encode(self, s: str) -> Sequence[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        ids = tf.py_function(
            lambda text: np.asarray(self._encode(text.numpy().decode()), np.int32), [s], tf.int32)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.py_function(lambda row: self._decode(row.numpy().tolist()), [ids], tf.string)

    def __eq__(self, other) -> bool:
        return isinstance(other, Vocabulary) and self.tokenizer is other.tokenizer


def register(mixture: str, *, model: config.Molmo2Config, inputs: config.InputConfig,
             tokenizer: tokenizers.Tokenizer, max_tokens: int | None = None,
             asking: formats.Asking = formats.Asking(),
             mixtures: Mapping[str, task_lib.Mixture] = task_lib.MIXTURES,
             tasks: Mapping[str, task_lib.Task] = task_lib.TASKS) -> str:
    """Registers a mixture and returns its name in seqio; its tasks are named molmo2_MIXTURE_TASK.

    Each example has the random choices of training's first epoch. Records that cannot be used are left out.

    Raises:
      KeyError: there is no such mixture.
      ValueError: a folder of the mixture has no usable annotations, the name is already registered, or the
        model chooses where to point, which seqio's features do not carry.
    """
    config.require(model.pointer is None, "seqio takes models that write points as text", model.pointer)
    members = task_lib.members(mixtures[mixture])
    opened = {member.task: _open(member.task, tasks[member.task].folder) for member in members}
    rates = task_lib.rates(mixtures[mixture], {task: len(source) for task, source in opened.items()})
    prepare = functools.partial(preparation.prepare, model=model, inputs=inputs, tokenizer=tokenizer,
                                max_tokens=max_tokens, asking=asking)
    names = {}
    for member in members:
        names[member.task] = f"{PREFIX}{mixture}_{''.join(c if c.isalnum() else '_' for c in member.task)}"
        _add_task(names[member.task], opened[member.task], functools.partial(
            prepare, weight=member.weight, high_res_share=member.high_res_share,
            point_modes=member.point_modes), Vocabulary(tokenizer))
    seqio.MixtureRegistry.add(PREFIX + mixture, [(names[task], rate) for task, rate in rates.items()])
    return PREFIX + mixture


def _open(task: str, folder: str) -> sources.Source:
    source = sources.open_source(folder, name=task)
    sources.check_usable(source, most=len(source))
    return source


def _add_task(name: str, source: sources.Source, prepare: Callable[..., types.Sequence],
              vocabulary: Vocabulary) -> None:
    plain = seqio.PassThroughVocabulary(size=0)
    features = {field: seqio.Feature(vocabulary if field in ("tokens", "targets") else plain, add_eos=False,
                                     rank=_RANKS.get(field, 1), dtype=tf.as_dtype(_dtype(field)))
                for field in _FIELDS}
    signature = {field: tf.TensorSpec([None] * _RANKS.get(field, 1), tf.as_dtype(_dtype(field)))
                 for field in _FIELDS}

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # seqio shuffles examples itself
        return tf.data.Dataset.from_generator(lambda: _prepared(source, prepare),
                                              output_signature=signature)

    data = seqio.FunctionDataSource(dataset, splits=(SPLIT,), num_input_examples={SPLIT: len(source)})
    seqio.TaskRegistry.add(name, source=data, preprocessors=[], output_features=features,
                           metric_fns=[score])


def _dtype(field: str) -> type:
    return _DTYPES.get(field, np.int32)


def _prepared(source: sources.Source, prepare) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of every usable example, with the random choices of its first epoch."""
    for index in range(len(source)):
        try:
            found = prepare(source[index], rng=preparation.generator(index, 0))
        except (records.BrokenRecord, preparation.Refused):
            continue
        yield {field: getattr(found, field) for field in _FIELDS}


def score(targets: Sequence[suite.Answered], predictions: Sequence[str]) -> dict[str, float]:
    """Returns scoring.suite.score of `targets` (what was asked) with `predictions` (the model's answers).

    Raises:
      ValueError: the two have different lengths.
    """
    return suite.score([dataclasses.replace(target, answer=prediction)
                        for target, prediction in zip(targets, predictions, strict=True)])
