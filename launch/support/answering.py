"""A model ready to answer, on the mesh that --mesh or gin names, or on the smallest that fits."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from launch.support import cli
from launch.support import trained
from molmo2_jax import decode
from molmo2_jax import generate
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax.cost import answering
from molmo2_jax.cost import chips
from molmo2_jax.model import molmo2


class Ready(NamedTuple):
    """A model's folder, and the Answerer that has its parameters."""
    source: trained.Trained
    answerer: generate.Answerer


def load(path, bindings: Sequence[str] = (), *, rows: int = 1, new_tokens: int | None = None,
         **options) -> Ready:
    """Returns the model of a folder on the mesh of the flags; `options` are those of Answerer.

    Args:
      rows: prompts answered at a time, which the devices left over by `tensor` share.
      new_tokens: length of the longest answer; None: --max_new_tokens.

    Raises:
      ValueError: as trained.load, or the mesh does not fit the devices.
    """
    dtype, weights, new_tokens = cli.DTYPE.value, cli.WEIGHTS.value, new_tokens or cli.MAX_NEW_TOKENS.value
    chosen: list[jax.sharding.Mesh] = []

    def choose(settings: trained.Settings) -> jax.sharding.Mesh:
        given = cli.mesh() or settings.mesh
        chosen.append(sharding.mesh_of_first(given) if given else
                      smallest_mesh(settings, dtype, rows, new_tokens, jax.devices(), weights))
        return chosen[0]

    source = trained.load(path, bindings, choose, dtype, weights)
    return Ready(source, generate.Answerer(
        source.params, source.model, source.inputs, source.tokenizer, mesh=chosen[0], dtype=dtype,
        max_new_tokens=new_tokens, **options))


def smallest_mesh(settings: trained.Settings, dtype: str, rows: int, new_tokens: int, devices,
                  weights: str | None = None) -> jax.sharding.Mesh:
    """Returns the mesh with the fewest devices along `tensor` whose memory holds weights and prompts.

    Devices that are left share the rows. A host's processor is one device however many it pretends to be,
    unless several processes take part.
    """
    limit, has_several = _memory(devices[0]), jax.process_count() > 1
    model, inputs = settings.model, settings.inputs
    fit = answering.Fit(1, 1, 0) if limit is None else answering.smallest(
        model, parameters=decode.stored_bytes(state.boxed_params(molmo2.Molmo2(model)), dtype, weights),
        devices=len(devices), limit=limit, rows=rows, width=jnp.dtype(dtype).itemsize,
        tokens=answering.longest_prompt(model, inputs), crops=inputs.max_frames, new_tokens=new_tokens)
    if limit is not None and fit.needed > limit:
        logging.warning("answering needs about %.1f GiB per device with tensor=%d; got %.1f: lower --rows "
                        "or max_frames, or give --weights=int8",
                        fit.needed / chips.GIB, fit.tensor, limit / chips.GIB)
    data = len(devices) // fit.tensor if has_several else fit.data
    return sharding.make_mesh(sharding.MeshConfig(data=data, fsdp=1, tensor=fit.tensor),
                              devices[:data * fit.tensor])


def _memory(device) -> int | None:
    """Returns the bytes that a program may use on an accelerator; None for a host's processor."""
    if device.platform == "cpu":
        return None
    return (device.memory_stats() or {}).get("bytes_limit")
