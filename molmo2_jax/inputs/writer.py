"""The text of an answer while it is generated."""

from collections.abc import Sequence

from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import stops
from molmo2_jax.inputs import tokenizer as tokenizers


class Writer:
    """Turns the growing ids of an answer into text: only whole characters, never part of a stop string."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: Sequence[str]):
        self._decoder = tokenizers.StreamDecoder(tokenizer)
        self._stop, self._read, self._text, self._given = stop, 0, "", 0
        self.is_over = False

    @property
    def text(self) -> str:
        """The text given so far."""
        return self._text[:self._given]

    def read(self, ids: Sequence[int], choices: Sequence[int] | None = None) -> bool:
        """Returns whether a stop string is complete; `ids` are all tokens of the answer so far.

        choices: of the tokens, for a model with a pointer.
        """
        for place in range(self._read, len(ids)):
            piece = self._decoder.feed(int(ids[place]))
            self._text += piece if choices is None else grounded.join(piece, [int(choices[place])])
        self._read = len(ids)
        return any(stop in self._text for stop in self._stop)

    def write(self, ids: Sequence[int], is_over: bool, choices: Sequence[int] | None = None) -> str:
        """Returns the new text; arguments as `read`."""
        self.read(ids, choices)
        self.is_over = is_over
        if is_over:
            self._text += self._decoder.flush()
            shown = stops.cut(self._text, self._stop)
        else:
            shown = stops.settled(self._text, self._stop)
        new, self._given = shown[self._given:], len(shown)
        return new
