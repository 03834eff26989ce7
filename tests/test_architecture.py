"""The import rules of the project: who may import what, from the standard library up to gin.

A module is judged by the most specific row of ALLOWED that names it or a package around it. The
standard library is free except where FILES_AND_PROCESSES forbids it. An entry with "!" is an
exception from the ones beside it.
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest
import setuptools

from tests import source as source_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("molmo2_jax", "data_pipelines", "launch")

BOTTOM = {"molmo2_jax.config", "molmo2_jax.types"}
DEVICES = {"numpy", "jax", "flax", "molmo2_jax.sharding"} | BOTTOM
# Training knows nothing of media: batches are passed in.
NO_MEDIA = {"molmo2_jax", "!molmo2_jax.inputs", "!molmo2_jax.generate", "!molmo2_jax.evaluate",
            "!molmo2_jax.render", "!molmo2_jax.serving"}
TRAINING = NO_MEDIA | {"numpy", "jax", "flax", "optax", "orbax", "absl", "etils"}
DATA = {"numpy", "scipy", "grain", "av", "PIL", "tqdm", "absl", "tokenizers",
        "data_pipelines", "!data_pipelines.seqio_bridge", "molmo2_jax.inputs", "molmo2_jax.files",
        "molmo2_jax.monitor.bars", "molmo2_jax.monitor.periodic"} | BOTTOM
ANSWERS = {"molmo2_jax", "numpy", "jax", "flax", "PIL", "av", "tokenizers", "tqdm", "absl"}

ALLOWED = {
    "molmo2_jax": set(),
    "molmo2_jax.config": {"numpy"} | BOTTOM,
    "molmo2_jax.types": {"numpy"} | BOTTOM,
    "molmo2_jax.files": {"etils"},
    "molmo2_jax.sharding": DEVICES,
    "molmo2_jax.inputs": {"numpy", "av", "tokenizers", "PIL", "molmo2_jax.inputs"} | BOTTOM,
    "molmo2_jax.attention": DEVICES | {"molmo2_jax.attention"},
    "molmo2_jax.model": DEVICES | {"molmo2_jax.attention", "molmo2_jax.model"},
    "molmo2_jax.loss": DEVICES | {"molmo2_jax.model"},
    "molmo2_jax.optim": DEVICES | {"optax"},
    "molmo2_jax.finetune": DEVICES | {"molmo2_jax.optim", "molmo2_jax.decode", "molmo2_jax.model",
                                       "molmo2_jax.cost.flops"},
    "molmo2_jax.state": TRAINING,
    "molmo2_jax.decode": DEVICES | {"molmo2_jax.attention", "molmo2_jax.model"},
    "molmo2_jax.train": TRAINING | {"tqdm"},
    "molmo2_jax.checkpoint": TRAINING | {"grain"},  # the position in the data is saved by grain
    # What work is, and what hardware gives: no jax, so that a launcher needs none, either.
    "molmo2_jax.cost": {"numpy", "molmo2_jax.cost"} | BOTTOM,
    # What a run says about itself.
    "molmo2_jax.monitor": {"jax", "absl", "molmo2_jax.files", "molmo2_jax.sharding", "molmo2_jax.cost",
                           "molmo2_jax.monitor"} | BOTTOM,
    "molmo2_jax.monitor.bars": {"tqdm"},
    "molmo2_jax.monitor.periodic": set(),
    "molmo2_jax.monitor.guard": {"numpy", "molmo2_jax.files"} | BOTTOM,
    "molmo2_jax.monitor.metrics": TRAINING | {"tqdm", "tensorboardX", "wandb"},
    "molmo2_jax.aot": TRAINING,
    "molmo2_jax.hf": DEVICES | {"etils", "molmo2_jax", "safetensors", "ml_dtypes", "tokenizers"},
    "molmo2_jax.hf.peer": DEVICES | {"torch", "transformers", "peft"},  # what others make of our folders
    "molmo2_jax.render": {"numpy", "PIL", "av", "molmo2_jax.inputs", "molmo2_jax.render"} | BOTTOM,
    "molmo2_jax.generate": ANSWERS,
    "molmo2_jax.evaluate": ANSWERS,
    "molmo2_jax.serving": ANSWERS,
    "data_pipelines": DATA,
    "data_pipelines.sources.shards": DATA | {"array_record"},
    "data_pipelines.prepared": DATA | {"array_record", "etils"},
    "data_pipelines.prepared.pipeline": DATA | {"apache_beam"},
    "data_pipelines.schemas.published": DATA | {"pyarrow"},
    "data_pipelines.suites.rows": DATA | {"pyarrow"},
    "data_pipelines.suites.segmenters": DATA | {"sam2"},   # where the user has installed it
    "data_pipelines.seqio_bridge": DATA | {"seqio", "tensorflow"},
    "launch": ANSWERS | DATA | {"launch"},
    "launch.run": ANSWERS | DATA | {"launch", "gin"},
    "launch.server": ANSWERS | DATA | {"launch", "starlette", "uvicorn", "prometheus_client"},
    "launch.compile": ANSWERS | DATA | {"launch", "libtpu"},
    "launch.tpu": {"launch.tpu", "molmo2_jax.cost"},  # needs nothing installed
}

IMPORTERS = ("__import__", "importlib.import_module", "import_module")

# The model computes; it reads and writes nothing.
FILES_AND_PROCESSES = {"os", "io", "pathlib", "shutil", "tempfile", "glob", "json", "pickle",
                       "socket", "subprocess", "multiprocessing", "threading", "urllib"}
PURE = ("molmo2_jax.attention", "molmo2_jax.model", "molmo2_jax.loss", "molmo2_jax.decode")


def modules():
    """Returns {dotted name: path} of every module of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def is_in(name, package):
    return name == package or name.startswith(package + ".")


