import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def bash(script, path=None):
    environment = os.environ | ({"PATH": str(path)} if path else {})
    environment.pop("MOLMO2_PYTHON", None)
    return subprocess.run(["/bin/bash", "-c", f"set -euo pipefail\nsource {ROOT}/launch/environment.sh\n"
                           + script], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def commands(tmp_path):
    """A folder for PATH with only the programs that the scripts need, without Python."""
    for name in ("dirname", "cat"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    return tmp_path


def add_python(folder, name, is_new):
    (folder / name).write_text(f"#!/bin/bash\nexit {0 if is_new else 1}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh", "environment.sh", "../.ci/run"])
def test_scripts_are_valid_bash(name):
    subprocess.run(["bash", "-n", str(ROOT / "launch" / name)], check=True)


def test_a_step_passes_the_exit_status_of_its_command_on():
    done = bash('step "counting" bash -c "exit 7"\necho not reached')
    assert done.returncode == 7
    assert "== counting" in done.stdout and "not reached" not in done.stdout
    assert "this step failed" in done.stderr


def test_a_step_says_how_long_it_took():
    done = bash('step "sleeping" true')
    assert done.returncode == 0 and re.search(r"^== done in \d+ s$", done.stdout, re.MULTILINE)


def test_a_missing_python_is_one_sentence(commands):
    done = bash("python=$(find_python)\necho not reached", path=commands)
    assert done.returncode == 1 and done.stdout == ""
    assert "Python 3.11 or newer is needed and was not found" in done.stderr


def test_an_old_python_is_passed_over(commands):
    add_python(commands, "python3", is_new=False)
    add_python(commands, "python3.12", is_new=True)
    assert bash("find_python", path=commands).stdout == "python3.12\n"
