"""Detects media files that are shorter than their container states.

Only sizes are read, never the media: a few seeks in most files, one per cluster or block in live Matroska.

Sources: ISO/IEC 14496-12 (mp4), RFC 8794 and RFC 9559 (Matroska), RFC 3533 (Ogg), Adobe's FLV and SWF, and
Microsoft's AVI and ASF specifications.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

_GUID_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_GUID_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_OGG_PAGE = 27 + 255 + 255 * 255   # bytes, at most
_SIDX = 40 + 12 * 65535            # bytes, at most
_SEGMENT, _CLUSTER, _EBML = 0x18538067, 0x1F43B675, 0x1A45DFA3
_LEVEL_1 = {_CLUSTER, 0x1C53BB6B, 0x1254C367, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1043A770, 0x1941A469}
_IN_CLUSTER = {0xE7, 0xA3, 0xA0, 0xA7, 0xAB, 0x5854, 0xAF}   # time, blocks, position, size before
_ANYWHERE = {0xEC, 0xBF}                                     # padding, checksum


def missing_end(path, format_name: str) -> str | None:
    """Returns why a file must be incomplete, or None.

    None may also mean that the container does not state where it ends, as in MPEG-TS and raw streams.

    Args:
      format_name: FFmpeg's name of the container, such as "mov,mp4,m4a,3gp,3g2,mj2".

    Raises:
      OSError: the file cannot be read.
    """
    find = _FORMATS.get(format_name)
    if find is None:
        return None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return find(file, size)
        except (struct.error, IndexError):  # an incomplete header
            return f"the file ends at byte {size}, within a header"


def _at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _past(what: str, end: int, size: int) -> str | None:
    return f"{what} ends at byte {end}, the file at {size}" if end > size else None


def _boxes(file: BinaryIO, size: int) -> str | None:
    """mp4, mov: boxes with a size and a type; the media are in `mdat`, in fragments after each `moof`."""
    place, is_fragmented = 0, False
    while place < size:
        header = _at(file, place, 16)
        if len(header) < 8:
            return "the file ends within a header" if is_fragmented and any(header) else None
        length, kind = struct.unpack(">I4s", header[:8])
        if length == 1:
            length, = struct.unpack(">Q", header[8:])
        if kind not in (b"mdat", b"moof", b"moov", b"styp", b"sidx"):
            if length < 8:  # extends to the end of the file, or is not a box
                return None
            place += length
            continue
        if length == 0:
            return None
        is_fragmented = is_fragmented or kind in (b"moof", b"styp", b"sidx")
        place += length
        reason = _past(f"its part {kind.decode()}", place, size)
        if kind == b"sidx" and not reason:
            reason = _segments(_at(file, place - length, min(length, _SIDX)), place, size)
        if reason or length < 8:
            return reason
    return None


def _segments(box: bytes, end: int, size: int) -> str | None:
    """An index of the segments that follow, with their sizes."""
    is_wide = box[8] > 0
    offset, _, count = struct.unpack_from(">QHH" if is_wide else ">IHH", box, 28 if is_wide else 24)
    sizes = struct.unpack_from(">" + "I8x" * count, box, 40 if is_wide else 32)
    return _past("the last of its segments", end + offset + sum(one & 0x7FFFFFFF for one in sizes), size)


def _elements(file: BinaryIO, place: int, size: int) -> Iterator[tuple[int, int, int | None]]:
    """Yields (id, start of the content, its length, None if unknown) of EBML elements.

    The next element is read after the content, or after the header if the length is unknown.
    """
    while place < size:
        header = _at(file, place, 12)
        id_bytes = 9 - header[0].bit_length()
        if id_bytes > 4:
            return
        length_bytes = 9 - header[id_bytes].bit_length()
        if length_bytes > 8:
            return
        data = header[id_bytes:id_bytes + length_bytes]
        if len(data) < length_bytes:
            raise IndexError
        length = int.from_bytes(data) - (1 << 7 * length_bytes)
        start = place + id_bytes + length_bytes
        unknown = length == (1 << 7 * length_bytes) - 1
        yield int.from_bytes(header[:id_bytes]), start, None if unknown else length
        place = start if unknown else start + length


def _matroska(file: BinaryIO, size: int) -> str | None:
    """Matroska, WebM: elements with an id and a size. Live streams omit the sizes of outer elements."""
    segment = None
    for kind, start, length in _elements(file, 0, size):
        if kind == _SEGMENT:
            segment = start if not length else None
            if length:
                return _past("its segment", start + length, size)
            break
        if kind not in (_EBML, *_ANYWHERE):
            return None
    if segment is None:
        return None
    in_cluster = False
    for kind, start, length in _elements(file, segment, size):
        if kind in _LEVEL_1:
            in_cluster = kind == _CLUSTER
        elif kind not in _ANYWHERE and not (in_cluster and kind in _IN_CLUSTER):
            return None  # no longer part of the video
        if length is None and kind != _CLUSTER:
            return None
        if length is not None and start + length > size:
            return _past("its last cluster", start + length, size)
    return None


def _avi(file: BinaryIO, size: int) -> str | None:
    """AVI: RIFF chunks with their sizes; 0 or all ones means unknown at the time of writing."""
    place = 0
    while place + 8 <= size:
        kind, length = struct.unpack("<4sI", _at(file, place, 8))
        if kind != b"RIFF" or length in (0, 0xFFFFFFFF):
            return None
        place += 8 + length + length % 2
        if place - 9 > size:  # some writers count the header, some omit the padding
            return _past("its chunk RIFF", place, size)
    return None


def _asf(file: BinaryIO, size: int) -> str | None:
    """ASF, WMV: objects with a GUID and a size, which is 0 in live streams."""
    place = 0
    while place < size:
        guid, length = struct.unpack("<16sQ", _at(file, place, 24))
        if guid not in (_GUID_HEADER, _GUID_DATA) or length < 24:
            return None
        place += length
        if place > size:
            return _past("its data", place, size)
    return None


def _flv(file: BinaryIO, size: int) -> str | None:
    """FLV: tags, each followed by its size. Tags are scanned only if the last size does not lead to one."""
    place = int.from_bytes(_at(file, 5, 4)) + 4
    if size < place + 15:
        return None
    last = size - 4 - int.from_bytes(_at(file, size - 4, 4))
    if place <= last <= size - 15 and _flv_end(file, last) == size:
        return None
    while place < size:
        end = _flv_end(file, place)
        if end is None:
            return None
        if end - 4 > size:
            return _past("its last tag", end - 4, size)
        place = end
    return None


def _flv_end(file: BinaryIO, place: int) -> int | None:
    """Returns the end of the size after a tag; None if there is no tag."""
    header = _at(file, place, 11)
    if header[0] & 0x1F not in (8, 9, 18):
        return None
    if len(header) < 11:
        raise IndexError
    return place + 11 + int.from_bytes(header[1:4]) + 4


def _ogg(file: BinaryIO, size: int) -> str | None:
    """Ogg: pages with the sizes of their parts; the last one begins at most a largest page before the end."""
    start = max(0, size - _OGG_PAGE)
    tail = _at(file, start, _OGG_PAGE)
    place = tail.rfind(b"OggS\0")
    if place < 0:
        return None
    parts = tail[place + 26]
    sizes = tail[place + 27:place + 27 + parts]
    if len(sizes) < parts:
        raise IndexError
    end = place + 27 + parts + sum(sizes)
    rest = tail[end:]
    if rest and b"OggS\0".startswith(rest):
        raise IndexError
    return _past("its last page", start + end, size)


def _rm(file: BinaryIO, size: int) -> str | None:
    """RealMedia: chunks with a type and a size, which is 0 for live data."""
    place = 0
    while place < size:
        kind, length = struct.unpack(">4sI", _at(file, place, 8))
        if kind not in (b".RMF", b"PROP", b"CONT", b"MDPR", b"DATA", b"INDX") or length < 10:
            return None
        place += length
        if place - 18 > size and kind != b"INDX":  # some writers count the header of DATA twice
            return _past(f"its chunk {kind.decode()}", place, size)
    return None


def _swf(file: BinaryIO, size: int) -> str | None:
    """SWF: states its uncompressed size."""
    kind, length = struct.unpack("<3sxI", _at(file, 0, 8))
    return _past("the film", length, size) if kind == b"FWS" else None


def _gif(file: BinaryIO, size: int) -> str | None:
    """GIF: images and extensions, each a chain of blocks that ends with an empty block."""
    data = _at(file, 0, size)
    place = 13 + _gif_colours(data[10])
    while place < size and data[place] in (0x21, 0x2C):
        if data[place] == 0x21:
            place += 2
        else:
            place += 11 + _gif_colours(data[place + 9])
        while data[place]:  # an IndexError at the end of the file
            place += 1 + data[place]
        place += 1
    return None


def _gif_colours(flags: int) -> int:
    """Returns the size in bytes of the colour table that the flags announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


_FORMATS = {
    "mov,mp4,m4a,3gp,3g2,mj2": _boxes, "matroska,webm": _matroska, "avi": _avi, "asf": _asf, "asf_o": _asf,
    "flv": _flv, "live_flv": _flv, "ogg": _ogg, "rm": _rm, "swf": _swf, "gif": _gif}
