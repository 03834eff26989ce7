"""Peak host memory of import and export relative to the model, for a random checkpoint of more than 2 GB.

  python -m benchmarks.convert [--folder=/tmp/convert]

Each stage runs in its own process, which reports how much its resident memory grew after its imports. Export
starts with the parameters in memory, and these count.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
from absl import logging

_FOLDER = flags.DEFINE_string("folder", None, "Scratch folder of about 10 GB; default: a temporary one.")
_STAGE = flags.DEFINE_string("stage", None, "Run this stage alone, in this process.")
_LAYERS = flags.DEFINE_integer("layers", 5, "Layers of the decoder, 50 million parameters each.")
GOAL = 1.15  # of the model in its target dtype


def model():
    """Returns a model of the 8B's shape at half its width: 0.55 billion parameters."""
    from molmo2_jax import config as config_lib
    eight = config_lib.molmo2_8b()
    return dataclasses.replace(
        eight, vision=dataclasses.replace(eight.vision, num_layers=4),
        connector=dataclasses.replace(eight.connector, taps=(3, 1), mlp_width=6144),
        text=dataclasses.replace(eight.text, vocab_size=50_000, width=2048, num_layers=_LAYERS.value,
                                 num_heads=16, mlp_width=6144))


def resident(field: str) -> int:
    """Returns bytes of this process: VmRSS (current), VmHWM (peak so far)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def export_from_memory(folder: pathlib.Path) -> None:
    import numpy as np

    from molmo2_jax import config as config_lib
    from molmo2_jax.hf import checkpoint
    from molmo2_jax.hf import weights
    from molmo2_jax.inputs import tokenizer as tokenizers
    config, rng = model(), np.random.default_rng(0)
    shapes = weights.abstract_params(config)
    params = weights.unflatten({path: rng.random(leaf.shape, np.float32)
                                for path, leaf in shapes.items()})
    tokenizer = tokenizers.train_small(["Point to the red circle."] * 4, config.text.vocab_size)
    checkpoint.export_checkpoint(params, config, config_lib.InputConfig(), tokenizer, folder / "hf",
                                 max_shard_bytes=1e9, overwrite=True)


def import_to_memory(folder: pathlib.Path, dtype: str = "float32") -> None:
    from molmo2_jax.hf import checkpoint
    params = checkpoint.import_checkpoint(folder / "hf", dtype)[0]
    assert params


def import_onto_devices(folder: pathlib.Path) -> None:
    import jax

    from launch.support import trained
    from molmo2_jax import sharding
    assert len(jax.devices()) == 8
    assert trained.load(folder / "hf", mesh=sharding.make_mesh(sharding.MeshConfig(fsdp=8))).params


def command(*arguments: str) -> None:
    """Runs launch.convert in this process."""
    from launch import convert
    rest = flags.FLAGS(["convert", *arguments])
    convert.main(rest[1:])


def convert_import(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "run", ignore_errors=True)
    command("import", f"--model={folder}/hf", f"--output={folder}/run")


def convert_export(folder: pathlib.Path, dtype: str) -> None:
    command("export", f"--model={folder}/run", f"--output={folder}/out", f"--dtype={dtype}", "--overwrite")


# name -> (function, bytes per parameter of what it makes)
STAGES = {
    "export, parameters in memory": (export_from_memory, 4),
    "import, float32": (import_to_memory, 4),
    "import, bfloat16": (lambda folder: import_to_memory(folder, "bfloat16"), 2),
    "import onto 8 devices, float32": (import_onto_devices, 4),
    "launch.convert import": (convert_import, 4),
    "launch.convert export, float32": (lambda folder: convert_export(folder, "float32"), 4),
    "launch.convert export, bfloat16": (lambda folder: convert_export(folder, "bfloat16"), 2),
}


def run_stage(name: str, folder: pathlib.Path) -> None:
    """Runs a stage and prints its memory use as JSON."""
    import math

    import jax
    import numpy as np

    from launch import convert  # noqa: F401
    from molmo2_jax.hf import weights
    count = sum(math.prod(leaf.shape) for leaf in weights.abstract_params(model()).values())
    np.asarray(jax.numpy.zeros(1) + 1)
    logging.set_verbosity(logging.WARNING)  # Orbax logs at length
    function, size = STAGES[name]
    before, start = resident("VmRSS"), time.monotonic()
    function(folder)
    print(json.dumps({"model": count * size, "peak": resident("VmHWM") - before,
                      "seconds": time.monotonic() - start}))


def main(_) -> None:
    if _STAGE.value:
        run_stage(_STAGE.value, pathlib.Path(_FOLDER.value))
        return
    folder = pathlib.Path(_FOLDER.value or tempfile.mkdtemp(prefix="convert."))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    print("| stage | model, GB | peak above start, GB | ratio | seconds |\n|---|---|---|---|---|", flush=True)
    for name in STAGES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.convert", f"--stage={name}", f"--folder={folder}",
             f"--layers={_LAYERS.value}"], check=True, env=environment, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {found['model'] / 1e9:.2f} | {found['peak'] / 1e9:.2f} | "
              f"{found['peak'] / found['model']:.2f} | {found['seconds']:.0f} |", flush=True)
    if not _FOLDER.value:
        shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
