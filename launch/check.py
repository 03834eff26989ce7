"""Checks data folders before training: lists everything in them that training would leave out.

  python -m launch.check --data=my_data
  python -m launch.check --data=my_data --nomedia

Reads every line of annotations.jsonl, then every video and image, and holds annotations against them
(docs/data_format.md). --nomedia leaves the files unopened, which takes seconds. Ends with status 1 if there
is anything to list.
"""

import collections
import dataclasses
import pathlib
import sys

from absl import flags

from data_pipelines import checking
from data_pipelines import sources
from launch import cli
from launch import places
from molmo2_jax import bars
from molmo2_jax import config
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import tokenizer as tokenizers

_MEDIA = flags.DEFINE_bool("media", True, "Open every video and image.")
for _name in ("data", "traceback"):
    flags.declare_key_flag(_name)

_MODEL = places.SHIPPED / "assets/nano"  # small pictures; whether files can be read depends on no model


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    found = [check(folder) for folder in cli.data()]  # all of them, also behind one that has problems
    if any(found):
        sys.exit(1)


def check(folder: str) -> list[str]:
    """Prints and returns what training would leave out of a folder."""
    examples, errors = sources.read_jsonl_collecting(pathlib.Path(folder) / "annotations.jsonl")
    found = [str(error) for error in errors]
    if _MEDIA.value:
        model, inputs = hf_checkpoint.read_config(_MODEL)
        inputs = dataclasses.replace(inputs, max_frames=config.InputConfig().max_frames)
        tokenizer = tokenizers.Tokenizer.from_file(_MODEL, model.text.vocab_size)
        for problems in bars.bar(checking.problems(examples, model, inputs, tokenizer),
                                 total=len(examples), desc=folder, unit="record"):
            found += [f"{folder}/{problem}" for problem in problems]
    kinds = collections.Counter(one.type for example in examples for one in example.annotations)
    print(f"{folder}: {len(examples)} good lines; annotations: "
          + (", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none")
          + f"; problems: {len(found) or 'none'}")
    for problem in found:
        print(f"  {problem}")
    return found


if __name__ == "__main__":
    cli.start(main)
