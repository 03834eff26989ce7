"""The tokenizer: special tokens, encoding, decoding, saving, workers."""

import json
import multiprocessing
import pickle
import subprocess
import sys
import unicodedata

import hypothesis
import pytest
import tokenizers
import transformers
from hypothesis import strategies

from molmo2_jax import config
from molmo2_jax.inputs import prompt
from molmo2_jax.inputs import tokenizer

COLOURS, SHAPES = "red green blue yellow purple orange".split(), "circle square triangle star cross".split()


def corpus():
    for number, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
        yield f"Point to the {colour} {shape}."
        yield f"How many {colour} {shape}s are there in the video?"
        coords = f"{number}.5 1 {number * 31:03d} {number * 17:03d}"
        yield f'Counting the <points coords="{coords}">{colour} {shape}</points> shows a total of {number}.'
        yield f'<tracks coords="{coords}">{colour} {shape}</tracks>'
        yield f"Track the {colour} {shape} at 2 FPS."
        yield "There are none."


@pytest.fixture(scope="module")
def small():
    return tokenizer.train_small(corpus(), 512)


def base():
    """A tokenizer as base models publish it: no fillers, no Molmo2 tokens."""
    raw = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, [("a", "b")]))
    raw.decoder = tokenizers.decoders.ByteLevel()
    return raw


def test_special_tokens_follow_the_fillers_in_order(small):
    assert small.vocab_size == 512
    assert list(small.special) == list(config.SPECIAL_TOKENS)
    assert list(small.special.values()) == list(range(512, 512 + len(config.SPECIAL_TOKENS)))
    assert small.encode("|<EXTRA_TOKENS_0>|") == [511 - sum("EXTRA" in text for text in small.reserved) + 1]
    assert small.bos_id == small.eos_id == small.encode("<|im_end|>")[0] < 512


def test_appending_to_any_tokenizer_fills_the_vocabulary():
    raw = base()
    tokenizer.append_special_tokens(raw, 10)
    assert [raw.id_to_token(number) for number in (4, 9)] == ["|<EXTRA_TOKENS_0>|", "|<EXTRA_TOKENS_5>|"]
    assert raw.token_to_id("<im_start>") == 10 and raw.token_to_id("<|vit_loc|>") == 23
    exact = base()
    tokenizer.append_special_tokens(exact, 4)
    assert exact.token_to_id("<im_start>") == 4
    with pytest.raises(ValueError, match="at least the tokenizer's 4 entries; got 3"):
        tokenizer.append_special_tokens(base(), 3)
    with pytest.raises(ValueError, match="already holds"):
        tokenizer.append_special_tokens(raw, 30)


def test_words_of_the_corpus_are_single_tokens_and_numbers_single_digits(small):
    words = [*COLOURS, "points", "tracks", *(f" {word}" for word in COLOURS + SHAPES)]
    assert {word: len(small.encode(word)) for word in words} == dict.fromkeys(words, 1)
    assert len(small.encode("Point to the red circle.")) == 6
    markup = ('<tracks coords="', ' <points coords="', '">', "</points>")
    lengths = [len(small.encode(text)) for text in markup]
    assert lengths == [3, 4, 1, 3]
    for text, length in (("0.0 ", 4), (" 0.5 ", 5), (" 127.5 ", 7)):
        assert len(small.encode(text)) == length
    digits = [small.encode(str(digit)) for digit in range(10)]
    assert small.encode("0123456789") == sum(digits, [])


def test_chat_markup_becomes_single_ids(small):
    ids = small.encode(prompt.chat_texts(["Point to the red circle."])[0])
    starts = small.encode("<|im_start|>")
    assert len(starts) == 1 and ids[0] == starts[0] and ids.count(starts[0]) == 2
    assert ids.count(small.eos_id) == 1


def test_encoding_composes_unicode_first(small):
    assert small.encode("e\u0301") == small.encode("\u00e9")


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(strategies.text(max_size=60))
def test_any_text_survives_encoding(small, text):
    hypothesis.assume(not any(token in text for token in small.reserved))
    assert small.decode(small.encode(text)) == unicodedata.normalize("NFC", text)


