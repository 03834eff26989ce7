"""Small videos in which every frame encodes its number."""

import fractions

import av
import numpy as np


def numbered(number, rows=32, columns=64):
    """Returns uint8[rows, columns, 3] with `number` in 16 black or white blocks on a mottled background."""
    rng = np.random.default_rng(number)
    picture = rng.integers(90, 130, (rows // 8, columns // 8, 3)).astype(np.uint8)
    picture = picture.repeat(8, 0).repeat(8, 1)
    bits = np.array([(number >> bit & 1) * 255 for bit in range(16)]).reshape(2, 8)
    picture[:16, :] = bits.repeat(8, 0).repeat(columns // 8, 1)[:, :, None]
    return picture


def number_of(picture):
    """Returns the number encoded in a picture of `numbered`, also after lossy coding."""
    rows, columns = 8, picture.shape[1] // 8
    blocks = picture[:16].reshape(2, rows, 8, columns, 3)[:, 2:-2, :, 2:-2].mean((1, 3, 4))
    return sum(1 << bit for bit, value in enumerate(blocks.ravel()) if value > 128)


def write(path, count, *, fps=30, keys=12, between=2, codec="libx264", ticks=None, unit=None, rotation=0,
          format=None, shift=0, options=None):
    """Writes `count` numbered frames; `ticks` in `unit` seconds make the rate variable."""
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=fractions.Fraction(fps), options=options or {"bf": str(between)})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = keys, between
        if unit:
            stream.codec_context.time_base = stream.time_base = unit
        if rotation:
            stream.set_display_rotation(rotation)
        packets = []
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            if ticks:
                frame.pts, frame.time_base = ticks[number], unit
            packets += stream.encode(frame)
        for packet in packets + stream.encode(None):
            packet.pts += shift
            packet.dts += shift
            out.mux(packet)
    return path
