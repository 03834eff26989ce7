"""Data structures on the way from a file on disk to the devices, with one legend for all shapes.

N frames of a video, H x W pixels; M crops of P patches of C values; R visual tokens, each pooling up to W
patches; T tokens of a sequence or row; B rows of a batch.

A visual token refers to patches by `crop * P + patch`, counted over all crops of the same row; -1 means
"no patch". The k-th `<im_patch>` token of a row uses row k of `pooled`; with config.PointerConfig the tokens
`<im_low>` of overviews count with them.

A choice is what a grounding token of such a model stands for: at `<|token_index|>` a row of `pooled`, or
NO_MORE for "no more points"; at `<|vit_index|>` a slot of the row chosen before; at `<|vit_loc|>` one of 3 x
3 cells of that patch, numbered down the columns. Slots and cells k are written as `inner(k)` = -2 - k, so
that only rows are >= 0; -1 is no choice.
"""

import dataclasses
import os
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeight:
    """Weight of the answer tokens of a branch: scale x 2/sqrt(n tokens) x 1/sqrt(m branches).

    The two factors can be switched off, as for pointing (0.2 flat) and video captions (0.1 flat).
    Source: paper, section 3.2 (which prints 4/sqrt(n)); reference: olmo/preprocessing/text_preprocessor.py.
    """
    scale: float = 1.0
    by_length: bool = True
    by_branches: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One visual input with all its annotations, as read from a data set, before decoding.

    `annotations` are those of data_pipelines.annotations, opaque here; data_pipelines.formats turns each into
    a Branch once the sampled times and the size of the media are known. At most one of `video` and `images`
    is set.
    """
    annotations: tuple[Any, ...]
    video: Any = None                           # path, or an inputs.kept_video.KeptVideo
    images: tuple[str | os.PathLike, ...] = ()  # paths
    clip: tuple[float, float] | None = None     # seconds
    tracking_fps: float | None = None           # rate of annotated tracks, if frames are sampled at it
    subtitles: tuple[tuple[float, float, str], ...] | str = ()  # (start, end in seconds, text), or one text
    dialogue_share: float = 0.0  # in training: probability of one conversation with all annotations as turns
    source: str = ""                            # data set name, for counts and reports
    key: str = ""                               # where it was read: "file.jsonl:17"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """One conversation about the visual input: user, model, user, model ... texts.

    Texts contain no chat markup; answers may contain grounding tokens with choices (inputs/grounded.py). An
    even number of turns is for training; with an odd number the model is to give the last answer.
    """
    turns: tuple[str, ...]
    weight: LossWeight = LossWeight()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Media:
    """A video or images as the model sees them, without pixels: what annotations and answers refer to.

    `sizes` is empty for text alone. Only a video has `seconds`.
    """
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) in pixels of each image, or of the one video
    seconds: np.ndarray | None = None        # float64[N] of the frames shown, from the start of the clip
    duration: float = 0.0                    # of the clip, seconds
    fps: float = 0.0                         # average rate of the source video
    cells: Any = None                        # inputs.grounded.Cells, for models with a pointer

    @property
    def is_video(self) -> bool:
        return self.seconds is not None


@dataclasses.dataclass(frozen=True)
class Frames:
    """Frames of one video as shown at `seconds` (relative to the clip's start)."""
    pixels: np.ndarray       # uint8[N, H, W, 3], at the requested size
    seconds: np.ndarray      # float64[N]
    width: int               # of the source video, pixels
    height: int
    duration: float          # of the clip, seconds
    fps: float               # average rate of the source video

    @property
    def media(self) -> Media:
        """Returns the Media that annotations and answers refer to."""
        return Media(sizes=((self.width, self.height),), seconds=self.seconds, duration=self.duration,
                     fps=self.fps)


@dataclasses.dataclass(frozen=True)
class Crops:
    """Pixels and their grouping into visual tokens, with the visual part of the token sequence.

    `tokens` holds the ids to insert after BOS: markers, `<im_patch>`, and text such as frame times.
    `image` numbers the images or frames 0, 1, ... at visual tokens and is -1 at text.
    """
    patches: np.ndarray      # uint8[M, P, C]
    pooled: np.ndarray       # int32[R, W]
    tokens: np.ndarray       # int32[T]
    image: np.ndarray        # int32[T]
    grids: tuple[np.ndarray, ...] = ()   # int[h, w] of each image or frame: the patch at each place


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A message tree laid out flat: root (BOS and all visual tokens), then branch 0, 1, ...

    Already shifted: position i predicts targets[i]. Positions restart after the root in each branch.
    """
    tokens: np.ndarray       # int32[T]
    targets: np.ndarray      # int32[T]
    weights: np.ndarray      # float32[T], 0 where nothing is learned
    positions: np.ndarray    # int32[T]
    branch: np.ndarray       # int32[T], -1 in the root
    image: np.ndarray        # int32[T], -1 at text
    patches: np.ndarray      # uint8[M, P, C]
    pooled: np.ndarray       # int32[R, W]
    choice: np.ndarray | None = None   # int32[T], -1 at other tokens; None: no grounding tokens


class RowShape(NamedTuple):
    """The fixed sizes of a row."""
    T: int                   # tokens
    M: int                   # crops
    R: int                   # visual tokens
    W: int                   # most patches that one visual token pools


class Batch(NamedTuple):
    """Packed rows of fixed shape. The mask is (end, group) or (end, image): see attention.tree_mask.

    Padding: tokens, targets, weights, positions 0; end = own position + 1; example, branch, group, image -1;
    patches 0; pooled -1.
    """
    tokens: Any              # int32[B, T]
    targets: Any             # int32[B, T]
    weights: Any             # float32[B, T]
    positions: Any           # int32[B, T], restart in every example and every branch
    end: Any                 # int32[B, T], first position from which causality hides this key
    group: Any               # int32[B, T], at visual tokens: index among the row's examples that have any
    image: Any               # int32[B, T], at visual tokens: index of the image or frame in the row
    example: Any             # int32[B, T], index of the packed example
    branch: Any              # int32[B, T], -1 in roots
    patches: Any             # uint8[B, M, P, C]
    pooled: Any              # int32[B, R, W]
    choice: Any = None       # int32[B, T], -1 at other tokens; None for models without a pointer


NO_MORE = 2**30   # the choice at `<|token_index|>` that ends a group of points


def inner(choice):
    """Returns -2 - choice: the choice that stands for a slot or cell, and the slot or cell of a choice."""
    return -2 - choice


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of an array, under the names that jax expects."""
    shape: tuple[int, ...]
    dtype: np.dtype


def batch_shapes(rows: int, shape: RowShape, patch_shape: tuple[int, int], has_choices: bool = False
                 ) -> Batch:
    """Returns a Batch of ArraySpecs: `rows` rows of `shape` with patches of `patch_shape` (P, C).

    has_choices: for a model with a pointer; without, `choice` is None.
    """
    T, M, R, W = shape
    specs: dict[str, ArraySpec | None] = dict.fromkeys(
        Batch._fields, ArraySpec((rows, T), np.dtype(np.int32)))
    if not has_choices:
        specs["choice"] = None
    return Batch(**specs | {
        "weights": ArraySpec((rows, T), np.dtype(np.float32)),
        "patches": ArraySpec((rows, M, *patch_shape), np.dtype(np.uint8)),
        "pooled": ArraySpec((rows, R, W), np.dtype(np.int32))})
