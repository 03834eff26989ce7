"""Text to ids and back, for any byte-level BPE `tokenizer.json` (Qwen3, OLMo 3, nano).

Ids 0 .. vocab_size - 1 index the base embedding and the logits; unused ones are filled with
`|<EXTRA_TOKENS_i>|`. The Molmo2 tokens follow in the order of config.SPECIAL_TOKENS and index the second,
input-only embedding.

Source: reference: olmo/tokenizer.py.
"""

import codecs
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import trainers

from molmo2_jax import config
from molmo2_jax.inputs import file_kind
from molmo2_jax.inputs import text_file

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# As in Qwen3: words with at most one leading sign or space, single digits, runs of signs, white space.
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")


# Entries that released tokenizers of models with a pointer have after the special tokens: ids by which other
# programs carry choices. Here choices are not tokens (inputs/grounded.py), so these entries are left out.
_CHOICE = re.compile(r"<(?:EXTRA_TOKENS_POINT|POINT)_\d+>")

# The class that tokenizer_config.json names if tokenizer.json alone defines the tokenizer.
GENERIC_CLASS = "PreTrainedTokenizerFast"


def _special(text: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, normalized=False, special=True)


def append_special_tokens(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> None:
    """Adds fillers up to `vocab_size` entries, then the Molmo2 tokens; changes `tokenizer` in place.

    Raises:
      ValueError: the tokenizer has more than vocab_size entries, or already contains one of the tokens.
    """
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > vocab_size:
        raise ValueError(f"vocab_size must be at least the tokenizer's {size} entries; got {vocab_size}")
    fillers = [f"|<EXTRA_TOKENS_{number}>|" for number in range(vocab_size - size)]
    texts = fillers + list(config.SPECIAL_TOKENS)
    tokenizer.add_special_tokens([_special(text) for text in texts])
    wrong = [text for offset, text in enumerate(texts) if tokenizer.token_to_id(text) != size + offset]
    if wrong:
        raise ValueError(f"special tokens must be new to the tokenizer; it already holds {wrong[:5]}")


class Tokenizer:
    """A tokenizer with fillers and special tokens, and what the model needs to know about it.

    bos_id, eos_id: EOS serves as BOS if the base model has none.
    vocab_size: entries of the base vocabulary, fillers included; the first special token has this id.
    special: id of each of config.SPECIAL_TOKENS.
    reserved: texts of all special entries, which plain text must not contain.
    hub_class: `tokenizer_class` of its tokenizer_config.json, e.g. "Qwen2Tokenizer"; saved unchanged.

    Raises:
      ValueError: special ids are not consecutive, or BOS or EOS is not in the vocabulary.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, bos: str | None = None, eos: str | None = None,
                 hub_class: str = GENERIC_CLASS):
        self._tokenizer, self.hub_class = tokenizer, hub_class
        self._texts = (bos, eos)
        self.special = {text: tokenizer.token_to_id(text) for text in config.SPECIAL_TOKENS}
        first = self.special[config.SPECIAL_TOKENS[0]]
        if first is None or list(self.special.values()) != list(range(first, first + len(self.special))):
            raise ValueError("a tokenizer must hold the special tokens with consecutive ids "
                             f"(append_special_tokens); got {self.special}")
        self.vocab_size = first
        added = tokenizer.get_added_tokens_decoder()
        self.reserved = tuple(token.content for token in added.values() if token.special)
        if eos is None:
            eos = TURN_END if tokenizer.token_to_id(TURN_END) is not None else END_OF_TEXT
        self.eos_id = self._base_id(eos)
        self.bos_id = self.eos_id if bos is None else self._base_id(bos)

    def _base_id(self, text: str) -> int:
        found = self._tokenizer.token_to_id(text)
        if found is None or found >= self.vocab_size:
            raise ValueError(f"BOS and EOS must be entries of the base vocabulary; got {text!r}")
        return found

    @classmethod
    def from_file(cls, path: str | pathlib.Path, vocab_size: int | None = None) -> "Tokenizer":
        """Returns the tokenizer of a `tokenizer.json`, or of the folder that holds one.

        If it lacks the special tokens, they are appended after `vocab_size` entries. BOS and EOS are from the
        `tokenizer_config.json` next to it; without one, EOS is `<|im_end|>` if that exists, else
        `<|endoftext|>`.

        Raises:
          ValueError: the file cannot be read, or `vocab_size` is missing or does not fit it.
        """
        path = pathlib.Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_str(_without_choices(text_file.read(path)))
            settings = _settings(path.parent / "tokenizer_config.json")
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            what = file_kind.describe(path) if path.is_file() else ""
            raise ValueError("a tokenizer must be a readable tokenizer.json; " + (
                f"{path} is {what}" if what else f"{path}: {error}")) from error
        if tokenizer.token_to_id(config.SPECIAL_TOKENS[0]) is None:
            if vocab_size is None:
                raise ValueError(f"vocab_size is needed: {path} does not hold the Molmo2 tokens yet")
            append_special_tokens(tokenizer, vocab_size)
        result = cls(tokenizer, bos=_text_of(settings.get("bos_token")),
                     eos=_text_of(settings.get("eos_token")), hub_class=_class_of(settings))
        if vocab_size is not None and result.vocab_size != vocab_size:
            raise ValueError(f"vocab_size must equal that of {path}, {result.vocab_size}; got {vocab_size}")
        return result

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; nothing is added. Chat markup in it becomes special ids."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_text(self, text: str) -> list[int]:
        """Returns the ids of a text in which special tokens stay text; nothing is added."""
        return self._plain.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text up to the first EOS. A leading EOS that serves as BOS is skipped."""
        return self._tokenizer.decode(self._answer(list(map(int, ids))), skip_special_tokens=False)

    def _answer(self, ids: Sequence[int]) -> Sequence[int]:
        if ids and ids[0] == self.eos_id == self.bos_id:
            ids = ids[1:]
        return ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids

    def token(self, token_id: int) -> str | None:
        """Returns the vocabulary entry of an id in byte-level spelling; None if there is none."""
        return self._tokenizer.id_to_token(int(token_id))

    def bytes_of(self, token_id: int) -> bytes:
        """Returns the UTF-8 bytes of a vocabulary entry; b"" for an id without an entry."""
        token = self.token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_LETTER[letter] for letter in token)
        except KeyError:  # an added token, spelt as plain text
            return token.encode("utf-8")

    def spell(self, ids: Iterable[int]) -> str:
        """Returns the text of all ids, chat markup and what follows an EOS included."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json (BOS and EOS) into `folder`."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / "tokenizer.json"))
        bos, eos = self._texts
        settings = {"tokenizer_class": self.hub_class, "bos_token": bos,
                    "eos_token": eos or self.token(self.eos_id), "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    def __reduce__(self):
        return Tokenizer, (self._tokenizer, *self._texts, self.hub_class)


def _without_choices(text: str) -> str:
    """Returns the text of a tokenizer.json without the entries of _CHOICE."""
    if "<POINT_0>" not in text:
        return text
    values = json.loads(text)
    values["added_tokens"] = [one for one in values["added_tokens"] if not _CHOICE.fullmatch(one["content"])]
    return json.dumps(values)


def _settings(path: pathlib.Path) -> dict:
    return text_file.read_json(path) if path.is_file() else {}


def _class_of(settings: dict) -> str:
    """Returns the tokenizer_class; a name known only to transformers 5 becomes one that 4 knows too."""
    found = settings.get("tokenizer_class")
    return found if found and found != "TokenizersBackend" else GENERIC_CLASS


def _text_of(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def train_small(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer trained on `corpus`, built like Qwen3's: single digits, no BOS.

    The result depends on the texts only. If a small corpus gives fewer merges, fillers take their place.

    Raises:
      ValueError: vocab_size is too small for the 256 bytes and the three chat tokens.
    """
    chat = [END_OF_TEXT, TURN_START, TURN_END]
    if vocab_size < 256 + len(chat):
        raise ValueError(f"vocab_size must be at least {256 + len(chat)}; got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab_size - len(chat), show_progress=False, min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.add_special_tokens([_special(text) for text in chat])
    append_special_tokens(tokenizer, vocab_size)
    return Tokenizer(tokenizer)


def _byte_of_letter() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary represents (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_of_letter()


class StreamDecoder:
    """Decodes ids one by one. All `feed` results and `flush` together equal `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_first, self._is_over = True, False

    def feed(self, token_id: int) -> str:
        """Returns the text completed by this id; "" within a character, and after EOS."""
        is_first, self._is_first = self._is_first, False
        if token_id == self._tokenizer.eos_id:
            self._is_over |= not (is_first and self._tokenizer.bos_id == token_id)
            return ""
        return "" if self._is_over else self._utf8.decode(self._tokenizer.bytes_of(token_id))

    def flush(self) -> str:
        """Returns the decoding of an unfinished last character."""
        return self._utf8.decode(b"", final=True)
