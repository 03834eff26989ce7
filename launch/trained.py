"""A trained model by the path a person gives: the work directory of a run, or a Hugging Face folder."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch import record
from launch import run
from molmo2_jax import checkpoint
from molmo2_jax import config
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2


class Trained(NamedTuple):
    """All that is needed to answer questions. `params` is the parameter tree, without boxes."""
    model: config.Molmo2Config
    inputs: config.InputConfig
    tokenizer: tokenizers.Tokenizer
    params: Any


def load(path: str | pathlib.Path, bindings: Sequence[str] = ()) -> Trained:
    """Returns the newest checkpoint of a work directory, or the model in a Hugging Face folder.

    `bindings` change the settings of the run that a work directory records.

    Raises:
      ValueError: the folder is neither, or what it holds does not fit together.
    """
    folder = pathlib.Path(path)
    if (folder / record.NAME).is_file():
        run_config = run.resolve([(folder / record.NAME).resolve()], bindings)
        model, inputs = run_config.model, run_config.inputs
        params = checkpoint.load_params(str(folder), molmo2.Molmo2(model))
    elif (folder / "config.json").is_file():
        if bindings:
            raise ValueError(f"a Hugging Face folder takes no gin bindings; got {list(bindings)}")
        params, model, inputs = hf_checkpoint.import_checkpoint(folder)
    else:
        raise ValueError("a model must be the work directory of a run (with config.gin) or a Hugging "
                         f"Face folder (with config.json); got {folder}")
    tokenizer = tokenizers.Tokenizer.from_file(folder, model.text.vocab_size)
    return Trained(model, inputs, tokenizer, params)
