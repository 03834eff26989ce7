"""How many examples a row holds, and how many processor cores preparing the batches of a run takes.

T tokens, M crops, R visual tokens: the budgets of a row. N records.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import pipeline
from molmo2_jax import types
from molmo2_jax.inputs import packers

DRAWN = 2000                       # examples that are packed to find how many share a row
STEP_SECONDS = (1.0, 2.0, 5.0, 10.0)


def examples_per_row(sizes: Sequence[np.ndarray], shares: Sequence[float], packer: packers.Rule,
                     shape: types.RowShape, seed: int) -> float:
    """Returns the mean number of examples that share a row, by packing examples drawn from the mixture.

    Args:
      sizes: for each data set int[N, 3]: tokens, crops and visual tokens of some of its records.
      shares: of each data set in the stream.

    Raises:
      ValueError: a data set with a share has no sizes.
    """
    if any(share > 0 and not len(one) for one, share in zip(sizes, shares, strict=True)):
        raise ValueError("every data set with a share must have the size of a record; got none of one")
    rng = np.random.default_rng(seed)
    packer_of_rows = packers.Packer(packer, shape.T, shape.M, shape.R)
    rows = []
    for place in rng.choice(len(sizes), DRAWN, p=np.asarray(shares) / sum(shares)):
        row = packer_of_rows.push(_sequence(sizes[place][rng.integers(len(sizes[place]))], shape))
        if row is not None:
            rows.append(len(row))
    rows += [len(row) for row in packer_of_rows.flush()] if not rows else []
    return float(np.mean(rows))


def _sequence(size: np.ndarray, shape: types.RowShape) -> types.Sequence:
    """Returns a sequence of a size (cut to a row) that takes no memory; packers look at sizes only."""
    tokens, crops, visual_tokens = min(int(size[0]), shape.T), int(size[1]), int(size[2])
    zero = np.zeros((), np.int32)
    text = np.broadcast_to(zero, (tokens,))
    return types.Sequence(
        tokens=text, targets=text, weights=text, positions=text, branch=text, image=text,
        patches=np.broadcast_to(zero.astype(np.uint8), (crops, 1, 1)),
        pooled=np.broadcast_to(zero, (visual_tokens, 1)))


def of_batch(data: pipeline.DataConfig, shape: types.RowShape, sizes: Mapping[str, np.ndarray],
             shares: Mapping[str, float], seconds: Mapping[str, float], *, hosts: int = 1,
             step_seconds: float | None = None) -> dict[str, Any]:
    """Returns what preparing a batch costs on cores like this machine's, as plain values for JSON.

    Args:
      sizes: of usable records, by data set: int[N, 3]. shares: of the stream, by data set.
      seconds: CPU seconds per usable record, by data set.
      step_seconds: how long a step of training takes; None: cores are given for some durations.

    Raises:
      ValueError: a data set has no usable record.
    """
    names = [name for name, share in shares.items() if share > 0]
    per_row = examples_per_row([sizes[name] for name in names], [shares[name] for name in names], data.packer,
                               shape, data.seed)
    per_example = sum(shares[name] * seconds[name] for name in names) / sum(shares[name] for name in names)
    total = per_row * data.batch_rows * per_example
    return {"rows": data.batch_rows, "examples_per_row": per_row, "examples": per_row * data.batch_rows,
            "core_seconds_per_example": per_example, "core_seconds": total, "hosts": hosts,
            "cores_per_host": {f"{step:g}": total / hosts / step
                               for step in ([step_seconds] if step_seconds else STEP_SECONDS)}}
