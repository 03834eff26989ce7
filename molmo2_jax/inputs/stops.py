"""Stop strings: texts that end an answer, regardless of token boundaries.

An automaton reads tokens byte by byte; its state is the longest prefix of a stop string just read (Aho and
Corasick, 1975). For the device it becomes a table over whole tokens.

S states, V base vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from molmo2_jax.inputs import tokenizer as tokenizers

FOUND = -1          # instead of a state: a stop string is complete
_LEAST_STATES = 16  # tables are padded to powers of two, so that few shapes are compiled


def check(stops: Sequence[str]) -> tuple[str, ...]:
    """Returns the stop strings as a tuple.

    Raises:
      ValueError: a stop string is empty, or `stops` is a single string.
    """
    if isinstance(stops, str) or not all(stops):
        raise ValueError(f"stop must be a sequence of texts of at least one character; got {stops!r}")
    return tuple(stops)


def byte_table(stops: Sequence[str]) -> np.ndarray:
    """Returns int32[S, 256]: the state after each byte; in state 0 no part of a stop string has been read."""
    words = [stop.encode("utf-8") for stop in stops]
    prefixes = sorted({word[:length] for word in words for length in range(len(word) + 1)}, key=len)
    states = [prefix for prefix in prefixes if not any(word in prefix for word in words)]
    number = {prefix: state for state, prefix in enumerate(states)}
    table = np.zeros((len(states), 256), np.int32)
    for state, prefix in enumerate(states):
        for byte in range(256):
            read = prefix + bytes([byte])
            if any(read.endswith(word) for word in words):
                table[state, byte] = FOUND
            else:
                table[state, byte] = next(
                    number[read[cut:]] for cut in range(len(read) + 1) if read[cut:] in number)
    return table


def token_table(stops: Sequence[str], tokenizer: tokenizers.Tokenizer) -> np.ndarray | None:
    """Returns int32[S, V]: the state after each token, or FOUND; None if there are no stop strings."""
    if not stops:
        return None
    by_byte = byte_table(stops)
    count = len(by_byte)
    table = np.tile(np.arange(count, dtype=np.int32)[:, None], tokenizer.vocab_size)
    spelt = [tokenizer.bytes_of(number) for number in range(tokenizer.vocab_size)]
    lengths = np.array([len(one) for one in spelt])
    for place in range(lengths.max()):
        reading = np.flatnonzero(lengths > place)
        byte = np.array([spelt[number][place] for number in reading])
        before = table[:, reading]
        table[:, reading] = np.where(before == FOUND, FOUND, by_byte[before, byte])
    padded = max(_LEAST_STATES, 1 << (count - 1).bit_length())
    return np.pad(table, ((0, padded - count), (0, 0)))


def cut(text: str, stops: Sequence[str]) -> str:
    """Returns the text up to its first stop string."""
    return text[:min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def settled(text: str, stops: Sequence[str]) -> str:
    """Returns the text without a final part that may still become a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for place in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[place:]) for stop in stops):
            return text[:place]
    return text
