"""Frames are rotated and mirrored as FFmpeg's own filters and the geometry of the display matrix require."""

import fractions
import io
import itertools
import math

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from av.filter import Graph
from PIL import Image
from PIL import ImageOps

from molmo2_jax.inputs import orientation
from molmo2_jax.inputs import video

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]],
                    [[255, 255, 255], [0, 0, 0], [255, 255, 0]]], np.uint8)  # all eight orientations differ
ONE = 1 << 16
EIGHT = [(a, b, c, d) for a, b, c, d in itertools.product((-ONE, 0, ONE), repeat=4)
         if abs(a * d - b * c) == ONE * ONE and abs(a) + abs(b) == abs(c) + abs(d) == ONE]


def write(path, matrix=None, size=16):
    """Writes three frames of six coloured squares under a display matrix (a, b, c, d)."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=4, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 3 * size, 2 * size, "yuv420p"
        if matrix is not None:
            a, b, c, d = matrix
            stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
        picture = COLOURS.repeat(size, 0).repeat(size, 1)
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def moved(pixels, matrix):
    """Returns pixels, each moved to the position that the display matrix gives it."""
    a, b, c, d = (value // ONE for value in matrix)
    rows, columns = np.indices(pixels.shape[:2])
    across, down = a * columns + c * rows, b * columns + d * rows
    across, down = across - across.min(), down - down.min()
    result = np.zeros((down.max() + 1, across.max() + 1, 3), np.uint8)
    result[down, across] = pixels
    return result


@pytest.mark.parametrize("matrix", EIGHT)
def test_each_of_the_eight_orientations_is_that_of_the_display_matrix(matrix, tmp_path):
    plain = video.read(write(tmp_path / "plain.mp4"), max_frames=2)
    turned = video.read(write(tmp_path / "turned.mp4", matrix), max_frames=2)
    expected = np.stack([moved(picture, matrix) for picture in plain.pixels])
    np.testing.assert_array_equal(turned.pixels, expected)
    assert (turned.height, turned.width) == expected.shape[1:3]
    small = video.read(tmp_path / "turned.mp4", max_frames=2, size=(20, 28))
    assert (small.height, small.width) == expected.shape[1:3]


def filtered(frame, *filters):
    graph = Graph()
    nodes = [graph.add_buffer(template=frame, time_base=fractions.Fraction(1, 4))]
    for name, arguments in (*filters, ("buffersink", None)):
        nodes.append(graph.add(name, arguments))
        nodes[-2].link_to(nodes[-1])
    graph.configure()
    nodes[0].push(frame)
    return nodes[-1].pull().to_ndarray(format="rgb24")


FILTERS = {  # what FFmpeg inserts for each matrix
    (ONE, 0, 0, ONE): [], (ONE, 0, 0, -ONE): [("vflip", None)], (-ONE, 0, 0, ONE): [("hflip", None)],
    (-ONE, 0, 0, -ONE): [("hflip", None), ("vflip", None)], (0, ONE, -ONE, 0): [("transpose", "clock")],
    (0, ONE, ONE, 0): [("transpose", "cclock_flip")], (0, -ONE, ONE, 0): [("transpose", "cclock")],
    (0, -ONE, -ONE, 0): [("transpose", "clock_flip")]}


def upright(frame):
    return orientation.upright_rgb(frame, orientation.display_matrix(frame))


def first_frame(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0))


@pytest.mark.parametrize("matrix", FILTERS)
def test_each_of_the_eight_orientations_is_that_of_ffmpegs_filters(matrix, tmp_path):
    frame = first_frame(write(tmp_path / "turned.mp4", matrix))
    # Rotating subsampled chroma before or after conversion gives different values at edges between colours.
    turned = upright(frame)[8::16, 8::16].astype(int)
    assert np.abs(turned - filtered(frame, *FILTERS[matrix])[8::16, 8::16]).max() <= 2


@pytest.mark.parametrize("degrees", [1, 10, 45, 89, 135, 200, 359])
def test_any_other_angle_is_turned_as_by_ffmpegs_rotate_filter(degrees, tmp_path):
    cos, sin = (round(ONE * turn(math.radians(degrees))) for turn in (math.cos, math.sin))
    frame = first_frame(write(tmp_path / "turned.mp4", (cos, sin, -sin, cos)))
    expected = filtered(frame, ("rotate", f"{degrees:f}*PI/180"))
    np.testing.assert_array_equal(upright(frame), expected)


@pytest.mark.parametrize("matrix, degrees", [
    ((ONE, 0, 0, ONE), 0), ((0, ONE, -ONE, 0), 90), ((-ONE, 0, 0, -ONE), 180), ((0, -ONE, ONE, 0), 270),
    ((ONE, 20, -20, ONE), 0), ((3 * ONE, 0, 0, 2 * ONE), 0), ((0, 0, 0, 0), 0), ((ONE, 0, ONE, 0), 0)])
def test_angles_are_whole_degrees_whatever_the_scale(matrix, degrees):
    a, b, c, d = matrix
    assert orientation.clockwise_degrees((a, b, 0, c, d, 0, 0, 0, 1 << 30)) == degrees


def with_message(path, source, arguments):
    """Rewrites the H.264 video with a display orientation message (SEI) in the stream itself."""
    with av.open(str(source)) as container, av.open(str(path), "w") as out:
        stream = container.streams.video[0]
        copy, insert = out.add_stream_from_template(stream), BitStreamFilterContext(
            f"h264_metadata=display_orientation=insert:{arguments}", stream)
        for packet in container.demux(stream):
            for changed in insert.filter(packet if packet.size else None):
                changed.stream = copy
                out.mux(changed)
    return path


@pytest.mark.parametrize("arguments, matrix", [
    ("rotate=90", (0, -ONE, ONE, 0)), ("rotate=0:flip=horizontal", (-ONE, 0, 0, ONE)),
    ("rotate=180:flip=vertical", (-ONE, 0, 0, ONE))])
def test_orientation_messages_in_the_stream_are_followed(arguments, matrix, tmp_path):
    plain = write(tmp_path / "plain.mp4")
    turned = video.read(with_message(tmp_path / "turned.mp4", plain, arguments), max_frames=2)
    expected = [moved(picture, matrix) for picture in video.read(plain, max_frames=2).pixels]
    np.testing.assert_array_equal(turned.pixels, expected)


def test_the_containers_matrix_counts_before_that_in_the_stream(tmp_path):
    source = write(tmp_path / "turned.mp4", (0, ONE, -ONE, 0))
    both = with_message(tmp_path / "both.mkv", source, "rotate=90")
    assert sum(data.type.name == "DISPLAYMATRIX" for data in first_frame(both).side_data) == 2
    np.testing.assert_array_equal(video.read(both, max_frames=2).pixels,
                                  video.read(source, max_frames=2).pixels)


@pytest.mark.parametrize("number", range(1, 9))
def test_jpeg_frames_that_carry_exif_are_shown_like_stills(number):
    exif, contents = Image.Exif(), io.BytesIO()
    exif[0x0112] = number
    Image.fromarray(COLOURS.repeat(16, 0).repeat(16, 1)).save(contents, "jpeg", exif=exif, subsampling=0)
    codec = av.CodecContext.create("mjpeg", "r")
    frame, = codec.decode(av.Packet(contents.getvalue())) + codec.decode(None)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(contents)))[8::16, 8::16]
    assert np.abs(upright(frame)[8::16, 8::16].astype(int) - expected).max() <= 3
