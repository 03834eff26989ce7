"""Everything a run carries from step to step, and how it is laid out over the mesh."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from molmo2_jax import optim
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
    return types.batch_shapes(1, types.RowShape(T=1, M=1, R=1, W=1), model.config.vision.patch_shape)


def init_params(model, key):
    """Returns new parameters in flax's boxes, whose `names` are their logical axes."""
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), smallest_batch(model))
    return model.init(key, batch)["params"]


def boxed_params(model):
    """Returns what `init_params` does, with ShapeDtypeStructs in the boxes; nothing is computed."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def abstract_params(model, mesh):
    """Returns the parameters as ShapeDtypeStructs with shardings."""
    boxed = boxed_params(model)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        nn.meta.unbox(boxed), sharding.of_parameters(boxed, mesh))


def abstract(model, tx: optim.Optimiser, mesh) -> TrainState:
    """Returns the state as ShapeDtypeStructs with shardings; moments lie where their parameters lie, or
    beside, in the optimiser's kind of memory.

    Raises:
      ValueError: the devices have no such memory.
    """
    rest = sharding.replicated(mesh)
    params = abstract_params(model, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=rest), params,
                      _in_memory(tx.memory_kind, mesh,
                                 _like_parameters(jax.eval_shape(tx.init, params), params, rest)),
                      jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rest))


def _in_memory(kind: str | None, mesh, opt_state):
    if kind is None:
        return opt_state
    sharding.check_memory(mesh, kind)
    return jax.tree.map(lambda x: x.update(sharding=x.sharding.with_memory_kind(kind)) if x.ndim else x,
                        opt_state)


def _like_parameters(opt_state, params, otherwise):
    """Returns the moments with the shardings of their parameters: those whose path ends in theirs.

    Optax keeps moments in trees of the parameters' structure, so the end of the path and the shape tell.
    """
    def names(path):
        return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))

    known = {names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

    def place(path, leaf):
        name = names(path)
        owner = next((known[name[i:]] for i in range(len(name)) if name[i:] in known), None)
        is_moment = owner is not None and owner.shape == leaf.shape
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                    sharding=owner.sharding if is_moment else otherwise)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def create(model, tx: optim.Optimiser, mesh, seed: int, params=None, layout=None) -> TrainState:
    """Returns the state of step 0, placed on the mesh; from scratch, or around given parameters.

    `layout`: the shardings of `abstract`, where they are known already.
    """
    layout = layout or jax.tree.map(lambda x: x.sharding, abstract(model, tx, mesh))

    def fresh(key, given):
        init_key, run_key = jax.random.split(key)
        start = nn.meta.unbox(init_params(model, init_key)) if given is None else given
        return TrainState(jnp.zeros((), jnp.int32), start, tx.init(start), run_key)

    # Fully optimised, the many small draws take XLA 20 s of a CPU to compile, for a program that runs once.
    options = {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(fresh, out_shardings=layout, compiler_options=options)(jax.random.key(seed), params)
