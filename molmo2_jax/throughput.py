"""How much work a batch is, the ViT's included, and what share of the chips' peak it is done at."""

import numpy as np

from molmo2_jax import chips
from molmo2_jax import config as config_lib
from molmo2_jax import flops
from molmo2_jax import types


def batch_flops(model: config_lib.Molmo2Config, batch: types.Batch) -> float:
    """Returns the operations of an update over the rows of a host batch: padding is no work.

    A token counts as seeing half of its example, other branches included: they weigh little.
    """
    crops = sum(int(row.max(initial=-1)) // batch.patches.shape[2] + 1 for row in batch.pooled)
    windows = int((batch.pooled >= 0).any(axis=-1).sum())
    lengths = np.concatenate([np.bincount(row[row >= 0]) for row in batch.example])
    tokens = int(lengths.sum())
    once = flops.forward(model, tokens=tokens, crops=crops, windows=windows,
                         slots=batch.pooled.shape[-1], pairs=float((lengths.astype(float) ** 2).sum() / 2))
    # Nobody needs the gradient of a frozen table.
    spared = 2.0 * tokens * model.text.width * model.text.vocab_size if model.text.tied_head else 0.0
    return 3 * once.total - spared


def rates(flops_per_second: float, devices) -> dict[str, float]:
    """Returns "mfu", the share of the devices' peak (0 to 1); nothing where it is not known, as on a CPU."""
    chip = chips.of_device(devices[0].device_kind)
    return {"mfu": flops.mfu(flops_per_second, 1.0, len(devices), chip.flops)} if chip else {}
