"""The only gin root: turns gin files and bindings into one frozen RunConfig.

gin fills in dataclasses and does nothing else; no other module imports it. Mistakes that gin accepts
silently are errors here: wrong types, lists for tuples, misspelt scopes, bindings that nothing reads.
"""

import dataclasses
import functools
import importlib
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import gin
import gin.config
from gin import config_parser

import data_pipelines.pipeline
import molmo2_jax.optim
import molmo2_jax.sharding
import molmo2_jax.train
from launch.support import field_types
from launch.support import places
from molmo2_jax import config
from molmo2_jax.inputs import text_file

ROOT = places.SHIPPED   # the folder of gin_configs

# The names that bindings given on the command line may use.
_HEADER = """from __gin__ import dynamic_registration
from data_pipelines import formats
from data_pipelines import pipeline
from launch import run
from molmo2_jax import config
from molmo2_jax import finetune
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import train
from molmo2_jax.inputs import packers
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines what a command computes; parts that it does not need may be None."""
    model: config.Molmo2Config
    inputs: config.InputConfig = config.InputConfig()
    tokenizer: str | None = None   # path of a tokenizer.json
    data: data_pipelines.pipeline.DataConfig | None = None
    optim: molmo2_jax.optim.OptimConfig | None = None
    train: molmo2_jax.train.TrainConfig | None = None
    evals: molmo2_jax.train.EvalsConfig | None = None
    mesh: molmo2_jax.sharding.MeshConfig = molmo2_jax.sharding.MeshConfig()

    @property
    def micro_batch_rows(self) -> int:
        """Rows of all hosts that a train step processes at once; needs `data` and `train`."""
        assert self.data and self.train
        return self.data.batch_rows // self.train.accumulate


def resolve(
        gin_files: Iterable[str | pathlib.Path], bindings: Sequence[str] = ()) -> RunConfig:
    """Returns the RunConfig described by the files and then the bindings; later ones win.

    Paths of gin files, included ones too, are relative to the root of the repository. In an installed package
    they are relative to the current folder or, if there is no such file, to the package's own gin_configs.

    Raises:
      ValueError: a file is missing, is not UTF-8 or does not parse; a name is unknown; a value has the
        wrong type or breaks a rule of its dataclass; a required value is not set; nothing reads a binding.
    """
    gin.clear_config()
    try:
        _parse(gin_files, bindings)
        bound = _read_text(gin.config_str())
        _check_types(bound)
        run_config = _build()
        _check_all_read(bound, _read_text(gin.operative_config_str()))
    finally:
        gin.clear_config()
    return run_config


def _parse(files: Iterable[str | pathlib.Path], bindings: Sequence[str]) -> None:
    """Fills gin's configuration.

    Raises:
      ValueError: a file is missing, includes itself, or does not parse; a binding does not parse.
    """
    gin_files = list(map(str, files))
    for path in gin_files:
        _check_file(path, ())
    _check_includes("\n".join(bindings), ())
    try:
        for path in gin_files:
            gin.parse_config_file(path)
        gin.parse_config(_HEADER + "\n".join(bindings) + "\n")
        gin.finalize()
    except Exception as error:  # gin reports mistakes with a dozen exception types
        raise ValueError(_one_line(error)) from error


def _check_file(path: str, includers: tuple[str, ...]) -> None:
    """Raises ValueError if the file or an included file is missing, or if a file includes itself."""
    origin = f" (included by {includers[-1]})" if includers else ""
    if path in includers:
        raise ValueError(f"a gin file must not include itself; got {path}{origin}")
    file = places.gin_file(path)
    if not file:
        raise ValueError(f"gin files must exist, relative to {places.base()}"
                         + (f" or to {ROOT}" if places.base() != ROOT else "") + f"; got {path}{origin}")
    _check_includes(text_file.read(file), (*includers, path))


def _check_includes(text: str, includers: tuple[str, ...]) -> None:
    for _, path in re.findall(r"""^\s*include\s+(['"])(.*?)\1""", text, flags=re.MULTILINE):
        _check_file(path, includers)


def _build() -> RunConfig:
    """Returns the RunConfig that gin builds.

    Raises:
      ValueError: a required value is missing, or a value breaks a rule of its dataclass.
    """
    try:
        return _gin_run_config()
    except TypeError as error:
        missing = re.search(r"(\w+)\.__init__\(\) missing \d+ required .*?: (.*)", str(error))
        if not missing:
            raise
        raise ValueError(f"{missing[1]} has fields that must be set: {missing[2]}") from error
    except ValueError as error:
        raise ValueError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    """Returns gin's message on one line, without the parts that only help to debug gin."""
    message = str(error).partition(" in config string:")[0]
    if isinstance(error, SyntaxError) and error.text:
        message += f" in {error.text}"
    for pattern, short in (
            (r"^\('(.*)', \(\d+, \d+\)\)$", r"\1"),
            (r" \(line \d+\) in ", " in "),
            (r"In call to configurable '(\w+)' \(<class .*?>\)", r"(in \1)"),
            (r"<module '([\w.]+)' from .*?>", r"\1"),
            (r"In bindings string line \d+", "in the binding"),
            (r"/gin\.macro'", "'")):
        message = re.sub(pattern, short, message)
    return " ".join(message.split())


