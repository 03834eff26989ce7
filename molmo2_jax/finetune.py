"""Low-rank adapters (LoRA): small trained matrices beside frozen kernels.

A kernel W with an adapter computes x W + s (drop(x) A) B, where only A and B are trained; s is alpha / rank,
or alpha / sqrt(rank). The product A B is never formed in training, nor is the gradient of W.

What is trained is a tree of the model's structure: `.../q/lora/a` and `.../q/lora/b` in place of
`.../q/kernel`, and the parameters of LoraConfig.full. All others are the base: frozen, in the dtype of the
computation, without moments, and not part of checkpoints.

Shapes of a kernel [in..., out...] of a stack of L layers: a [L, in..., rank], b [L, rank, out...].

Source: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; initial values are those of the package peft.
"""

import dataclasses
import functools
import hashlib
import math
import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import optim
from molmo2_jax.cost import flops
from molmo2_jax.model import layers

# Regular expressions over paths of kernels, by name.
TARGETS = {"decoder": r"text/layers/.*", "connector": r"connector/.*", "vision": r"vision/layers/.*",
           "all": r"(text/layers|connector|vision/layers)/.*"}
# Kernels of a decoder layer that read the same input and are one matrix in the released layout. The first
# holds the A that they share (LoraConfig.share_a).
FUSED = (("attn/q", "attn/k", "attn/v"), ("mlp/up", "mlp/gate"))
_SHOWN = 6   # paths in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which kernels have an adapter, and of what size; other parameters are frozen unless `full` names them.

    targets: "decoder", "connector", "vision" or "all" (TARGETS), or a regular expression that must match the
      whole path of a kernel, such as "text/layers/attn/[qv]/kernel".
    rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
    dropout: share of the adapter's inputs that is dropped in training.
    share_a: q, k, v of a decoder layer share one A, and so do up and gate: fewer parameters, and the rank
      stays the same in layouts that fuse them (hf/adapter.py).
    full: top-level parameters that are trained completely, such as "connector"; they are stored and exported
      whole.
    base: "int8" keeps the decoder's frozen matrices in 8 bits (model/quantized.py); None: in the dtype of the
      computation. Merged, adapters are added to the base as it was before.
    """
    targets: str = "decoder"
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.05
    share_a: bool = False
    full: tuple[str, ...] = ()
    base: Literal["int8"] | None = None

    def __post_init__(self):
        config_lib.require(self.rank >= 1, "the rank of an adapter must be >= 1", self.rank)
        config_lib.require(self.alpha > 0, "alpha must be > 0", self.alpha)
        config_lib.require(0 <= self.dropout < 1, "dropout of an adapter must lie in [0, 1)", self.dropout)
        config_lib.require(self.base in (None, "int8"), "base must be 'int8' or None", self.base)
        unknown = sorted(set(self.full) - set(optim.TOWER_OF))
        config_lib.require(not unknown, f"full must name parameters among {sorted(optim.TOWER_OF)}", unknown)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"targets must be one of {sorted(TARGETS)} or a regular expression; got "
                             f"{self.targets!r}: {error}") from error

    @property
    def pattern(self) -> str:
        return TARGETS.get(self.targets, self.targets)

    @property
    def scale(self) -> float:
        """The factor s of the product of A and B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def flat(tree) -> dict[str, Any]:
    """Returns {path: leaf} of a nested dict; flax boxes are leaves."""
    return traverse_util.flatten_dict(tree, sep="/")


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of {path: leaf}; the inverse of `flat`."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def targets(config: LoraConfig, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Returns the paths of the modules with an adapter (those of their kernels without "/kernel").

    Args:
      shapes: of all parameters of the model, by path.

    Raises:
      ValueError: `config.targets` matches no kernel, or a kernel that is also trained in full; or the rank
        exceeds the width of a kernel.
    """
    kernels = [path for path in shapes if path.endswith("/kernel")]
    found = [path for path in kernels if re.fullmatch(config.pattern, path)]
    if not found:
        raise ValueError("targets must match the whole path of a kernel, such as "
                         f"{', '.join(kernels[:_SHOWN])}; or be one of {sorted(TARGETS)}; got "
                         f"{config.targets!r}, which matches none of {len(kernels)}")
    both = [path for path in found if path.split("/")[0] in config.full]
    if both:
        raise ValueError("a kernel must not have an adapter and be trained in full as well; got "
                         f"full={config.full} with targets={config.targets!r}, which match "
                         f"{', '.join(both[:_SHOWN])}")
    for path in found:
        ins, outs = _sides(path, shapes[path])
        narrow = min(math.prod(ins), math.prod(outs))
        config_lib.require(config.rank <= narrow, f"the rank of an adapter must be at most {narrow}, the "
                           f"smaller side of {path}", config.rank)
    return [path.removesuffix("/kernel") for path in found]


def _sides(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (shape of the inputs, shape of the outputs) of a kernel, without the axis of layers."""
    shape = shape[is_stacked(path):]
    num_in = optim.num_in(path.removesuffix("/kernel"))
    return shape[:num_in], shape[num_in:]


