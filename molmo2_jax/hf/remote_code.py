"""Python files of a checkpoint folder that other programs run to load it: copied, never run by us.

The JSON files of such a folder name the classes and their files under `auto_map`. In a work directory, which
may be in a bucket, these files are in the folder NAME, so that a model that was imported, trained and
exported can be loaded like the original.
"""

import os
from typing import Any, NamedTuple

from etils import epath

from molmo2_jax import files as files_lib
from molmo2_jax.hf import processor

NAME = "remote_code"  # in a work directory
JSON_FILES = ("config.json", processor.IMAGE_FILE, processor.VIDEO_FILE, processor.PROCESSOR_FILE,
              "tokenizer_config.json")


class Code(NamedTuple):
    """`auto_maps` of JSON files by file name, and the Python files of a folder."""
    auto_maps: dict[str, Any]
    files: tuple[epath.Path, ...]


def read(folder: str | os.PathLike | None) -> Code:
    """Returns the remote code of a folder; empty if none of its JSON files refers to any.

    Raises:
      ValueError: an auto_map names a file that is missing, or a JSON file cannot be read.
    """
    if folder is None:
        return Code({}, ())
    folder = files_lib.path(folder)
    found = {name: processor.read_json(folder / name).get("auto_map")
             for name in JSON_FILES if (folder / name).is_file()}
    auto_maps = {name: value for name, value in found.items() if value}
    missing = sorted({file for value in auto_maps.values() for file in _files(value)
                      if not (folder / file).is_file()})
    if missing:
        raise ValueError(f"auto_map must name files of its folder; {folder} lacks {', '.join(missing)}")
    return Code(auto_maps, tuple(sorted(folder.glob("*.py"))) if auto_maps else ())


def _files(auto_map: Any) -> list[str]:
    """Returns the local files that an auto_map needs; "repository--file.Class" needs none."""
    values = auto_map.values() if isinstance(auto_map, dict) else auto_map
    names = [name for value in values for name in (value if isinstance(value, list | tuple) else [value])]
    return [f"{name.rpartition('.')[0]}.py" for name in names if name and "--" not in name]


def write(code: Code, folder: str | os.PathLike) -> None:
    """Copies the files into a folder and adds the auto_maps to its JSON files, created where missing."""
    target = files_lib.path(folder)
    if not code.auto_maps:
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in code.files:
        file.copy(target / file.name, overwrite=True)
    for name, auto_map in code.auto_maps.items():
        values = processor.read_json(target / name) if (target / name).is_file() else {}
        processor.write_json(target / name, values | {"auto_map": auto_map})
