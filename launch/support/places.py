"""Paths of gin files, included models and the data of runs, in a checkout and in an installed package.

In a checkout all paths are relative to the root of the repository. `pip install` copies gin_configs and
assets into the package (setup.py); paths of data and runs are then relative to the current folder.
"""

import pathlib

import launch
from molmo2_jax import files

PACKAGES = pathlib.Path(launch.__file__).resolve().parent.parent   # the folder of launch, molmo2_jax, ...
_COPIED = PACKAGES / "launch" / "shipped"    # setup.py's SHIPPED_IN; absent in a checkout
IS_INSTALLED = _COPIED.is_dir()
SHIPPED = _COPIED if IS_INSTALLED else PACKAGES   # holds gin_configs and assets
_SHIPPED_FOLDERS = ("gin_configs", "assets")


def base() -> pathlib.Path:
    """Returns the absolute folder that paths in configurations are relative to."""
    return pathlib.Path.cwd() if IS_INSTALLED else PACKAGES


def gin_file(path: str) -> pathlib.Path | None:
    """Returns the file that a path in --gin_file or an `include` line names, or None if there is none.

    It is searched for in base() and then among the package's own files.
    """
    return next((found for found in (base() / path, SHIPPED / path) if found.is_file()), None)


def data(folder: str) -> str:
    """Returns the absolute path of a data folder of a run; one in a bucket is unchanged."""
    return folder if files.is_remote(folder) else str(base() / folder)


def model(path: str) -> str:
    """Returns the path of a model or tokenizer; included ones, such as "assets/nano", work in any folder.

    A path that exists is returned unchanged, as is one that names nothing included in the package.
    """
    is_shipped = pathlib.PurePath(path).parts[:1] in [(name,) for name in _SHIPPED_FOLDERS]
    if is_shipped and not pathlib.Path(path).exists() and (SHIPPED / path).exists():
        return str(SHIPPED / path)
    return path
