"""Shared by tests of training: a model of a few thousand parameters, meshes, and batches in memory."""

import functools

import grain
import jax

from molmo2_jax import config as config_lib
from molmo2_jax import sharding
from tests import packs

# Axes that a mesh shards have even sizes, so that every sharding rule has an effect.
MODEL = config_lib.Molmo2Config(
    vision=config_lib.VisionConfig(image_size=6, patch_size=3, width=8, num_layers=2, num_heads=2, head_dim=4,
                                   mlp_width=12),
    connector=config_lib.ConnectorConfig(taps=(1, 0), num_heads=2, head_dim=4, mlp_width=12),
    text=config_lib.TextConfig(vocab_size=64, additional_vocab_size=16, width=12, num_layers=2, num_heads=4,
                               num_kv_heads=2, head_dim=6, mlp_width=16, rope_theta=1e4, max_positions=64))
B, T, M, R = 4, 32, 4, 16


def mesh(data=1, fsdp=1, tensor=1, context=1):
    """Returns a mesh over the first devices."""
    config = sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context)
    return sharding.make_mesh(config, jax.devices()[:data * fsdp * tensor * context])


@functools.cache
def batch(seed):
    """Returns a cached Batch of B rows with random trees that differ in loss tokens; do not modify it."""
    made = packs.random_rows(seed, MODEL, B, T, M, R)
    assert len({float(row.sum()) for row in made.weights}) > 1
    return made


class Batches(grain.DatasetIterator):
    """Yields batch(0), batch(1), batch(0) ... changed by `spoil(number, batch)`; `given` lists numbers."""

    def __init__(self, spoil=lambda number, batch: batch):
        super().__init__()
        self._next, self._spoil, self.given = 0, spoil, []

    def __next__(self):
        number, self._next = self._next, self._next + 1
        self.given.append(number)
        return self._spoil(number, batch(number % 2))

    def get_state(self):
        return {"next": self._next}

    def set_state(self, state):
        self._next = state["next"]

