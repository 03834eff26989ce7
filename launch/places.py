"""Where gin files, shipped models and the data of runs are, in a checkout and in an installation.

In a checkout all paths start at the root of the repository. `pip install` copies gin_configs and assets into
the package (setup.py), and paths of data and runs are relative to the current folder.
"""

import pathlib

import launch

PACKAGES = pathlib.Path(launch.__file__).resolve().parent.parent   # the folder of launch, molmo2_jax, ...
_COPIED = PACKAGES / "launch" / "shipped"    # setup.py's SHIPPED_IN; absent in a checkout
IS_INSTALLED = _COPIED.is_dir()
SHIPPED = _COPIED if IS_INSTALLED else PACKAGES   # holds gin_configs and assets
_SHIPPED_FOLDERS = ("gin_configs", "assets")


def base() -> pathlib.Path:
    """Returns the absolute folder that paths in configurations are relative to."""
    return pathlib.Path.cwd() if IS_INSTALLED else PACKAGES


def gin_file(path: str) -> pathlib.Path | None:
    """Returns the file that a path in --gin_file or an `include` line names, below base() or among those
    that ship; None if there is none."""
    return next((found for found in (base() / path, SHIPPED / path) if found.is_file()), None)


def model(path: str) -> str:
    """Returns the path of a model or tokenizer: what ships, such as "assets/nano", is found from any folder.

    A path that exists, and one that names nothing that ships, is returned as it is.
    """
    is_shipped = pathlib.PurePath(path).parts[:1] in [(name,) for name in _SHIPPED_FOLDERS]
    if is_shipped and not pathlib.Path(path).exists() and (SHIPPED / path).exists():
        return str(SHIPPED / path)
    return path
