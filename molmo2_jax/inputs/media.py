"""The media of an example as the model will see them: files to crops, for training and for answering."""

from collections.abc import Sequence

import numpy as np

from molmo2_jax import config as configs
from molmo2_jax import types
from molmo2_jax.inputs import image
from molmo2_jax.inputs import video

# What annotations and answers are relative to: the Frames of a video, or (width, height) of each image.
View = types.Frames | Sequence[tuple[int, int]]


def see(example: types.Example, config: configs.Molmo2Config, inputs: configs.InputConfig, tokenizer, *,
        rng: np.random.Generator | None = None, high_res: float = 0.0) -> tuple[types.Crops | None, View]:
    """Returns the Crops of an example's media, and its Frames or the (width, height) of its images.

    Without media they are None and (). Frames are read at the size of a crop.

    Args:
      high_res: probability that a single image is cut into `high_res_crops` tiles; 0 and 1 need no rng.

    Raises:
      ValueError: the media cannot be read (image.MediaError) or do not fit the configs.
    """
    if example.video is not None:
        side = config.vision.image_size
        frames = video.read(example.video, max_frames=inputs.max_frames, fps=inputs.max_fps,
                            clip=example.clip, size=(side, side))
        return image.crops_of_frames(frames, config, inputs, tokenizer, example.subtitles), frames
    if example.images:
        pixels = [image.load(path) for path in example.images]
        crops = image.crops_of_images(pixels, config, inputs, tokenizer, high_res=high_res, rng=rng)
        return crops, tuple((one.shape[1], one.shape[0]) for one in pixels)
    return None, ()
