"""The texts of data folders as the model will see them: what a small tokenizer is trained on."""

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
from molmo2_jax.inputs import image
from molmo2_jax.inputs import media
from molmo2_jax.inputs import prompt
from molmo2_jax.inputs import video

_MARKUP = re.compile("|".join(map(re.escape, prompt.RESERVED)))  # single ids, not to be learnt as text


def texts(folders: Sequence[str | pathlib.Path], inputs: config.InputConfig, *,
          most_examples: int = 250, num_templates: int | None = None) -> Iterator[str]:
    """Yields times of frames, questions and answers with their chat markup, then every prompt template.

    Args:
      most_examples: of each folder, the first ones.
      num_templates: as in pipeline.DataConfig.

    Raises:
      ValueError: a folder has no annotations.jsonl, or a record cannot be used.
    """
    for folder in folders:
        examples = sources.read_jsonl(pathlib.Path(folder) / "annotations.jsonl")[:most_examples]
        for number, example in enumerate(examples):
            view = _view(example, inputs)
            if isinstance(view, types.Frames):
                yield from (prompt.frame_time_text(second, place == 0)
                            for place, second in enumerate(view.seconds))
            branches = formats.to_branches(example, frames_or_sizes=view, train=True,
                                           rng=np.random.default_rng(number), num_templates=num_templates)
            for branch in branches:
                yield from _spoken(branch.turns)
    for question in _all_templates():
        yield from _spoken((question,))


def _spoken(turns: Sequence[str]) -> Iterator[str]:
    """Yields what is plain text in turns with their markup."""
    for text in prompt.chat_texts(turns):
        yield from filter(None, _MARKUP.split(text))


def _view(example: types.Example, inputs: config.InputConfig) -> media.View:
    """Returns what a format needs to know about media, without decoding a video."""
    if example.video is None:
        return tuple(image.load(path).shape[1::-1] for path in example.images)
    index = video.index(example.video)
    duration = video.clip_span(index, example.clip)[1]
    return types.Frames(pixels=np.zeros((0, 0, 0, 3), np.uint8), width=index.width, height=index.height,
                        seconds=video.sample_seconds(duration, inputs.max_frames, inputs.max_fps),
                        duration=duration, fps=index.fps)


def _all_templates() -> Iterator[str]:
    families = (value for name, value in vars(templates).items() if name.isupper())
    for template in itertools.chain.from_iterable(families):
        yield template.format(label="object", medium="video", selection="image 1", fps=2, start="")
