"""The attention mask of packed message trees, in two int32 vectors per row.

A token is visible to a contiguous run of later tokens: a root token until its example ends, a branch token
until its branch ends. In addition, all visual tokens of one group see each other in both directions:

    allowed(i, j) = ( j <= i < end[j] )  or  ( group[i] = group[j] and group[j] >= 0 )

An example with two visual tokens v around a timestamp t, and two branches a, b (rows are queries, columns
keys):

         v t v a a b b      end    7 7 7 5 5 7 7
    v    x . x . . . .      group  0 - 0 - - - -
    t    x x . . . . .
    v    x x x . . . .
    a    x x x x . . .
    a    x x x x x . .
    b    x x x . . x .
    b    x x x . . x x

B batch, S positions, T queries.

Source: paper, section 3.2; reference: olmo/models/molmo2/molmo2.py, which builds the S x S mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TreeMask(NamedTuple):
    """Which query sees which key.

    `end` int32[B, S], exclusive, > own position; `group` int32[B, S], -1 at text.
    Groups are numbered 0, 1, ... along a row, in order and without gaps.
    """
    end: jax.Array
    group: jax.Array


class Queries(NamedTuple):
    """The T query positions of each row: first[b], first[b] + 1, ...; `group` as in TreeMask."""
    first: jax.Array   # int32[B]
    group: jax.Array   # int32[B, T]


def from_batch(batch, visual_attention: str) -> TreeMask:
    """Returns the mask of a packed batch under one of the paper's attention settings (Table 8b).

    "image_tokens": all visual tokens of an example see each other. "within_image": those of one image or
    frame do, and earlier images are visible causally. "causal": no token sees a later one.
    """
    groups = {"image_tokens": batch.group, "within_image": batch.image,
              "causal": jnp.full_like(batch.group, -1)}
    return TreeMask(batch.end, groups[visual_attention])


def causal(rows: int, length: int) -> TreeMask:
    """Returns the mask under which every token sees itself and all earlier ones."""
    return TreeMask(jnp.full((rows, length), length, jnp.int32), jnp.full((rows, length), -1, jnp.int32))


def segments(segment_BS: jax.Array) -> TreeMask:
    """Returns the causal mask of packed documents, runs of one number; tokens below 0 see only themselves."""
    length = segment_BS.shape[1]
    position = jnp.arange(length, dtype=jnp.int32)
    is_last = jnp.pad(segment_BS[:, 1:] != segment_BS[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    next_end = jax.lax.cummin(jnp.where(is_last, position + 1, length), axis=1, reverse=True)
    return TreeMask(jnp.where(segment_BS < 0, position + 1, next_end), jnp.full_like(segment_BS, -1))


def everything(rows: int, length: int) -> TreeMask:
    """Returns the mask under which all tokens of a row see each other."""
    return TreeMask(jnp.full((rows, length), length, jnp.int32), jnp.zeros((rows, length), jnp.int32))


def all_queries(mask: TreeMask) -> Queries:
    """Returns the queries of self-attention: every position of a row."""
    return Queries(jnp.zeros(mask.end.shape[0], jnp.int32), mask.group)


def dense(mask: TreeMask, queries: Queries | None = None) -> jax.Array:
    """Returns bool[B, T, S] (query, key). Quadratic: for tests, drawings, and a few queries at a time."""
    first, group = queries or all_queries(mask)
    i = (first[:, None] + jnp.arange(group.shape[1]))[:, :, None]
    j = jnp.arange(mask.end.shape[1])
    causal = (j <= i) & (i < mask.end[:, None, :])
    return causal | ((group[:, :, None] == mask.group[:, None, :]) & (mask.group[:, None, :] >= 0))


def pad(mask: TreeMask, length: int) -> TreeMask:
    """Returns the mask padded to `length` with tokens that see, and are visible to, only themselves."""
    batch, old = mask.end.shape
    tail = jnp.broadcast_to(jnp.arange(old, length, dtype=jnp.int32) + 1, (batch, length - old))
    return TreeMask(jnp.concatenate([mask.end, tail], 1),
                    jnp.concatenate([mask.group, jnp.full_like(tail, -1)], 1))


def pad_queries(queries: Queries, length: int) -> Queries:
    """Returns the queries padded to `length` positions, the new ones in no group."""
    room = ((0, 0), (0, length - queries.group.shape[1]))
    return queries._replace(group=jnp.pad(queries.group, room, constant_values=-1))
