"""Shared by all commands: the flags that describe a run, exit statuses, and one-line error messages."""

import functools
import glob
import importlib.metadata
import logging as stdlib_logging
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app
from absl import flags
from absl import logging

from launch import run
from launch.support import places
from launch.support import record
from molmo2_jax import files
from molmo2_jax import sharding

_GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], "File that describes the run, such as gin_configs/runs/quickstart.gin; later files win. "
    "Default, for commands with --workdir: its config.gin")
_GIN = flags.DEFINE_multi_string(
    "gin", [], "One binding, which overrides the files, such as "
    "--gin='config.ConnectorConfig.video_window = (4, 4)'")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory of the run: checkpoints, metrics and config.gin.")
TRACEBACK = flags.DEFINE_bool(
    "traceback", False, "Show the stack trace of an error instead of one line.")


# Flags of several commands; each command declares those it reads as its own (declare_key_flag).
MODEL = flags.DEFINE_string("model", None, "Work directory of a run, or a Hugging Face folder.")
DATA = flags.DEFINE_multi_string("data", [], "Folder with annotations.jsonl (docs/data_format.md)")
INIT_FROM = flags.DEFINE_string(
    "init_from", None, "Work directory or Hugging Face folder with the initial weights of training.")
OUTPUT = flags.DEFINE_string("output", None, "Folder or file to write.")
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 512, "Maximum length of an answer in tokens.", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Dtype of the computation or of exported weights.")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["int8"], "int8 stores the decoder's matrices in 8 bits. Default: in --dtype.")
CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, ["float32", "bfloat16"],
                                "Dtype of the KV cache. Default: that of --dtype.")
_MESH = flags.DEFINE_list(
    "mesh", [], "Devices along data, fsdp, tensor and context, such as --mesh=tensor=4 or "
    "--mesh=data=2,tensor=4; those left out are 1, -1 takes the rest. Default: the smallest that fits.")
SAMPLE = flags.DEFINE_integer(
    "sample", None, "Examine at most this many records of each folder, drawn by --seed.", lower_bound=1)
ALLOW_MISSING = flags.DEFINE_bool(
    "allow_missing", False, "Train without the data sets whose folders are absent; the shares of the others "
    "grow. The same as --gin='pipeline.DataConfig.allow_missing = True'. In evaluation: leave the cells of "
    "benchmarks without files, and their averages, empty.")
CACHE = flags.DEFINE_string(
    "cache", None, "Folder on a disk of this host for copies of shards that are in a bucket (gs://). The "
    "same as --gin=\"pipeline.DataConfig.cache = 'FOLDER'\".")
ROWS = flags.DEFINE_integer(
    "rows", 8, "Rows of a batch: records that launch.evaluate answers at a time, or, at most, rows on the "
    "page of launch.inspect.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.")

USER_ERROR = 2    # exit status of a mistake that the user can correct
INTERRUPTED = 130
UNFINISHED = 75   # saved; the same command resumes (EX_TEMPFAIL)
DISK_ERROR = 74   # a disk is full, read-only or broken; the command itself is right (EX_IOERR)


def start(main: Callable[[list[str]], None], argv: list[str] | None = None) -> NoReturn:
    """Parses the flags and calls main with the remaining arguments; never returns."""
    app.run(functools.partial(_guarded, main), argv=argv, flags_parser=_parse)


def workdir(default: pathlib.Path | None = None) -> pathlib.Path:
    """Returns --workdir or the default.

    Raises:
      ValueError: there is neither.
    """
    if not (WORKDIR.value or default):
        raise ValueError("--workdir must name the folder of the run")
    given = WORKDIR.value or default
    return files.path(given) if files.is_remote(given) else pathlib.Path(given)


def mesh() -> sharding.MeshConfig | None:
    """Returns the sizes of --mesh; None if it is not given.

    Raises:
      ValueError: an entry is no axis with a size.
    """
    sizes = {}
    for entry in _MESH.value:
        axis, _, size = entry.strip().partition("=")
        if axis not in sharding.AXES or not size.removeprefix("-").isdigit():
            raise ValueError(f"--mesh must be AXIS=SIZE of {', '.join(sharding.AXES)}, separated by commas; "
                             f"got {','.join(_MESH.value)!r}")
        sizes[axis] = int(size)
    return sharding.MeshConfig(**{"fsdp": 1} | sizes) if sizes else None


def bindings() -> list[str]:
    """Returns the bindings of --gin."""
    return _GIN.value


