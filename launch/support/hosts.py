"""Connects the processes of one run, as the environment variable MOLMO2_HOSTS (set by tpu_run.sh) says, and
compares what they have found."""

import json
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

VARIABLE = "MOLMO2_HOSTS"
_SHOWN = 5  # differences between processes


def is_job() -> bool:
    """Returns whether this process belongs to a run of several, as `join` finds them."""
    return bool(os.environ.get(VARIABLE))


def join() -> None:
    """Connects this process with the other processes of its run; without the variable there are none.

    "auto": jax reads the addresses from the environment of the TPU machine or GKE.
    "ADDRESS:PORT,COUNT,INDEX": this is process INDEX of COUNT, and ADDRESS:PORT is the coordinator.

    Raises:
      ValueError: the variable has another form.
    """
    value = os.environ.get(VARIABLE, "")
    if not value or jax.distributed.is_initialized():
        return
    if value == "auto":
        jax.distributed.initialize()
        return
    address, *numbers = value.split(",")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers) or ":" not in address:
        raise ValueError(f"{VARIABLE} must be 'auto' or ADDRESS:PORT,COUNT,INDEX; got {value!r}")
    jax.distributed.initialize(address, int(numbers[0]), int(numbers[1]))


def check_same(what: str, values: Mapping[str, int]) -> None:
    """Checks that all processes of a run have the same values; each of them must call this.

    what: the values are, for the message.

    Raises:
      ValueError: (in every process) they differ; the message names processes and values.
    """
    if jax.process_count() == 1:
        return
    first, *others = _gathered(values)
    different = [f"{name}: {first.get(name, 'none')} in process 0, "
                 f"{one.get(name, 'none')} in process {number}"
                 for number, one in enumerate(others, start=1)
                 for name in sorted({*first, *one}) if first.get(name) != one.get(name)]
    if different:
        raise ValueError(f"all processes of a run must have the same {what}; got " + "; ".join(
            different[:_SHOWN]) + (f"; and {len(different) - _SHOWN} more" if different[_SHOWN:] else ""))


def _gathered(values: Mapping[str, int]) -> list[dict[str, int]]:
    """Returns the values of each process."""
    text = np.frombuffer(json.dumps(values).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[:len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(one[:length])) for one, length in zip(texts, lengths, strict=True)]