def is_stacked(path: str) -> bool:
    """Returns whether a parameter has a leading axis of layers."""
    return "/layers/" in path


def owner(config: LoraConfig, module: str, modules) -> str:
    """Returns the module of `modules` that holds A of `module`: itself, unless it shares another's."""
    if config.share_a and module.startswith("text/layers/"):
        for group in FUSED:
            held = [f"text/layers/{name}" for name in group if f"text/layers/{name}" in modules]
            if module in held:
                return held[0]
    return module


def boxed_trained(config: LoraConfig, boxed) -> dict[str, Any]:
    """Returns the tree of trained parameters as ShapeDtypeStructs in flax's boxes.

    Args:
      boxed: the tree of the model's parameters, as state.boxed_params returns it.

    Raises:
      ValueError: as `targets`.
    """
    leaves = flat(boxed)
    modules = targets(config, {path: box.value.shape for path, box in leaves.items()})
    found = {path: box for path, box in leaves.items() if path.split("/")[0] in config.full}
    for module in modules:
        kernel = leaves[f"{module}/kernel"]
        names, stacked = kernel.names, is_stacked(module)
        lead, lead_names = kernel.value.shape[:stacked], names[:stacked]
        ins, outs = _sides(f"{module}/kernel", kernel.value.shape)
        in_names, out_names = names[stacked:][:len(ins)], names[stacked:][len(ins):]
        # Stored like "embed": split over all devices that hold parameters.
        parts = {"a": ((*lead, *ins, config.rank), (*lead_names, *in_names, layers.RANK_AXIS)),
                 "b": ((*lead, config.rank, *outs), (*lead_names, layers.RANK_AXIS, *out_names))}
        for name in ("a", "b") if owner(config, module, modules) == module else ("b",):
            shape, axes = parts[name]
            found[f"{module}/lora/{name}"] = nn.LogicallyPartitioned(
                jax.ShapeDtypeStruct(shape, jnp.float32), axes)
    return nested(found)


def trained_parts(boxed) -> flops.Trained:
    """Returns which parts of the model the result of `boxed_trained` trains."""
    names = {"vision": "vit", "connector": "connector", "text": "decoder", "head": "head"}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for path in flat(boxed):
        if path.split("/")[0] in names:
            found["/lora/" in path].add(names[path.split("/")[0]])
    return flops.Trained(frozenset(found[False]), frozenset(found[True]))


def create(config: LoraConfig, key, boxed, params) -> dict[str, Any]:
    """Returns the trained parameters at the start, float32: A random, B zero, those of `full` from `params`.

    A is uniform in +-1/sqrt(inputs).

    Args:
      boxed: the result of `boxed_trained`.
      params: the model's parameters, or those that are trained in full.
    """
    given, found = flat(params), {}
    for number, (path, box) in enumerate(sorted(flat(boxed).items())):
        module, _, name = path.rpartition("/lora/")
        if not module:
            found[path] = jnp.asarray(given[path], jnp.float32)
        elif name == "b":
            found[path] = jnp.zeros(box.value.shape, jnp.float32)
        else:
            bound = math.prod(box.value.shape[is_stacked(module):-1]) ** -0.5
            found[path] = jax.random.uniform(jax.random.fold_in(key, number), box.value.shape, jnp.float32,
                                             -bound, bound)
    return nested(found)


