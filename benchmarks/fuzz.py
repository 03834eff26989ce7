"""Reads 2,000 damaged mp4, jpeg and png files; counts outcomes, and reports the worst times and memory.

  python -m benchmarks.fuzz [--count=2000] [--seed=0] [--keep=folder]

Each file must give crops or an error that names it: no crash, at most 10 CPU seconds, bounded memory. A
second process reads them, so that a crash is one of the outcomes. Exit status 1: a rule was broken.
"""

import collections
import pathlib
import tempfile

from absl import app
from absl import flags

from benchmarks import damage

_COUNT = flags.DEFINE_integer("count", 2000, "Damaged files.")
_SEED = flags.DEFINE_integer("seed", 0, "Decides the damage.")
_KEEP = flags.DEFINE_string("keep", None, "Folder in which files that broke a rule are kept.")


def main(_) -> None:
    kinds, slowest, largest, broken = collections.Counter(), 0.0, 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        for path, outcome in damage.outcomes(_COUNT.value, _SEED.value, pathlib.Path(folder, "fuzz")):
            kinds[path.suffix[1:], outcome.kind] += 1
            slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.memory)
            if not outcome.is_fine:
                broken.append(f"{path.name}: {outcome}")
                if _KEEP.value:
                    pathlib.Path(_KEEP.value).mkdir(parents=True, exist_ok=True)
                    pathlib.Path(_KEEP.value, path.name).write_bytes(path.read_bytes())
    print("| files | outcome | count |\n|---|---|---|")
    for (suffix, kind), count in sorted(kinds.items()):
        print(f"| {suffix} | {kind} | {count} |")
    print(f"slowest {slowest:.2f} CPU s; memory grew by {largest:.0f} MiB; rules broken: {len(broken)}")
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    app.run(main)
