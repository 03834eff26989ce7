"""A visual input and its conversations, laid out flat: the message tree (paper, section 3.2).

    root            branch 0                          branch 1
    BOS visual ...  <user> question <model> answer    <user> question <model> answer ...
    0   1 ... R-1   R  R+1 ...                        R  R+1 ...                         positions

Each branch continues the root and knows nothing of its neighbours. Source: reference:
olmo/preprocessing/text_preprocessor.py, with one difference: branches start behind the root also where the
root is BOS alone (the reference starts them at BOS's own position 0).
"""

import dataclasses
import math
from collections.abc import Sequence as Listing

import numpy as np

from molmo2_jax import types
from molmo2_jax.inputs import prompt
from molmo2_jax.inputs import tokenizer as tokenizers

NO_CROPS = types.Crops(patches=np.zeros((0, 0, 0), np.uint8), pooled=np.zeros((0, 0), np.int32),
                       tokens=np.zeros(0, np.int32), image=np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """One branch: its ids int32[T] and whether each is learnt, bool[T]; the last EOS is not among them."""
    ids: np.ndarray
    is_learnt: np.ndarray
    weight: types.LossWeight

    @property
    def offset_of_loss(self) -> int:
        return int(np.argmax(self.is_learnt))


def build(crops: types.Crops | None, branches: Listing[types.Branch], tokenizer: tokenizers.Tokenizer, *,
          max_tokens: int | None = None, max_text_tokens: int | None = None,
          length_factor: float = 2.0) -> types.Sequence:
    """Returns the Sequence of a visual input (None: text only) and its branches, in the order given.

    One branch is one conversation: `branch` is -1 throughout. An odd number of turns, allowed for one branch
    only, asks for the next answer: nothing is shifted, targets and weights are 0.
    A branch whose first loss token would lie at `max_tokens` or beyond is left out with all later ones;
    branch 0 always stays, and nothing is cut here (see `truncate`). Branches also end with the one that
    reaches `max_text_tokens`. Text-only sequences have 0 crops of 0 patches. `length_factor` is the 2 of
    2 / sqrt(n) in LossWeight (the paper prints 4).

    Raises:
      ValueError: no branch, an empty answer, special tokens in a text, a question without answer in a tree,
        or crops whose `<im_patch>` tokens and pooled rows differ in number.
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
    """Returns (a tree with one branch per conversation, the position in it of each one's last token).

    A conversation has an odd number of turns: it asks for the next one. Each branch holds the tokens and
    positions that the conversation has in a sequence of its own; targets and weights are 0.

    Raises:
      ValueError: there is no conversation, or one has an even number of turns or holds special tokens; or
        crops whose `<im_patch>` tokens and pooled rows differ in number.
    """
    if not conversations:
        raise ValueError("at least one question is needed; got none")
    for turns in conversations:
        if len(turns) % 2 == 0:
            raise ValueError(f"a question must have an odd number of turns; got {len(turns)}")
    branches = [_encode(types.Branch(turns=tuple(turns)), tokenizer).ids for turns in conversations]
    tree = _lay_out(_checked(crops, tokenizer), branches, tokenizer)
    ends = len(tree.tokens) - sum(map(len, branches)) + np.cumsum([len(ids) for ids in branches])
    return tree, tuple(int(end) - 1 for end in ends)


def _checked(crops: types.Crops | None, tokenizer: tokenizers.Tokenizer) -> types.Crops:
    """Returns the crops, NO_CROPS for None; ValueError unless visual tokens and pooled rows are as many."""
    crops = NO_CROPS if crops is None else crops
    patches = int(np.sum(crops.tokens == tokenizer.special["<im_patch>"]))
    if patches != len(crops.pooled):
        raise ValueError(f"crops must have one pooled row per <im_patch> token, {patches}; "
                         f"got {len(crops.pooled)}")
    return crops


def _encode(branch: types.Branch, tokenizer: tokenizers.Tokenizer) -> _Encoded:
    """Returns the ids of a conversation, EOS behind each answer but the last."""
    ids, is_learnt = [], []
    for number, text in enumerate(prompt.chat_texts(branch.turns, tokenizer.reserved)):
        is_answer = number % 2 == 1
        piece = tokenizer.encode(text)
        if is_answer and number < len(branch.turns) - 1:
            piece = piece + [tokenizer.eos_id]
        ids += piece
        is_learnt += [is_answer] * len(piece)
    return _Encoded(np.array(ids, np.int32), np.array(is_learnt, bool), branch.weight)


def _weight(rule: types.LossWeight, num_loss_tokens: int, num_branches: int, length_factor: float) -> float:
    by_length = length_factor / math.sqrt(num_loss_tokens) if rule.by_length else 1.0
    by_branches = 1 / math.sqrt(num_branches) if rule.by_branches else 1.0
    return rule.scale * by_length * by_branches


def _admit(branches, tokenizer, num_visual: int, max_tokens, max_text_tokens) -> list[_Encoded]:
    """Returns the branches that enter the tree; later ones are not even encoded."""
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
    flat = _lay_out(crops, [encoded.ids], tokenizer)
    flat = dataclasses.replace(flat, branch=np.full_like(flat.branch, -1))
    if len(branch.turns) % 2:
        return flat
    is_learnt = np.zeros(len(flat.tokens), bool)
    is_learnt[len(flat.tokens) - len(encoded.ids) - 1:-1] = encoded.is_learnt
    is_learnt[-1] = True  # EOS
    # a tree counts the tokens before its EOS, a conversation counts EOS as well (as the reference)
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
    return dataclasses.replace(_lay_out(crops, [branch.ids for branch in branches], tokenizer),
                               targets=np.concatenate(targets).astype(np.int32),
                               weights=np.concatenate(weights).astype(np.float32))


def _lay_out(crops: types.Crops, branches: Listing[np.ndarray], tokenizer) -> types.Sequence:
    """Returns the tree of a visual input and the ids of its branches, without targets and weights."""
    root, lengths = 1 + len(crops.tokens), [len(ids) for ids in branches]
    tokens = np.concatenate([[tokenizer.bos_id], crops.tokens, *branches]).astype(np.int32)
    positions = np.concatenate([np.arange(root), *(root + np.arange(length) for length in lengths)])
    image = np.full(len(tokens), -1, np.int32)
    image[1:1 + len(crops.image)] = crops.image
    return types.Sequence(
        tokens=tokens, targets=np.zeros_like(tokens), weights=np.zeros(len(tokens), np.float32),
        positions=positions.astype(np.int32),
        branch=np.repeat(np.arange(-1, len(branches), dtype=np.int32), [root, *lengths]),
        image=image, patches=crops.patches, pooled=crops.pooled)


def truncate(sequence: types.Sequence, max_tokens: int) -> types.Sequence:
    """Returns the sequence cut behind `max_tokens` tokens; itself if it is short enough.

    Raises:
      ValueError: a visual token, or every token that is learnt, would be cut.
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
    fields = ("tokens", "targets", "weights", "positions", "branch", "image")
    return dataclasses.replace(sequence, **{name: getattr(sequence, name)[:max_tokens] for name in fields})
