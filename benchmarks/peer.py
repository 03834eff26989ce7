"""The models that benchmarks share with transformers: random weights, exported by us and loaded by them.

The peer needs `pip install torch transformers`.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import math
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
import transformers

from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import weights
from molmo2_jax.inputs import image
from molmo2_jax.inputs import packing
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import tokenizer as tokenizers

TEXTS = ["Point to the red circle. How many blue squares are there? 0.5 1.0 1.5 2.0"] * 4
FRAME_RATE = 2.0


def small(width: int = 640, num_layers: int = 12, vocab_size: int = 16384, vision_layers: int = 8
          ) -> config_lib.Molmo2Config:
    """Returns a model of about 100M parameters: head width, ratios and windows of Qwen3 and SigLIP2."""
    return config_lib.Molmo2Config(
        vision=config_lib.VisionConfig(image_size=126, patch_size=14, width=384, num_layers=vision_layers,
                                       num_heads=6, head_dim=64, mlp_width=1536),
        connector=config_lib.ConnectorConfig(taps=(vision_layers - 1, vision_layers // 2), num_heads=6,
                                             head_dim=64, mlp_width=3 * width),
        text=config_lib.TextConfig(vocab_size=vocab_size, width=width, num_layers=num_layers,
                                   num_heads=width // 64, num_kv_heads=width // 128, head_dim=64,
                                   mlp_width=3 * width, max_positions=4096))


def params_of(config: config_lib.Molmo2Config) -> dict:
    """Returns a parameter tree of random numpy arrays, scaled so that logits are of size 1."""
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in weights.abstract_params(config).items():
        values, kind = rng.standard_normal(leaf.shape, np.float32), path.rsplit("/", 1)[-1]
        if kind == "kernel":
            shape = leaf.shape[1:] if "/layers/" in path else leaf.shape
            values *= (math.prod(shape[:-1]) if "/o/" in path else shape[0]) ** -0.5
        elif kind == "scale":
            values = 1 + 0.1 * values
        else:
            values *= {"head": 4 * config.text.width ** -0.5, "bias": 0.1}.get(kind, 0.5)
        flat[path] = values.astype(np.float32)
    return weights.unflatten(flat)


def num_parameters(config: config_lib.Molmo2Config) -> int:
    return sum(math.prod(leaf.shape) for leaf in weights.abstract_params(config).values())


def exported(params, config: config_lib.Molmo2Config, folder: str | pathlib.Path):
    """Returns transformers' model of the folder that our exporter writes, in float32."""
    checkpoint.export_checkpoint(params, config, config_lib.InputConfig(), None, folder)
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model.eval()


@functools.cache
def tokenizer_of(config: config_lib.Molmo2Config) -> tokenizers.Tokenizer:
    return tokenizers.train_small(TEXTS, config.text.vocab_size)


def video(config: config_lib.Molmo2Config, frames: int, seed: int = 0) -> types.Crops:
    """Returns random frames as the input pipeline lays them out."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 90, 120, 3)).astype(np.uint8)
    view = types.Frames(pixels, np.arange(frames) / FRAME_RATE, 120, 90, frames / FRAME_RATE, FRAME_RATE)
    return image.crops_of_frames(view, config, config_lib.InputConfig(), tokenizer_of(config))


def question(config: config_lib.Molmo2Config, crops: types.Crops | None, num_words: int) -> types.Sequence:
    """Returns BOS, the visual tokens and a question of so many words, most of them one token."""
    branch = types.Branch(turns=(" red" * num_words,))
    return sequences.build(crops, [branch], tokenizer_of(config))


def batch_of(prompts: Sequence[types.Sequence], config: config_lib.Molmo2Config) -> types.Batch:
    """Returns a Batch with one prompt per row and no more padding than unequal lengths need."""
    T, M, R = (max(len(getattr(one, name)) for one in prompts) for name in ("tokens", "patches", "pooled"))
    shape = (config.vision.num_patches, config.vision.patch_values)
    window = math.prod(config.connector.video_window)
    return packing.stack([packing.join([one], T=T, M=M, R=R, W=window, patch_shape=shape) for one in prompts])


def video_arguments(trees: Sequence[types.Sequence], config: config_lib.Molmo2Config) -> dict:
    """Returns what transformers wants to know of the frames of some sequences, in their order."""
    offset, pooled, grids, pixels = 0, [], [], []
    rows, columns = (-(-config.vision.grid // window) for window in config.connector.video_window)
    for one in trees:
        if not len(one.patches):
            continue
        pixels.append(one.patches.astype(np.float32) / 127.5 - 1)
        pooled.append(np.where(one.pooled >= 0, one.pooled + offset, -1))
        grids.append([len(one.patches), rows, columns])
        offset += one.patches.shape[0] * one.patches.shape[1]
    if not pixels:
        return {}
    return {"pixel_values_videos": torch.from_numpy(np.concatenate(pixels)),
            "video_token_pooling": whole(np.concatenate(pooled)), "video_grids": whole(grids)}


def whole(values) -> torch.Tensor:
    """Returns int64 values as torch wants them."""
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))


def prompt_arguments(prompts: Sequence[types.Sequence], config: config_lib.Molmo2Config) -> dict:
    """Returns the arguments of transformers' generate, padded on the left."""
    length = max(len(one.tokens) for one in prompts)
    left = lambda x: np.pad(x, (length - len(x), 0))
    return {"input_ids": whole([left(one.tokens) for one in prompts]),
            "attention_mask": whole([left(np.ones_like(one.tokens)) for one in prompts]),
            "mm_token_type_ids": whole([left(one.image >= 0) for one in prompts]),
            **video_arguments(prompts, config)}
