"""Scenes of flat, coloured, moving shapes: positions over time, and how frames are drawn.

F frames of H x W pixels, K shapes. Positions are (x, y) in pixels; integer coordinates are pixel centres,
so the pixel of a point is the rounded point. Later shapes of a scene cover earlier ones.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image
from PIL import ImageDraw

COLOURS = {
    "red": (216, 40, 40), "green": (40, 168, 60), "blue": (48, 80, 228), "yellow": (240, 216, 40),
    "purple": (150, 50, 190), "cyan": (50, 210, 220), "orange": (245, 135, 25), "pink": (250, 140, 190),
}
REACH = 1.25        # no outline leaves a circle of REACH x radius
SUPERSAMPLING = 4   # per axis, for anti-aliased edges
_BINARY = [0] * 128 + [255] * 128


def _ring(radii, num_vertices: int) -> np.ndarray:
    """Returns float64[V, 2]: vertices at the given radii (repeated), the first one at the top."""
    angles = np.arange(num_vertices) * 2 * math.pi / num_vertices
    radii = np.resize(radii, num_vertices)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


OUTLINES = {  # polygons in units of the radius, y downwards, of roughly equal area
    "circle": _ring([1.0], 36),
    "square": np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    "triangle": _ring([1.25], 3),
    "star": _ring([1.25, 0.55], 10),
    "diamond": np.array([(0, -1.25), (0.85, 0), (0, 1.25), (-0.85, 0)]),
    "cross": np.array([(-.48, -1.08), (.48, -1.08), (.48, -.48), (1.08, -.48), (1.08, .48), (.48, .48),
                       (.48, 1.08), (-.48, 1.08), (-.48, .48), (-1.08, .48), (-1.08, -.48), (-.48, -.48)]),
}
KINDS = tuple(OUTLINES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One object of a scene."""
    kind: str
    colour: str
    rgb: tuple[int, int, int]
    radius: float          # pixels
    angle: float           # radians, fixed
    centres: np.ndarray    # float64[F, 2], (x, y)

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Shapes over a background. A still has one frame, at time 0."""
    background: np.ndarray     # uint8[H, W, 3]
    shapes: tuple[Shape, ...]
    times: np.ndarray          # float64[F], when each frame appears, seconds
    duration: float            # seconds

    @property
    def height(self) -> int:
        return self.background.shape[0]

    @property
    def width(self) -> int:
        return self.background.shape[1]

    def frame_at(self, seconds: float) -> int:
        """Returns the index of the frame shown at a time; the last one at the end of the clip."""
        return max(int(np.searchsorted(self.times, seconds + 1e-6, side="right")) - 1, 0)


def background(rng: np.random.Generator, height: int, width: int, texture: float,
               tone: tuple[float, float], tint: float) -> np.ndarray:
    """Returns uint8[H, W, 3]: a greyish tone with soft blotches and fine grain.

    texture: strength of blotches and grain, 0 to 1. tone: range of the grey level. tint: largest deviation of
    a channel from it.
    """
    colour = rng.uniform(*tone) + rng.uniform(-tint, tint, 3)
    image = np.broadcast_to(colour, (height, width, 3)).astype(np.float32)
    if texture > 0:
        cells = rng.uniform(-60 * texture, 60 * texture, (rng.integers(3, 7), rng.integers(3, 7)))
        blotches = Image.fromarray(cells.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.integers(0, 5, (height, width), dtype=np.int8) * np.float32(texture)
        image = image + (np.asarray(blotches) + grain)[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=512)
def _stamp(kind: str, radius: float, angle: float, phase: tuple[int, int]) -> tuple[Image.Image, int]:
    """Returns the coverage (0..255) of a shape whose centre is phase/SUPERSAMPLING pixels to the right of and
    below the centre of pixel [reach, reach], and reach."""
    reach = int(REACH * radius) + 2
    side = (2 * reach + 2) * SUPERSAMPLING
    cos, sin = math.cos(angle), math.sin(angle)
    outline = OUTLINES[kind] @ np.array([[cos, sin], [-sin, cos]]) * radius
    corners = (outline + reach + 0.5) * SUPERSAMPLING + phase
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).polygon(corners.ravel().tolist(), fill=255)
    return canvas.reduce(SUPERSAMPLING), reach


def _sprite(shape: Shape, frame: int) -> tuple[Image.Image, tuple[int, int]]:
    """Returns the coverage (0..255) of a shape, and the column and row of its upper left corner.

    Shapes move in steps of 1/SUPERSAMPLING pixels, so that few sprites need drawing.
    """
    (column, phase_x), (row, phase_y) = (divmod(round(float(value) * SUPERSAMPLING), SUPERSAMPLING)
                                         for value in shape.centres[frame])
    coverage, reach = _stamp(shape.kind, shape.radius, shape.angle, (phase_x, phase_y))
    return coverage, (column - reach, row - reach)


def draw(scene: Scene) -> Iterator[np.ndarray]:
    """Yields uint8[H, W, 3] for each frame in order."""
    background = Image.fromarray(scene.background)
    for frame in range(len(scene.times)):
        image = background.copy()
        for shape in scene.shapes:
            coverage, corner = _sprite(shape, frame)
            image.paste(shape.rgb, corner, coverage)
        yield np.asarray(image)


def owners(scene: Scene, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the visible shape at each pixel, and each shape's visible share.

    uint8[H, W]: k + 1 at pixels of shape k, 0 at background. float64[K]: the share of each shape's area
    that is visible, that is inside the frame and not occluded.
    """
    K = len(scene.shapes)
    owner, areas = Image.new("L", (scene.width, scene.height)), np.zeros(K)
    for k, shape in enumerate(scene.shapes):
        coverage, corner = _sprite(shape, frame)
        areas[k] = sum(coverage.histogram()[128:])
        owner.paste(k + 1, corner, coverage.point(_BINARY))
    pixels = np.asarray(owner)
    visible = np.bincount(pixels.ravel(), minlength=K + 1)[1:]
    return pixels, visible / np.maximum(areas, 1)
