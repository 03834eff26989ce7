"""Molmo2: a ViT sees crops, a connector pools patches into visual tokens, a decoder reads them among text.

B rows, T tokens, M crops, P patches, C values per patch, A width of the ViT's tapped layers, R visual
tokens, W slots per window, D width, V base vocabulary, E rows of the second table.

Source: paper, figure 2 and section 3.1; reference: olmo/models/molmo2/molmo2.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from molmo2_jax import config as config_lib
from molmo2_jax import sharding
from molmo2_jax import types
from molmo2_jax.attention import tree_mask
from molmo2_jax.model import connector
from molmo2_jax.model import layers
from molmo2_jax.model import text
from molmo2_jax.model import vision

PATCH_ROW = config_lib.SPECIAL_TOKENS.index("<im_patch>")  # in the second embedding table


def merge(x_BTD, is_patch_BT, visual_BRD, how: config_lib.VisualMerge = "add"):
    """Adds the k-th visual token to the embedding of the k-th `<im_patch>` of its row.

    With "replace" it is put in the place of the embedding: the reference and transformers add, vLLM replaces.
    """
    visual_BRD = sharding.constrain(visual_BRD, "rows", None, None)
    k_BT = jnp.maximum(jnp.cumsum(is_patch_BT, axis=1) - 1, 0)
    placed_BTD = jnp.take_along_axis(visual_BRD, k_BT[..., None], axis=1, mode="clip")
    if how == "replace":
        x_BTD = jnp.where(is_patch_BT[..., None], 0, x_BTD)
    merged = x_BTD + jnp.where(is_patch_BT[..., None], placed_BTD, 0).astype(x_BTD.dtype)
    return sharding.constrain(merged, "rows", "length", None)


class Inside(NamedTuple):
    """Intermediate results of a forward pass; the visual ones are None in a text-only shape."""
    features: jax.Array | None      # [B, M, P, A] what the ViT says of patches, before the connector
    visual: jax.Array | None        # [B, R, D] visual tokens, after the connector
    layers: dict[int, jax.Array]    # [B, T, D] after each tapped layer of the decoder


def zero_patch_row(initializer):
    """Returns the initialiser of a second table whose row of `<im_patch>` is zero."""
    def draw(key, shape, dtype=jnp.float32):
        return initializer(key, shape, dtype).at[PATCH_ROW].set(0)
    return draw


def freeze_patch_row(table_ED):
    """Returns the second table; no gradient flows into the row of `<im_patch>`."""
    is_frozen_E1 = (jnp.arange(table_ED.shape[0]) == PATCH_ROW)[:, None]
    return jnp.where(is_frozen_E1, jax.lax.stop_gradient(table_ED), table_ED)


class Molmo2(nn.Module):
    """The model. `embed` and `decode` are its two halves, `logits` the head, `__call__` all of them."""
    config: config_lib.Molmo2Config
    dtype: str = "float32"          # of the computation; parameters stay float32
    remat: str = "full"             # of decoder and connector, see layers.REMAT_POLICIES
    attention: str | None = None    # implementation, see attention.attend
    vision_remat: str | None = None     # of the ViT; None: as remat

    def setup(self):
        c, t = self.config, self.config.text
        self.vision = vision.VisionTransformer(c.vision, c.connector.taps, self.dtype,
                                               self.vision_remat or self.remat)
        recomputed = connector.Connector if self.remat == "none" else nn.remat(connector.Connector)
        self.connector = recomputed(c.connector, t.width, self.dtype)
        self.text = text.Decoder(t, self.dtype, self.remat, self.attention)
        normal = nn.initializers.normal(t.embedding_init_std)
        new = zero_patch_row(normal) if c.freeze_patch_row else normal
        normal, new = (nn.with_logical_partitioning(draw, ("vocab", "embed")) for draw in (normal, new))
        self.base_embedding = self.param("base_embedding", normal, (t.vocab_size, t.width))
        self.new_embedding = self.param("new_embedding", new, (t.additional_vocab_size, t.width))
        if not t.tied_head:
            head = nn.with_logical_partitioning(
                nn.initializers.normal(t.init_std or t.width ** -0.5), ("embed", "vocab"))
            self.head = self.param("head", head, (t.width, t.vocab_size))

    def embed_tokens(self, tokens_BT):
        """Returns [B, T, D]; ids from V on hit the second table, which only inputs use."""
        V = self.config.text.vocab_size
        # Devices that store columns of the tables look up theirs for all tokens around, then exchange.
        tokens_BT = sharding.constrain(tokens_BT, "replicas", None)
        base, new = (sharding.constrain(table, None, "stored")
                     for table in (self.base_embedding, self.new_embedding))
        if self.config.freeze_patch_row:
            new = freeze_patch_row(new)
        x_BTD = jnp.where(tokens_BT[..., None] < V, base[jnp.minimum(tokens_BT, V - 1)],
                          new[jnp.maximum(tokens_BT - V, 0)]).astype(self.dtype)
        x_BTD = sharding.constrain(x_BTD, "replicas", None, "stored")
        x_BTD = sharding.constrain(x_BTD, "rows", None, "partly_stored")  # one exchange at a time
        return sharding.constrain(x_BTD, "rows", "length", None)

    def embed(self, tokens_BT, patches_BMPC, pooled_BRW):
        """Returns [B, T, D] embeddings with the visual tokens added."""
        return self._embed(tokens_BT, patches_BMPC, pooled_BRW)[0]

    def _embed(self, tokens_BT, patches_BMPC, pooled_BRW):
        """Returns (what `embed` does, [B, M, P, A] features or None, [B, R, D] visual tokens or None)."""
        x_BTD = self.embed_tokens(tokens_BT)
        if 0 in patches_BMPC.shape or 0 in pooled_BRW.shape:
            return x_BTD, None, None  # a text-only shape
        with jax.named_scope("vision"):
            features_BMPA = self.vision(patches_BMPC)
        with jax.named_scope("connector"):
            visual_BRD = self.connector(features_BMPA, pooled_BRW)
        is_patch_BT = tokens_BT == self.config.special_id("<im_patch>")
        x_BTD = merge(x_BTD, is_patch_BT, visual_BRD, self.config.visual_merge)
        return x_BTD, features_BMPA, visual_BRD

    def decode(self, x_BTD, positions_BT, mask, memory=None, drop_rate_BT=None, rng=None):
        """Returns ([B, T, D] hidden states after the final norm, text.Cache; text.Memory if given one)."""
        with jax.named_scope("decoder"):
            return self.text(x_BTD, positions_BT, mask, memory, drop_rate_BT, rng)[:2]

    def head_kernel(self):
        """Returns float32[D, V]."""
        return self.base_embedding.T if self.config.text.tied_head else self.head

    def logits(self, hidden_BTD, kernel_DV=None):
        """Returns float32[..., V]; only the base vocabulary can be produced.

        `kernel_DV` is the head's, gathered from all devices; None: it is gathered here.
        """
        axes = ("embed", "vocab") if kernel_DV is None else None
        kernel_DV = self.head_kernel() if kernel_DV is None else kernel_DV
        return layers.contract(hidden_BTD.astype(self.dtype), kernel_DV, 1, axes).astype(jnp.float32)

    def hidden(self, batch: types.Batch, drop_rate_BT=None, rng=None, taps: tuple[int, ...] | None = None):
        """Returns [B, T, D] hidden states of a packed batch, ready for `logits`.

        With `taps`, layers of the decoder from 0, returns (hidden states, Inside); () taps no layer.

        Raises:
          ValueError: there is no such layer.
        """
        mask = tree_mask.from_batch(batch, self.config.visual_attention)
        x_BTD, features_BMPA, visual_BRD = self._embed(batch.tokens, batch.patches, batch.pooled)
        with jax.named_scope("decoder"):
            hidden_BTD, _, tapped = self.text(x_BTD, batch.positions, mask, None, drop_rate_BT, rng,
                                              taps or ())
        return hidden_BTD if taps is None else (hidden_BTD, Inside(features_BMPA, visual_BRD, tapped))

    def __call__(self, batch: types.Batch):
        """Returns float32[B, T, V] logits of a packed batch."""
        return self.logits(self.hidden(batch))
