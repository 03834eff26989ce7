"""The texts of data folders as the model will see them, for training a small tokenizer."""

import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines import formats
from data_pipelines import sources
from data_pipelines.formats import templates
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import prompt
from molmo2_jax.inputs import video

_MARKUP = re.compile("|".join(map(re.escape, prompt.RESERVED)))  # have ids of their own: not learnt as text


def texts(folders: Sequence[str | pathlib.Path], inputs: config.InputConfig, *,
          most_examples: int = 250, num_templates: int | None = None) -> Iterator[str]:
    """Yields frame times, questions and answers in chat format without the markup, then templates.FAMILIES.

    Args:
      most_examples: how many examples of each folder are read, from the first.
      num_templates: as in pipeline.DataConfig.

    Raises:
      ValueError: a folder has no annotations.jsonl, or one of these records is unusable.
    """
    for folder in folders:
        source = sources.open_source(folder)
        for number in range(min(len(source), most_examples)):
            example = source[number]
            media = _media(example, inputs)
            if media.is_video:
                yield from (prompt.frame_time_text(second, place == 0)
                            for place, second in enumerate(media.seconds))
            branches = formats.to_branches(example, media=media, rng=np.random.default_rng(number),
                                           asking=formats.Asking(num_templates=num_templates))
            for branch in branches:
                yield from _spoken(branch.turns)
    for question in _all_templates():
        yield from _spoken((question,))


def _spoken(turns: Sequence[str]) -> Iterator[str]:
    """Yields the plain text between the markup of a conversation."""
    for text in prompt.chat_texts(turns):
        yield from filter(None, _MARKUP.split(text))


def _media(example: types.Example, inputs: config.InputConfig) -> types.Media:
    """Returns the description of media that formats need, without decoding a video."""
    if example.video is None:
        return types.Media(sizes=tuple(pixels_lib.load(path).shape[1::-1] for path in example.images))
    index = video.index(example.video)
    duration = video.clip_span(index, example.clip)[1]
    return types.Media(sizes=((index.width, index.height),), duration=duration, fps=index.fps,
                       seconds=video.sample_seconds(duration, inputs.max_frames, inputs.max_fps))


def _all_templates() -> Iterator[str]:
    for template in itertools.chain.from_iterable(templates.FAMILIES.values()):
        yield template.format(label="object", medium="video", selection="image 1", fps=2, start="")
