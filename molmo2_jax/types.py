"""What flows from a file on disk to the devices: the shapes of everything, in one legend.

N frames of a video, H x W pixels; M crops of P patches of C values; R visual tokens, each pooling up to W
patches; T tokens of a sequence or row; B rows of a batch.

A visual token refers to patches by `crop * P + patch`, counted over all crops of the same row; -1 means
"no patch". The k-th `<im_patch>` token of a row uses row k of `pooled`.
"""

import dataclasses
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
    """One visual input with all its annotations, as read from a data set; nothing is decoded yet.

    `annotations` are those of data_pipelines.annotations, opaque here; data_pipelines.formats turns each into
    a Branch once the sampled times and the size of the media are known. At most one of `video` and `images`
    is set.
    """
    annotations: tuple[Any, ...]
    video: str | None = None                    # path
    images: tuple[str, ...] = ()                # paths
    clip: tuple[float, float] | None = None     # seconds
    tracking_fps: float | None = None           # rate of annotated tracks, where it decides the sampled times
    subtitles: tuple[tuple[float, float, str], ...] | str = ()  # (start, end in seconds, text), or one text
    dialogue_share: float = 0.0  # in training: chance that the annotations are turns of one conversation
    source: str = ""                            # data set name, for counts and reports
    key: str = ""                               # where it came from: "file.jsonl:17"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """One conversation about the visual input: user, model, user, model ... texts.

    Texts carry no chat markup. An even number of turns trains; an odd number asks for the last answer.
    """
    turns: tuple[str, ...]
    weight: LossWeight = LossWeight()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Media:
    """What annotations and answers are relative to: a video or images as the model sees them, without pixels.

    Text alone has no sizes. Only a video has `seconds`.
    """
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) in pixels of each image, or of the one video
    seconds: np.ndarray | None = None        # float64[N] of the frames shown, from the start of the clip
    duration: float = 0.0                    # of the clip, seconds
    fps: float = 0.0                         # average rate of the source video

    @property
    def is_video(self) -> bool:
        return self.seconds is not None


@dataclasses.dataclass(frozen=True)
class Frames:
    """Frames of one video as shown at `seconds` (relative to the clip's start)."""
    pixels: np.ndarray       # uint8[N, H, W, 3], at the size that was asked for
    seconds: np.ndarray      # float64[N]
    width: int               # of the source video, pixels
    height: int
    duration: float          # of the clip, seconds
    fps: float               # average rate of the source video

    @property
    def media(self) -> Media:
        """Returns what annotations and answers are relative to."""
        return Media(sizes=((self.width, self.height),), seconds=self.seconds, duration=self.duration,
                     fps=self.fps)


@dataclasses.dataclass(frozen=True)
class Crops:
    """Pixels and their grouping into visual tokens, with the visual part of the token sequence.

    `tokens` holds the ids to insert behind BOS: markers, `<im_patch>`, and text such as frame times.
    `image` numbers the images or frames 0, 1, ... at visual tokens and is -1 at text.
    """
    patches: np.ndarray      # uint8[M, P, C]
    pooled: np.ndarray       # int32[R, W]
    tokens: np.ndarray       # int32[T]
    image: np.ndarray        # int32[T]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A message tree laid out flat: root (BOS and all visual tokens), then branch 0, 1, ...

    Already shifted: position i predicts targets[i]. Positions restart behind the root in each branch.
    """
    tokens: np.ndarray       # int32[T]
    targets: np.ndarray      # int32[T]
    weights: np.ndarray      # float32[T], 0 where nothing is learnt
    positions: np.ndarray    # int32[T]
    branch: np.ndarray       # int32[T], -1 in the root
    image: np.ndarray        # int32[T], -1 at text
    patches: np.ndarray      # uint8[M, P, C]
    pooled: np.ndarray       # int32[R, W]


class Batch(NamedTuple):
    """Packed rows of fixed shape. The mask is (end, group) or (end, image): see attention.tree_mask.

    Padding: tokens, targets, weights, positions 0; end = own position + 1; example, branch, group, image -1;
    patches 0; pooled -1.
    """
    tokens: Any              # int32[B, T]
    targets: Any             # int32[B, T]
    weights: Any             # float32[B, T]
    positions: Any           # int32[B, T], restart in every example and every branch
    end: Any                 # int32[B, T], first position that may no longer see this key by causality
    group: Any               # int32[B, T], at visual tokens: counts the examples of a row that have some
    image: Any               # int32[B, T], at visual tokens: counts the images and frames of a row
    example: Any             # int32[B, T], which of the packed examples
    branch: Any              # int32[B, T], -1 in roots
    patches: Any             # uint8[B, M, P, C]
    pooled: Any              # int32[B, R, W]
