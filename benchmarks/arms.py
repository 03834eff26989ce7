"""A table whose rows, called arms, take minutes each to compute: every one is kept as a line of a file.

The benchmark that has such a table gets the flags --lines, --page, --only, --again and --table, computes what
the cache lacks, and writes the page after every arm.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tqdm
from absl import flags

_FOLDER = pathlib.Path(__file__).parent
_ONLY = flags.DEFINE_string("only", "", "Part of the names of the arms to compile.")
_AGAIN = flags.DEFINE_bool("again", False, "Recompile arms that are in the cache.")
_TABLE = flags.DEFINE_bool("table", False, "Compile nothing.")
_LINES = flags.DEFINE_string("lines", None, "One line per arm; default: NAME.jsonl in benchmarks/.")
_PAGE = flags.DEFINE_string("page", None, "The table; default: NAME.md in benchmarks/.")

Arm = tuple[Any, ...]


def fill(name: str, arms: Sequence[Arm], arm_of: Callable[[dict], Arm], compile_arm: Callable[..., dict],
         prepare: Callable[[], None], page_of: Callable[[dict[Arm, dict]], str]) -> None:
    """Computes the arms that are asked for and not known, and writes the page.

    Args:
      name: of the benchmark, after which cache and page are called.
      arm_of: returns the arm of a line of the cache.
      compile_arm: returns the line of an arm; its arguments are the arm's parts.
      prepare: called once if anything may be computed.
      page_of: returns the text of the page from {arm: line}.
    """
    cache, page = (pathlib.Path(given or _FOLDER / f"{name}.{ending}")
                   for given, ending in ((_LINES.value, "jsonl"), (_PAGE.value, "md")))
    lines = cache.read_text(encoding="utf-8").splitlines() if cache.exists() else []
    known = {arm_of(line): line for line in map(json.loads, lines)}   # later lines win
    if not _TABLE.value:
        prepare()
        todo = [arm for arm in arms
                if _ONLY.value in "@".join(map(str, arm)) and (_AGAIN.value or arm not in known)]
        for arm in tqdm.tqdm(todo, unit="arm"):
            known[arm] = compile_arm(*arm)
            with open(cache, "a", encoding="utf-8") as file:
                file.write(json.dumps(known[arm]) + "\n")
            page.write_text(page_of(known), encoding="utf-8")
    page.write_text(page_of(known), encoding="utf-8")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ["---"] * len(columns), *rows))
