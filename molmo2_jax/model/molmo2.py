"""Molmo2: a ViT encodes crops, a connector pools patches into visual tokens, a decoder reads them with text.

B rows, T tokens, M crops, P patches, C values per patch, A = taps * width of the ViT, R visual tokens, W
slots of a pooling window, D decoder width, V base vocabulary, E rows of the second embedding table, N choices
of a patch in a row, Q answers decoded per row.

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
from molmo2_jax.model import choosing
from molmo2_jax.model import connector
from molmo2_jax.model import layers
from molmo2_jax.model import pointer as pointers
from molmo2_jax.model import text
from molmo2_jax.model import vision

PATCH_ROW = config_lib.SPECIAL_TOKENS.index("<im_patch>")  # in the second embedding table


def merge(x_BTD, is_patch_BT, visual_BRD, how: config_lib.VisualMerge = "add"):
    """Returns [B, T, D]: the k-th visual token added to the embedding of the k-th `<im_patch>` of its row.

    With "replace" it takes the place of that embedding. The reference and transformers add, vLLM replaces.
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
    features: jax.Array | None      # [B, M, P, A] ViT features of patches, before the connector
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
            self.head = layers.parameter(self, "head", head, (t.width, t.vocab_size))
        if c.pointer is not None:
            tapped = len(c.connector.taps) * c.vision.width
            self.pointer = pointers.Pointer(c.pointer, t.width, tapped, self.dtype)
            if not t.tied_head:
                self.new_head = self.param("new_head", head, (t.width, t.additional_vocab_size))

    def embed_tokens(self, tokens_BT, is_in_place: bool = False):
        """Returns [B, T, D]; ids from V on hit the second table, which only inputs use.

        Each device has its stored columns for the tokens of its replicas. Without gradients, `is_in_place`
        also leaves the rows of the tables on the devices that store them.
        """
        V = self.config.text.vocab_size
        if self.config.pointer is not None:  # overviews share the embedding of other visual tokens
            overview, patch = map(self.config.special_id, (self.config.overview_token, "<im_patch>"))
            tokens_BT = jnp.where(tokens_BT == overview, patch, tokens_BT)
        tokens_BT = sharding.constrain(tokens_BT, "replicas", None)
        base, new = self.base_embedding, self.new_embedding
        if not is_in_place:
            base, new = (sharding.constrain(table, None, "stored") for table in (base, new))
        if self.config.freeze_patch_row:
            new = freeze_patch_row(new)
        x_BTD = jnp.where(tokens_BT[..., None] < V, base[jnp.minimum(tokens_BT, V - 1)],
                          new[jnp.maximum(tokens_BT - V, 0)]).astype(self.dtype)
        return sharding.constrain(x_BTD, "replicas", None, "stored")

    def embed(self, batch: types.Batch, is_in_place: bool = False):
        """Returns (embeddings [B, T, D], features [B, M, P, A] or None, visual tokens [B, R, D] or None).

        The embeddings have the visual tokens, and what was chosen, added. `is_in_place` as in `embed_tokens`.
        """
        tokens_BT, patches_BMPC, pooled_BRW = batch.tokens, batch.patches, batch.pooled
        x_BTD = self.embed_tokens(tokens_BT, is_in_place)
        x_BTD = sharding.constrain(x_BTD, "rows", None, "partly_stored")  # one exchange at a time
        x_BTD = sharding.constrain(x_BTD, "rows", "length", None)
        if 0 in patches_BMPC.shape or 0 in pooled_BRW.shape:
            return x_BTD, None, None  # a text-only shape
        with jax.named_scope("vision"):
            features_BMPA = self.vision(patches_BMPC)
        with jax.named_scope("connector"):
            visual_BRD = self.connector(features_BMPA, pooled_BRW)
        x_BTD = merge(x_BTD, pointers.is_visual(tokens_BT, self.config), visual_BRD, self.config.visual_merge)
        if batch.choice is not None:
            with jax.named_scope("choices"):
                x_BTD = self._feed_back(x_BTD, batch, features_BMPA, visual_BRD)
        return x_BTD, features_BMPA, visual_BRD

    def _feed_back(self, x_BTD, batch: types.Batch, features_BMPA, visual_BRD):
        """Returns the embeddings with what was chosen added at `<|token_index|>` and `<|vit_index|>`."""
        tokens_BT, choice_BT, pooled_BRW = batch.tokens, batch.choice, batch.pooled
        is_token_BT = tokens_BT == self.config.special_id("<|token_index|>")
        is_token_BT &= (choice_BT >= 0) & (choice_BT < pooled_BRW.shape[1])
        visual_BRD = sharding.constrain(visual_BRD, "rows", None, None)
        token_BTD = jnp.where(is_token_BT[..., None], pointers.take(visual_BRD, choice_BT), 0)
        is_sub_BT = (tokens_BT == self.config.special_id("<|vit_index|>")) & (choice_BT < -1)
        features_BNA = pointers.sub_features(is_sub_BT, choice_BT, features_BMPA, pooled_BRW)
        sub_BTD = pointers.take(self.pointer.embed_sub(features_BNA), jnp.cumsum(is_sub_BT, axis=1) - 1)
        fed_BTD = token_BTD + jnp.where(is_sub_BT[..., None], sub_BTD, 0)
        return sharding.constrain(x_BTD + fed_BTD.astype(x_BTD.dtype), "rows", "length", None)

    def decode(self, x_BTD, positions_BT, mask, memory=None, drop_rate_BT=None, rng=None):
        """Returns ([B, T, D] hidden states after the final norm, text.Cache; text.Memory if given one)."""
        return self.decode_inside(x_BTD, positions_BT, mask, memory, drop_rate_BT, rng)[:2]

    def decode_inside(self, x_BTD, positions_BT, mask, memory=None, drop_rate_BT=None, rng=None):
        """Returns what `decode` does, and with a pointer the states [B, T, D] before the final norm."""
        last = self.config.text.num_layers - 1
        taps = () if self.config.pointer is None else (last,)
        with jax.named_scope("decoder"):
            hidden_BTD, kept, tapped = self.text(x_BTD, positions_BT, mask, memory, drop_rate_BT, rng, taps)
        return hidden_BTD, kept, tapped.get(last)

    def heads(self, x_BTD) -> pointers.Heads:
        """Returns what states before the final norm say about points."""
        return self.pointer(x_BTD)

    def choose(self, prompt: choosing.Prompt, progress: choosing.Progress, heads: pointers.Heads, tokens_BQ,
               count) -> choosing.Progress:
        """Returns the progress after new tokens, see choosing.choose."""
        return choosing.choose(prompt, progress, heads, tokens_BQ, self.pointer.no_more, self.pointer.sub_k,
                               self.config, count)

    def fed_back(self, prompt: choosing.Prompt, progress: choosing.Progress):
        """Returns [B, Q, D], what is added to the embeddings of the last tokens of answers."""
        return choosing.fed_back(prompt, progress, self.pointer.embed_sub)

    def head_kernel(self):
        """Returns float32[D, V], or a quantized.Int8 of this shape; with a pointer float32[D, V + E]."""
        kernels = self._head_kernels()
        return kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=1)

    def _head_kernels(self):
        is_tied = self.config.text.tied_head
        base = self.base_embedding.T if is_tied else self.head
        if self.config.pointer is None:
            return (base,)
        return base, self.new_embedding.T if is_tied else self.new_head

    def logits(self, hidden_BTD, kernel_DV=None, is_in_place: bool = False):
        """Returns float32[..., V], of tokens of the base vocabulary; with a pointer float32[..., V + E].

        `kernel_DV` is the head's kernel, already gathered from all devices; None: it is gathered here, or, if
        `is_in_place`, used where it is stored.
        """
        axes = ("embed", "vocab") if kernel_DV is None else None
        kernels = self._head_kernels() if kernel_DV is None else (kernel_DV,)
        product = layers.contract_in_place if is_in_place else layers.contract
        parts = [product(hidden_BTD.astype(self.dtype), kernel, 1, axes).astype(jnp.float32)
                 for kernel in kernels]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def choices(self, inside: Inside) -> pointers.Scored:
        """Returns what states and features say about choices; `inside` is of `hidden` with the last layer."""
        with jax.named_scope("choices"):
            heads = self.pointer(inside.layers[self.config.text.num_layers - 1])
            return pointers.Scored(heads, self.pointer.sub_k(inside.features), self.pointer.no_more)

    def hidden(self, batch: types.Batch, drop_rate_BT=None, rng=None, taps: tuple[int, ...] | None = None):
        """Returns [B, T, D] hidden states of a packed batch, the input of `logits`.

        With `taps`, decoder layers counted from 0, returns (hidden states, Inside); () taps no layer.

        Raises:
          ValueError: a tap is no layer of the decoder.
        """
        mask = tree_mask.from_batch(batch, self.config.visual_attention)
        x_BTD, features_BMPA, visual_BRD = self.embed(batch)
        with jax.named_scope("decoder"):
            hidden_BTD, _, tapped = self.text(x_BTD, batch.positions, mask, None, drop_rate_BT, rng,
                                              taps or ())
        return hidden_BTD if taps is None else (hidden_BTD, Inside(features_BMPA, visual_BRD, tapped))

    def __call__(self, batch: types.Batch):
        """Returns float32[B, T, V] logits of a packed batch; with a pointer [B, T, V + E]."""
        if not (self.config.pointer is not None and self.is_initializing()):
            return self.logits(self.hidden(batch))
        hidden_BTD, inside = self.hidden(batch, taps=(self.config.text.num_layers - 1,))
        self.choices(inside)  # so that its parameters exist
        return self.logits(hidden_BTD)
