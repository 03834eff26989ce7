"""transformers' own molmo2 model of a folder, run on our arrays: the reference for our logits.

The only module that imports torch and transformers; it is imported only for a comparison.

T tokens, V base vocabulary.
"""

import contextlib
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything loaded here is in local folders

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from molmo2_jax import config as config_lib
from molmo2_jax import types


def load(folder: str | pathlib.Path):
    """Returns transformers' model of a folder in float32 and evaluation mode.

    Raises:
      ValueError: tensors are missing, unused or of another shape, or the folder cannot be loaded.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32)
    except Exception as error:  # from_pretrained raises many types
        raise ValueError(f"transformers must load {folder}; {type(error).__name__}: {error}") from error
    problems = {name: sorted(map(str, found)) for name, found in info.items() if found}
    if problems:
        raise ValueError(f"transformers must find all tensors of {folder} and no others; got {problems}")
    return model.eval()


def with_adapter(model, folder: str | pathlib.Path):
    """Returns transformers' model with the PEFT adapter of a folder beside its weights.

    Raises:
      ValueError: peft cannot load it, or finds tensors that are missing or unexpected.
    """
    import peft
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)   # peft warns of tensors that it does not find
        try:
            return peft.PeftModel.from_pretrained(model, str(folder)).eval()
        except (UserWarning, ValueError, RuntimeError) as error:
            raise ValueError(f"peft must load {folder}; {error}") from error


def arguments(sequences: Sequence[types.Sequence], config: config_lib.Molmo2Config
              ) -> dict[str, torch.Tensor]:
    """Returns the arguments of transformers' forward for a batch of sequences, padded on the left.

    Sequences with visual tokens must be all videos or all images.
    """
    length = max(len(one.tokens) for one in sequences)
    left = lambda x: np.pad(x, (length - len(x), 0))
    mask = np.stack([left(np.ones_like(one.tokens)) for one in sequences])
    values = {"input_ids": np.stack([left(one.tokens) for one in sequences]), "attention_mask": mask,
              "mm_token_type_ids": np.stack([left(one.image >= 0) for one in sequences]),
              "position_ids": np.maximum(np.cumsum(mask, 1) - 1, 0)}
    seen = [one for one in sequences if len(one.pooled)]
    if seen:
        is_video = config.special_id("<low_res_im_start>") not in seen[0].tokens
        pixels, pooling, grids = (
            ("pixel_values_videos", "video_token_pooling", "video_grids") if is_video else
            ("pixel_values", "image_token_pooling", "image_grids"))
        offsets = np.cumsum([0, *(one.patches.shape[0] * one.patches.shape[1] for one in seen)])
        values |= {pixels: np.concatenate([one.patches.astype(np.float32) / 127.5 - 1 for one in seen]),
                   pooling: np.concatenate([np.where(one.pooled >= 0, one.pooled + offset, -1)
                                            for one, offset in zip(seen, offsets)]),
                   grids: np.concatenate([_grids(one, config, is_video) for one in seen])}
    return {name: torch.from_numpy(np.ascontiguousarray(
        value, np.float32 if value.dtype == np.float32 else np.int64)) for name, value in values.items()}


def _grids(one: types.Sequence, config: config_lib.Molmo2Config, is_video: bool) -> np.ndarray:
    """Returns int[images, 4] (overview, tiles) or int[1, 3] (frames); only products are read."""
    patch, end = config.special_id("<im_patch>"), config.special_id("<im_end>")
    if is_video:
        frames = int(one.image.max()) + 1
        return np.array([[frames, 1, int((one.tokens == patch).sum()) // frames]])
    rows = []
    for number in range(one.image.max() + 1):
        mine = one.tokens[one.image == number]
        overview, both = (mine[:list(mine).index(end)] == patch).sum(), (mine == patch).sum()
        rows.append([1, overview, 1, both - overview])
    return np.array(rows)


def logits(model, sequences: Sequence[types.Sequence], config: config_lib.Molmo2Config) -> list[np.ndarray]:
    """Returns [T, V] logits of each sequence in the model's dtype, computed as one batch.

    Also for a config with causal visual attention, or whose visual features replace the embedding of
    `<im_patch>`: transformers is causal without mm_token_type_ids, and adding to a zero row replaces it.
    """
    given = {name: value.to(model.dtype) if value.is_floating_point() else value
             for name, value in arguments(sequences, config).items()}
    if config.visual_attention == "causal":
        given["mm_token_type_ids"] = None
    replaced = [config.special_id("<im_patch>")] if config.visual_merge == "replace" else []
    with torch.no_grad(), _zeroed(model.get_input_embeddings().weight, replaced):
        rows = model(**given).logits.numpy()
    return [row[len(row) - len(one.tokens):] for row, one in zip(rows, sequences)]


@contextlib.contextmanager
def _zeroed(table: torch.Tensor, rows: list[int]):
    """Sets rows of a table to zero within the block."""
    kept = table[rows].clone()
    table[rows] = 0
    try:
        yield
    finally:
        table[rows] = kept


def answers(model, sequence: types.Sequence, config: config_lib.Molmo2Config, num_new: int) -> list[int]:
    """Returns the greedy continuation of a sequence; EOS does not end it."""
    given = arguments([sequence], config)
    del given["position_ids"]
    generated = model.generate(**given, max_new_tokens=num_new, do_sample=False, eos_token_id=None)
    return generated[0, len(sequence.tokens):].tolist()


def configs(folder: str | pathlib.Path) -> tuple[Any, Any]:
    """Returns transformers' configs of a folder: of the model and of generation."""
    return (transformers.AutoConfig.from_pretrained(folder),
            transformers.GenerationConfig.from_pretrained(folder))


def tokenizer(folder: str | pathlib.Path):
    """Returns transformers' tokenizer of a folder."""
    return transformers.AutoTokenizer.from_pretrained(folder)


def processor(folder: str | pathlib.Path):
    """Returns transformers' processor of a folder.

    Raises:
      ImportError: torchvision is not installed.
    """
    if not transformers.utils.is_torchvision_available():
        raise ImportError("transformers' processor needs torchvision")
    return transformers.AutoProcessor.from_pretrained(folder)
