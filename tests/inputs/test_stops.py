"""Stop strings: the token table finds what a text search finds; no text is returned too early."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from molmo2_jax.inputs import stops
from molmo2_jax.inputs import tokenizer as tokenizers

LETTERS = "abé"
words = st.text(LETTERS, min_size=1, max_size=4)


@pytest.fixture(scope="module")
def small():
    return tokenizers.train_small(["ab abé aab bba ba éb Stop. <stop>"] * 9, 320)


def read(table, ids):
    """Returns the number of ids read until a stop string is complete; None if none is."""
    state = 0
    for count, one in enumerate(ids, 1):
        state = table[state, one]
        if state == stops.FOUND:
            return count
    return None


@settings(max_examples=60, deadline=None)
@given(text=st.text(LETTERS, max_size=14), stop=st.lists(words, min_size=1, max_size=3),
       seed=st.integers(0, 9))
def test_the_table_ends_with_the_token_that_completes_the_first_stop_string(small, text, stop, seed):
    pieces, rng = [], np.random.default_rng(seed)
    while text:  # token boundaries other than the encoder's
        size = int(rng.integers(1, 6))
        pieces, text = pieces + small.encode(text[:size]), text[size:]
    table = stops.token_table(stop, small)
    texts = [small.decode(pieces[:count]) for count in range(len(pieces) + 1)]
    expected = next((count for count, one in enumerate(texts) if any(word in one for word in stop)), None)
    assert read(table, pieces) == expected


@settings(max_examples=60, deadline=None)
@given(text=st.text(LETTERS, max_size=14), stop=st.lists(words, max_size=3))
def test_settled_text_only_grows_into_the_text_before_the_stop_string(text, stop):
    whole = stops.cut(text, stop)
    before = ""
    for count in range(len(text) + 1):
        if any(word in text[:count] for word in stop):
            break
        shown = stops.settled(text[:count], stop)
        assert shown.startswith(before) and whole.startswith(shown)
        assert len(text[:count]) - len(shown) < max(map(len, stop), default=1)
        before = shown


def test_text_is_cut_before_the_first_stop_string():
    assert stops.cut("one. two; three.", (";", ".")) == "one"
    assert stops.cut("one", (";", ".")) == stops.cut("one", ()) == "one"
    assert stops.settled("one <st", ("<stop>",)) == "one "
    assert stops.settled("one <sx", ("<stop>",)) == "one <sx"


def test_end_of_turn_marks_can_be_stop_strings(small):
    table = stops.token_table(["<|endoftext|>"], small)
    assert read(table, small.encode("ab <|endoftext|>")) == len(small.encode("ab <|endoftext|>"))


def test_tables_have_few_sizes(small):
    assert stops.token_table((), small) is None
    shapes = {stops.token_table([word], small).shape for word in ("a", "abab", "a" * 16, "a" * 17)}
    assert shapes == {(16, 320), (32, 320)}


@pytest.mark.parametrize("stop", ["text", [""], ["a", ""]])
def test_impossible_stop_strings_are_refused(stop):
    with pytest.raises(ValueError, match="stop must be"):
        stops.check(stop)
