"""Converts between the work directory of a run and the Hugging Face format.

  python -m launch.convert export --model=runs/mine --output=hf/mine
  python -m launch.convert import --model=hf/mine --output=runs/imported

export writes config.json, safetensors, tokenizer and processor files that transformers loads; import
writes a work directory that launch.generate and launch.evaluate take, and training starts from.
"""

import pathlib

from absl import flags

from launch import cli
from launch import record
from launch import run
from launch import trained
from molmo2_jax import checkpoint
from molmo2_jax.hf import checkpoint as hf_checkpoint

_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing output folder.")
for _name in ("model", "output", "dtype", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    commands = {"export": export_model, "import": import_model}
    if len(arguments) != 1 or arguments[0] not in commands:
        raise ValueError(f"launch.convert takes one of the words {' or '.join(commands)}; "
                         f"got {' '.join(arguments) or 'none'}")
    if not (cli.MODEL.value and cli.OUTPUT.value):
        raise ValueError("--model must name the folder to read and --output the one to write")
    source = trained.load(cli.MODEL.value)
    commands[arguments[0]](source, pathlib.Path(cli.OUTPUT.value))


def export_model(source: trained.Trained, output: pathlib.Path) -> None:
    hf_checkpoint.export_checkpoint(source.params, source.model, source.inputs, source.tokenizer, output,
                                    dtype=cli.DTYPE.value, overwrite=_OVERWRITE.value)


def import_model(source: trained.Trained, output: pathlib.Path) -> None:
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output must be empty or not exist; got {output}")
    checkpoint.save_params(str(output), source.params)
    source.tokenizer.save(output)
    record.save(output, record.gin_text(run.RunConfig(model=source.model, inputs=source.inputs)))


if __name__ == "__main__":
    cli.start(main)
