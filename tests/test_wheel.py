"""The package as users get it: built, installed into a folder, and used outside the repository."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

import molmo2_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("molmo2_jax", "data_pipelines", "launch", "gin_configs", "assets", "benchmarks", "docs", "tests",
           ".ci")
pytestmark = pytest.mark.slow(45)   # seconds


def run(*command, cwd, **environment):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True,
                          text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of sdist and wheel, made from a copy of the sources, without network."""
    copy, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]:
        shutil.copy(path, copy)
    run(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", output, copy, cwd=output)
    return output


@pytest.fixture(scope="module")
def molmo2(built, tmp_path_factory):
    """Calls the `molmo2` of the installed wheel from an empty folder, which is `molmo2.folder`."""
    target, folder = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("empty")
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
        "--target", target, wheel, cwd=built)

    # -S ignores the .pth file of an editable install, which would lead to the repository.
    def python(*arguments):
        return run(sys.executable, "-S", *arguments, cwd=folder, PYTHONSAFEPATH="1",
                   PYTHONPATH=os.pathsep.join([str(target), sysconfig.get_path("purelib"),
                                               sysconfig.get_path("platlib")]))

    def call(*arguments):
        return python(target / "bin" / "molmo2", *arguments)

    call.python, call.target, call.folder = python, target, folder
    return call


def test_the_source_distribution_holds_what_git_tracks(built):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a checkout of git")
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    assert len(tracked) > 300
    assert not tracked - packed


def test_the_wheel_holds_three_packages_and_no_top_level_folder_of_a_common_name(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"molmo2_jax", "data_pipelines", "launch",
                    f"molmo2_jax-{molmo2_jax.__version__}.dist-info"}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "molmo2_jax").rglob("*")
             if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert pages and pages <= set(names)
    shipped = {name.removeprefix("launch/shipped/") for name in names if name.startswith("launch/shipped/")}
    wanted = [path for folder in ("gin_configs", "assets/nano", "assets/nano_full")
              for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert shipped == {str(path.relative_to(ROOT)) for path in wanted}


def test_the_installed_package_is_the_one_that_runs(molmo2):
    for name in ("molmo2_jax", "data_pipelines", "launch"):
        found = molmo2.python("-c", f"import {name}; print({name}.__file__)").strip()
        assert pathlib.Path(found).is_relative_to(molmo2.target)
    assert molmo2("--version") == f"molmo2_jax {molmo2_jax.__version__}\n"
    assert str(molmo2.target) in molmo2("--help")
    assert "--prompt" in molmo2("generate", "--help")


def test_gin_files_that_ship_resolve_in_an_empty_folder(molmo2):
    script = ("from launch import run; from launch.support import record; "
              "print(record.gin_text(run.resolve(['gin_configs/runs/sft_8b.gin'])))")
    assert "TextConfig.num_layers = 36" in molmo2.python("-c", script)
    assert not list(molmo2.folder.iterdir())


def test_a_model_that_ships_answers_about_a_drawn_clip(molmo2):
    molmo2("draw", "--output=clips", "--split=heldout", "--examples=1", "--workers=2")
    lines = (molmo2.folder / "clips/heldout/annotations.jsonl").read_text().splitlines()
    example = json.loads(lines[0])
    assert "problems: none" in molmo2("check", "--data=clips/heldout")
    label = next(one["label"] for one in example["annotations"] if one["type"] == "count")
    media = f"--video=clips/heldout/{example['video']}"
    answer = json.loads(molmo2("generate", "--model=assets/nano", media, "--json",
                               f"--prompt=How many {label} are there in the video?"))
    assert answer["is_complete"] and answer["points"]
    assert {path.name for path in molmo2.folder.iterdir()} == {"clips"}
