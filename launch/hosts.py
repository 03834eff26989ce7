"""How the processes of one run find each other; tpu_run.sh says it in the variable MOLMO2_HOSTS."""

import os

import jax

VARIABLE = "MOLMO2_HOSTS"


def join() -> None:
    """Connects this process with the others of its run; without the variable it is alone.

    "auto": as TPU machines and GKE describe themselves. "ADDRESS:PORT,COUNT,INDEX": process INDEX of COUNT.

    Raises:
      ValueError: the variable says anything else.
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
