"""The vision transformer: encodes each crop separately and returns features of chosen layers.

B batch, M crops, n = B * M crops of all rows, P patches (Q as keys), C values per patch, E width, F width of
the MLP, N heads, H head width, A = taps * E.

Source: reference, olmo/nn/image_vit.py. No class token, no final norm, no dropout.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from molmo2_jax import config as config_lib
from molmo2_jax import sharding
from molmo2_jax.attention import attend
from molmo2_jax.attention import tiling
from molmo2_jax.attention import tree_mask
from molmo2_jax.model import layers


def normalise(patches):
    """Returns float32 pixels in [-1, 1], which SigLIP2 expects, from uint8."""
    return patches.astype(jnp.float32) / 127.5 - 1.0


def full_attention(q_nPNH, k_nPNH, v_nPNH):
    """Returns [n, P, N, H]: softmax attention among the patches of each crop; logits, softmax in float32."""
    q_nNPH, k_nNQH, v_nNQH = (
        x.transpose(0, 2, 1, 3) for x in (q_nPNH * q_nPNH.shape[-1] ** -0.5, k_nPNH, v_nPNH))
    s_nNPQ = jnp.einsum("nNPH,nNQH->nNPQ", q_nNPH, k_nNQH, preferred_element_type=jnp.float32)
    p_nNPQ = jax.nn.softmax(s_nNPQ, axis=-1).astype(v_nNQH.dtype)
    return jnp.einsum("nNPQ,nNQH->nNPH", p_nNPQ, v_nNQH).transpose(0, 2, 1, 3)


def kernel_attention(q_nPNH, k_nPNH, v_nPNH, implementation: str = "pallas_tpu"):
    """Returns the same as `full_attention`, by the decoder's kernel, up to MAX_ROWS crops per call."""
    n, P, N, H = q_nPNH.shape
    rows = max(size for size in range(1, tiling.MAX_ROWS + 1) if n % size == 0)
    plan = attend.plan(tree_mask.everything(rows, P), N, N, H, implementation)
    parts = [x.reshape(n // rows, rows, P, N, H) for x in (q_nPNH, k_nPNH, v_nPNH)]
    return jax.lax.map(lambda part: attend.attend(*part, plan), parts).reshape(n, P, N, H)


def crop_attention(q_nPNH, k_nPNH, v_nPNH):
    """Returns the same as `full_attention`, on a TPU by a kernel on each device's own crops.

    XLA would write and read the scores of all crops several times: 6 GiB in each layer of a so400m ViT with
    192 crops on a chip.
    """
    if attend.platform() != "tpu":
        return full_attention(q_nPNH, k_nPNH, v_nPNH)
    return sharding.on_own_part(kernel_attention, "all_crops", q_nPNH, k_nPNH, v_nPNH)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""
    config: config_lib.VisionConfig
    dtype: str

    @nn.compact
    def __call__(self, x_nPE):
        c = self.config

        def linear(name, shape, axes, num_in=1):
            return layers.Linear(shape, axes, num_in, use_bias=True, init_std=c.init_std, dtype=self.dtype,
                                 name=name)

        heads, split = (c.width, c.num_heads, c.head_dim), ("embed", "vision_heads", "head_dim")
        h_nPE = layers.LayerNorm(c.width, c.norm_eps, name="norm1")(x_nPE)
        out_nPNH = crop_attention(*(linear(name, heads, split)(h_nPE) for name in ("q", "k", "v")))
        x_nPE = x_nPE + linear("o", heads[1:] + heads[:1], split[1:] + split[:1], 2)(out_nPNH)
        h_nPE = layers.LayerNorm(c.width, c.norm_eps, name="norm2")(x_nPE)
        h_nPF = linear("fc1", (c.width, c.mlp_width), ("embed", "vision_mlp"))(h_nPE)
        h_nPF = jax.nn.gelu(h_nPF, approximate=True)
        return x_nPE + linear("fc2", (c.mlp_width, c.width), ("vision_mlp", "embed"))(h_nPF)


class VisionTransformer(nn.Module):
    """uint8[B, M, P, C] patches -> [B, M, P, A]: outputs of the tapped layers, concatenated in tap order."""
    config: config_lib.VisionConfig
    taps: tuple[int, ...]
    dtype: str = "float32"
    remat: str = "full"

    @nn.compact
    def __call__(self, patches_BMPC):
        c = self.config
        B, M, P, C = patches_BMPC.shape
        crops_nPC = sharding.constrain(patches_BMPC.reshape(B * M, P, C), "all_crops", None, None)
        x_nPE = layers.Linear((C, c.width), (None, "embed"), use_bias=True, init_std=c.init_std,
                              dtype=self.dtype, name="patch")(normalise(crops_nPC))
        normal = nn.initializers.normal(c.position_init_std or c.width ** -0.5)
        normal = nn.with_logical_partitioning(normal, (None, "embed"))
        x_nPE = x_nPE + self.param("position", normal, (P, c.width)).astype(x_nPE.dtype)

        block = Block(c, self.dtype, parent=None)
        stack = layers.Stack.of(self, "layers", block, c.num_layers, jnp.zeros((1, 1, c.width)))

        def run(x_nPE, params, _):
            return block.apply({"params": params}, x_nPE), None

        outputs, start = {}, 0
        for tap in sorted(set(self.taps)):  # layers after the last tap are not computed
            x_nPE, _, _ = stack[start:tap + 1].run(run, x_nPE, remat=self.remat)
            outputs[tap], start = x_nPE, tap + 1
        return jnp.concatenate([outputs[tap] for tap in self.taps], -1).reshape(B, M, P, -1)
