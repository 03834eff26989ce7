"""The flags of launch.prepare that are about shards, and the shards of a data folder they describe."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence, Set

from absl import flags

from data_pipelines.prepared import running
from data_pipelines.sources import shard_format
from launch.support import cli
from launch.support import places
from molmo2_jax import config
from molmo2_jax import files
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import tokenizer as tokenizers

FORMAT = flags.DEFINE_enum("format", "jsonl", ["jsonl", "shards"], "What to make of --task.")
_MEDIA = flags.DEFINE_enum(
    "media", shard_format.REFERENCE, shard_format.MEDIA,
    "In shards: names of files, their bytes, or of videos the frames that training asks for (JPEG).")
_MAX_FRAMES = flags.DEFINE_multi_integer(
    "max_frames", [], "Frames of a video that training asks for at most; give every value that runs will use "
    "(default: that of --model)", lower_bound=1)
_FPS = flags.DEFINE_float("fps", config.InputConfig.max_fps, "Frames per second that training asks for.")
_MAX_SIDE = flags.DEFINE_integer(
    "max_side", 378, "With --media=frames: longer sides are cut to this, pixels.", lower_bound=1)
_QUALITY = flags.DEFINE_integer(
    "quality", 95, "With --media=frames: of the JPEGs.", lower_bound=1, upper_bound=100)
_RECORDS = flags.DEFINE_integer("records_per_shard", 500, "Records of a shard, before any is left out.",
                                lower_bound=1)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Remove the shards that --output holds, and begin anew.",
                               allow_override=True)  # launch.convert has one of this name
FLAGS = ("data", "format", "media", "max_frames", "fps", "max_side", "quality", "records_per_shard",
         "overwrite", "model")
_SHOWN = 3  # records left out that are printed
_NANO = "assets/nano"  # its tokenizer counts tokens unless --model names another


def of_data(exclude: Set[str], arguments: Sequence[str]) -> None:
    """Writes the shards of --data to --output and prints a summary.

    Raises:
      ValueError: a flag is missing, or running.prepare refuses the folder or a setting.
    """
    if len(cli.DATA.value) != 1 or not cli.OUTPUT.value:
        raise ValueError("--data must name one folder, and --output that of its shards; got "
                         f"{cli.DATA.value} and {cli.OUTPUT.value}")
    (folder,) = cli.DATA.value
    write(folder, cli.OUTPUT.value, files.path(folder).name, exclude, arguments)


def write(folder: str, output: str, name: str, exclude: Set[str], arguments: Sequence[str]) -> None:
    """Writes the shards of a data folder and prints a summary.

    Raises:
      ValueError: Apache Beam is not installed, or running.prepare refuses the folder or a setting.
    """
    is_kept = _MEDIA.value == shard_format.FRAMES
    checker = _checker(cli.MODEL.value)
    with beam():
        manifest = running.prepare(
            folder, output, checker, arguments=arguments, exclude=exclude, overwrite=_OVERWRITE.value,
            name=name, media=_MEDIA.value, records_per_shard=_RECORDS.value, max_fps=_FPS.value,
            max_frames=tuple(sorted(set(_MAX_FRAMES.value or [checker.inputs.max_frames]))),
            max_tracking_fps=checker.inputs.max_tracking_fps,
            max_side=_MAX_SIDE.value if is_kept else None, quality=_QUALITY.value if is_kept else None)
    _show(manifest, output)


@contextlib.contextmanager
def beam() -> Iterator[None]:
    """Raises ValueError that says what to install if Apache Beam is missing in the block."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] != "apache_beam":
            raise
        raise ValueError("published rows and shards need Apache Beam: pip install -e '.[prepare]'") from None


def _show(manifest: dict, output: str) -> None:
    left_out = manifest["left_out"]
    print(f"{output}: {manifest['count']} records in {len(manifest['shards'])} shards of "
          f"{sum(shard['bytes'] for shard in manifest['shards']) / 1e6:,.1f} MB; left out: "
          + (", ".join(f"{count} by {stage}" for stage, count in left_out.items()) or "none"))
    if left_out:
        lines = (files.path(output) / shard_format.BROKEN).read_text().splitlines()
        print("\n".join(f"  {line}" for line in lines[:_SHOWN]))
    for name, numbers in manifest["statistics"].items():
        print(f"  {name}: {numbers['least']:g} to {numbers['most']:g}, mean {numbers['mean']:.4g}, in "
              f"{numbers['count']} records")


def _checker(path: str | None) -> running.Checker:
    """Returns by what records are checked and counted: the model of a Hugging Face folder, or Molmo2-8B's
    crops with the words of the small model that ships."""
    folder = pathlib.Path(places.model(path or _NANO))
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model must be a Hugging Face folder with config.json; got {path}")
    model, inputs = hf_checkpoint.read_config(folder)
    tokenizer = tokenizers.Tokenizer.from_file(folder, model.text.vocab_size)
    if path is None:
        model = dataclasses.replace(config.molmo2_8b(), text=model.text)
        inputs = config.InputConfig()
    identity = hashlib.sha256(repr((model, inputs)).encode() + (folder / "tokenizer.json").read_bytes())
    return running.Checker(model=model, inputs=inputs, tokenizer=tokenizer, digest=identity.hexdigest())
