"""The command `molmo2`: `molmo2 train ...` is the same as `python -m launch.train ...`.

  molmo2                    lists the commands
  molmo2 COMMAND --help     explains one
  molmo2 --version

This module imports only the standard library until it knows the command, so that --help is immediate.
"""

import ast
import difflib
import importlib.util
import pathlib
import runpy
import sys

import molmo2_jax
from launch.support import places

COMMANDS = ("train", "generate", "evaluate", "convert", "compile", "sweep", "prepare", "check", "inspect",
            "draw", "serve", "quickstart")
_USER_ERROR = 2   # as cli.USER_ERROR; cli imports jax


def main() -> None:
    """Runs the command named by the first argument as the main module, with the remaining arguments."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(overview())
    elif name == "--version":
        print(f"molmo2_jax {molmo2_jax.__version__}")
    elif name in COMMANDS:
        sys.argv[1:] = arguments
        # `alter_sys`: absl takes the help text from sys.modules["__main__"], and child processes import the
        # module that its __spec__ names, as with `python -m`.
        runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(f"error: the first argument must be one of {', '.join(COMMANDS)}; got {name!r}"
              + (f"; did you mean {near[0]!r}?" if near else ""), file=sys.stderr)
        sys.exit(_USER_ERROR)


def overview() -> str:
    """Returns the help of `molmo2`: every command with the first sentence of its docstring."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {sentence(name)}" for name in COMMANDS]
    return "\n".join([
        "usage: molmo2 COMMAND [flags]", "", *lines, "",
        "molmo2 COMMAND --help explains a command, molmo2 --version prints the version.",
        f"The gin files and models of this package (gin_configs/..., assets/...) are in {places.SHIPPED}"])


def sentence(command: str) -> str:
    """Returns the first sentence of a command's docstring without importing the command."""
    spec = importlib.util.find_spec(f"launch.{command}")
    folders = spec.submodule_search_locations
    path = pathlib.Path(folders[0], "__main__.py") if folders else pathlib.Path(spec.origin)
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.partition("\n\n")[0].split())
    return first.partition(". ")[0].removesuffix(".") + "."


if __name__ == "__main__":
    main()
