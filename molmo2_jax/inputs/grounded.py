"""Points as choices among visual tokens: from positions to choices, to text, and back.

    <points coords="P1P2E">label</points>     P = <|token_index:R|><|vit_index:J|><|vit_loc:C|>
                                              E = <|token_index:end|>

1, 2 are ids. R is a row of `Crops.pooled`, J a slot of it, C = 3 * column + row of one of 3 x 3 cells of that
patch: see types.py. In texts the three tokens carry their choices as shown; `split` takes them apart for the
tokenizer, which knows the tokens without choices.

Source: arXiv 2603.28069; reference: olmo/preprocessing/data_formatter.py, example_preprocessor.py. It closes
tags of points and of tracks with `</point>`; readers accept any end. Deliberate difference: positions outside
of the frame are clipped to it (the reference's indices wrap to the far edge).
"""

import re
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import points

TOKENS = config.GROUNDING_TOKENS
_WRITTEN = re.compile(r"<\|(token_index|vit_index|vit_loc):([0-9]{1,9}|end)\|>")
_POINT = re.compile(r"<\|token_index:([0-9]{1,9})\|><\|vit_index:([0-9]{1,9})\|><\|vit_loc:([0-8])\|>"
                    r"([0-9]{1,9})")
_COORDS = re.compile(r'(?<= coords=")[^"]*')
_TAG = re.compile(r'<(?:points|tracks) coords="([^"]*)">([^<]*)')
_SIDE = 3   # cells per side of a patch

Choice = tuple[int, int, int]   # row of pooled, slot, cell


