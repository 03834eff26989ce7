"""Peers in the attention benchmark compute the same mask."""

import numpy as np

from benchmarks.attention import packs as attention_packs
from benchmarks.attention import peers as attention_peers
from molmo2_jax.attention import tree_mask


def test_the_rule_of_flex_attention_is_the_mask():
    mask = attention_packs.row(attention_packs.PACKS["short-mix"], 1024, 3)
    rule = attention_peers.flex_rule(mask.end[0], mask.group[0])
    i, j = np.ogrid[:1024, :1024]
    seen = rule(0, 0, i, j)
    np.testing.assert_array_equal(seen, tree_mask.dense(mask)[0])
    assert seen.sum() == attention_packs.visible_pairs(mask)
