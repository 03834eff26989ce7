"""What all mains share: flags that describe a run, and mistakes answered by one sentence."""

import functools
import glob
import importlib.metadata
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app
from absl import flags
from absl import logging

from launch import places
from launch import record
from launch import run
from molmo2_jax import files

_GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], "File that describes the run, such as gin_configs/runs/quickstart.gin; later ones win. "
    "Default, of commands with --workdir: the config.gin in there")
_GIN = flags.DEFINE_multi_string(
    "gin", [], "One binding that wins over the files, such as "
    "--gin='config.ConnectorConfig.video_window = (4, 4)'")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics and config.gin.")
_TRACEBACK = flags.DEFINE_bool(
    "traceback", False, "Show where in the code a mistake was noticed.")


# Flags that several commands have; each declares the ones it reads as its own (declare_key_flag).
MODEL = flags.DEFINE_string("model", None, "Work directory of a run, or a Hugging Face folder.")
DATA = flags.DEFINE_multi_string("data", [], "Folder with annotations.jsonl (docs/data_format.md)")
INIT_FROM = flags.DEFINE_string(
    "init_from", None, "Work directory or Hugging Face folder whose weights the first step starts from.")
OUTPUT = flags.DEFINE_string("output", None, "Folder or file to write.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Longest answer.", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of the computation, or of exported weights.")
SEED = flags.DEFINE_integer("seed", 0, "Decides whatever is drawn at random.")

USER_ERROR = 2    # exit status for what a user can correct
INTERRUPTED = 130
UNFINISHED = 75   # saved; the same command resumes (EX_TEMPFAIL)
DISK_ERROR = 74   # a disk is full, read-only or broken: nothing to correct in the command (EX_IOERR)


def start(main: Callable[[list[str]], None], argv: list[str] | None = None) -> NoReturn:
    """Parses the flags and calls main with what is left of the command line; never returns."""
    app.run(functools.partial(_guarded, main), argv=argv, flags_parser=_parse)


def workdir(default: pathlib.Path | None = None) -> pathlib.Path:
    """Returns --workdir or the default. Raises ValueError if there is neither."""
    if not (WORKDIR.value or default):
        raise ValueError("--workdir must name the folder of the run")
    given = WORKDIR.value or default
    return files.path(given) if files.is_remote(given) else pathlib.Path(given)


def bindings() -> list[str]:
    """Returns the bindings of --gin."""
    return _GIN.value


def resolve(*needed: str) -> run.RunConfig:
    """Returns the RunConfig of the flags, which has all the `needed` parts.

    Raises:
      ValueError: as run.resolve; or no gin file is known; or a needed part is None.
    """
    files = gin_files()
    if not files:
        saved = workdir().resolve() / record.NAME if WORKDIR.value else None
        if not (saved and saved.is_file()):
            raise ValueError("--gin_file must be given, such as one of gin_configs/runs, or --workdir hold a "
                             f"{record.NAME}; got " + (f"--workdir={WORKDIR.value}" if saved else "neither"))
        files = [saved]
    run_config = run.resolve(files, _GIN.value)
    missing = [name for name in needed if getattr(run_config, name) is None]
    if missing:
        names = ", ".join(f"run.RunConfig.{name}" for name in missing)
        raise ValueError(f"this command needs bindings for {names}; the files of gin_configs/runs "
                         f"have them; got {', '.join(map(str, files))}")
    return run_config


def output_file(path: str) -> pathlib.Path:
    """Returns the path of a file to be written at the end of the work; makes its folder.

    Raises:
      ValueError: it is a folder, or may not be written. OSError: its folder cannot be made.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        raise ValueError(f"the file to write must not be a folder; got {path}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"the file to write must lie where this user may write; got {path}")
    return file


def data() -> list[str]:
    """Returns the folders of --data. Raises ValueError if there is none."""
    if not DATA.value:
        raise ValueError("--data must name at least one folder with annotations.jsonl")
    return DATA.value


def no_arguments(arguments: list[str]) -> None:
    """Raises ValueError if the command line has more than flags."""
    if arguments:
        raise ValueError("this command takes flags only (--help lists them), values with spaces in quotes; "
                         f"got {arguments}")


def located(path: str) -> str:
    """Returns the path of a gin file: as given if run.resolve finds it, else absolute."""
    return path if places.gin_file(path) else str(pathlib.Path(path).absolute())


def gin_files() -> list[str]:
    """Returns the files of --gin_file."""
    return list(map(located, _GIN_FILE.value))


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if not flags.FLAGS["verbosity"].present:  # Orbax tells at length what it does
            logging.set_verbosity(logging.WARNING)
        return rest
    except flags.Error as error:
        _fail(error)
    except SystemExit:  # absl exits with 1 after printing the help that was asked for
        sys.exit(0)


def _pass_over_absent_tpu() -> None:
    """Keeps jax from looking for a TPU where libtpu is installed (to compile for one) but none is attached:
    it would search for ten seconds and print errors. Accelerators of other plug-ins are found as ever."""
    has_plugins = bool(importlib.metadata.entry_points(group="jax_plugins"))
    if "JAX_PLATFORMS" not in os.environ and not has_plugins and not glob.glob("/dev/accel*") + glob.glob(
            "/dev/vfio/*"):
        jax.config.update("jax_platforms", "cpu")


def _guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
    _pass_over_absent_tpu()
    try:
        main(argv[1:])
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ValueError, OSError) as error:
        is_explained = isinstance(error, files.StorageError)
        cause = files.storage_cause(error)
        if _TRACEBACK.value or not (is_explained or cause or _is_users_mistake(error)):
            raise
        if cause and not is_explained:
            where = error.filename if isinstance(error, OSError) and error.filename else "a file"
            error = f"{where} could not be written or read: {cause} (where that is: --traceback)"
        _fail(error, DISK_ERROR if is_explained or cause else USER_ERROR)


def _is_users_mistake(error: Exception) -> bool:
    """Returns whether our own code refused something, or the system a file."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(raised_in.is_relative_to(places.PACKAGES / package)
               for package in ("molmo2_jax", "data_pipelines", "launch"))


def _fail(error: Exception | str, status: int = USER_ERROR) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)
