"""The decoder: pre-norm with per-head q/k norm (Qwen3) or post-norm with full-width q/k norm (OLMo 3).

B batch, T positions, Q answers decoded per row, S token slots per answer, P places of a decode row, L layers,
N query heads, K key heads, H head width, h = H / 2, D width, F tables of rotary angles.

The parameters of the layers are stacked and scanned over. For decoding they may also be a list with one tree
per layer (see decode.ready); then a Cache or Memory is a list with one per layer, too.

Source: reference, olmo/nn/llm.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import sharding
from molmo2_jax.attention import answers
from molmo2_jax.attention import attend
from molmo2_jax.attention import tree_mask
from molmo2_jax.model import layers


class Cache(NamedTuple):
    """Keys (after norm and rope) and values of past tokens; [L, B, T, K, H] as the layers return them."""
    k: jax.Array
    v: jax.Array


class Memory(NamedTuple):
    """Keys and values for decoding: of each row's prompt, which its answers share, and of the answers.

    Axes are in the order of the products that read them, so no decoding step transposes. In a list of layers,
    the prompt has no axis L and the answers have L = 1.
    """
    prompt: Cache   # keys [L, B, K, H, T], values [L, B, K, T, H]
    answers: Cache  # keys [L, B, Q, K, H, S], values [L, B, Q, K, S, H]


class Step(NamedTuple):
    """One new token for each of Q answers of a row: the prompt tokens that it sees, and its slot."""
    seen_BQT: jax.Array   # bool[B, Q, T]
    slot: jax.Array       # int32[], the same for all answers; an answer sees its slots up to this one


class Growth(NamedTuple):
    """New tokens of each row, T of them, that continue what the row holds. The memory is then
    Memory(None, Cache), of keys [L, B, K, H, P] and values [L, B, K, P, H] at P places per row."""
    start_B: jax.Array    # int32[B], place of the first new token; each sees all places up to its own

    def seen_BTP(self, num_new: int, num_places: int):
        """Returns bool[B, T, P]: the places that each new token sees."""
        own_BT = self.start_B[:, None] + jnp.arange(num_new)
        return jnp.arange(num_places) <= own_BT[..., None]


def rope_variants(config: config_lib.TextConfig):
    """Returns the distinct (inverse frequencies, factor), and the index of each layer's pair among them."""
    plain = (layers.inverse_frequencies(config.rope_theta, config.head_dim, None), 1.0)
    if config.yarn is None:
        return [plain], np.zeros(config.num_layers, int)
    yarn = config.yarn
    scaled = (layers.inverse_frequencies(config.rope_theta, config.head_dim, yarn), yarn.attention_factor)
    return [plain, scaled], np.isin(np.arange(config.num_layers), yarn.layers).astype(int)


