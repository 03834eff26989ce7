"""What training would leave out of a data folder, found before training."""

from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines import formats
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import media as media_lib
from molmo2_jax.inputs import tokenizer as tokenizers


def problems(examples: Sequence[types.Example], model: config.Molmo2Config, inputs: config.InputConfig,
             tokenizer: tokenizers.Tokenizer) -> Iterator[list[str]]:
    """Yields for each example one sentence for each thing about it that training could not use.

    Media are read as the configs say, and annotations held against them.
    """
    for example in examples:
        try:
            _, media = media_lib.see(example, model, inputs, tokenizer)
            found = formats.format_example(example, media=media, rng=np.random.default_rng(0),
                                           asking=formats.PLAIN)
        except (ValueError, OSError, EOFError, MemoryError) as error:
            yield [f"{example.key}: {str(error).removeprefix(f'{example.key}: ') or type(error).__name__}"]
            continue
        yield [f"{example.key}: annotations[{number}]: must have a point at a time that is shown; got none"
               for number in found.dropped]
