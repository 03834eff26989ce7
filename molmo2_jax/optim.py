"""One optimiser per tower, with its own learning rate, warm-up and gradient clipping; some tables frozen.

Source: reference, olmo/train/optim.py; paper, appendix (training hyper-parameters). Gradients are clipped
per tower; there is no joint norm.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

TOWER_OF = {"vision": "vit", "connector": "connector", "new_embedding": "connector", "new_head": "connector",
            "text": "llm", "head": "llm", "base_embedding": "llm", "pointer": "pointer"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """Peak learning rate of a tower and the number of its warm-up steps."""
    lr: float
    warmup: int = 200

    def __post_init__(self):
        if self.lr < 0 or self.warmup < 1:
            raise ValueError(f"lr must be >= 0 and warmup >= 1 step; got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonalised momentum for the kernels inside the towers; AdamW keeps norms, biases, tables, head.

    Not in the recipe. From scratch at nano size it left the plateau before AdamW did (benchmarks/README.md).
    `lr` is the peak of the kernels' rate; it follows the schedule of the tower.
    """
    lr: float = 0.02
    momentum: float = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """One optimiser per tower, cosine to `floor` of the peak. Defaults are the recipe's SFT stage.

    The paper's table gives 2e-4 for the decoder in pre-training; its code and re-implementation use 2e-5.
    """
    vit: Tower = Tower(lr=5e-6)
    connector: Tower = Tower(lr=5e-6)   # also for the added tokens' embeddings and rows of the head
    llm: Tower = Tower(lr=1e-5)
    pointer: Tower = Tower(lr=1e-4)     # of models with config.PointerConfig
    floor: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    frozen: tuple[str, ...] = ("base_embedding",)  # top-level parameters that never change
    muon: Muon | None = None            # None: AdamW for all parameters
    offload: bool = False               # keep moments in the hosts' memory while gradients are computed

    def __post_init__(self):
        unknown = set(self.frozen) - set(TOWER_OF)
        if unknown:
            raise ValueError(f"frozen must name parameters among {sorted(TOWER_OF)}; got {sorted(unknown)}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be a fraction of the peak learning rate, 0 to 1; got {self.floor}")


def learning_rate(tower: Tower, floor: float, total: int, step):
    """Returns the rate of update `step`, counted from 1: linear warm-up, then cosine to floor x peak."""
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - tower.warmup) / max(total - tower.warmup, 1), 0, 1)
    cosine = floor + (1 - floor) * (1 + jnp.cos(jnp.pi * progress)) / 2
    return tower.lr * jnp.where(step < tower.warmup, step / tower.warmup, cosine)


def _decays(params):
    """Returns the mask of weight decay: all parameters but embeddings, norms, positions and patch kernels
    (reference: olmo/train/optim.py)."""
    spared = ("norm", "position", "embedding", "patch")
    return _map_paths(lambda path, _: not any(word in key for key in path for word in spared), params)


def _map_paths(function, tree):
    """Maps `function(names from the root, leaf)` over a tree of nested dicts."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(tuple(key.key for key in path), leaf), tree)


def num_in(module: str) -> int:
    """Returns the number of a kernel's axes that are inputs, from the path of its module: two, heads and head
    width, in the output of attention, else one."""
    return 2 if module.rpartition("/")[2] == "o" else 1


def _kernel_axes(path: tuple[str, ...], leaf):
    """Returns the dimensions by which Muon treats a parameter as a matrix, or None for parameters of AdamW.

    Heads and head width count as one axis; a leading layers axis is a batch of matrices.
    """
    if path[-1] != "kernel":
        return None
    axes = tuple(range(int("layers" in path), leaf.ndim))
    inputs = num_in(path[-2])
    return optax.contrib.MuonDimensionNumbers(reduction_axis=axes[:inputs], output_axis=axes[inputs:])


def _update_rule(config: OptimConfig, tower: Tower, total: int) -> optax.GradientTransformation:
    def schedule(peak):
        peaked = dataclasses.replace(tower, lr=peak)
        return lambda count: learning_rate(peaked, config.floor, total, count + 1)
    if config.muon is None:
        return optax.adamw(schedule(tower.lr), config.beta1, config.beta2, config.eps,
                           weight_decay=config.weight_decay, mask=_decays)
    return optax.contrib.muon(
        schedule(config.muon.lr), beta=config.muon.momentum, weight_decay=config.weight_decay,
        weight_decay_mask=_decays, adam_learning_rate=schedule(tower.lr), adam_b1=config.beta1,
        adam_b2=config.beta2, adam_eps_root=0.0, eps=config.eps,
        muon_weight_dimension_numbers=lambda params: _map_paths(_kernel_axes, params))


class Optimiser(NamedTuple):
    """An optax.GradientTransformation with the names of the top-level parameters it never changes, and the
    memory kind of its moments (None: the devices' own)."""
    init: Callable
    update: Callable
    frozen: tuple[str, ...] = ()
    memory_kind: str | None = None


def make(config: OptimConfig, total_steps: int) -> Optimiser:
    """Returns the transformation of a run of `total_steps`: clips and updates each tower on its own.

    It takes the dictionary of top-level parameters; its state is a dictionary of towers.
    """
    towers = {"vit": config.vit, "connector": config.connector, "llm": config.llm, "pointer": config.pointer}
    rules = {name: optax.chain(optax.clip_by_global_norm(config.clip_norm),
                               _update_rule(config, tower, total_steps)) for name, tower in towers.items()}

    def split(tree):
        return {name: {key: tree[key] for key in tree
                       if TOWER_OF[key] == name and key not in config.frozen} for name in towers
                if name != "pointer" or name in tree}

    def init(params):
        return {name: rules[name].init(part) for name, part in split(params).items()}

    def update(grads, state, params):
        updates, new_state = {key: jax.tree.map(jnp.zeros_like, grads[key]) for key in config.frozen
                              if key in grads}, {}
        of_tower, params_of = split(grads), split(params)
        for name in of_tower:
            part, new_state[name] = rules[name].update(of_tower[name], state[name], params_of[name])
            updates.update(part)
        return {key: updates[key] for key in grads}, new_state

    tx = Optimiser(init, update, config.frozen)
    return offloaded(tx) if config.offload else tx


def offloaded(tx: Optimiser) -> Optimiser:
    """Returns `tx` with its moments in the hosts' memory, except while they are updated.

    Works only inside jit: the compiled step transfers the moments. Counts, being scalars, stay on the device.
    """
    def moved(state, place):
        return jax.tree.map(lambda x: jax.device_put(x, place) if x.ndim else x, state)

    def update(grads, state, params):
        updates, state = tx.update(grads, moved(state, jax.memory.Space.Device), params)
        return updates, moved(state, jax.memory.Space.Host)

    return tx._replace(update=update, memory_kind="pinned_host")


def grad_norms(grads, frozen: tuple[str, ...] = ()) -> dict:
    """Returns the gradient norm of each tower before clipping, leaving out frozen parameters."""
    squares = {"vit": 0.0, "connector": 0.0, "llm": 0.0} | ({"pointer": 0.0} if "pointer" in grads else {})
    for name in sorted(grads.keys() - set(frozen)):
        squares[TOWER_OF[name]] += optax.tree_utils.tree_l2_norm(grads[name], squared=True)
    return {f"grad_norm_{tower}": jnp.sqrt(value) for tower, value in squares.items()}
