"""Some frames of a video, kept as JPEG with the times at which each is on display.

It answers the questions that are asked of the index of a file (video.clip_span, frames_at and the rates of
tracks) as the file did, and refuses a time that shows a frame it does not have.

N kept frames, ascending.
"""

import dataclasses
import fractions
import io

import numpy as np
from PIL import Image

from molmo2_jax.inputs import pixels as pixels_lib

SUBSAMPLING = "4:4:4"   # colours as fine as brightness


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptVideo:
    """The frames of one video that were kept.

    starts, stops: seconds from the first frame of the video, between which each frame is on display; the
      last frame of the video stops at infinity.
    width, height: of the video, upright. begin, duration, length, fps, nominal_fps: as in
      video_file.VideoIndex. rule: for which times frames were kept, in words.
    """
    name: str
    jpegs: tuple[bytes, ...]
    starts: tuple[float, ...]
    stops: tuple[float, ...]
    width: int
    height: int
    begin: float
    duration: float
    length: fractions.Fraction | None
    fps: float
    nominal_fps: float
    rule: str

    def __str__(self) -> str:
        return self.name

    @property
    def elapsed(self) -> np.ndarray:
        """float64[1 + 2 N]: where frames of the file, and gaps between those that were kept, begin."""
        edges = np.stack([np.array(self.starts), np.array(self.stops)], axis=1).ravel()
        return np.concatenate(([0.0], edges))

    def pixels(self, shown: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
        """Returns uint8[len(shown), rows, columns, 3] of what video.frames_at made of `elapsed`.

        size: (rows, columns); None: that of the source.

        Raises:
          MediaError: a frame was not kept, or is not a JPEG.
        """
        gaps = shown[shown % 2 == 0]
        if len(gaps):
            raise pixels_lib.MediaError(
                f"{self.name}: times must show one of the {len(self.jpegs)} frames that were kept for "
                f"{self.rule}; got one that shows a frame after {self.elapsed[gaps[0]]:.3f} seconds: "
                "prepare the data with these settings, or with --media=copy")
        rows, columns = size or (self.height, self.width)
        pixels = np.empty((len(shown), rows, columns, 3), np.uint8)
        for place in np.unique(shown):
            pixels[shown == place] = pixels_lib.resize(self._decode(place // 2), rows, columns)
        return pixels

    def _decode(self, frame: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(self.jpegs[frame])) as image:
                return np.array(image.convert("RGB"))
        except Exception as error:  # as in pixels.load
            raise pixels_lib.MediaError(f"{self.name}: its kept frame {frame} cannot be decoded: "
                                        f"{error}") from error


def to_jpeg(pixels: np.ndarray, max_side: int, quality: int) -> bytes:
    """Returns the JPEG of uint8[H, W, 3], of which each side longer than max_side is resized to that.

    Sides change independently, as frames are resized to square crops whatever their shape.
    """
    height, width = pixels.shape[:2]
    pixels = pixels_lib.resize(pixels, min(height, max_side), min(width, max_side))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=SUBSAMPLING)
    return out.getvalue()
