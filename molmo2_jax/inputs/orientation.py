"""Turns decoded frames upright, as FFmpeg's players do.

Source: FFmpeg, fftools/ffmpeg_filter.c (autorotate) and libavutil/display.c.
"""

import contextlib
import fractions
import math
import threading

import av
import numpy as np
from av.filter import Graph
from av.sidedata import sidedata
from av.video.reformatter import VideoReformatter

# Building swscale's tables costs as much as decoding a small clip, so they are kept until the format changes.
_converters = threading.local()


Matrix = tuple[int, ...]       # nine fixed-point numbers, by rows


def upright_rgb(frame: av.VideoFrame, matrix: Matrix | None) -> np.ndarray:
    """Returns uint8[H, W, 3], rotated and mirrored as the display matrix says.

    A rotation by other than a multiple of 90 degrees keeps the size; uncovered corners are black.
    """
    if matrix is None:
        return _rgb(frame)
    degrees = clockwise_degrees(matrix)
    if degrees % 90:
        return _rgb(_rotated(frame, degrees))
    rgb = _rgb(frame)
    if degrees == 90:
        return rgb.swapaxes(0, 1) if matrix[3] > 0 else np.rot90(rgb, -1)
    if degrees == 270:
        return np.rot90(rgb, 2).swapaxes(0, 1) if matrix[3] < 0 else np.rot90(rgb, 1)
    if degrees == 180 and matrix[0] < 0:
        rgb = rgb[:, ::-1]
    return rgb[::-1] if matrix[4] < 0 else rgb


def clockwise_degrees(matrix: Matrix) -> int:
    """Returns the rotation of a 3 x 3 display matrix in whole degrees, 0 .. 359; 0 for a singular one.

    For a mirrored matrix it is the angle of the first row; other signs show the mirroring.
    """
    across, down = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not across or not down:
        return 0
    degrees = math.degrees(math.atan2(matrix[1] / down, matrix[0] / across))
    return int(math.copysign(math.floor(abs(degrees) + 0.5), degrees)) % 360


def display_matrix(frame: av.VideoFrame) -> Matrix | None:
    """Returns the display matrix of a frame, or None.

    The first matrix is used. FFmpeg puts the container's before the one of messages in the stream.
    """
    listed = sidedata.SideDataContainer.__new__(sidedata.SideDataContainer)
    with contextlib.suppress(ValueError):  # PyAV stops listing at a type unknown to it, such as EXIF
        listed.__init__(frame)
    for data in listed:
        with contextlib.suppress(ValueError):
            if data.type == sidedata.Type.DISPLAYMATRIX:
                return tuple(np.frombuffer(data, np.int32, 9).tolist())
    if frame.rotation:  # a matrix listed after such a type: only its rotation is known
        angle = math.radians(-frame.rotation)
        cos, sin = (round(65536 * value) for value in (math.cos(angle), math.sin(angle)))
        return cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30
    return None


def _rotated(frame: av.VideoFrame, degrees: int) -> av.VideoFrame:
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name,
                              time_base=frame.time_base or fractions.Fraction(1, 1000))
    rotate, sink = graph.add("rotate", f"{degrees}*PI/180"), graph.add("buffersink")
    source.link_to(rotate)
    rotate.link_to(sink)
    graph.configure()
    source.push(frame)
    return sink.pull()


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    if not hasattr(_converters, "rgb"):
        _converters.rgb = VideoReformatter()
    return _converters.rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
