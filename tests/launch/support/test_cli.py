import ast
import errno
import os
import subprocess
import sys

import fsspec
import pytest

from launch import run
from launch.support import cli
from launch.support import record
from molmo2_jax import config
from molmo2_jax import files
from tests import source as source_lib
from tests.launch import commands

flags_as_before = commands.flags_as_before

NANO = "gin_configs/models/nano.gin"


def start(main, *arguments):
    """Returns the exit status of a command started with these arguments."""
    with pytest.raises(SystemExit) as caught:
        cli.start(main, ["command", *arguments])
    return caught.value.code


def refused(capsys, main, *arguments):
    """Returns the one line that a command with these arguments prints before it ends with status 2."""
    assert start(main, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_a_main_gets_what_the_flags_leave_and_ends_with_zero():
    seen = []
    assert start(lambda arguments: seen.extend(arguments), "a", "--workdir=w", "b") in (None, 0)
    assert seen == ["a", "b"]


def test_unknown_flags_are_one_sentence(capsys):
    assert "wokdir" in refused(capsys, cli.no_arguments, "--wokdir=3")


def test_left_over_arguments_are_one_sentence(capsys):
    assert "takes flags only" in refused(capsys, cli.no_arguments, "--workdir=w", "extra")


def test_a_missing_file_is_one_sentence(capsys, tmp_path):
    assert "nothing.mp4" in refused(capsys, lambda _: (tmp_path / "nothing.mp4").read_bytes())


def test_a_rule_broken_in_our_own_code_is_one_sentence(capsys):
    assert "window must be at least" in refused(
        capsys, lambda _: config.ConnectorConfig(video_window=(0, 1)))


@pytest.mark.parametrize(("error", "words"), [
    (OSError(errno.ENOSPC, "No space left on device"), "a file could not be written or read: No space left"),
    (OSError(errno.EROFS, "Read-only file system", "/disk/a"), "/disk/a could not be written or read: Read"),
    (ValueError("RESOURCE_EXHAUSTED: Error\n: No space left on device"), "No space left on device"),
    (files.StorageError("the run could not write"), "error: the run could not write\n")])
def test_faults_of_a_disk_are_one_sentence_and_no_mistake_of_the_user(error, words, capsys):
    def main(_):
        raise error
    assert start(main) == cli.DISK_ERROR not in (cli.USER_ERROR, cli.UNFINISHED)
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_a_bucket_whose_package_is_not_installed_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "is not installed: Install s3fs" in refused(
        capsys, lambda _: fsspec.filesystem("s3"))


def test_errors_of_other_code_keep_their_traceback():
    with pytest.raises(ValueError, match="invalid literal"):
        cli.start(lambda _: int("x"), ["command"])


def test_traceback_can_be_asked_for():
    with pytest.raises(ValueError, match="window must be at least"):
        cli.start(lambda _: config.ConnectorConfig(video_window=(0, 1)), ["command", "--traceback"])


def test_an_interrupt_ends_quietly():
    def interrupted(_):
        raise KeyboardInterrupt
    assert start(interrupted) == cli.INTERRUPTED


def test_flags_resolve_to_a_run_config():
    seen = []
    assert not start(lambda _: seen.append(cli.resolve("model")), f"--gin_file={NANO}",
                     "--gin=config.TextConfig.num_layers = 2", "--gin=config.TextConfig.width = 96")
    assert (seen[0].model.text.num_layers, seen[0].model.text.width) == (2, 96)


def test_the_saved_configuration_of_the_workdir_is_the_default(tmp_path):
    saved = run.resolve([NANO], ["config.TextConfig.num_layers = 2"])
    record.save(tmp_path, record.gin_text(saved))
    seen = []
    assert not start(lambda _: seen.append(cli.resolve()), f"--workdir={tmp_path}")
    assert seen == [saved]


def test_gin_files_may_lie_below_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.gin").write_text(f"include '{NANO}'\n")
    monkeypatch.chdir(tmp_path)
    seen = []
    assert not start(lambda _: seen.append(cli.resolve()), "--gin_file=mine.gin")
    assert seen[0].model == config.nano()


def test_parts_that_a_command_needs_and_the_files_lack_are_named(capsys):
    message = refused(capsys, lambda _: cli.resolve("model", "data", "optim"), f"--gin_file={NANO}")
    assert "run.RunConfig.data, run.RunConfig.optim" in message and NANO in message


def test_a_run_needs_a_gin_file_or_a_workdir_that_has_one(capsys, tmp_path):
    assert refused(capsys, lambda _: cli.resolve()).startswith("error: --gin_file must be given")
    assert str(tmp_path) in refused(capsys, lambda _: cli.resolve(), f"--workdir={tmp_path}")


MAINS = [path for path in sorted((run.ROOT / "launch").glob("*.py"))
         if "cli.start(main)" in path.read_text()]


@pytest.mark.parametrize("path", MAINS, ids=lambda path: path.stem)
def test_every_main_shows_how_it_is_called_and_starts_only_as_a_command(path):
    tree = source_lib.tree(path.read_text())
    assert f"python -m launch.{path.stem}" in ast.get_docstring(tree)
    text = tree.body[0]
    assert text.value.value.count("\n") == text.end_lineno - text.lineno, "a backslash eats the end of a line"
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    cli.start(main)"


def test_help_of_flags_that_repeat_leaves_it_to_absl_to_say_so():
    texts = [ast.unparse(node.args[-1]) for path in (run.ROOT / "launch").glob("*.py")
             for node in ast.walk(source_lib.tree(path.read_text()))
             if isinstance(node, ast.Call) and "DEFINE_multi_" in ast.unparse(node.func)]
    assert len(texts) > 5
    assert not [text for text in texts if text[-2] == "." or "repeated" in text]


def test_a_file_to_write_is_refused_before_the_work(tmp_path):
    assert cli.output_file(f"{tmp_path}/new/scores.json").parent.is_dir()
    with pytest.raises(ValueError, match="must not be a folder"):
        cli.output_file(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        cli.output_file(f"{tmp_path}/file/scores.json")


@pytest.mark.slow(11)
def test_help_explains_the_command_and_its_flags(tmp_path):
    done = subprocess.run([sys.executable, "-m", "launch.train", "--help"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(run.ROOT)}, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in ("python -m launch.train --gin_file=", "--gin: One binding", "--workdir: Work directory of"):
        assert words in done.stdout
