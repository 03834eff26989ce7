"""Everything a run carries from step to step, and how it is laid out over the mesh."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from molmo2_jax import sharding
from molmo2_jax import types


class TrainState(NamedTuple):
    """`step` int32, updates made; `params` float32 tree; `opt_state` of optax; `rng` the run's key."""
    step: Any
    params: Any
    opt_state: Any
    rng: Any


def smallest_batch(model) -> types.Batch:
    """Returns the shapes of a one-token, one-crop batch: enough to trace the parameters."""
    vision = model.config.vision
    ints = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return types.Batch(*(ints,) * len(types.Batch._fields))._replace(
        weights=jax.ShapeDtypeStruct((1, 1), jnp.float32),
        patches=jax.ShapeDtypeStruct((1, 1, vision.num_patches, vision.patch_values), jnp.uint8),
        pooled=jax.ShapeDtypeStruct((1, 1, 1), jnp.int32))


def _init_params(model, key):
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), smallest_batch(model))
    return model.init(key, batch)["params"]


def abstract(model, tx: optax.GradientTransformation, mesh) -> TrainState:
    """Returns the state as ShapeDtypeStructs with shardings; moments lie where their parameters lie."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed = jax.eval_shape(lambda k: _init_params(model, k), key)
    of_params = sharding.of_parameters(boxed, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                          nn.meta.unbox(boxed), of_params)
    rest = sharding.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        tx, lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding),
        jax.eval_shape(tx.init, params), params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rest))
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=rest), params, opt_state,
                      jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rest))


def create(model, tx: optax.GradientTransformation, mesh, seed: int, params=None) -> TrainState:
    """Returns the state of step 0, placed on the mesh; from scratch, or around given parameters."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract(model, tx, mesh))

    def fresh(key, given):
        init_key, run_key = jax.random.split(key)
        start = nn.meta.unbox(_init_params(model, init_key)) if given is None else given
        return TrainState(jnp.zeros((), jnp.int32), start, tx.init(start), run_key)

    return jax.jit(fresh, out_shardings=shardings)(jax.random.key(seed), params)
