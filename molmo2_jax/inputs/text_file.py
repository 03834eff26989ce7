"""Users' text files: UTF-8 with or without a byte order mark. Any other encoding is rejected.

Windows' Notepad, PowerShell and Excel write byte order marks, UTF-16 and code page 1252. A mark is dropped.
Guessing the encoding, or replacing invalid bytes, would change names and answers silently.
"""

import codecs
import itertools
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from molmo2_jax.inputs import file_kind

# UTF-32 first: its little-endian mark begins with the one of UTF-16.
_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
          (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
_CHUNK = 1 << 20  # bytes


def read(path: str | os.PathLike) -> str:
    """Returns the text of a file without its byte order mark; all line ends become "\\n".

    Raises:
      ValueError: as `decode`.
      OSError: the file cannot be read.
    """
    return decode(_path(path).read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")


def _path(path: str | os.PathLike) -> Any:
    """Returns a path with methods; one of etils, which may be remote, as it is."""
    return path if hasattr(path, "read_bytes") else pathlib.Path(path)


def read_json(path: str | os.PathLike) -> Any:
    """Returns the value of a JSON file.

    Raises:
      ValueError: the file is not UTF-8 or not JSON; the message says what it is instead, if known.
      OSError: the file cannot be read.
    """
    try:
        return json.loads(read(path))
    except (ValueError, RecursionError) as error:
        what = file_kind.describe(path)
        raise ValueError(f"{path} is {what}" if what else
                         str(error) if str(path) in str(error) else f"{path}: {error}") from error


def decode(data: bytes, where: str | os.PathLike) -> str:
    """Returns UTF-8 bytes as text without a byte order mark; `where` names them in errors.

    Raises:
      ValueError: the bytes are not UTF-8 or contain a zero byte, as UTF-16 does. The message gives the
        probable encoding, the byte's offset, and how to convert the file.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        _check([data], where)
    return text


def check(path: str | os.PathLike) -> None:
    """Checks that a file of any size is UTF-8, reading it in chunks.

    Raises:
      ValueError: as `decode`.
      OSError: the file cannot be read.
    """
    with _path(path).open("rb") as file:
        _check(iter(lambda: file.read(_CHUNK), b""), path)


def check_start(path: str | os.PathLike) -> None:
    """Checks that a file does not begin as UTF-16 or UTF-32 does.

    Raises:
      ValueError: as `decode`.
      OSError: the file cannot be read.
    """
    with _path(path).open("rb") as file:
        start = file.read(4)
    if b"\0" in start or start.startswith(tuple(mark for mark, _ in _MARKS)):
        _check([start], path)


def _check(chunks: Iterable[bytes], where: str | os.PathLike) -> None:
    """Raises ValueError at the first byte that is not UTF-8 text."""
    offset, line, rest = 0, 1, b""  # of `data`; `rest` holds the bytes of an unfinished character
    for chunk in itertools.chain(chunks, [b""]):
        data = rest + chunk
        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
        if encoding and not offset:
            raise _refusal(where, encoding, "a byte order mark at offset 0")
        try:
            end, is_bad = codecs.utf_8_decode(data, "strict", not chunk)[1], False
        except UnicodeDecodeError as error:
            end, is_bad = error.start, True
        zero = data.find(b"\0", 0, end)
        if zero >= 0:
            raise _refusal(where, f"UTF-16{'LE' if (offset + zero) % 2 else 'BE'}",
                           f"a zero byte at offset {offset + zero}")
        line += data.count(b"\n", 0, end)
        if is_bad:
            raise _refusal(where, "CP1252", f"byte 0x{data[end]:02x} at offset {offset + end}, line {line}")
        offset, rest = offset + end, data[end:]


def _refusal(where: str | os.PathLike, encoding: str, found: str) -> ValueError:
    name = "perhaps Windows code page 1252" if encoding == "CP1252" else f"probably {encoding}"
    return ValueError(f"{where}: text must be UTF-8; got {found}, {name}: save it as UTF-8, or convert it "
                      f"with `iconv -f {encoding} -t UTF-8 OLD >NEW`")