class Cells:
    """The patches of images or frames as choices; built from the crops of one example.

    Only visual tokens named in `selectable` bool[R] can be chosen, those of overviews not.
    """

    def __init__(self, crops: types.Crops, selectable: np.ndarray):
        self._grids, self._pooled = crops.grids, crops.pooled
        rows, slots = np.nonzero((crops.pooled >= 0) & selectable[:, None])
        self._place = np.full((int(crops.pooled.max(initial=-1)) + 1, 2), -1)
        self._place[crops.pooled[rows, slots]] = np.stack([rows, slots], axis=1)
        self._selectable = selectable

    def choice(self, image: int, x: float, y: float) -> Choice:
        """Returns the choice for a position.

        Args:
          image: number of the image or frame, from 0.
          x, y: fractions of its width and height, clipped to 0 ... 1.

        Raises:
          ValueError: a coordinate is not finite.
        """
        if not (np.isfinite(x) and np.isfinite(y)):
            raise ValueError(f"coordinates must be finite; got {(x, y)}")
        grid = self._grids[image]
        at, cells = [], []
        for value, size in ((y, grid.shape[0]), (x, grid.shape[1])):
            scaled = size * min(max(float(value), 0.0), 1.0)
            place = min(int(scaled), size - 1)
            at.append(place)
            cells.append(min(int(_SIDE * (scaled - place)), _SIDE - 1))
        row, slot = self._place[grid[at[0], at[1]]]
        return int(row), int(slot), _SIDE * cells[1] + cells[0]

    def __len__(self) -> int:
        """Returns R, the number of visual tokens, those of overviews included."""
        return len(self._pooled)

    def has(self, row: int, slot: int) -> bool:
        """Returns whether a visual token pools a patch at this slot; at borders some slots are empty."""
        return slot < self._pooled.shape[1] and bool(self._pooled[row, slot] >= 0)

    def position(self, choice: Choice) -> tuple[int, float, float] | None:
        """Returns (image, x, y): the centre of the chosen cell; None if there is no such patch."""
        row, slot, cell = choice
        if not (0 <= row < len(self._pooled) and self._selectable[row] and 0 <= slot < self._pooled.shape[1]):
            return None
        patch = self._pooled[row, slot]
        for image, grid in enumerate(self._grids):
            places = np.argwhere(grid == patch) if patch >= 0 else np.zeros((0, 2), int)
            if len(places):
                (row, column), (h, w) = places[0], grid.shape
                return (image, (column + (cell // _SIDE + 0.5) / _SIDE) / w,
                        (row + (cell % _SIDE + 0.5) / _SIDE) / h)
        return None


def cells_of(crops: types.Crops, patch_id: int, overview_id: int) -> Cells:
    """Returns the Cells of crops whose visual tokens have these ids; overviews cannot be chosen."""
    visual = crops.tokens[np.isin(crops.tokens, (patch_id, overview_id))]
    return Cells(crops, visual == patch_id)


def _written(choice: Choice) -> str:
    return "".join(f"{token[:-2]}:{value}|>" for token, value in zip(TOKENS, choice, strict=True))


_END = "<|token_index:end|>"


def pieces(text: str) -> Iterator[tuple[str, int | None]]:
    """Yields (text, None) and (plain grounding token, its choice as in types.Batch) in order."""
    place = 0
    for found in _WRITTEN.finditer(text):
        if found.start() > place:
            yield text[place:found.start()], None
        kind, value = found.groups()
        place = found.end()
        if kind == "token_index":
            yield f"<|{kind}|>", types.NO_MORE if value == "end" else int(value)
        else:
            yield f"<|{kind}|>", -1 if value == "end" else types.inner(int(value))
    if place < len(text):
        yield text[place:], None


def split(text: str) -> tuple[str, list[int]]:
    """Returns the text with the plain grounding tokens, and their choices as in types.Batch."""
    found = list(pieces(text))
    return "".join(piece for piece, _ in found), [choice for _, choice in found if choice is not None]


def fed(choices: Sequence[int], cells: Cells | None) -> list[tuple[int, int]]:
    """Returns (row, slot) that each token of a text feeds back, -1 where there is none: a row at
    `<|token_index|>`, and this row with a slot at the `<|vit_index|>` after it.

    Args:
      choices: of the tokens of a text that nobody has checked, as in types.Batch.
      cells: what may be chosen from; None: nothing.

    Raises:
      ValueError: a choice is not among the visual tokens, a slot is empty or follows no visual token.
    """
    found, before, num_rows = [], -1, len(cells or ())
    for choice, previous in zip(choices, [-1, *choices]):
        row, slot = -1, -1
        if choice == types.NO_MORE:
            pass
        elif choice >= 0:
            if choice >= num_rows:
                raise ValueError(f"a point in an answer must be one of {num_rows} visual tokens; "
                                 f"got {choice}")
            row = before = choice
        elif choice < -1 and 0 <= previous < types.NO_MORE:
            row, slot = before, types.inner(choice)
            if cells is None or not cells.has(row, slot):
                raise ValueError(f"a point in an answer must be in a patch; visual token {row} pools none at "
                                 f"slot {slot}")
        elif choice < -1 and not previous < -1:
            raise ValueError("the tokens of a point in an answer must follow each other")
        found.append((row, slot))
    return found


def join(text: str, choices: Sequence[int]) -> str:
    """Returns the text in which the n-th grounding token carries the n-th choice: the inverse of `split`."""
    remaining = iter(choices)

    def written(found: re.Match) -> str:
        choice = next(remaining)
        value = "end" if choice in (types.NO_MORE, -1) else choice if choice >= 0 else types.inner(choice)
        return f"{found[0][:-2]}:{value}|>"

    return re.sub("|".join(map(re.escape, TOKENS)), written, text)


def _tag(name: str, numbered: Sequence[tuple[Choice, int]], label: str) -> str:
    coords = "".join(f"{_written(choice)}{number}" for choice, number in numbered)
    return f'<{name} coords="{coords}{_END}">{label}</point>'


def format_points(groups: Sequence[points.Group], label: str, *, cells: Cells,
                  image_of: Callable[[float | int | str], int], scale: float = 1) -> str:
    """Returns the tag of points, ordered by choice, or "There are none."

    Args:
      groups, scale: as in points.format_points.
      image_of: number of the image or frame, from 0, of a group's index.
    """
    chosen = sorted(cells.choice(image_of(index), x / scale, y / scale)
                    for index, group in groups for x, y in group)
    return _tag("points", [(choice, number + 1) for number, choice in enumerate(chosen)], label
                ) if chosen else points.NONE


def format_tracks(frames: Sequence[points.TrackFrame], label: str, *, cells: Cells,
                  image_of: Callable[[float | int | str], int], scale: float = 1) -> str:
    """Returns the tag of tracks; objects are numbered by first appearance. Arguments as format_points.

    Returns "No tracks available." without frames, and "There are none." if every object is hidden.
    """
    if not frames:
        return points.NO_TRACKS
    chosen: list[tuple[Choice, int, Hashable]] = []
    for seconds, placed in frames:
        for order, (name, point) in enumerate(placed.items()):
            if point is not None:
                at = cells.choice(image_of(seconds), point[0] / scale, point[1] / scale)
                chosen.append((at, order, name))
    chosen.sort(key=lambda one: one[:2])
    numbers: dict[Hashable, int] = {}
    for _, _, name in chosen:
        numbers.setdefault(name, len(numbers) + 1)
    return _tag("tracks", [(at, numbers[name]) for at, _, name in chosen], label) if chosen else points.NONE


def parse(text: str, cells: Cells, media: types.Media) -> list[points.Point]:
    """Returns the points in a text, in pixels: index is the image number from 1, or the seconds of the frame.

    A point without an id, as at the end of a text that was cut off, is left out; so is a choice that does not
    exist.
    """
    return [point for _, point in parse_labelled(text, cells, media)]


def parse_labelled(text: str, cells: Cells, media: types.Media, *, is_partial: bool = False
                   ) -> list[tuple[str, points.Point]]:
    """Returns the points of `parse`, each with the label of its tag; "" outside of a tag or if it is cut off.

    is_partial: the text goes on, so an id that ends it may, too: its point is left out.
    """
    tags = [(*found.span(1), found[2]) for found in _TAG.finditer(text)]
    result = []
    for found in _POINT.finditer(text):
        row, slot, cell, name = found.groups()
        at = cells.position((int(row), int(slot), int(cell)))
        if at is None or (is_partial and found.end() == len(text)):
            continue
        image, x, y = at
        width, height = media.sizes[0 if media.is_video else image]
        index = float(media.seconds[image]) if media.is_video else float(image + 1)
        label = next((label for first, last, label in tags if first <= found.start() < last), "")
        result.append((label, points.Point(index, name, x * width, y * height)))
    return result


def read(text: str, media: types.Media) -> tuple[tuple[points.Point, ...], tuple[points.Tracked, ...]]:
    """Returns (points, tracks) in an answer, in pixels of the video or of the named image."""
    if media.cells is not None:
        found = parse(text, media.cells, media)
        tracked = points.tracks_of(found, media.fps) if media.is_video and "<tracks" in text else []
        return tuple(found), tuple(tracked)
    if media.is_video:
        [size] = media.sizes
        tracks = points.parse_tracks(text, *size, media.fps) if "<tracks" in text else ()
        return tuple(points.parse_points(text, *size)), tuple(tracks)
    return tuple(points.parse_points(text, sizes=media.sizes)) if media.sizes else (), ()


def numbered(text: str, cells: Cells, media: types.Media) -> str:
    """Returns the text with coordinates in place of choices, which `points.parse_points` reads."""

    def written(found: re.Match) -> str:
        groups: dict[float, list[str]] = {}
        for point in parse(found[0], cells, media):
            size = media.sizes[0 if media.is_video else int(point.index) - 1]
            x, y = (round(1000 * at / side) for at, side in zip((point.x, point.y), size, strict=True))
            groups.setdefault(point.index, []).append(f"{point.id} {x:03d} {y:03d}")
        return points.SEPARATOR.join(f"{index if media.is_video else int(index)} {' '.join(fields)}"
                                     for index, fields in sorted(groups.items()))

    return _COORDS.sub(written, text)
