"""Pointing by choosing visual tokens: patch, then sub-patch, then location (MolmoPoint).

                     state of the token before     chooses among
    <|token_index|>  q = rot(patch_q(n), p of the  the example's visual tokens r: rot(patch_k(n_r), p_r);
                     previous point)               "no more points": a learned vector
    <|vit_index|>    sub_q(n)                      the patches f_rj pooled into token r: sub_k(f_rj)
    <|vit_loc|>      location(n)                   3 x 3 cells of that patch

n = norm(x), x the states after the last block and before the decoder's final norm; p_r counts the selectable
visual tokens of an example, in reading order. What was chosen is fed back: the embedding of `<|token_index|>`
gets visual token r added, that of `<|vit_index|>` embed_sub(f_rj).

B rows, T tokens, M crops, P patches of a crop, p of a row, R visual tokens, W slots of a pooling window, A
tapped width of the ViT, E pointing width, D decoder width, N points of a row.

Source: arXiv 2603.28069, figure 2; reference: olmo/models/molmo_point/molmo_point.py. Deliberate differences:
a fixed divisor of the scores and normed states for locations (config.PointerConfig), empty slots are never
candidates, and a group whose end was cut off does not rotate the queries of the next one.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.model import layers

CELLS = 9   # 3 x 3 locations in a patch
_NEVER = -1e30


class Heads(NamedTuple):
    """What the states of tokens say about points."""
    patch_q: jax.Array      # [..., E], before rotation
    patch_k: jax.Array      # [..., E], before rotation; used at visual tokens
    sub_q: jax.Array        # [..., E]
    location: jax.Array     # float32[..., 9], scores


class Scored(NamedTuple):
    """States and features from which the scores of all choices follow."""
    heads: Heads            # of [B, T, D]
    sub_key: jax.Array      # [B, M, P, E], of all patches
    no_more: jax.Array      # float32[E]


class Visual(NamedTuple):
    """The visual tokens of rows as candidates."""
    position: jax.Array     # int32[B, R], of the token in the row; T if there is none
    example: jax.Array      # int32[B, R], -1 if there is none
    selectable: jax.Array   # bool[B, R], false for overviews and padding
    place: jax.Array        # int32[B, R], p_r; clamped where not selectable


class Points(NamedTuple):
    """The choices of rows, in order; rows with fewer than N have `token` = T at the end."""
    token: jax.Array        # int32[B, N], position of `<|token_index|>`
    chosen: jax.Array       # int32[B, N], its choice, types.NO_MORE among them
    slot: jax.Array         # int32[B, N], choice of the `<|vit_index|>` after it, -1 if there is none
    cell: jax.Array         # int32[B, N], choice of the `<|vit_loc|>` after that, -1 if there is none
    previous: jax.Array     # int32[B, N], choice before in the same group, -1 for its first


class Pointer(nn.Module):
    """The parameters of pointing: `__call__` is for states, `sub_k` and `embed_sub` are for ViT features.

    `no_more` is float32[E], the key of "no more points".
    """
    config: config_lib.PointerConfig
    width: int      # D
    tapped: int     # A
    dtype: str = "float32"

    def setup(self):
        c = self.config

        def linear(width_in, size, axes):
            return layers.Linear((width_in, size), axes, use_bias=True, init_std=c.init_std, dtype=self.dtype)

        inner = ("embed", None)
        self.norm = layers.RMSNorm(self.width)
        self.patch_q, self.patch_k, self.sub_q = (linear(self.width, c.width, inner) for _ in range(3))
        self.sub_k = linear(self.tapped, c.width, inner)
        self.location = linear(self.width, CELLS, inner)
        self.embed_sub = linear(self.tapped, self.width, (None, "embed"))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        self.no_more = self.param("no_more", zeros, (c.width,))

    def __call__(self, x_BTD) -> Heads:
        """Returns the Heads of states before the decoder's final norm."""
        n_BTD = self.norm(x_BTD)
        located_BTD = x_BTD if self.config.raw_location_reference else n_BTD
        return Heads(self.patch_q(n_BTD), self.patch_k(n_BTD), self.sub_q(n_BTD),
                     self.location(located_BTD).astype(jnp.float32))


def is_visual(tokens, config: config_lib.Molmo2Config):
    """Returns bool: which tokens are visual tokens, those of overviews included."""
    is_patch = tokens == config.special_id("<im_patch>")
    if config.pointer is None:
        return is_patch
    return is_patch | (tokens == config.special_id(config.overview_token))


def rotate(x_BNE, place_BN, theta: float):
    """Returns x rotated by positions over its whole width, in float32, cast back."""
    width = x_BNE.shape[-1]
    inverse = (theta ** (-np.arange(0, width, 2) / width)).astype(np.float32)
    return layers.rotate(x_BNE[:, :, None], *layers.rope_tables(place_BN, inverse))[:, :, 0]


