"""The message tree: a visual input and its conversations as one flat sequence (paper, section 3.2).

    root            branch 0                          branch 1
    BOS visual ...  <user> question <model> answer    <user> question <model> answer ...
    0   1 ... R-1   R  R+1 ...                        R  R+1 ...                         positions

Each branch continues the root independently of the other branches.

Source: reference: olmo/preprocessing/text_preprocessor.py, with one difference: branches start after the root
even if the root is BOS alone (the reference then starts them at BOS's own position 0).
"""

import dataclasses
import math
from collections.abc import Sequence as Listing

import numpy as np

from molmo2_jax import types
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import prompt
from molmo2_jax.inputs import tokenizer as tokenizers

VISUAL = ("<im_patch>", "<im_low>")   # tokens with a row of `pooled`; the second with config.PointerConfig
NO_CROPS = types.Crops(patches=np.zeros((0, 0, 0), np.uint8), pooled=np.zeros((0, 0), np.int32),
                       tokens=np.zeros(0, np.int32), image=np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """One branch without its last EOS: ids int32[T], whether each is learnt bool[T], choices int32[T]."""
    ids: np.ndarray
    is_learnt: np.ndarray
    weight: types.LossWeight
    choice: np.ndarray | None = None

    @property
    def offset_of_loss(self) -> int:
        return int(np.argmax(self.is_learnt))


def build(crops: types.Crops | None, branches: Listing[types.Branch], tokenizer: tokenizers.Tokenizer, *,
          max_tokens: int | None = None, max_text_tokens: int | None = None,
          length_factor: float = 2.0) -> types.Sequence:
    """Returns the Sequence of a visual input (None: text only) and its branches, in the order given.

    A single branch is a plain conversation: `branch` is -1 throughout. An odd number of turns, allowed only
    for a single branch, asks for the next answer: targets and weights are then 0.
    A branch whose first loss token would be at `max_tokens` or later is dropped with all later branches;
    branch 0 is always kept, and nothing is cut here (see `truncate`). The branch that reaches
    `max_text_tokens` is the last one kept. Text-only sequences have 0 crops of 0 patches. `length_factor` is
    the 2 of 2 / sqrt(n) in LossWeight (the paper prints 4).

    Raises:
      ValueError: there is no branch, an answer is empty, a text contains special tokens, a question in a tree
        has no answer, or the `<im_patch>` tokens and pooled rows of the crops differ in number.
    """
    if not branches:
        raise ValueError("a sequence must have at least one branch; got none")
    crops = _checked(crops, tokenizer)
    if len(branches) == 1:
        return _conversation(crops, branches[0], tokenizer, length_factor)
    for number, branch in enumerate(branches):
        if len(branch.turns) % 2:
            raise ValueError("branches of a tree must end with an answer; "
                             f"got {len(branch.turns)} turns in branch {number}")
    encoded = _admit(branches, tokenizer, len(crops.tokens), max_tokens, max_text_tokens)
    return _tree(crops, encoded, tokenizer, length_factor)


def ask(crops: types.Crops | None, conversations: Listing[Listing[str]], tokenizer: tokenizers.Tokenizer
        ) -> tuple[types.Sequence, tuple[int, ...]]:
    """Returns (a tree with one branch per conversation, the index in it of the last token of each).

    A conversation has an odd number of turns and asks for the next one. Each branch has the tokens and
    positions that the conversation would have as a sequence of its own; targets and weights are 0.

    Raises:
      ValueError: there is no conversation, one has an even number of turns or contains special tokens, or the
        `<im_patch>` tokens and pooled rows of the crops differ in number.
    """
    if not conversations:
        raise ValueError("at least one question is needed; got none")
    for turns in conversations:
        if len(turns) % 2 == 0:
            raise ValueError(f"a question must have an odd number of turns; got {len(turns)}")
    encoded = [_encode(types.Branch(turns=tuple(turns)), tokenizer) for turns in conversations]
    branches = [one.ids for one in encoded]
    tree = _lay_out(_checked(crops, tokenizer), branches, tokenizer, [one.choice for one in encoded])
    ends = len(tree.tokens) - sum(map(len, branches)) + np.cumsum([len(ids) for ids in branches])
    return tree, tuple(int(end) - 1 for end in ends)


def ids_of_text(turns: Listing[str], tokenizer: tokenizers.Tokenizer, has_pointer: bool = False
                ) -> tuple[list[int], list[int]]:
    """Returns (ids, choices) that `ask` gives a conversation after the root, for texts that nobody has
    checked: special tokens in them stay text, but for what answers chose if `has_pointer`.

    Raises:
      ValueError: there is no turn, or an answer is empty.
    """
    ids: list[int] = []
    choices: list[int] = []

    def add(found: list[int], choice: int = -1) -> None:
        ids.extend(found)
        choices.extend([choice] * len(found))

    for number, pieces in enumerate(prompt.chat_pieces(turns)):
        for text, is_special in pieces:
            if is_special or not (has_pointer and number % 2):
                add(tokenizer.encode(text) if is_special else tokenizer.encode_text(text))
                continue
            for piece, choice in grounded.pieces(text):
                add(tokenizer.encode_text(piece) if choice is None else [tokenizer.special[piece]],
                    -1 if choice is None else choice)
        if number % 2:
            add([tokenizer.eos_id])
    return ids, choices


def root(crops: types.Crops, tokenizer: tokenizers.Tokenizer) -> types.Sequence:
    """Returns BOS and the visual tokens, which all conversations about one visual input begin with.

    Raises:
      ValueError: the `<im_patch>` tokens and pooled rows of the crops differ in number.
    """
    return _lay_out(_checked(crops, tokenizer), [], tokenizer)


def _checked(crops: types.Crops | None, tokenizer: tokenizers.Tokenizer) -> types.Crops:
    """Returns the crops; NO_CROPS for None.

    Raises:
      ValueError: the `<im_patch>` tokens and pooled rows differ in number.
    """
    crops = NO_CROPS if crops is None else crops
    patches = int(np.sum(np.isin(crops.tokens, [tokenizer.special[name] for name in VISUAL])))
    if patches != len(crops.pooled):
        raise ValueError(f"crops must have one pooled row per <im_patch> token, {patches}; "
                         f"got {len(crops.pooled)}")
    return crops


def _encode(branch: types.Branch, tokenizer: tokenizers.Tokenizer) -> _Encoded:
    """Returns the ids of a conversation, with EOS after each answer but the last."""
    ids, is_learnt = [], []
    turns, choices = list(branch.turns), []
    for number in range(1, len(turns), 2):
        turns[number], chosen = grounded.split(turns[number])
        choices += chosen
    for number, text in enumerate(prompt.chat_texts(turns, tokenizer.reserved,
                                                    grounded.TOKENS if choices else ())):
        is_answer = number % 2 == 1
        piece = tokenizer.encode(text)
        if is_answer and number < len(branch.turns) - 1:
            piece = piece + [tokenizer.eos_id]
        ids += piece
        is_learnt += [is_answer] * len(piece)
    found = np.array(ids, np.int32)
    return _Encoded(found, np.array(is_learnt, bool), branch.weight, _choice(found, choices, tokenizer))


def _choice(ids: np.ndarray, choices: Listing[int], tokenizer) -> np.ndarray | None:
    """Returns int32[T], the choice at each token of a branch; None if it has none.

    Raises:
      ValueError: choices and grounding tokens differ in number.
    """
    if not choices:
        return None
    places = np.flatnonzero(np.isin(ids, [tokenizer.special[name] for name in grounded.TOKENS]))
    if len(places) != len(choices):
        raise ValueError(f"every grounding token must carry a choice; got {len(choices)} for {len(places)}")
    choice = np.full(len(ids), -1, np.int32)
    choice[places] = choices
    return choice


def _weight(rule: types.LossWeight, num_loss_tokens: int, num_branches: int, length_factor: float) -> float:
    by_length = length_factor / math.sqrt(num_loss_tokens) if rule.by_length else 1.0
    by_branches = 1 / math.sqrt(num_branches) if rule.by_branches else 1.0
    return rule.scale * by_length * by_branches


def _admit(branches, tokenizer, num_visual: int, max_tokens, max_text_tokens) -> list[_Encoded]:
    """Returns the branches that enter the tree; dropped ones are not encoded."""
    admitted = []
    num_text = 1  # BOS
    for branch in branches:
        encoded = _encode(branch, tokenizer)
        begin = num_visual + num_text + encoded.offset_of_loss
        if admitted and max_tokens is not None and begin >= max_tokens:
            break
        admitted.append(encoded)
        num_text += len(encoded.ids)
        if max_text_tokens is not None and num_text >= max_text_tokens:
            break
    return admitted


def _conversation(crops: types.Crops, branch: types.Branch, tokenizer, length_factor) -> types.Sequence:
    encoded = _encode(branch, tokenizer)
    flat = _lay_out(crops, [encoded.ids], tokenizer, [encoded.choice])
    flat = dataclasses.replace(flat, branch=np.full_like(flat.branch, -1))
    if len(branch.turns) % 2:
        return flat
    is_learnt = np.zeros(len(flat.tokens), bool)
    is_learnt[len(flat.tokens) - len(encoded.ids) - 1:-1] = encoded.is_learnt
    is_learnt[-1] = True  # EOS
    # As in the reference, n counts the EOS of a conversation, but not those of a tree's branches.
    weights = is_learnt * np.float32(_weight(branch.weight, int(is_learnt.sum()), 1, length_factor))
    return dataclasses.replace(flat, targets=np.append(flat.tokens[1:], np.int32(tokenizer.eos_id)),
                               weights=weights.astype(np.float32))


def _tree(crops: types.Crops, branches: list[_Encoded], tokenizer, length_factor) -> types.Sequence:
    targets = [crops.tokens, branches[0].ids[:1]]
    weights = [np.zeros(1 + len(crops.tokens))]
    for branch in branches:
        weight = _weight(branch.weight, int(branch.is_learnt.sum()), len(branches), length_factor)
        targets += [branch.ids[1:], np.array([tokenizer.eos_id])]
        weights.append(np.append(branch.is_learnt[1:], True) * np.float32(weight))
    flat = _lay_out(crops, [branch.ids for branch in branches], tokenizer,
                    [branch.choice for branch in branches])
    return dataclasses.replace(flat, targets=np.concatenate(targets).astype(np.int32),
                               weights=np.concatenate(weights).astype(np.float32))


def _lay_out(crops: types.Crops, branches: Listing[np.ndarray], tokenizer,
             choices: Listing[np.ndarray | None] = ()) -> types.Sequence:
    """Returns the tree of a visual input and its branches' ids; targets and weights are 0."""
    root, lengths = 1 + len(crops.tokens), [len(ids) for ids in branches]
    tokens = np.concatenate([[tokenizer.bos_id], crops.tokens, *branches]).astype(np.int32)
    positions = np.concatenate([np.arange(root), *(root + np.arange(length) for length in lengths)])
    image = np.full(len(tokens), -1, np.int32)
    image[1:1 + len(crops.image)] = crops.image
    choice = None
    if any(one is not None for one in choices):
        parts = [np.full(len(ids), -1) if one is None else one for ids, one in zip(branches, choices)]
        choice = np.concatenate([np.full(root, -1), *parts]).astype(np.int32)
    return types.Sequence(
        choice=choice, tokens=tokens, targets=np.zeros_like(tokens),
        weights=np.zeros(len(tokens), np.float32),
        positions=positions.astype(np.int32),
        branch=np.repeat(np.arange(-1, len(branches), dtype=np.int32), [root, *lengths]),
        image=image, patches=crops.patches, pooled=crops.pooled)


def truncate(sequence: types.Sequence, max_tokens: int) -> types.Sequence:
    """Returns the first `max_tokens` tokens of a sequence; itself if it is short enough.

    Raises:
      ValueError: a visual token, or every learnt token, would be cut.
    Source: reference: olmo/preprocessing/multimodal_collator.py.
    """
    length = len(sequence.tokens)
    if length <= max_tokens:
        return sequence
    num_through_visual = int(np.max(np.flatnonzero(sequence.image >= 0), initial=-1)) + 1
    if num_through_visual > max_tokens:
        raise ValueError("max_tokens must hold all visual tokens, which end at token "
                         f"{num_through_visual}; got {max_tokens}")
    if not np.any(sequence.weights[:max_tokens] > 0):
        raise ValueError(f"max_tokens must hold a token to learn from, of {length} tokens; got {max_tokens}")
    fields = ["tokens", "targets", "weights", "positions", "branch", "image"]
    fields += ["choice"] if sequence.choice is not None else []
    return dataclasses.replace(sequence, **{name: getattr(sequence, name)[:max_tokens] for name in fields})
