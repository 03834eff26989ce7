"""Commands in README and docs: their gin files and bindings resolve exactly as written."""

import re
import shlex

import pytest

from launch import run

PAGES = [run.ROOT / "README.md", *sorted((run.ROOT / "docs").glob("*.md")), run.ROOT / "launch/tpu_run.sh"]


def commands(path):
    """Returns (page, command, gin files, bindings) of the commands on a page that name gin files."""
    text = re.sub(r"\\\n[# ]*", " ", path.read_text(encoding="utf-8"))
    found = []
    for command, rest in re.findall(r"python -m launch\.(\w+)([^`\n]*)", text):
        words = [word.partition("=")[::2] for word in shlex.split(rest)]
        files, bindings = ([value for flag, value in words if flag == wanted]
                           for wanted in ("--gin_file", "--gin"))
        if files:
            found.append((path.name, command, files, bindings))
    return found


SHOWN = [shown for path in PAGES for shown in commands(path)]


@pytest.mark.parametrize("page, command, gin_files, bindings", SHOWN)
def test_settings_of_a_command_resolve(page, command, gin_files, bindings):
    run.resolve(gin_files, bindings)


def test_all_kinds_of_commands_are_found():
    assert {("README.md", "train"), ("README.md", "compile"), ("training.md", "train"),
            ("hugging_face.md", "convert"), ("tpu_run.sh", "train")} <= {shown[:2] for shown in SHOWN}
    assert any("sharding.MeshConfig" in binding for *_, bindings in SHOWN for binding in bindings)
