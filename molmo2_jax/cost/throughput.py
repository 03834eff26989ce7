"""Operations of a batch, the ViT's included, and the share of the chips' peak that they reach."""

import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.cost import chips
from molmo2_jax.cost import flops


def batch_flops(model: config_lib.Molmo2Config, batch: types.Batch,
                trained: flops.Trained = flops.EVERYTHING) -> float:
    """Returns the operations of an update over the rows of a host batch; padding does not count.

    A token is assumed to attend to half of its example, other branches included, as these are short.
    """
    crops = sum(int(row.max(initial=-1)) // batch.patches.shape[2] + 1 for row in batch.pooled)
    windows = int((batch.pooled >= 0).any(axis=-1).sum())
    lengths = np.concatenate([np.bincount(row[row >= 0]) for row in batch.example])
    tokens = int(lengths.sum())
    return flops.update(model, tokens=tokens, crops=crops, windows=windows, slots=batch.pooled.shape[-1],
                        pairs=float((lengths.astype(float) ** 2).sum() / 2), trained=trained).total


def rates(flops_per_second: float, devices) -> dict[str, float]:
    """Returns "mfu", the share of the devices' peak (0 to 1); empty if the peak is unknown, as on a CPU."""
    chip = chips.of_device(devices[0].device_kind)
    return {"mfu": flops.mfu(flops_per_second, 1.0, len(devices), chip.flops)} if chip else {}