def resolve(*needed: str) -> run.RunConfig:
    """Returns the RunConfig that the flags describe; it has all the `needed` parts.

    Raises:
      ValueError: as run.resolve; or no gin file is given or found; or a needed part is None.
    """
    files = gin_files()
    if not files:
        saved = workdir().resolve() / record.NAME if WORKDIR.value else None
        if not (saved and saved.is_file()):
            raise ValueError("--gin_file must be given, such as one of gin_configs/runs, or --workdir "
                             f"must hold {record.NAME}; got "
                             + (f"--workdir={WORKDIR.value}" if saved else "neither"))
        files = [saved]
    run_config = run.resolve(files, [*_GIN.value, *_data_bindings()])
    missing = [name for name in needed if getattr(run_config, name) is None]
    if missing:
        names = ", ".join(f"run.RunConfig.{name}" for name in missing)
        raise ValueError(f"this command needs bindings for {names}, which the files in gin_configs/runs "
                         f"have; got {', '.join(map(str, files))}")
    return run_config


def cache() -> str | None:
    """Returns the absolute path of --cache; None if it is not given."""
    return os.path.abspath(os.path.expanduser(CACHE.value)) if CACHE.value else None


def _data_bindings() -> list[str]:
    """Returns the bindings of flags that are settings of the data."""
    values = {"allow_missing": ALLOW_MISSING.value or None, "cache": cache()}
    return [f"pipeline.DataConfig.{name} = {value!r}" for name, value in values.items() if value is not None]


def output_file(path: str) -> pathlib.Path:
    """Returns the path of a file that a command writes when it is done; creates its folder.

    Raises:
      ValueError: it is a folder or cannot be written. OSError: its folder cannot be created.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        raise ValueError(f"the output file must not be a folder; got {path}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"the output file must be writable for this user; got {path}")
    return file


def data() -> list[str]:
    """Returns the folders of --data.

    Raises:
      ValueError: there is none.
    """
    if not DATA.value:
        raise ValueError("--data must name at least one folder with annotations.jsonl")
    return DATA.value


def no_arguments(arguments: list[str]) -> None:
    """Raises ValueError if the command line has arguments other than flags."""
    if arguments:
        raise ValueError("this command takes flags only (see --help); quote values that contain spaces; "
                         f"got {arguments}")


def located(path: str) -> str:
    """Returns the path of a gin file: unchanged if run.resolve finds it, else absolute."""
    return path if places.gin_file(path) else str(pathlib.Path(path).absolute())


def gin_files() -> list[str]:
    """Returns the files of --gin_file."""
    return list(map(located, _GIN_FILE.value))


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if not flags.FLAGS["verbosity"].present:  # Orbax logs at length
            logging.set_verbosity(logging.WARNING)
        return rest
    except flags.Error as error:
        _fail(error)
    except SystemExit:  # absl exits with 1 after printing help
        sys.exit(0)


def _pass_over_absent_tpu() -> None:
    """Keeps jax from searching for a TPU where libtpu is installed (to compile for one) but none is attached.

    The search would take ten seconds and print errors. Accelerators of other plug-ins are still found.
    """
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
    except ImportError as error:   # fsspec looks for the package of a scheme when a path is first used
        if TRACEBACK.value or "fsspec" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        _fail(f"the package that reads such a bucket is not installed: {error}")
    except (ValueError, OSError) as error:
        is_explained = isinstance(error, files.StorageError)
        cause = files.storage_cause(error)
        if TRACEBACK.value or not (is_explained or cause or _is_users_mistake(error)):
            raise
        if cause and not is_explained:
            where = error.filename if isinstance(error, OSError) and error.filename else "a file"
            error = f"{where} could not be written or read: {cause} (--traceback shows the stack trace)"
        if is_explained or cause:
            silence_threads()
        _fail(error, DISK_ERROR if is_explained or cause else USER_ERROR)


def silence_threads() -> None:
    """Silences other threads, so that the message printed next is the last one.

    Threads of a failed save report the same cause again while the process exits.
    """
    logging.flush()
    stdlib_logging.disable(stdlib_logging.CRITICAL)
    threading.excepthook = lambda _: None
    sys.unraisablehook = lambda _: None


def _is_users_mistake(error: Exception) -> bool:
    """Returns whether this project's code rejected a value or the system refused access to a file."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(raised_in.is_relative_to(places.PACKAGES / package)
               for package in ("molmo2_jax", "data_pipelines", "launch"))


def _fail(error: Exception | str, status: int = USER_ERROR) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)