def published(split):
    """A byte-level BPE as base models publish it: three merges of digits and letters, no Molmo2 tokens."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.normalizer = tokenizers.normalizers.NFC() if split == "digits" else None
    pattern = (r"\p{N}" if split == "digits" else r"\p{N}{1,3}") + r"|\s?\p{L}+|[^\p{L}\p{N}]+"
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=460, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator([*corpus(), *["naïve 東京 😀 Ω 123 456"] * 9], trainer)
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return raw


FUZZ = strategies.text(max_size=40) | strategies.lists(
    strategies.sampled_from(["Point to", " the", "\r\n", "\t ", "123456", " 0.5 ", "e\u0301", "東京",
                             "\u200d", "😀👩\u200d👩", "\ufeff", "<|im_end|>", "<|im", "ß", "\u0130",
                             "\x00", "؀", "ﬁ", "\U0010ffff"]),
    max_size=12).map("".join)


@pytest.mark.parametrize("split", ["digits", "triples"])
def test_encoding_equals_that_of_tokenizers_and_transformers_on_any_text(split, tmp_path):
    raw = published(split)
    raw.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.Tokenizer.from_file(tmp_path, vocab_size=500)
    ours.save(tmp_path / "saved")
    peer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))

    @hypothesis.settings(deadline=None, max_examples=250)
    @hypothesis.given(FUZZ)
    def compare(text):
        # Hypothesis also draws constants of the code under test, among them the tokens that only ours has.
        hypothesis.assume(not any(token in text for token in config.SPECIAL_TOKENS))
        ids = raw.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids == peer.encode(text, add_special_tokens=False)
        assert ours.bos_id == ours.eos_id == raw.token_to_id("<|im_end|>")

    compare()


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(strategies.lists(strategies.integers(0, 540), max_size=30))
def test_decoding_bit_by_bit_equals_decoding_at_once(small, ids):
    stream = tokenizer.StreamDecoder(small)
    assert "".join(map(stream.feed, ids)) + stream.flush() == small.decode(ids)


def test_a_stream_gives_characters_as_soon_as_they_are_complete(small):
    stream = tokenizer.StreamDecoder(small)
    pieces = [stream.feed(one) for one in small.encode("ä€😀a")]
    assert [piece for piece in pieces if piece] == ["ä", "€", "😀", "a"] and "" in pieces


def test_decoding_skips_bos_and_ends_at_eos(small):
    ids = small.encode("There are none.")
    eos = [small.eos_id]
    assert small.decode(eos + ids + eos + ids) == "There are none."
    assert small.decode(ids) == "There are none." and small.decode(eos) == small.decode([]) == ""


def test_training_depends_on_the_texts_only(small):
    code = ("import json, sys; from molmo2_jax.inputs import tokenizer\n"
            "print(tokenizer.train_small(json.load(sys.stdin), 512)._tokenizer.to_str())")
    backwards = list(corpus())[::-1]
    other = subprocess.run([sys.executable, "-c", code], input=json.dumps(backwards), check=True,
                           capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert other.stdout.strip() == small._tokenizer.to_str()


def test_a_saved_tokenizer_is_the_same(small, tmp_path):
    small.save(tmp_path / "new")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        again = tokenizer.Tokenizer.from_file(path, 512)
        text = 'Counting the <points coords="1 1 100 200">red circle</points> shows a total of 1.'
        assert again.encode(text) == small.encode(text)
        assert (again.bos_id, again.eos_id, again.special) == (small.bos_id, small.eos_id, small.special)
    with pytest.raises(ValueError, match="must equal .*512; got 500"):
        tokenizer.Tokenizer.from_file(tmp_path / "new", 500)


def test_bos_and_eos_come_from_the_file_beside_it(tmp_path):
    raw = base()
    raw.add_special_tokens(["<s>", "<|im_end|>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    plain = tokenizer.Tokenizer.from_file(tmp_path, 8)
    assert plain.bos_id == plain.eos_id == 5
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>"}))
    told = tokenizer.Tokenizer.from_file(tmp_path, 8)
    assert (told.bos_id, told.eos_id) == (4, 3)
    assert told.decode([4, 2, 3, 2]) == "<s>ab"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<im_end>"}')
    with pytest.raises(ValueError, match="entries of the base vocabulary; got '<im_end>'"):
        tokenizer.Tokenizer.from_file(tmp_path, 8)


def test_a_byte_order_mark_changes_no_tokenizer_and_other_encodings_are_refused(small, tmp_path):
    small.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / name
        path.write_bytes(path.read_text(encoding="utf-8").encode("utf-8-sig"))
    again = tokenizer.Tokenizer.from_file(tmp_path, small.vocab_size)
    assert (again.bos_id, again.eos_id) == (small.bos_id, small.eos_id)
    assert again.encode("Point to the red circle.") == small.encode("Point to the red circle.")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        path = tmp_path / name
        path.write_bytes(path.read_text(encoding="utf-8-sig").encode("utf-16"))
        with pytest.raises(ValueError, match=f"{name}: text must be UTF-8; got .*probably UTF-16"):
            tokenizer.Tokenizer.from_file(tmp_path, small.vocab_size)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_instead_of_a_tokenizer_is_called_that(small, tmp_path, name):
    small.save(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 11\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*`git lfs pull`"):
        tokenizer.Tokenizer.from_file(tmp_path, small.vocab_size)


def test_files_that_are_no_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="readable tokenizer.json"):
        tokenizer.Tokenizer.from_file(tmp_path / "missing.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="readable tokenizer.json"):
        tokenizer.Tokenizer.from_file(tmp_path, 8)
    base().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="vocab_size is needed"):
        tokenizer.Tokenizer.from_file(tmp_path)
    with pytest.raises(ValueError, match="consecutive ids"):
        tokenizer.Tokenizer(base())
    with pytest.raises(ValueError, match="at least 259; got 258"):
        tokenizer.train_small([], 258)


def test_a_corpus_may_be_too_small_to_fill_the_vocabulary():
    tiny = tokenizer.train_small(["a"], 600)
    assert tiny.vocab_size == 600 and tiny.decode(tiny.encode("héllo")) == "héllo"


def _encoded_elsewhere(one):
    return one.encode("Point to the red circle.")


def test_workers_receive_the_tokenizer(small):
    again = pickle.loads(pickle.dumps(small))
    assert again._tokenizer.to_str() == small._tokenizer.to_str()
    assert (again.bos_id, again.reserved) == (small.bos_id, small.reserved)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_encoded_elsewhere, (small,)) == _encoded_elsewhere(small)
