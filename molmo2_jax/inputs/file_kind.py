"""Identifies files that are not what their name says: Git LFS pointers, HTML pages, pickles, empty files.

They result from clones without Git LFS, failed downloads and renamed files.
"""

import os

_SAVE_AGAIN = "load it with the program that wrote it and save it as safetensors"
_STARTS = (
    (b"version https://git-lfs",
     "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"),
    (b"PK\x03\x04", f"a zip archive, as torch.save writes: {_SAVE_AGAIN}"),
    *((b"\x80" + bytes([protocol]), f"a pickle, as older versions of torch.save write: {_SAVE_AGAIN}")
      for protocol in range(2, 6)),
    (b"GGUF", f"a GGUF file: {_SAVE_AGAIN}"),
    (b"\x89HDF", f"an HDF5 file: {_SAVE_AGAIN}"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml")
_SHOWN = 40  # characters of a text


def describe(path: str | os.PathLike, *, is_binary: bool = False) -> str:
    """Returns what an unreadable file probably is, and the remedy; "" if its first bytes do not show it.

    Args:
      is_binary: the file should not be text, so any text is reported.

    Raises:
      OSError: the file cannot be opened.
    """
    with (path.open("rb") if hasattr(path, "open") else open(path, "rb")) as file:  # it may be in a bucket
        start = file.read(512)
    for known, what in _STARTS:
        if start.startswith(known):
            return what
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_PAGES):
        return "a page of HTML or XML, such as servers answer errors with: download the file again"
    if not start:
        return "empty: download the file again"
    if is_binary and text and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text):
        return f"a text that begins {text[:_SHOWN].decode()!r}: download the file again"
    return ""
