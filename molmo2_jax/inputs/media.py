"""The media of an example as the model will see them: files to crops, for training and for answering."""

import numpy as np

from molmo2_jax import config as configs
from molmo2_jax import types
from molmo2_jax.inputs import image
from molmo2_jax.inputs import time_limit
from molmo2_jax.inputs import video
from molmo2_jax.inputs import video_file


def see(example: types.Example, config: configs.Molmo2Config, inputs: configs.InputConfig, tokenizer, *,
        rng: np.random.Generator | None = None, high_res: float = 0.0
        ) -> tuple[types.Crops | None, types.Media]:
    """Returns the Crops of an example's media (None without media), and the media without their pixels.

    Frames are read at the size of a crop.

    Args:
      high_res: probability that a single image is cut into `high_res_crops` tiles; 0 and 1 need no rng.

    Raises:
      ValueError: the media cannot be read, or not within `max_read_seconds` (image.MediaError), or they do
        not fit the configs.
    """
    if example.video is None and not example.images:
        return None, types.Media()
    limit = inputs.max_read_seconds
    late = video_file.too_slow(example.video or ", ".join(example.images), limit)
    if example.video is not None:
        frames = time_limit.within(limit, lambda: _frames(example, config, inputs), late)
        return image.crops_of_frames(frames, config, inputs, tokenizer, example.subtitles), frames.media
    pixels = time_limit.within(limit, lambda: [image.load(path) for path in example.images], late)
    crops = image.crops_of_images(pixels, config, inputs, tokenizer, high_res=high_res, rng=rng)
    return crops, types.Media(sizes=tuple((one.shape[1], one.shape[0]) for one in pixels))


def _frames(example, config, inputs) -> types.Frames:
    side = config.vision.image_size
    return video.read(example.video, max_frames=inputs.max_frames, fps=inputs.max_fps, clip=example.clip,
                      tracking_fps=example.tracking_fps, max_tracking_fps=inputs.max_tracking_fps,
                      size=(side, side), max_seconds=inputs.max_read_seconds)
