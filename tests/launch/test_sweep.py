"""Arms of a sweep: names, commands, running, resuming, and the summary."""

import json
import shlex
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from launch import arms
from launch import cli
from launch import run
from launch import sweep

BASE = "gin_configs/runs/quickstart.gin"
WINDOWS, SEEDS = "config.ConnectorConfig.video_window=[(2, 2), (3, 3)]", "train.TrainConfig.seed=[0, 1, 2]"


@pytest.fixture
def start():
    """Runs the main with these arguments and returns its exit status."""
    def call(*arguments):
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
            cli.start(sweep.main, ["sweep", *map(str, arguments)])
        return caught.value.code or 0
    yield call
    flags.FLAGS.mark_as_parsed()


def of(*texts, **options):
    return arms.of_axes([BASE], [arms.parse_axis(text) for text in texts], **options)


def test_axes_multiply_and_the_last_one_turns_fastest():
    made = of(WINDOWS, SEEDS)
    assert [arm.name for arm in made] == [
        f"video_window-{w}_seed-{s}" for w in ("2x2", "3x3") for s in (0, 1, 2)]
    assert made[1].bindings == ("config.ConnectorConfig.video_window = (2, 2)", "train.TrainConfig.seed = 1")


def test_zipped_axes_go_in_step():
    made = of("train.TrainConfig.steps=[10, 20]", "train.TrainConfig.seed=[3, 4]", is_zipped=True)
    assert [arm.name for arm in made] == ["steps-10_seed-3", "steps-20_seed-4"]
    with pytest.raises(ValueError, match="as many values each; got .*window: 2, train.TrainConfig.seed: 3"):
        of(WINDOWS, SEEDS, is_zipped=True)


def test_fields_of_one_name_are_told_apart():
    made = of("vit/optim.Tower.lr=[1e-3]", "llm/optim.Tower.lr=[0.5]")
    assert made[0].name == "vit-optim.Tower.lr-0.001_llm-optim.Tower.lr-0.5"


@pytest.mark.parametrize("text", ["seed", "seed=", "seed=3", "seed=[]", "seed=[a]", "=[1]", "a b=[1]"])
def test_an_axis_that_is_written_otherwise_is_refused(text):
    with pytest.raises(ValueError, match="an axis must be FIELD="):
        arms.parse_axis(text)


def test_arms_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names of arms must be distinct"):
        of("train.TrainConfig.seed=[1, 1]")


def test_files_are_arms_and_take_axes_too():
    seeds = arms.parse_axis("train.TrainConfig.seed=[0, 1]")
    made = arms.product(arms.of_files(["a/x.gin", "b/y.gin"]), [seeds])
    assert [(arm.name, arm.gin_files) for arm in made] == [
        ("x_seed-0", ("a/x.gin",)), ("x_seed-1", ("a/x.gin",)), ("y_seed-0", ("b/y.gin",)),
        ("y_seed-1", ("b/y.gin",))]


def test_every_arm_of_a_dry_run_resolves_to_what_it_says(start, tmp_path, capsys):
    assert start(f"--gin_file={BASE}", f"--axis={WINDOWS}", f"--axis={SEEDS}", f"--workdir={tmp_path / 'w'}",
                 "--dry_run") == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6 and not (tmp_path / "w").exists()
    for line, (window, seed) in zip(lines, [(w, s) for w in ((2, 2), (3, 3)) for s in (0, 1, 2)]):
        assert line[:3] == [sys.executable, "-m", "launch.train"]
        bindings = [word.removeprefix("--gin=") for word in line if word.startswith("--gin=")]
        resolved = run.resolve([BASE], bindings)
        assert (resolved.model.connector.video_window, resolved.train.seed) == (window, seed)
        assert line[-1].startswith(f"--workdir={tmp_path}/w/video_window-")


def test_arms_may_be_started_through_another_command(start, tmp_path, capsys):
    assert start(f"--gin_file={BASE}", f"--axis={WINDOWS}", f"--workdir={tmp_path}", "--dry_run",
                 "--through=launch/tpu_run.sh --name=mine-{name} --type=v6e-8",
                 "--init_from=gs://mine/run") == 0
    first = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert first[-1] == "--init_from=gs://mine/run"
    assert first[:6] == ["launch/tpu_run.sh", "--name=mine-video-window-2x2", "--type=v6e-8", "--",
                         "python", "-m"]


@pytest.mark.parametrize("arguments, words", [
    ([], "a sweep must have --arm files, or a --gin_file"),
    ([f"--gin_file={BASE}"], "a sweep must have --arm files, or a --gin_file"),
    ([f"--gin_file={BASE}", f"--arm={BASE}"], "take no --gin_file"),
    ([f"--gin_file={BASE}", "--axis=train.TrainConfig.sed=[0]"], "sed"),
    ([f"--gin_file={BASE}", "--axis=train.TrainConfig.seed=[0, 'x']"], "seed must be int; got 'x'"),
    (["summary"], "a summary needs the folder of a sweep")])
def test_mistakes_are_one_sentence_before_anything_starts(start, tmp_path, capsys, arguments, words):
    assert start(*arguments, f"--workdir={tmp_path / 'w'}") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "w").exists()


# A stand-in for launch.train that writes metrics and fails where it is told to.
TRAIN = """
import json, pathlib, sys
workdir = pathlib.Path(next(word for word in sys.argv if word.startswith("--workdir=")).partition("=")[2])
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "started").open("a").write("x")
seed = int(workdir.name[-1])
if seed == 1 and not (workdir.parent / "healed").exists():
    sys.exit("broken on purpose")
lines = [{"step": step, "loss": 2.0 - seed - step / 10, "accuracy": 0.5} for step in range(1, 5)]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    monkeypatch.setattr(arms.Arm, "command", lambda arm, python, workdir, through="", init_from=None: [
        python, str(script), f"--workdir={workdir}"])
    return tmp_path / "sweep"


def test_a_sweep_goes_on_behind_failures_and_sums_up(start, folder, capsys):
    arguments = (f"--gin_file={BASE}", f"--axis={SEEDS}", "--gin=train.TrainConfig.steps = 4",
                 f"--workdir={folder}", "--jobs=2")
    assert start(*arguments) == 2
    captured = capsys.readouterr()
    assert "failed: seed-1" in captured.err and "seed-2: finished" in captured.out
    assert "broken on purpose" in (folder / "seed-1.log").read_text()
    (folder / "healed").touch()
    assert start(*arguments) == 0
    assert "seed-0: finished before" in capsys.readouterr().out
    assert [(folder / f"seed-{n}" / "started").read_text() for n in range(3)] == ["x", "xx", "x"]

    (folder / "seed-2" / "scores.json").write_text(json.dumps({"data/heldout": {"count_accuracy": 0.75}}))
    assert start("summary", f"--workdir={folder}") == 0
    table = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    assert rows[0] == ["arm", "step", "loss", "accuracy", "heldout: count_accuracy"]
    assert rows[2:] == [["seed-0", "4", "1.75", "0.5", ""], ["seed-1", "4", "0.75", "0.5", ""],
                        ["seed-2", "4", "-0.25", "0.5", "0.75"]]
    assert json.loads((folder / "summary.json").read_text())["seed-1"]["loss"] == pytest.approx(0.75)
    page = (folder / "summary.html").read_text()
    assert page.count("<svg") == 1 and all(f">seed-{n}</text>" in page for n in range(3))
