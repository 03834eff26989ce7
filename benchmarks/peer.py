"""The models and prompts that benchmarks share with transformers; needs `pip install torch transformers`."""

import functools
import math
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import peer
from molmo2_jax.hf import weights
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import tokenizer as tokenizers

TEXTS = ["red blue <|im_start|>user assistant 0.5 1.0 1.5 2.0"] * 4
FRAME_RATE = 2.0
FRAMES = ("pixel_values_videos", "video_token_pooling", "video_grids")  # video inputs of transformers


def small(width: int = 640, num_layers: int = 12, vocab_size: int = 16384, vision_layers: int = 8
          ) -> config_lib.Molmo2Config:
    """Returns a model of about 100M parameters: heads, ratios and windows as in Qwen3 and SigLIP2."""
    return config_lib.Molmo2Config(
        vision=config_lib.VisionConfig(image_size=126, patch_size=14, width=384, num_layers=vision_layers,
                                       num_heads=6, head_dim=64, mlp_width=1536),
        connector=config_lib.ConnectorConfig(taps=(vision_layers - 1, vision_layers // 2), num_heads=6,
                                             head_dim=64, mlp_width=3 * width),
        text=config_lib.TextConfig(vocab_size=vocab_size, width=width, num_layers=num_layers,
                                   num_heads=width // 64, num_kv_heads=width // 128, head_dim=64,
                                   mlp_width=3 * width, max_positions=4096))


def num_parameters(config: config_lib.Molmo2Config) -> int:
    return sum(math.prod(leaf.shape) for leaf in weights.abstract_params(config).values())


def exported(params, config: config_lib.Molmo2Config):
    """Returns transformers' model of the folder that our exporter writes, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        return peer.load(checkpoint.export_checkpoint(
            params, config, config_lib.InputConfig(), None, f"{folder}/model"))


@functools.cache
def tokenizer_of(config: config_lib.Molmo2Config) -> tokenizers.Tokenizer:
    return tokenizers.train_small(TEXTS, config.text.vocab_size)


def video(config: config_lib.Molmo2Config, frames: int, seed: int = 0) -> types.Crops:
    """Returns random frames as the input pipeline lays them out."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 90, 120, 3)).astype(np.uint8)
    view = types.Frames(pixels, np.arange(frames) / FRAME_RATE, 120, 90, frames / FRAME_RATE, FRAME_RATE)
    return crops_lib.crops_of_frames(view, config, config_lib.InputConfig(), tokenizer_of(config))


def question(config: config_lib.Molmo2Config, crops: types.Crops | None, num_words: int) -> types.Sequence:
    """Returns BOS, the visual tokens and a question of `num_words` words."""
    return sequences.build(crops, [types.Branch(turns=(" red" * num_words,))], tokenizer_of(config))


def batch_of(held: Sequence[types.Sequence], config: config_lib.Molmo2Config) -> types.Batch:
    """Returns a Batch with one sequence per row and no more padding than unequal lengths need."""
    T, M, R = (max(len(getattr(one, name)) for one in held) for name in ("tokens", "patches", "pooled"))
    shape = types.RowShape(T=T, M=M, R=R, W=math.prod(config.connector.video_window))
    return rows_lib.stack([rows_lib.join([one], shape, config.vision.patch_shape) for one in held])


def prompt_arguments(prompts: Sequence[types.Sequence], config: config_lib.Molmo2Config) -> dict:
    """Returns the arguments of transformers' generate, padded on the left."""
    given = peer.arguments(prompts, config)
    del given["position_ids"]
    return given


def video_arguments(held: Sequence[types.Sequence], config: config_lib.Molmo2Config) -> Mapping:
    """Returns the video inputs of transformers for the frames of some sequences, in their order."""
    return {name: value for name, value in peer.arguments(held, config).items() if name in FRAMES}


def whole(values) -> torch.Tensor:
    """Returns int64 values, as torch needs them."""
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))