def _example(config: config_lib.TextConfig):
    """Returns the smallest input of a Block: one token that sees itself."""
    x_BTD, angle_BTh = (jnp.zeros((1, 1, size)) for size in (config.width, config.head_dim // 2))
    mask = tree_mask.TreeMask(jnp.ones((1, 1), jnp.int32), jnp.full((1, 1), -1))
    return x_BTD, angle_BTh, angle_BTh, mask


class Attention(nn.Module):
    """Grouped-query self-attention. Returns (output, Cache of the new keys and values).

    With `memory` (prompt Cache of this layer, answers Cache of all layers, index of this layer), T is Q, the
    mask is a Step, and the updated answers Cache is returned. With a Growth as mask, the prompt is None and
    the Cache is that of whole rows.
    """
    config: config_lib.TextConfig
    dtype: str
    implementation: str | None = None

    @nn.compact
    def __call__(self, x_BTD, cos_BTh, sin_BTh, mask, memory=None):
        c, is_in_place = self.config, memory is not None

        def project(name, num_heads, axis):
            return layers.Linear((c.width, num_heads, c.head_dim), ("embed", axis, "head_dim"),
                                 init_std=c.init_std, dtype=self.dtype, is_in_place=is_in_place,
                                 name=name)(x_BTD)

        def norm(name, x_BTNH):
            if c.qk_norm == "qwen3":  # one weight for all heads
                return layers.RMSNorm(c.head_dim, None, c.norm_eps, name=name)(x_BTNH)
            flat = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
            normed = layers.RMSNorm(flat.shape[-1], None, c.norm_eps, name=name)(flat)
            return normed.reshape(x_BTNH.shape)

        q_BTNH = layers.rotate(norm("q_norm", project("q", c.num_heads, "heads")), cos_BTh, sin_BTh)
        k_BTKH = layers.rotate(norm("k_norm", project("k", c.num_kv_heads, "kv_heads")), cos_BTh, sin_BTh)
        v_BTKH = project("v", c.num_kv_heads, "kv_heads")
        if memory is None:
            cache = Cache(k_BTKH, v_BTKH)
            out_BTNH = attend.attend(q_BTNH, k_BTKH, v_BTKH, mask, self.implementation)
        elif isinstance(mask, Growth):
            _, written, layer = memory
            cache = Cache(*answers.append(*written, k_BTKH, v_BTKH, layer, mask.start_B))
            seen_BTP = mask.seen_BTP(x_BTD.shape[1], cache.k.shape[-1])
            out_BTNH = answers.attend_row(q_BTNH, cache.k[layer], cache.v[layer], seen_BTP)
        else:
            prompt, written, layer = memory
            cache = Cache(*answers.write(*written, k_BTKH, v_BTKH, layer, mask.slot))
            out_BTNH = answers.attend(q_BTNH, *prompt, mask.seen_BQT, cache.k[layer], cache.v[layer],
                                      mask.slot)
        out_BTD = layers.Linear((c.num_heads, c.head_dim, c.width), ("heads", "head_dim", "embed"), 2,
                                init_std=c.init_std, dtype=self.dtype, is_in_place=is_in_place,
                                name="o")(out_BTNH)
        return out_BTD, cache


class Block(nn.Module):
    """Attention and SwiGLU, each with a norm before (Qwen3) or after it (OLMo 3) and residual dropout."""
    config: config_lib.TextConfig
    dtype: str
    implementation: str | None = None

    @nn.compact
    def __call__(self, x_BTD, cos_BTh, sin_BTh, mask, memory=None, drop_rate_BT=None, rng=None):
        c = self.config
        rngs = (None, None) if rng is None else jax.random.split(rng)
        std = c.init_std
        out_std = (std or c.mlp_width ** -0.5) / (2 * c.num_layers) ** 0.5
        attention = Attention(c, self.dtype, self.implementation, name="attn")
        mlp = layers.SwiGLU(c.width, c.mlp_width, c.width, std, out_std, self.dtype,
                            is_in_place=memory is not None, name="mlp")
        attn_norm = layers.RMSNorm(c.width, eps=c.norm_eps, name="attn_norm")
        mlp_norm = layers.RMSNorm(c.width, eps=c.norm_eps, name="mlp_norm")

        place = ("rows", "length", None) if memory is None else ("replicas", None, "stored")
        x_BTD = sharding.constrain(x_BTD, *place)
        h_BTD, cache = attention(x_BTD if c.norm_after else attn_norm(x_BTD), cos_BTh, sin_BTh, mask, memory)
        h_BTD = attn_norm(h_BTD) if c.norm_after else h_BTD
        x_BTD = x_BTD + layers.dropout(h_BTD, drop_rate_BT, rngs[0])
        h_BTD = mlp(x_BTD if c.norm_after else mlp_norm(x_BTD))
        h_BTD = mlp_norm(h_BTD) if c.norm_after else h_BTD
        return x_BTD + layers.dropout(h_BTD, drop_rate_BT, rngs[1]), cache


class Decoder(nn.Module):
    """[B, T, D] embeddings -> ([B, T, D] hidden states after the final norm, keys and values, taps).

    Without a memory the mask is a TreeMask, and the Cache of the T tokens is returned (the compiler removes
    it where it is unused). With a memory T is Q, the mask is a Step or a Growth, and the Memory with the new
    tokens is returned.

    taps: layers, from 0, whose outputs [B, T, D] before the final norm are returned as {layer: output}; with
      a memory only the last layer.

    Raises:
      ValueError: a tap is no layer, or not the last one with a memory.
    """
    config: config_lib.TextConfig
    dtype: str = "float32"
    remat: str = "full"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask, memory: Memory | None = None, drop_rate_BT=None, rng=None,
                 taps: tuple[int, ...] = ()):
        c = self.config
        variants, of_layer = rope_variants(c)
        tables = [layers.rope_tables(positions_BT, *variant) for variant in variants]
        cos_FBTh, sin_FBTh = (jnp.stack(x) for x in zip(*tables))
        block = Block(c, self.dtype, self.implementation, parent=None)
        stack = layers.Stack.of(self, "layers", Block(c, self.dtype, "dense", parent=None), c.num_layers,
                                *_example(c))

        def run(x_BTD, params, per_layer, memory=None):
            variant, key = per_layer
            return block.apply({"params": params}, x_BTD, cos_FBTh[variant], sin_FBTh[variant], mask, memory,
                               drop_rate_BT, key)

        if memory is None:
            mask = attend.plan(mask, c.num_heads, c.num_kv_heads, c.head_dim, self.implementation)
            keys = None if rng is None else jax.random.split(rng, c.num_layers)
            x_BTD, kept, tapped = stack.run(run, x_BTD, (of_layer, keys), self.remat, taps)
        else:
            config_lib.require(set(taps) <= {c.num_layers - 1},
                               "with a memory only the last layer can be tapped", taps)
            x_BTD, kept = stack.extend(run, x_BTD, (of_layer, None), memory)
            tapped = dict.fromkeys(taps, x_BTD)
        return layers.RMSNorm(c.width, eps=c.norm_eps, name="final_norm")(x_BTD), kept, tapped
