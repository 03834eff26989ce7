"""From ViT patches to visual tokens: attention pooling with the masked mean as query, then a projector.

B batch, M crops, P patches, A tapped width, R visual tokens, W slots of a pooling window, N heads,
H head width, D decoder width.

Source: paper, section 3.1; reference: olmo/nn/vision_backbone.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from molmo2_jax import config as config_lib
from molmo2_jax import sharding
from molmo2_jax.model import layers


def gather_windows(features_BMPA, pooled_BRW):
    """Returns ([B, R, W, A] patch features of each window, bool[B, R, W] which slots are filled)."""
    B, M, P, A = features_BMPA.shape
    valid_BRW = pooled_BRW >= 0
    flat = features_BMPA.reshape(B, M * P, A)
    gathered = jnp.take_along_axis(flat[:, :, None], jnp.maximum(pooled_BRW, 0).reshape(B, -1, 1, 1), axis=1)
    windows_BRWA = gathered.reshape(*pooled_BRW.shape, A)
    return jnp.where(valid_BRW[..., None], windows_BRWA, 0), valid_BRW


def masked_mean(windows_BRWA, valid_BRW):
    """Returns [B, R, A]: mean of the filled slots, 0 for an empty window."""
    count = jnp.maximum(valid_BRW.sum(-1, keepdims=True), 1)
    return windows_BRWA.sum(2) / count.astype(windows_BRWA.dtype)


def pool_attention(q_BRNH, k_BRWNH, v_BRWNH, valid_BRW):
    """Returns [B, R, N, H]: one query per window attends to its filled slots; finite for empty windows."""
    q_BRNH = q_BRNH * q_BRNH.shape[-1] ** -0.5
    s_BRNW = jnp.einsum("BRNH,BRWNH->BRNW", q_BRNH, k_BRWNH, preferred_element_type=jnp.float32)
    s_BRNW = jnp.where(valid_BRW[:, :, None], s_BRNW, -1e30)
    p_BRNW = jax.nn.softmax(s_BRNW, axis=-1).astype(v_BRWNH.dtype)
    return jnp.einsum("BRNW,BRWNH->BRNH", p_BRNW, v_BRWNH)


class Pooling(nn.Module):
    """Attention pooling of windows of patches; biases on all four projections, no residual."""
    config: config_lib.ConnectorConfig
    dtype: str

    @nn.compact
    def __call__(self, features_BMPA, pooled_BRW):
        c = self.config
        width = c.num_heads * c.head_dim

        def linear(name, shape, axes, num_in=1):
            return layers.Linear(shape, axes, num_in, use_bias=True, init_std=c.init_std, dtype=self.dtype,
                                 name=name)

        windows_BRWA, valid_BRW = gather_windows(features_BMPA, pooled_BRW)
        windows_BRWA = sharding.constrain(windows_BRWA, "rows", "crops", None, None)
        heads = (windows_BRWA.shape[-1], c.num_heads, c.head_dim)
        split = ("embed", "vision_heads", "head_dim")
        q_BRNH = linear("q", heads, split)(masked_mean(windows_BRWA, valid_BRW))
        k_BRWNH, v_BRWNH = (linear(name, heads, split)(windows_BRWA) for name in ("k", "v"))
        pooled_BRNH = pool_attention(q_BRNH, k_BRWNH, v_BRWNH, valid_BRW)
        if not c.has_output:
            return pooled_BRNH.reshape(*pooled_BRNH.shape[:2], width)
        return linear("o", (c.num_heads, c.head_dim, width), ("vision_heads", "head_dim", "embed"), 2)(
            pooled_BRNH)


class Connector(nn.Module):
    """[B, M, P, A] features and int32[B, R, W] windows -> [B, R, D] visual tokens."""
    config: config_lib.ConnectorConfig
    width_out: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features_BMPA, pooled_BRW):
        c = self.config
        # A window may pool patches of any crop of its row: gather a row's features, then shard its windows.
        features_BMPA = sharding.constrain(features_BMPA, "rows", None, None, None)
        pooled_BRW = sharding.constrain(pooled_BRW, "rows", "crops", None)
        pooled_BRA = Pooling(c, self.dtype, name="pool")(features_BMPA, pooled_BRW)
        return layers.SwiGLU(c.num_heads * c.head_dim, c.mlp_width, self.width_out, c.init_std, c.init_std,
                             self.dtype, "vision_mlp", name="project")(pooled_BRA)
