"""Draws a data folder of moving shapes with known answers, in the bring-your-own-data format.

  python -m launch.draw --world=full --output=runs/full/data --split=train --examples=20000 --seed=1
  python -m launch.draw --world=full --output=runs/full/data --split=heldout --examples=256 --seed=2

Writes OUTPUT/SPLIT/annotations.jsonl and its media; docs/data_format.md describes them. Splits other than
train get the masks that scores need. A folder that is complete is left as it is, and
refused if it was drawn with other settings.
"""

from absl import flags

from data_pipelines import synthetic
from data_pipelines import workers
from launch import cli

WORLD = flags.DEFINE_enum(
    "world", "quickstart", sorted(synthetic.WORLDS), "quickstart: one or two large objects apart, learnt in "
    "minutes. full: one to six that cross, hide each other, enter and leave; learnt in an hour by a model "
    "that can point already (launch.quickstart --init_from).")
_SPLIT = flags.DEFINE_string("split", "train", "Name of the subfolder; part of what decides the drawings.")
_EXAMPLES = flags.DEFINE_integer("examples", 1000, "Videos, stills and sets of stills.", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes that draw.", lower_bound=1)
for _name in ("output", "seed", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    if not cli.OUTPUT.value:
        raise ValueError("--output must name the folder to write into")
    with workers.hidden_main():
        world, _ = synthetic.WORLDS[WORLD.value]
        path = synthetic.write(cli.OUTPUT.value, world(), cli.SEED.value, _EXAMPLES.value,
                               _SPLIT.value, workers=_WORKERS.value, replace=False)
    print(path)


if __name__ == "__main__":
    cli.start(main)
