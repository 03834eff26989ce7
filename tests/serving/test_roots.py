"""The store of roots is bounded, forgets what was not used, and keeps what is held."""

import numpy as np

from molmo2_jax import types
from molmo2_jax.serving import roots as roots_lib


def root(size):
    return roots_lib.Root(np.zeros(size, np.uint8), 1, 128, 0, types.Media())


def test_the_least_recently_used_root_leaves_first():
    store = roots_lib.Roots(100)
    assert store.keep("a", root(40)) and store.keep("b", root(40)) and store.size == 80
    assert store.find("a") is not None
    assert store.keep("c", root(40)) and (store.size, len(store), store.evictions) == (80, 2, 1)
    assert store.find("b") is None and store.find("a") is not None and store.find(None) is None
    assert store.keep("a", root(40)) and store.size == 80


def test_a_held_root_stays_and_one_that_has_no_room_is_not_kept():
    store = roots_lib.Roots(100)
    store.keep("a", root(60))
    assert store.hold("a").size == 60 and store.hold("none") is None
    assert not store.keep("b", root(60)) and not store.keep("c", root(101)) and store.keep("d", root(40))
    store.let_go("a")
    assert store.keep("b", root(60)) and (store.size, store.find("a")) == (100, None)
    assert (store.hits, store.misses, store.evictions) == (1, 1, 1)
    assert not roots_lib.Roots(0).keep("a", root(1))
