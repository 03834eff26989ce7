"""Packed rows as a self-contained HTML page, on which every token shows whom it sees and who sees it.

The page holds the arrays of the rows (`values`). rows.js draws them and evaluates the mask of
attention.tree_mask token by token, so that no T x T matrix is made. `picture` is a still, for logs.

T tokens of a row, M crops of P patches of C values.
"""

import html
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from molmo2_jax import types
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.render import document
from molmo2_jax.render import pictures
from molmo2_jax.render import tree

_HERE = pathlib.Path(__file__).parent
_SIDE = 144             # pixels of a frame on the page
_MOST_LOGGED = 24       # frames in `picture`

Member = Mapping[str, Any]   # of a row: key, source, tokens, whole_tokens, left_out ...


def runs(values: np.ndarray) -> list[list]:
    """Returns [value, count] of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values) != 0) + 1).tolist(), len(values)]
    return [[values[start].item(), stop - start] for start, stop in zip(edges, edges[1:])]


def ramps(values: np.ndarray) -> list[list]:
    """Returns [first, count] of each run in which every value is one more than the one before it."""
    edges = [0, *(np.flatnonzero(np.diff(values) != 1) + 1).tolist(), len(values)]
    return [[values[start].item(), stop - start] for start, stop in zip(edges, edges[1:])]


def values(batch: types.Batch, row: int, group: np.ndarray, tokenizer: tokenizers.Tokenizer,
           members: Sequence[Member] = ()) -> dict[str, Any]:
    """Returns what the page holds of a row, as plain values for JSON.

    `tokens` and `targets` are lists; `weights`, `end`, `group`, `image`, `example` and `branch` are [value,
    count] of their runs, `positions` [first, count] of its ramps. `choices` is {place: text} of the tokens
    that choose a point. `budgets` is (used, size) of each budget.

    Args:
      group: int32[B, T], of the attention.tree_mask.TreeMask that the model uses.
      members: of the row's examples, in order.
    """
    fields = {name: np.asarray(getattr(batch, name)[row]) for name in
              ("weights", "end", "image", "example", "branch")} | {"group": np.asarray(group[row])}
    tokens, targets = np.asarray(batch.tokens[row]), np.asarray(batch.targets[row])
    used = fields["example"] >= 0
    pooled = np.asarray(batch.pooled[row])
    M, P = batch.patches.shape[1:3]
    return {
        "budgets": {"tokens": [int(used.sum()), len(used)],
                    "crops": [int(pooled.max(initial=-1)) // P + 1 if M else 0, M],
                    "visual tokens": [int((pooled >= 0).any(1).sum()), len(pooled)]},
        "tokens": tokens.tolist(), "targets": targets.tolist(), "choices": _choices(batch, row, tokenizer),
        "positions": ramps(np.asarray(batch.positions[row])),
        **{name: runs(one) for name, one in fields.items()},
        "members": list(members), "frames": _frames(batch, row, tokenizer)}


def _choices(batch: types.Batch, row: int, tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    """Returns {place: text} of the tokens that choose a point; visual tokens are counted in the row."""
    if batch.choice is None:
        return {}
    tokens, choice = np.asarray(batch.tokens[row]), np.asarray(batch.choice[row])
    return {int(place): grounded.join(tokenizer.spell(tokens[place:place + 1]), [int(choice[place])])
            for place in np.flatnonzero(choice != -1)}


def _frames(batch: types.Batch, row: int, tokenizer: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """Returns, of each image or frame: the text before it, its tokens, and its crops as pictures."""
    found = []
    for label, place, crops in shown(batch, row, tokenizer):
        pictures_of = [Image.fromarray(one) for one in crops]
        for one in pictures_of:
            one.thumbnail((_SIDE, _SIDE))
        found.append({
            "label": label, "first": int(place[0]), "tokens": len(place),
            "crops": [pictures.data_uri(pictures.encode(np.asarray(one), "WEBP"), "webp")
                      for one in pictures_of]})
    return found


def shown(batch: types.Batch, row: int, tokenizer: tokenizers.Tokenizer
          ) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Returns (label, int[n] places of its tokens, uint8[m, S, S, 3] crops) of each image or frame of a row.

    The label is what the row says before it: its time, its number, or nothing.
    """
    image, example = np.asarray(batch.image[row]), np.asarray(batch.example[row])
    tokens, pooled = np.asarray(batch.tokens[row]), np.asarray(batch.pooled[row])
    is_visual = np.isin(tokens, [tokenizer.special[name] for name in sequences.VISUAL])
    pooled_row = np.cumsum(is_visual) - 1
    P, C = batch.patches.shape[2:]
    found = []
    for number in range(int(image.max(initial=-1)) + 1):
        place = np.flatnonzero(image == number)
        windows = pooled[pooled_row[place[is_visual[place]]]]
        crops = np.unique(windows[windows >= 0] // P)
        pixels = crops_lib.unpatchify(np.asarray(batch.patches[row])[crops], math.isqrt(C // 3))
        found.append((_label(tokens, image, example, int(place[0]), tokenizer), place, pixels))
    return found


def _label(tokens, image, example, first: int, tokenizer) -> str:
    """Returns the text between a frame and what is before it in its example, times with their unit."""
    start = first
    while start > 0 and image[start - 1] < 0 and example[start - 1] == example[first]:
        start -= 1
    if start == 0 or example[start - 1] != example[first]:
        start += 1   # BOS
    text = tokenizer.spell(tokens[start:first]).strip()
    return f"{text} s" if re.fullmatch(r"\d+\.\d", text) else text


def page(title: str, facts: Mapping[str, str], batch: types.Batch, group: np.ndarray,
         tokenizer: tokenizers.Tokenizer, members: Sequence[Sequence[Member]],
         skipped: Sequence[tuple[str, str]] = ()) -> str:
    """Returns the HTML of all rows of a batch.

    Args:
      group: see `values`.
      members: of each row.
      skipped: (key, reason) of records that are in no row.
    """
    rows = [values(batch, row, group, tokenizer, members[row]) for row in range(len(batch.tokens))]
    ids = sorted({one for row in rows for name in ("tokens", "targets") for one in row[name]})
    data = {"rows": rows, "texts": {str(one): _spelt(one, tokenizer) for one in ids},
            "colours": ["#{:02x}{:02x}{:02x}".format(*one) for one in pictures.COLOURS]}
    drawn = [tree.tree_svg(batch, row, tokenizer.decode) for row in range(len(rows))]
    drawings = "".join(f'<div class="scroll drawing" hidden>{svg}</div>' for svg in drawn)
    left = "".join(f"<li><code>{html.escape(key)}</code> {html.escape(reason)}</li>"
                   for key, reason in skipped)
    sections = [_read("rows.html").replace("DRAWINGS", drawings),
                document.section("Records that are in no row", f"<ul>{left}</ul>" if left else "")]
    summary = ("What the model is given, token by token. Choose a token, with the pointer or the arrow keys: "
               "the tokens that it sees and those that see it are marked.")
    return document.html_of(title, summary, facts, sections, style=_read("rows.css"),
                            script=_read("rows.js"), data=data)


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _spelt(token: int, tokenizer: tokenizers.Tokenizer) -> str:
    """Returns the text of a token; bytes that are part of a character as \\xNN."""
    return tokenizer.bytes_of(token).decode("utf-8", errors="backslashreplace")


def picture(batch: types.Batch, row: int, group: np.ndarray, tokenizer: tokenizers.Tokenizer
            ) -> np.ndarray:
    """Returns uint8[h, w, 3]: the first frames of a row with their times, and its attention mask below them.

    group: see `values`.
    """
    frames = [pictures.draw(crops[0], label=label) for label, _, crops in shown(batch, row, tokenizer)
              if len(crops)][:_MOST_LOGGED]
    mask = tree.mask_picture(batch._replace(group=group), row)
    return pictures.contact_sheet([*([pictures.contact_sheet(frames)] if frames else []), mask], columns=1)
