"""Which records of a data set are examined, and reading them one by one, broken ones included."""

import os
from collections.abc import Sequence

import numpy as np

from data_pipelines import records
from data_pipelines import sources
from molmo2_jax import types

Record = types.Example | ValueError
Records = sources.Source | Sequence[Record]


def of_folder(folder: str | os.PathLike, cache: str | os.PathLike | None = None) -> Records:
    """Returns the records of a folder; of one that cannot be opened the error alone.

    cache: as in sources.open_source.
    """
    try:
        return sources.open_source(folder, cache=cache)
    except ValueError as error:
        return [error]


def read(found: Records, number: int) -> Record:
    """Returns a record, or the error that says why it is broken."""
    try:
        return found[number]
    except records.BrokenRecord as error:
        return error


def key(found: Records, number: int) -> str:
    """Returns file and place of a record; "" if the folder could not be opened."""
    return "" if isinstance(found, Sequence) else found.key(number)


def choose(count: int, sample: int | None, seed: int) -> Sequence[int]:
    """Returns the numbers of the records to examine, ascending: all, or `sample` drawn by `seed`."""
    if sample is None or sample >= count:
        return range(count)
    chosen = np.random.default_rng(seed).choice(count, sample, replace=False, shuffle=False)
    return sorted(chosen.tolist())
