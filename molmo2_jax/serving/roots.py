"""A bounded store of roots: keys and values of media that were asked about, by the hash of their content."""

import collections
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from molmo2_jax import types


class Root(NamedTuple):
    """Keys and values of BOS and visual tokens."""
    cache: Any            # as serving/rows.py `see` returns it, in a bucket of `places`
    length: int           # tokens
    places: int
    visual: int           # visual tokens
    media: types.Media

    @property
    def size(self) -> int:
        """Bytes on all devices."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache))


class OutOfMemory(Exception):
    """The devices have too little memory left for a root."""


def within_memory(see: Callable, batch: types.Batch):
    """Returns see(batch), computed.

    Raises:
      OutOfMemory: the devices have too little memory for it.
    """
    try:
        return jax.block_until_ready(see(batch))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory("the devices have too little memory left for these media") from error


class Roots:
    """Roots up to a number of bytes; the least recently used ones leave first, but none that is held.

    A root that is larger than what is free and not held is not kept. Any thread may call.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self.size = self.hits = self.misses = self.evictions = 0
        self._roots: collections.OrderedDict[str, Root] = collections.OrderedDict()
        self._held: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._roots)

    def find(self, key: str | None) -> Root | None:
        """Returns the root of a key, now the most recently used one; None if it is not here."""
        with self._lock:
            root = self._roots.get(key) if key is not None else None
            if root is not None:
                self._roots.move_to_end(key)
            return root

    def hold(self, key: str) -> Root | None:
        """Returns a root, which stays until `let_go`; None if it is not here."""
        with self._lock:
            root = self._roots.get(key)
            if root is None:
                self.misses += 1
                return None
            self.hits += 1
            self._held[key] += 1
            self._roots.move_to_end(key)
            return root

    def let_go(self, key: str) -> None:
        """Ends one `hold` of a root."""
        with self._lock:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]

    def keep(self, key: str, root: Root) -> bool:
        """Returns whether the root is kept."""
        with self._lock:
            size = root.size
            if key in self._roots:
                return True
            free = [name for name in self._roots if name not in self._held]
            if size > self.most_bytes - self.size + sum(self._roots[name].size for name in free):
                return False
            while self.size + size > self.most_bytes:
                self.size -= self._roots.pop(free.pop(0)).size
                self.evictions += 1
            self._roots[key] = root
            self.size += size
            return True
