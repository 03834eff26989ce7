"""The state that a run carries from step to step, and its layout on the mesh."""

import hashlib
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from molmo2_jax import finetune
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import types
from molmo2_jax.cost import flops


class TrainState(NamedTuple):
    """`step` int32, updates made; `params` float32 tree of what is trained (with adapters: finetune.py);
    `opt_state` of optax; `rng` the run's key."""
    step: Any
    params: Any
    opt_state: Any
    rng: Any


def smallest_batch(model) -> types.Batch:
    """Returns the shapes of a one-token, one-crop batch: enough to trace the parameters."""
    return types.batch_shapes(1, types.RowShape(T=1, M=1, R=1, W=1), model.config.vision.patch_shape,
                              model.config.pointer is not None)


def init_params(model, key):
    """Returns new parameters in flax's boxes, whose `names` are their logical axes."""
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), smallest_batch(model))
    return model.init(key, batch)["params"]


def boxed_params(model):
    """Returns the tree of `init_params` with ShapeDtypeStructs in the boxes; computes nothing."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def num_weights(model) -> int:
    """Returns the number of weights of a model; nothing is computed."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(boxed_params(model)))


def boxed_trained(model, lora: finetune.LoraConfig | None = None):
    """Returns what a run trains, in boxes as `boxed_params` returns them: all, or adapters.

    Raises:
      ValueError: as finetune.targets.
    """
    boxed = boxed_params(model)
    return boxed if lora is None else finetune.boxed_trained(lora, boxed)


def trained_parts(model, lora: finetune.LoraConfig | None) -> flops.Trained:
    """Returns which parts of a model a run trains; without adapters, all."""
    return flops.EVERYTHING if lora is None else finetune.trained_parts(boxed_trained(model, lora))


def abstract_params(model, mesh, lora: finetune.LoraConfig | None = None):
    """Returns the parameters that a run trains, by default all, as ShapeDtypeStructs with shardings."""
    boxed = boxed_trained(model, lora)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        nn.meta.unbox(boxed), sharding.of_parameters(boxed, mesh))


def abstract_base(model, mesh, lora: finetune.LoraConfig | None, dtype: str):
    """Returns the frozen parameters as ShapeDtypeStructs with shardings; None without adapters.

    dtype: of the computation.
    """
    return None if lora is None else finetune.frozen(lora, abstract_params(model, mesh), dtype)


def abstract(model, tx: optim.Optimiser, mesh, lora: finetune.LoraConfig | None = None) -> TrainState:
    """Returns the state as ShapeDtypeStructs with shardings. Moments are sharded like their parameters, in
    the optimiser's kind of memory.

    Raises:
      ValueError: the devices cannot address that memory; or as finetune.targets; or a parameter has an
        adapter, or is in LoraConfig.full, and is in OptimConfig.frozen as well.
    """
    rest = sharding.replicated(mesh)
    params = abstract_params(model, mesh, lora)
    both = sorted(set(params) & set(tx.frozen)) if lora else []
    if both:
        raise ValueError("parameters that adapters or LoraConfig.full train must not be in "
                         f"OptimConfig.frozen; got {', '.join(both)}")
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
    """Returns the moments with the shardings of their parameters.

    Optax keeps moments in trees of the parameters' structure, so a moment's path ends in the path of its
    parameter, and has its shape.
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


def create(model, tx: optim.Optimiser, mesh, seed: int, params=None, layout=None,
           lora: finetune.LoraConfig | None = None) -> TrainState:
    """Returns the state of step 0, placed on the mesh; with new or with given parameters.

    `layout`: the shardings of `abstract`, if they are known already. With adapters, `params` are those of the
    whole model; those that the state does not hold are not read.

    Raises:
      ValueError: the devices cannot address the memory of the optimiser's moments.
    """
    layout = layout or jax.tree.map(lambda x: x.sharding, abstract(model, tx, mesh, lora))
    if lora is not None:
        params = {name: value for name, value in params.items() if name in lora.full}

    def fresh(key, given):
        init_key, run_key = jax.random.split(key)
        if lora is not None:
            start = finetune.create(lora, init_key, boxed_trained(model, lora), given)
        else:
            start = nn.meta.unbox(init_params(model, init_key)) if given is None else given
        return TrainState(jnp.zeros((), jnp.int32), start, tx.init(start), run_key)

    # With full optimisation XLA compiles the many small draws for 20 s on a CPU, and they run only once.
    options = {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(fresh, out_shardings=layout, compiler_options=options)(jax.random.key(seed), params)


def digest(params) -> str:
    """Returns a digest of the names, shapes and bits of parameters, the same however they are sharded."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    said = [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), int(one))
            for (path, leaf), one in zip(leaves, sums, strict=True)]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Returns uint32[]: a sum of an array's bits, each value times a number of its place."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
    place = jnp.uint32(1)
    for axis in range(leaf.ndim):
        place = place * jnp.uint32(2246822519) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place = place ^ (place >> 15)
    return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)
