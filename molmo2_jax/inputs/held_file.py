"""A file whose content is in memory, for readers that take a path."""

import os
import pathlib
import tempfile
import weakref


class HeldFile(os.PathLike):
    """A file in memory. Its text is its name; as a path it is a copy that is gone when the object is.

    On Linux the copy has no name in any folder, so that a killed process leaves nothing. The type of a file
    is then known by its content alone, as everywhere in these readers.
    """

    def __init__(self, name: str, content: bytes):
        self.name, self.content, self._path = name, content, ""

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"HeldFile({self.name!r}, {len(self.content)} bytes)"

    def __eq__(self, other) -> bool:
        return isinstance(other, HeldFile) and (self.name, self.content) == (other.name, other.content)

    def __hash__(self) -> int:
        return hash((self.name, self.content))

    def __reduce__(self):
        return HeldFile, (self.name, self.content)

    def __fspath__(self) -> str:
        if not self._path:
            self._path = self._write()
        return self._path

    def _write(self) -> str:
        if hasattr(os, "memfd_create"):
            number = os.memfd_create("media")
            weakref.finalize(self, os.close, number)
            with open(number, "wb", closefd=False) as file:
                file.write(self.content)
            return f"/proc/self/fd/{number}"
        with tempfile.NamedTemporaryFile(suffix=pathlib.PurePath(self.name).suffix, delete=False) as file:
            weakref.finalize(self, os.unlink, file.name)
            file.write(self.content)
        return file.name
