"""The media of an example as the model sees them: files to crops, for training and for inference."""

import dataclasses

import numpy as np

from molmo2_jax import config as configs
from molmo2_jax import types
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import prompt
from molmo2_jax.inputs import time_limit
from molmo2_jax.inputs import video
from molmo2_jax.inputs import video_file


def see(example: types.Example, config: configs.Molmo2Config, inputs: configs.InputConfig, tokenizer, *,
        rng: np.random.Generator | None = None, high_res: float = 0.0
        ) -> tuple[types.Crops | None, types.Media]:
    """Returns the Crops of an example's media (None without media), and the media without their pixels.

    Frames are resized to the size of a crop while reading. Subtitles are cut to the clip.

    Args:
      high_res: probability that a single image may use up to `high_res_crops` tiles; 0 and 1 need no rng.

    Raises:
      MediaError: the media cannot be read, or not within `max_read_seconds`.
      ValueError: the media do not fit the configs.
    """
    if example.video is None and not example.images:
        return None, types.Media()
    limit = inputs.max_read_seconds
    late = video_file.too_slow(example.video or ", ".join(map(str, example.images)), limit)
    if example.video is not None:
        frames = time_limit.within(limit, lambda: _frames(example, config, inputs), late)
        subtitles = prompt.subtitles_within(example.subtitles, frames.duration)
        crops = crops_lib.crops_of_frames(frames, config, inputs, tokenizer, subtitles)
        return crops, _with_cells(frames.media, crops, config)
    pixels = time_limit.within(limit, lambda: [pixels_lib.load(path) for path in example.images], late)
    crops = crops_lib.crops_of_images(pixels, config, inputs, tokenizer, high_res=high_res, rng=rng)
    media = types.Media(sizes=tuple((one.shape[1], one.shape[0]) for one in pixels))
    return crops, _with_cells(media, crops, config)


def _with_cells(media: types.Media, crops: types.Crops, config: configs.Molmo2Config) -> types.Media:
    """Returns the media; with their cells for a model with a pointer."""
    if config.pointer is None:
        return media
    patch, overview = map(config.special_id, ("<im_patch>", config.overview_token))
    return dataclasses.replace(media, cells=grounded.cells_of(crops, patch, overview))


def _frames(example, config, inputs) -> types.Frames:
    side = config.vision.image_size
    return video.read(example.video, max_frames=inputs.max_frames, fps=inputs.max_fps, clip=example.clip,
                      tracking_fps=example.tracking_fps, max_tracking_fps=inputs.max_tracking_fps,
                      size=(side, side), max_seconds=inputs.max_read_seconds)
