import os
import subprocess
import sys

import pytest

from launch import __main__ as command_line
from launch import run
from molmo2_jax import __version__

ENVIRONMENT = os.environ | {"PYTHONPATH": str(run.ROOT)}


def python(*arguments, cwd):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=280, check=False)


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["molmo2", *arguments])
    command_line.main()


def mains():
    """Returns the names of all modules and packages (with a __main__) that start as commands."""
    paths = [path for path in (run.ROOT / "launch").rglob("*.py") if "cli.start(main)" in path.read_text()]
    return {path.parent.name if path.stem == "__main__" else path.stem for path in paths}


def test_every_main_is_a_command():
    assert set(command_line.COMMANDS) == mains()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command_with_one_sentence(monkeypatch, capsys, arguments):
    called(monkeypatch, *arguments)
    lines = capsys.readouterr().out.splitlines()
    for name in command_line.COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert line.endswith(".") and len(line) > 30
    assert "  generate    Answers questions about a video or images." in lines


def test_the_version_is_printed(monkeypatch, capsys):
    called(monkeypatch, "--version")
    assert capsys.readouterr().out == f"molmo2_jax {__version__}\n"


@pytest.mark.parametrize("wrong, near", [("trian", "train"), ("evalute", "evaluate"),
                                         ("quick", "quickstart")])
def test_a_wrong_command_names_the_nearest(monkeypatch, capsys, wrong, near):
    with pytest.raises(SystemExit) as caught:
        called(monkeypatch, wrong, "--workdir=w")
    assert caught.value.code == 2
    assert f"got {wrong!r}; did you mean {near!r}?" in capsys.readouterr().err


def test_a_word_like_no_command_names_none(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        called(monkeypatch, "xyz")
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "train, generate" in message and "did you mean" not in message


def test_the_list_of_commands_is_printed_without_jax(tmp_path):
    check = ("import sys; sys.argv = ['molmo2']; from launch import __main__; __main__.main(); "
             "assert not {'jax', 'numpy', 'absl'} & set(sys.modules)")
    done = python("-c", check, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


@pytest.mark.slow(19)
def test_help_of_a_command_is_that_of_its_module(tmp_path):
    ours = python("-m", "launch", "convert", "--help", cwd=tmp_path)
    wanted = python("-m", "launch.convert", "--help", cwd=tmp_path)
    assert ours.returncode == wanted.returncode == 0, ours.stderr
    assert "--against" in ours.stdout
    assert ours.stdout == wanted.stdout


@pytest.mark.slow(20)
def test_a_command_starts_worker_processes_and_its_mistakes_are_one_line(tmp_path):
    draw = ("-m", "launch", "draw", "--output=clips", "--examples=2", "--workers=2")
    done = python(*draw, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clips/train/annotations.jsonl\n"
    again = python(*draw, "--seed=1", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
