"""The decoder: pre-norm with per-head q/k norm (Qwen3) or post-norm with full-width q/k norm (OLMo 3).

B batch, T positions, Q answers that a row continues at once, S slots for their tokens, L layers, N query
heads, K key heads, H head width, D width.

The parameters of the layers are stacked and scanned over. For decoding they may also come as a list with
one tree per layer (see decode.ready); then a Cache or Memory is a list with one per layer, too.

Source: reference, olmo/nn/llm.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from molmo2_jax import config as config_lib
from molmo2_jax import sharding
from molmo2_jax.attention import answers
from molmo2_jax.attention import attend
from molmo2_jax.attention import tree_mask
from molmo2_jax.model import layers


class Cache(NamedTuple):
    """Keys (after norm and rope) and values of past tokens; [L, B, T, K, H] as they come from the layers."""
    k: jax.Array
    v: jax.Array


class Memory(NamedTuple):
    """What decoding has read and written: the prompts of all rows, shared by their answers, and these.

    Axes are in the order in which they are multiplied, so that no step has to transpose what it reads.
    In a list of layers L is missing from the prompt, and 1 in the answers.
    """
    prompt: Cache   # keys [L, B, K, H, T], values [L, B, K, T, H]
    answers: Cache  # keys [L, B, Q, K, H, S], values [L, B, Q, K, S, H]


class Step(NamedTuple):
    """One new token for each of Q answers of a row: what it sees of the prompt, and its place."""
    seen_BQT: jax.Array   # bool[B, Q, T]
    slot: jax.Array       # int32[], the same for all answers; slots up to this one are seen


def rope_variants(config: config_lib.TextConfig):
    """Returns the distinct (inverse frequencies, factor) and, per layer, which of them it uses."""
    plain = (layers.inverse_frequencies(config.rope_theta, config.head_dim, None), 1.0)
    if config.yarn is None:
        return [plain], [0] * config.num_layers
    yarn = config.yarn
    scaled = (layers.inverse_frequencies(config.rope_theta, config.head_dim, yarn), yarn.attention_factor)
    return [plain, scaled], [int(i in yarn.layers) for i in range(config.num_layers)]


class Attention(nn.Module):
    """Grouped-query self-attention. Returns (output, (k, v)): the new keys and values.

    With `memory` (prompt Cache of this layer, answers Cache of all layers, number of this layer), T is Q,
    the mask is a Step, and the new answers Cache is returned.
    """
    config: config_lib.TextConfig
    dtype: str
    implementation: str | None = None

    @nn.compact
    def __call__(self, x_BTD, cos, sin, mask, memory=None):
        c = self.config

        def project(name, num_heads, axis):
            return layers.Linear((c.width, num_heads, c.head_dim), ("embed", axis, "head_dim"),
                                 init_std=c.init_std, dtype=self.dtype, name=name)(x_BTD)

        def norm(name, x_BTNH):
            if c.qk_norm == "qwen3":  # one weight for all heads
                return layers.RMSNorm(c.head_dim, None, c.norm_eps, name=name)(x_BTNH)
            flat = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
            normed = layers.RMSNorm(flat.shape[-1], None, c.norm_eps, name=name)(flat)
            return normed.reshape(x_BTNH.shape)

        q = layers.rotate(norm("q_norm", project("q", c.num_heads, "heads")), cos, sin)
        k = layers.rotate(norm("k_norm", project("k", c.num_kv_heads, "kv_heads")), cos, sin)
        v = project("v", c.num_kv_heads, "kv_heads")
        if memory is None:
            out = attend.attend(q, k, v, mask, self.implementation)
        else:
            prompt, written, layer = memory
            k, v = answers.write(*written, k, v, layer, mask.slot)
            out = answers.attend(q, *prompt, mask.seen_BQT, k[layer], v[layer], mask.slot)
        out = layers.Linear((c.num_heads, c.head_dim, c.width), ("heads", "head_dim", "embed"), 2,
                            init_std=c.init_std, dtype=self.dtype, name="o")(out)
        return out, (k, v)


class Block(nn.Module):
    """Attention and SwiGLU, each with its norm before (Qwen3) or after (OLMo 3), dropout before the add."""
    config: config_lib.TextConfig
    dtype: str
    implementation: str | None = None

    @nn.compact
    def __call__(self, x_BTD, cos, sin, mask, memory=None, drop_rate_BT=None, rng=None):
        c = self.config
        rngs = (None, None) if rng is None else jax.random.split(rng)
        std = c.init_std
        out_std = (std or c.mlp_width ** -0.5) / (2 * c.num_layers) ** 0.5
        attention = Attention(c, self.dtype, self.implementation, name="attn")
        mlp = layers.SwiGLU(c.width, c.mlp_width, c.width, std, out_std, self.dtype, name="mlp")
        attn_norm = layers.RMSNorm(c.width, eps=c.norm_eps, name="attn_norm")
        mlp_norm = layers.RMSNorm(c.width, eps=c.norm_eps, name="mlp_norm")

        x_BTD = sharding.constrain(x_BTD, "rows", "length", None)
        h, kv = attention(x_BTD if c.norm_after else attn_norm(x_BTD), cos, sin, mask, memory)
        h = attn_norm(h) if c.norm_after else h
        x_BTD = x_BTD + layers.dropout(h, drop_rate_BT, rngs[0])
        h = mlp(x_BTD if c.norm_after else mlp_norm(x_BTD))
        h = mlp_norm(h) if c.norm_after else h
        return x_BTD + layers.dropout(h, drop_rate_BT, rngs[1]), kv


class Decoder(nn.Module):
    """[B, T, D] embeddings -> ([B, T, D] hidden states after the final norm, keys and values).

    Without a memory the mask is a TreeMask, and the Cache of the T tokens is returned (unused, the compiler
    drops it). With a memory T is Q, the mask is a Step, and the Memory with the new tokens is returned.
    """
    config: config_lib.TextConfig
    dtype: str = "float32"
    remat: str = "full"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask, memory: Memory | None = None, drop_rate_BT=None, rng=None):
        c = self.config
        variants, of_layer = rope_variants(c)
        tables = [layers.rope_tables(positions_BT, *variant) for variant in variants]
        cos_VBTh, sin_VBTh = (jnp.stack(x) for x in zip(*tables))
        block = Block(c, self.dtype, self.implementation, parent=None)
        dot = jnp.zeros((1, 1, c.width))
        angle = jnp.zeros((1, 1, c.head_dim // 2))
        alone = tree_mask.TreeMask(jnp.ones((1, 1), jnp.int32), jnp.full((1, 1), -1))
        stack = layers.stacked_params(self, "layers", Block(c, self.dtype, "dense", parent=None),
                                      c.num_layers, dot, angle, angle, alone)

        if memory is None:
            mask = attend.plan(mask, c.num_heads, c.num_kv_heads, c.head_dim, self.implementation)

        def run(x, params, variant, *rest):
            return block.apply({"params": params}, x, cos_VBTh[variant], sin_VBTh[variant], mask, *rest)

        def read(x, per_layer):
            params, variant, key = per_layer
            return run(x, params, variant, None, drop_rate_BT, key)

        def extend(carry, per_layer):
            x, written = carry
            params, variant, prompt, layer = per_layer
            x, written = run(x, params, variant, (prompt, written, layer))
            return (x, Cache(*written)), None

        if isinstance(stack, list):
            kept = []
            for one, variant, held in zip(stack, of_layer, memory or [None] * c.num_layers):
                x_BTD, kv = run(x_BTD, one, variant, held and (*held, 0))
                kept.append(Cache(*kv) if held is None else held._replace(answers=Cache(*kv)))
        elif memory is None:
            keys = None if rng is None else jax.random.split(rng, c.num_layers)
            x_BTD, kv = layers.run_stack(read, x_BTD, (stack, jnp.asarray(of_layer), keys), self.remat)
            kept = Cache(*kv)
        else:
            per_layer = (stack, jnp.asarray(of_layer), memory.prompt, jnp.arange(c.num_layers))
            (x_BTD, answers), _ = layers.run_stack(extend, (x_BTD, memory.answers), per_layer, "none")
            kept = memory._replace(answers=answers)
        return layers.RMSNorm(c.width, eps=c.norm_eps, name="final_norm")(x_BTD), kept
