"""How commands that examine data read records: as a run prepares them."""

import contextlib
import dataclasses

from data_pipelines.doctor import examination
from launch import run
from launch.support import places
from molmo2_jax import config as configs
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import tokenizer as tokenizers

MODEL = places.SHIPPED / "assets/nano"  # small pictures; whether files can be read depends on no model


def settings(config: run.RunConfig, *, has_media: bool = True) -> examination.Settings:
    """Returns the settings of a run that has a tokenizer and data.

    Raises:
      ValueError: the tokenizer cannot be read, or settings do not fit the model.
    """
    with contextlib.chdir(places.base()):  # paths in configurations are relative to it
        tokenizer = tokenizers.Tokenizer.from_file(
            places.model(config.tokenizer), config.model.text.vocab_size)
    return examination.Settings(
        model=config.model, inputs=config.inputs, tokenizer=tokenizer, asking=config.data.asking(),
        shape=config.data.shape(config.model), has_media=has_media)


def settings_of_no_run(*, has_media: bool = True) -> examination.Settings:
    """Returns settings for records of any size, with the small model that ships."""
    model, inputs = hf_checkpoint.read_config(MODEL)
    return examination.Settings(
        model=model, inputs=dataclasses.replace(inputs, max_frames=configs.InputConfig().max_frames),
        tokenizer=tokenizers.Tokenizer.from_file(MODEL, model.text.vocab_size), has_media=has_media)
