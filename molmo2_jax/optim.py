"""One optimiser per tower: own learning rate, warm-up and gradient clipping; some tables frozen.

Source: reference, olmo/train/optim.py; paper, appendix (training hyper-parameters). Gradients are clipped
tower by tower, there is no joint norm.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

TOWER_OF = {"vision": "vit", "connector": "connector", "new_embedding": "connector",
            "text": "llm", "head": "llm", "base_embedding": "llm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """Peak learning rate of a tower and how many steps it warms up for."""
    lr: float
    warmup: int = 200

    def __post_init__(self):
        if self.lr < 0 or self.warmup < 1:
            raise ValueError(f"lr must be >= 0 and warmup >= 1 step; got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW per tower with a cosine to `floor` of the peak. Defaults are the recipe's SFT stage.

    The paper's table prints 2e-4 for the decoder in pre-training; code and re-implementation use 2e-5.
    """
    vit: Tower = Tower(lr=5e-6)
    connector: Tower = Tower(lr=5e-6)   # the added token embeddings belong to it
    llm: Tower = Tower(lr=1e-5)
    floor: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    frozen: tuple[str, ...] = ("base_embedding",)  # top-level parameters that never change

    def __post_init__(self):
        unknown = set(self.frozen) - set(TOWER_OF)
        if unknown:
            raise ValueError(f"frozen must name parameters among {sorted(TOWER_OF)}; got {sorted(unknown)}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a share of the peak learning rate, 0 to 1; got {self.floor}")


def learning_rate(tower: Tower, floor: float, total: int, step):
    """Returns the rate of update `step`, counted from 1: linear warm-up, then cosine to floor x peak."""
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - tower.warmup) / max(total - tower.warmup, 1), 0, 1)
    cosine = floor + (1 - floor) * (1 + jnp.cos(jnp.pi * progress)) / 2
    return tower.lr * jnp.where(step < tower.warmup, step / tower.warmup, cosine)


def labels(params, config: OptimConfig):
    """Returns a tree like `params` naming each leaf's tower, or "frozen"."""
    return {name: jax.tree.map(lambda _: "frozen" if name in config.frozen else TOWER_OF[name], tree)
            for name, tree in params.items()}


def _decays(path_params):
    """Weight decay spares embeddings, norms and positions (reference: olmo/train/optim.py)."""
    spared = ("norm", "position", "embedding", "patch")

    def decays(path, _):
        return not any(word in str(key.key) for key in path for word in spared)
    return jax.tree_util.tree_map_with_path(decays, path_params)


def make(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns the gradient transformation for a run of `total_steps`: clip, AdamW, per tower."""
    def tower(t: Tower):
        return optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.scale_by_adam(config.beta1, config.beta2, config.eps),
            optax.add_decayed_weights(config.weight_decay, _decays),
            optax.scale_by_learning_rate(
                lambda count: learning_rate(t, config.floor, total_steps, count + 1)))
    towers = {"vit": tower(config.vit), "connector": tower(config.connector), "llm": tower(config.llm),
              "frozen": optax.set_to_zero()}
    return optax.partition(towers, lambda params: labels(params, config))


def grad_norms(grads) -> dict:
    """Returns the gradient norm of each tower before clipping."""
    squares = {"vit": 0.0, "connector": 0.0, "llm": 0.0}
    for name, tree in grads.items():
        squares[TOWER_OF[name]] += optax.tree_utils.tree_l2_norm(tree, squared=True)
    return {f"grad_norm_{tower}": jnp.sqrt(value) for tower, value in squares.items()}