class _Key(NamedTuple):
    """What one line of gin binds: a field of a dataclass, or a macro (cls None, scope its name)."""
    scope: str
    cls: type | None
    field: str

    def __str__(self):
        if self.cls is None:
            return self.scope
        name = f"{self.cls.__module__.rpartition('.')[2]}.{self.cls.__name__}.{self.field}"
        return f"{self.scope}/{name}" if self.scope else name


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str


class _Delegate(config_parser.ParserDelegate):
    """Turns references and macros into placeholders. `symbols` maps imported names to modules."""

    def __init__(self):
        self.symbols = {}

    def named(self, selector):
        """Returns the object named by `symbol.path.Name`."""
        symbol, *path = selector.split(".")
        return functools.reduce(getattr, path, importlib.import_module(self.symbols[symbol]))

    def configurable_reference(self, scoped_configurable_name, evaluate):
        selector = scoped_configurable_name.rpartition("/")[2]
        return field_types.Built(self.named(selector), scoped_configurable_name, evaluate)

    def macro(self, macro_name):
        return _Macro(macro_name)


def _read_text(text: str) -> dict[_Key, Any]:
    """Returns the bindings in a text by gin.config_str or operative_config_str; builds nothing."""
    delegate, bound = _Delegate(), {}
    for statement in config_parser.ConfigParser(text, delegate):
        if isinstance(statement, config_parser.ImportStatement):
            has_own_name = statement.is_from or statement.alias
            module = statement.module if has_own_name else statement.module.split(".")[0]
            delegate.symbols[statement.bound_name()] = module
        elif statement.arg_name:
            cls = delegate.named(statement.selector)
            bound[_Key(statement.scope, cls, statement.arg_name)] = statement.value
        else:
            name = "/".join(filter(None, (statement.scope, statement.selector)))
            bound[_Key(name, None, "")] = statement.value
    return bound


def _check_types(bound: dict[_Key, Any]) -> None:
    """Raises ValueError with every binding whose value does not fit the type of its field."""
    problems = []
    for key, value in bound.items():
        if key.cls is None:
            continue
        if not dataclasses.is_dataclass(key.cls):
            problems.append(f"gin may set fields of dataclasses only; got {key}")
            continue
        annotation = field_types.of(key.cls)[key.field]
        problem = field_types.problem(_without_macros(value, bound), annotation)
        problems += [f"{key} {problem}"] if problem else []
    if problems:
        raise ValueError("; ".join(problems))


def _without_macros(value: Any, bound: dict[_Key, Any]) -> Any:
    """Returns the value with every macro replaced by its value."""
    if isinstance(value, _Macro):
        return _without_macros(bound[_Key(value.name, None, "")], bound)
    if isinstance(value, (list, tuple)):
        return type(value)(_without_macros(item, bound) for item in value)
    if isinstance(value, dict):
        return {key: _without_macros(item, bound) for key, item in value.items()}
    return value


def _check_all_read(bound: dict[_Key, Any], operative: dict[_Key, Any]) -> None:
    """Raises ValueError with every binding that had no effect.

    In scope a/b gin takes the binding of a/b, else that of a, else the one without a scope.
    """
    read = set()
    for key in operative:
        if key.cls is None:
            read.add(key)
            continue
        scopes = key.scope.split("/") if key.scope else []
        candidates = (key._replace(scope="/".join(scopes[:length]))
                      for length in range(len(scopes), -1, -1))
        read.add(next((candidate for candidate in candidates if candidate in bound), key))
    unread = [str(key) for key in bound if key not in read]
    if unread:
        raise ValueError("every binding must be read by something; nothing read "
                         + ", ".join(unread) + " (misspelt scope, unused object or macro, or "
                         "overridden in every scope that is used)")


_gin_run_config = gin.external_configurable(RunConfig, module="launch.run")
# gin's own readers search one folder only and fail where the current folder has a `gin_configs`. They also
# decode files in the locale's encoding and keep a byte order mark as text.
gin.config._FILE_READERS[:] = [
    (lambda path: places.gin_file(path).open(encoding="utf-8-sig"), places.gin_file)]
