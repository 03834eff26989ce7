"""Random small models, parameters, message trees and rows for tests, determined by a seed.

Visual tokens pool random patches of their own image, with empty slots: more general than any real tiling.

B rows, T tokens, M crops of P patches of C values, R pooled rows.
"""

import dataclasses
import math

import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.hf import weights
from molmo2_jax.inputs import rows as rows_lib

STYLES = ("qwen3", "qwen3_tied", "olmo")


def random_config(style: str, seed: int) -> config_lib.Molmo2Config:
    """Returns the config of a model of a few thousand parameters; every size that can vary does."""
    rng = np.random.default_rng((STYLES.index(style), seed))
    pick = lambda *options: int(rng.choice(options))
    depth, layers, patch = pick(2, 3, 4), pick(2, 3, 4), pick(2, 3)
    vision_heads, vision_head_dim, kv_heads = pick(1, 2, 3), pick(4, 6, 8), pick(1, 2)
    pool_heads = pick(*[n for n in (1, 2, 3) if vision_heads * vision_head_dim % n == 0])
    width = vision_heads * vision_head_dim
    olmo = dict(qk_norm="olmo", norm_after=True, yarn=config_lib.YarnConfig(
        factor=4.0, original_length=64, beta_fast=8.0, attention_factor=1.1386294361119891,
        layers=tuple(sorted(rng.choice(layers, layers - 1, replace=False).tolist()))))
    return config_lib.Molmo2Config(
        vision=config_lib.VisionConfig(
            image_size=patch * pick(3, 4), patch_size=patch, width=width, num_layers=depth,
            num_heads=vision_heads, head_dim=vision_head_dim, mlp_width=pick(20, 30)),
        connector=config_lib.ConnectorConfig(
            taps=(depth - 1, int(rng.integers(depth - 1))), num_heads=pool_heads,
            head_dim=width // pool_heads, mlp_width=pick(24, 40)),
        text=config_lib.TextConfig(
            vocab_size=pick(90, 131), additional_vocab_size=pick(16, 128), width=pick(20, 32),
            num_layers=layers, num_heads=kv_heads * pick(1, 2, 3), num_kv_heads=kv_heads,
            head_dim=pick(8, 12), mlp_width=pick(24, 36), rope_theta=1e4, max_positions=256,
            tied_head=style == "qwen3_tied",
            **(olmo if style == "olmo" else {})))


def random_params(config: config_lib.Molmo2Config, seed: int = 0) -> dict:
    """Returns a parameter tree of numpy arrays in which every entry has an effect, biases and norms too."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in weights.abstract_params(config).items():
        noise, kind = rng.standard_normal(leaf.shape, np.float32), path.rsplit("/", 1)[-1]
        if kind == "kernel":
            shape = leaf.shape[1:] if "/layers/" in path else leaf.shape
            fan_in = math.prod(shape[:-1]) if "/o/" in path else shape[0]
            noise *= fan_in ** -0.5
        elif kind == "scale":
            noise = 1 + 0.2 * noise
        else:
            # A tied head multiplies by this table: keep its logits near 1.
            embedding = 1.25 * config.text.width ** -0.5 if config.text.tied_head else 0.5
            noise *= {"bias": 0.2, "head": config.text.width ** -0.5}.get(kind, embedding)
        flat[path] = noise.astype(np.float32, copy=False)
    return weights.unflatten(flat)


@dataclasses.dataclass(frozen=True)
class Visual:
    """Crops and what transformers needs in addition: grids of an image (overview, tiles) or of a video."""
    crops: types.Crops
    grids: np.ndarray       # int[images, 4] or int[1, 3]
    num_crops: np.ndarray   # int[images]
    is_video: bool


def words(rng, config: config_lib.Molmo2Config, count: int) -> list[int]:
    """Returns random ids of the base vocabulary."""
    return rng.integers(0, config.text.vocab_size, count).tolist()


def _windows(rng, count: int, slots: int, low: int, high: int) -> np.ndarray:
    windows = rng.integers(low, high, (count, slots))
    windows[:, 1:][rng.random((count, slots - 1)) < 0.3] = -1
    return windows.astype(np.int32)


def images(rng, config: config_lib.Molmo2Config, count: int, num_tiles: int = 2) -> Visual:
    """Returns images of an overview of 2 x 2 tokens and a tiled part of 2 x 3, markers and texts included."""
    P, C = config.vision.num_patches, config.vision.patch_values
    start, end, low, column, patch = (config.special_id(token) for token in (
        "<im_start>", "<im_end>", "<low_res_im_start>", "<im_col>", "<im_patch>"))
    block = [low, *[patch] * 4, end, start, *[*[patch] * 3, column] * 2, end]
    tokens, image, pooled = [], [], []
    slots = math.prod(config.connector.image_window)
    for number in range(count):
        text = words(rng, config, 3) if count > 1 else []
        tokens += text + block
        image += [-1] * len(text) + [number] * len(block)
        first = number * (1 + num_tiles) * P
        pooled.append(_windows(rng, 4, slots, first, first + P))
        pooled.append(_windows(rng, 6, slots, first + P, first + (1 + num_tiles) * P))
    crops = types.Crops(
        rng.integers(0, 256, (count * (1 + num_tiles), P, C), np.uint8), np.concatenate(pooled),
        np.array(tokens, np.int32), np.array(image, np.int32))
    return Visual(crops, np.tile([2, 2, 2, 3], (count, 1)), np.full(count, 1 + num_tiles), False)


def video(rng, config: config_lib.Molmo2Config, count: int) -> Visual:
    """Returns frames of 1 x 2 tokens, each after two tokens of text."""
    P, C = config.vision.num_patches, config.vision.patch_values
    start, end, patch = (config.special_id(t) for t in ("<frame_start>", "<frame_end>", "<im_patch>"))
    tokens, image, pooled = [], [], []
    for number in range(count):
        tokens += [*words(rng, config, 2), start, patch, patch, end]
        image += [-1] * 2 + [number] * 4
        slots = math.prod(config.connector.video_window)
        pooled.append(_windows(rng, 2, slots, number * P, (number + 1) * P))
    crops = types.Crops(rng.integers(0, 256, (count, P, C), np.uint8), np.concatenate(pooled),
                        np.array(tokens, np.int32), np.array(image, np.int32))
    return Visual(crops, np.array([[count, 1, 2]]), np.full(count, 1), True)


def sequence(rng, config: config_lib.Molmo2Config, visual: Visual | None, branches: tuple[int, ...]
             ) -> types.Sequence:
    """Returns BOS and the visual tokens as root, and branches of the given lengths in tokens."""
    root = [1, *(visual.crops.tokens.tolist() if visual else [])]
    tokens, branch, positions = list(root), [-1] * len(root), list(range(len(root)))
    for number, length in enumerate(branches):
        tokens += words(rng, config, length)
        branch += [number] * length
        positions += range(len(root), len(root) + length)
    image = np.full(len(tokens), -1, np.int32)
    slots = math.prod(config.connector.video_window)
    patches = np.zeros((0, config.vision.num_patches, config.vision.patch_values), np.uint8)
    pooled = np.zeros((0, slots), np.int32)
    if visual:
        image[1:len(root)] = visual.crops.image
        patches, pooled = visual.crops.patches, visual.crops.pooled
    return types.Sequence(
        tokens=np.array(tokens, np.int32), targets=np.array([*tokens[1:], 1], np.int32),
        weights=np.array([float(b >= 0) for b in branch], np.float32),
        positions=np.array(positions, np.int32), branch=np.array(branch, np.int32), image=image,
        patches=patches, pooled=pooled)


def random_sequence(rng, config: config_lib.Molmo2Config) -> types.Sequence:
    """Returns text only, images or a video, with one to four branches of 1 to 9 tokens."""
    kind = rng.integers(4)
    visual = None
    if kind == 1:
        visual = images(rng, config, int(rng.integers(1, 3)), num_tiles=1)
    elif kind > 1:
        visual = video(rng, config, int(rng.integers(1, 5)))
    return sequence(rng, config, visual, tuple(rng.integers(1, 10, rng.integers(1, 5)).tolist()))


def row(sequences, config: config_lib.Molmo2Config, T: int, M: int, R: int) -> types.Batch:
    """Returns a Batch of one row."""
    shape = types.RowShape(T=T, M=M, R=R, W=math.prod(config.connector.video_window))
    return rows_lib.join(sequences, shape, config.vision.patch_shape)


def random_rows(seed: int, config: config_lib.Molmo2Config, B: int, T: int, M: int = 16, R: int = 64
                ) -> types.Batch:
    """Returns B rows, each filled with random sequences until the next one does not fit."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(B):
        held: list[types.Sequence] = []
        while True:
            held.append(random_sequence(rng, config))
            if (sum(len(s.tokens) for s in held) > T or sum(len(s.patches) for s in held) > M
                    or sum(len(s.pooled) for s in held) > R):
                break
        rows.append(row(held[:-1], config, T, M, R))
    return rows_lib.stack(rows)


def seen_by_the_reference(batch: types.Batch, visual_attention: str = "image_tokens") -> np.ndarray:
    """Returns bool[B, T, T]: valid key, sub-ids in order, and causal or both visual in one example.

    Reference: olmo/models/molmo2/molmo2.py; sub-ids as in olmo/data/dynamic_packer.py.
    """
    q, k = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    is_tree = np.zeros_like(batch.example, bool)
    for row, example in enumerate(batch.example):
        for number in range(example.max() + 1):
            is_tree[row, example == number] = batch.branch[row][example == number].max() > 0
    local = np.where(is_tree, np.where(batch.branch < 0, 10000, batch.branch), 0)
    valid = batch.example >= 0
    sub = np.where(valid, batch.example * 100000 + local, -1)
    is_visual = batch.image >= 0
    i = np.arange(batch.tokens.shape[1])
    both = q(is_visual) & k(is_visual) & (q(batch.example) == k(batch.example))
    if visual_attention == "within_image":
        both &= k(batch.image) <= q(batch.image)
    elif visual_attention == "causal":
        both &= False
    return k(valid) & (q(sub) <= k(sub)) & ((i[None, :] <= i[:, None]) | both)