def imports(module, source, known):
    """Returns every dotted name that the source imports, anywhere in it, also by importlib."""
    names = []
    for node in ast.walk(source_lib.tree(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.append(full if full in known or base in PACKAGES else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            names += [argument.value for argument in node.args[:1]
                      if isinstance(argument, ast.Constant)]
    return names


def violations(module, source, known=()):
    """Returns what the module imports or opens against the rules, as sentences."""
    row = max((name for name in ALLOWED if is_in(module, name)), key=len, default=None)
    if row is None:
        return [f"{module} has no row in ALLOWED"]
    allowed = {name for name in ALLOWED[row] if not name.startswith("!")}
    refused = {name[1:] for name in ALLOWED[row] if name.startswith("!")}
    is_pure = any(is_in(module, package) for package in PURE)
    found = []
    for name in imports(module, source, known):
        top = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{module} imports {name} by a relative path")
        elif top in sys.stdlib_module_names:
            if is_pure and top in FILES_AND_PROCESSES:
                found.append(f"{module} imports {name}, but may not touch files or processes")
        elif (not any(is_in(name, package) for package in allowed)
              or any(is_in(name, package) for package in refused)):
            found.append(f"{module} imports {name}, which the row {row} does not allow")
    if is_pure:
        found += [f"{module} opens a file" for node in ast.walk(source_lib.tree(source))
                  if isinstance(node, ast.Call) and ast.unparse(node.func) == "open"]
    return found


def test_every_module_imports_only_what_its_row_allows():
    known = modules()
    assert len(known) > 20
    found = [text for module, path in known.items()
             for text in violations(module, path.read_text(encoding="utf-8"), known)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module, source", [
    ("molmo2_jax", "import numpy"),
    ("molmo2_jax.config", "import jax"),
    ("molmo2_jax.types", "from jax import numpy"),
    ("molmo2_jax.inputs.video", "import jax.numpy as jnp"),
    ("molmo2_jax.inputs.video", "from molmo2_jax.model import vision"),
    ("molmo2_jax.inputs.video", "def f():\n    import grain"),
    ("molmo2_jax.attention.attend", "from molmo2_jax.model import text"),
    ("molmo2_jax.model.text", "from molmo2_jax.inputs import video"),
    ("molmo2_jax.model.text", "from molmo2_jax import loss"),
    ("molmo2_jax.model.text", "import pathlib"),
    ("molmo2_jax.model.text", "def f(p):\n    return open(p)"),
    ("molmo2_jax.model.text", "from . import layers"),
    ("molmo2_jax.train", "from data_pipelines import pipeline"),
    ("molmo2_jax.train", "from molmo2_jax.inputs import video"),
    ("molmo2_jax.train", "import gin"),
    ("molmo2_jax.train", "import torch"),
    ("molmo2_jax.hf.weights", "import torch"),
    ("molmo2_jax.evaluate", "from data_pipelines.scoring import points"),
    ("molmo2_jax.novelty", "import numpy"),
    ("molmo2_jax.cost.flops", "import jax"),
    ("molmo2_jax.monitor.report", "from molmo2_jax import train"),
    ("launch.tpu.run", "from launch.support import cli"),
    ("data_pipelines.pipeline", "import jax"),
    ("data_pipelines.pipeline", "from molmo2_jax.model import molmo2"),
    ("data_pipelines.pipeline", "from molmo2_jax import sharding"),
    ("data_pipelines.pipeline", "import tensorflow as tf"),
    ("data_pipelines.pipeline", "from data_pipelines import seqio_bridge"),
    ("data_pipelines.pipeline", "import importlib\nimportlib.import_module('seqio')"),
    ("data_pipelines.formats", "from launch import run"),
    ("launch.train", "import gin"),
    ("launch.train", "import seqio"),
    ("launch.train", "from data_pipelines import seqio_bridge"),
])
def test_the_rules_can_be_broken(module, source):
    assert violations(module, source, modules())


@pytest.mark.parametrize("module, source", [
    ("molmo2_jax.inputs.video", "import os, av\nfrom molmo2_jax.inputs import pixels"),
    ("molmo2_jax.model.text", "import jax.numpy as jnp\nfrom molmo2_jax import config, types"),
    ("molmo2_jax.checkpoint", "import grain.python as grain"),
    ("data_pipelines.pipeline", "from molmo2_jax.inputs import video\nimport grain"),
    ("data_pipelines.seqio_bridge", "import seqio"),
    ("launch.run", "import gin\nfrom gin import config_parser"),
])
def test_the_rules_can_be_kept(module, source):
    assert not violations(module, source, modules())


def test_every_folder_with_modules_is_a_package_that_setup_declares():
    folders = {path.parent.relative_to(ROOT) for path in modules().values()}
    without_init = [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()]
    assert not without_init
    include = [f"{name}{tail}" for name in PACKAGES for tail in ("", ".*")]
    declared = setuptools.find_packages(str(ROOT), include=include)
    assert set(declared) == {".".join(folder.parts) for folder in folders}
    assert {"molmo2_jax.attention", "molmo2_jax.hf", "molmo2_jax.inputs", "molmo2_jax.model",
            "data_pipelines.formats", "data_pipelines.scoring", "launch"} <= set(declared)


MOST_LINES = 500   # of a file
MOST_FILES = {"molmo2_jax": 14, "data_pipelines": 9}   # of a package's own folder


def test_files_and_folders_stay_small_enough_to_take_in():
    for package, most in MOST_FILES.items():
        assert len(list((ROOT / package).glob("*.py"))) <= most, package
    folders = (*PACKAGES, "tests", "benchmarks")
    too_long = {str(path.relative_to(ROOT)): lines for folder in folders
                for path in (ROOT / folder).rglob("*.py")
                if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES}
    assert not too_long


def test_no_two_folders_of_the_library_import_each_other():
    """Modules in a package's own folder count alone: ALLOWED orders them. Commands and launch/support share
    launch.run, so they count as one."""
    known = modules()

    def room(name):
        if is_in(name, "launch") and not name.startswith(("launch.tpu", "launch.quickstart")):
            return "launch"
        folder = name.split(".")[:2]
        return ".".join(folder) if (ROOT / pathlib.Path(*folder)).is_dir() else name

    arrows = {}
    for name, path in known.items():
        for imported in imports(name, path.read_text(encoding="utf-8"), known):
            if imported in known and room(imported) != room(name):
                arrows.setdefault(room(name), set()).add(room(imported))
    remaining = dict(arrows)
    while free := [one for one, to in remaining.items() if not to & remaining.keys()]:
        for one in free:
            del remaining[one]
    assert not remaining, f"these import each other, or are above such: {remaining}"


def test_tensorflow_comes_only_with_the_seqio_extra():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines()
             if re.match(r"""\s*["'].*(tensorflow|seqio)""", line)]
    assert lines == ['"seqio": ["seqio>=0.0.20,<0.1", "sentencepiece>=0.2,<0.2.2"],']


IMPORT_CHECK = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = {"tensorflow", "seqio", "torch", "transformers", "peft", "apache_beam"} & set(sys.modules)
assert not heavy, f"imported: {heavy}"
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "an import initialised a jax backend"
"""


@pytest.mark.slow(10)
def test_importing_the_training_main_loads_nothing_heavy_and_touches_no_device():
    check_imports("launch.train")


@pytest.mark.slow(12)
def test_importing_every_module_loads_nothing_heavy_and_touches_no_device():
    needs_extra = {"data_pipelines.prepared.pipeline", "data_pipelines.seqio_bridge", "molmo2_jax.hf.peer"}
    check_imports(*sorted(set(modules()) - needs_extra))


def check_imports(*names):
    done = subprocess.run([sys.executable, "-c", IMPORT_CHECK, *names], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