def stored(config: LoraConfig, path: str, leaf, dtype: str):
    """Returns a parameter as the base stores it, for a computation in `dtype`; those of `full` in float32."""
    if path.split("/")[0] in config.full:
        return leaf.astype("float32")
    return decode.stored(path, leaf, dtype, config.base)


def frozen(config: LoraConfig, params, dtype: str):
    """Returns the base: the parameters that are not trained, as they are stored (decode.stored).

    params: arrays, or ShapeDtypeStructs, which keep their shardings.
    """
    held = {name: value for name, value in params.items() if name not in config.full}
    if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(held)):
        return decode.abstract_stored(held, dtype, config.base)
    return nested({path: decode.stored(path, leaf, dtype, config.base) for path, leaf in flat(held).items()})


def joined(config: LoraConfig, base, trained, rng=None) -> dict[str, Any]:
    """Returns the parameters that the model applies: the base, with a layers.LowRank beside each target.

    Args:
      rng: key of the dropout; None drops nothing.
    """
    found, given = flat(base), flat(trained)
    modules = [path.removesuffix("/lora/b") for path in given if path.endswith("/lora/b")]
    found |= {path: leaf for path, leaf in given.items() if "/lora/" not in path}
    for module in modules:
        held_by = owner(config, module, modules)
        a, key = given[f"{held_by}/lora/a"], None
        if rng is not None and config.dropout:
            key = jax.random.fold_in(rng, modules.index(held_by))
            key = jax.random.split(key, len(a)) if is_stacked(module) else key
        found[f"{module}/lora"] = layers.LowRank(a, given[f"{module}/lora/b"], key, config.scale,
                                                 config.dropout)
    return nested(found)


def merged(config: LoraConfig, base, trained) -> dict[str, Any]:
    """Returns ordinary parameters of the model, W + s A B for each target, in the dtypes of the base.

    Sums are computed in float32.
    """
    found, given = flat(base), flat(trained)
    modules = [path.removesuffix("/lora/b") for path in given if path.endswith("/lora/b")]
    found |= {path: leaf for path, leaf in given.items() if "/lora/" not in path}
    for module in modules:
        a, b = given[f"{owner(config, module, modules)}/lora/a"], given[f"{module}/lora/b"]
        found[f"{module}/kernel"] = _added(found[f"{module}/kernel"], a, b, config.scale, is_stacked(module))
    return nested(found)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _added(kernel, a, b, scale: float, stacked: bool):
    def one(parts):
        kernel, a, b = parts
        change = jnp.tensordot(a, b, 1, precision="highest", preferred_element_type=jnp.float32)
        return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)
    return jax.lax.map(one, (kernel, a, b)) if stacked else one((kernel, a, b))


@jax.jit
def _sum(leaf):
    words = jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16)
    return words.astype(jnp.uint32).sum(dtype=jnp.uint32)


class Fingerprint:
    """Sees the parameters of a model one after the other; its text differs for other sizes or weights.

    The same for float32 and bfloat16 copies of a model and on every mesh: it is made from the paths, the
    shapes and the sums of the bits of all parameters, rounded to bfloat16.
    """

    def __init__(self):
        self._lines: list[str] = []

    def of(self, path: str, leaf):
        """Returns `leaf`, an array, after adding it."""
        self._lines.append(f"{path} {tuple(leaf.shape)} {int(_sum(leaf))}")
        return leaf

    def text(self) -> str:
        """Returns 16 characters."""
        return hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest()[:16]


def fingerprint(params) -> str:
    """Returns the text of the Fingerprint of a parameter tree."""
    seen = Fingerprint()
    for path, leaf in flat(params).items():
        seen.of(path, leaf)
    return seen.text()