def visual_of(batch: types.Batch, config: config_lib.Molmo2Config) -> Visual:
    """Returns the candidates of a packed batch."""
    patch = config.special_id("<im_patch>")
    T, R = batch.tokens.shape[1], batch.pooled.shape[1]
    position_BR = _places(is_visual(batch.tokens, config), R)
    example_BR, token_BR = (jnp.where(position_BR < T, take(x, position_BR), -1)
                            for x in (batch.example, batch.tokens))
    selectable_BR = token_BR == patch
    before_BR = jnp.cumsum(selectable_BR, axis=1) - selectable_BR
    is_first_BR = example_BR != jnp.pad(example_BR, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    start_BR = jax.lax.cummax(jnp.where(is_first_BR, before_BR, 0), axis=1)
    return Visual(position_BR, example_BR, selectable_BR, before_BR - start_BR)


def points_of(batch: types.Batch, config: config_lib.Molmo2Config) -> Points:
    """Returns the choices of a packed batch, at most one per three tokens."""
    T = batch.tokens.shape[1]
    is_token_BT = batch.tokens == config.special_id("<|token_index|>")
    token_BN = _places(is_token_BT & (batch.choice >= 0), T // 3 + 1)
    is_point_BN = token_BN < T
    chosen_BN = jnp.where(is_point_BN, take(batch.choice, token_BN), -1)

    def following(offset, name):
        at_BN = token_BN + offset
        is_there_BN = (at_BN < T) & (take(batch.tokens, at_BN) == config.special_id(name))
        is_there_BN &= is_point_BN & (chosen_BN != types.NO_MORE)
        return jnp.where(is_there_BN, types.inner(take(batch.choice, at_BN)), -1)

    before_BN, branch_BN, example_BN = (
        jnp.pad(x, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
        for x in (chosen_BN, take(batch.branch, token_BN), take(batch.example, token_BN)))
    follows_BN = ((branch_BN == take(batch.branch, token_BN)) & (example_BN == take(batch.example, token_BN))
                  & (before_BN >= 0) & (before_BN != types.NO_MORE))
    return Points(token_BN, chosen_BN, following(1, "<|vit_index|>"), following(2, "<|vit_loc|>"),
                  jnp.where(follows_BN & is_point_BN, before_BN, -1))


def _places(is_there_BT, size: int):
    """Returns int32[B, size]: the positions at which it holds, T after the last one."""
    T = is_there_BT.shape[1]
    return jax.vmap(lambda row: jnp.nonzero(row, size=size, fill_value=T)[0])(is_there_BT).astype(jnp.int32)


def take(x_BT, index_BN):
    """Returns x[b, index[b, n]], shape [B, N, ...]; an index outside gives the nearest entry."""
    index_BN = jnp.clip(index_BN, 0, x_BT.shape[1] - 1)
    return jnp.take_along_axis(x_BT, index_BN.reshape(*index_BN.shape, *[1] * (x_BT.ndim - 2)), axis=1)


def patch_of(pooled_BRW, chosen_BN, slot_BN):
    """Returns int32[B, N]: the patch id in slot j of the window of visual token r; -1 if empty or absent."""
    id_BN = take(pooled_BRW.reshape(pooled_BRW.shape[0], -1), chosen_BN * pooled_BRW.shape[2] + slot_BN)
    is_there_BN = (chosen_BN >= 0) & (chosen_BN < pooled_BRW.shape[1]) & (slot_BN >= 0)
    return jnp.where(is_there_BN, id_BN, -1)


def sub_features(is_sub_BT, choice_BT, features_BMPA, pooled_BRW):
    """Returns [B, N, A]: the ViT features chosen at each `<|vit_index|>`, in order; 0 after the last."""
    T = is_sub_BT.shape[1]
    at_BN = _places(is_sub_BT, T // 3 + 1)
    chosen_BN = jnp.where(at_BN < T, take(choice_BT, at_BN - 1), -1)
    patch_BN = patch_of(pooled_BRW, chosen_BN, types.inner(take(choice_BT, at_BN)))
    features_BpA = features_BMPA.reshape(features_BMPA.shape[0], -1, features_BMPA.shape[-1])
    return jnp.where((patch_BN >= 0)[..., None], take(features_BpA, patch_BN), 0)


def patch_scores(q_BNE, key_BRE, no_more_E, allowed_BNR, scale: float):
    """Returns float32[B, N, R + 1]: scores of visual tokens and, last, of "no more points".

    Args:
      q_BNE, key_BRE: rotated. allowed_BNR: candidates; others get -1e30.
    """
    s_BNR = jnp.einsum("BNE,BRE->BNR", q_BNE, key_BRE, preferred_element_type=jnp.float32)
    s_BN = jnp.einsum("BNE,E->BN", q_BNE, no_more_E.astype(q_BNE.dtype), preferred_element_type=jnp.float32)
    return jnp.concatenate([jnp.where(allowed_BNR, s_BNR / scale, _NEVER), s_BN[..., None] / scale], -1)


def sub_scores(q_BNE, key_BNWE, is_filled_BNW):
    """Returns float32[B, N, W]: scores of the patches in the chosen windows; -1e30 at empty slots."""
    s_BNW = jnp.einsum("BNE,BNWE->BNW", q_BNE, key_BNWE, preferred_element_type=jnp.float32)
    return jnp.where(is_filled_BNW, s_BNW / q_BNE.shape[-1] ** 0.5, _NEVER)
