"""Draws videos and images of moving shapes with known answers, as a data folder for training or evaluation.

  python -m launch.draw --world=full --output=runs/full/data --split=train --examples=20000 --seed=1
  python -m launch.draw --world=full --output=runs/full/data --split=heldout --examples=256 --seed=2

Writes OUTPUT/SPLIT/annotations.jsonl and its media (docs/data_format.md). Splits other than train also get
the masks that scoring needs. A complete folder is left unchanged; if it was drawn with other settings, the
command fails.
"""

from absl import flags

from data_pipelines.stream import workers
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch.support import cli

WORLD = flags.DEFINE_enum(
    "world", "quickstart", sorted(world_config.WORLDS),
    "quickstart: one or two large, separate objects; learnt in minutes. "
    "full: one to six objects that cross, occlude each other, enter and leave; learnt in an hour by a model "
    "that can already point (launch.quickstart --init_from).")
_SPLIT = flags.DEFINE_string(
    "split", "train", "Name of the subfolder; the drawings depend on it as they do on --seed.")
_EXAMPLES = flags.DEFINE_integer(
    "examples", 1000, "Number of examples: videos, images and sets of images.", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", 2, "Number of processes that draw.", lower_bound=1)
for _name in ("output", "seed", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    if not cli.OUTPUT.value:
        raise ValueError("--output must name the folder to write into")
    with workers.hidden_main():
        world, _ = world_config.WORLDS[WORLD.value]
        path = world_write.write(cli.OUTPUT.value, world(), cli.SEED.value, _EXAMPLES.value,
                                 _SPLIT.value, workers=_WORKERS.value, replace=False)
    print(path)


if __name__ == "__main__":
    cli.start(main)
