"""Arms of a sweep: names, commands, training, resuming, and the summary."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import types

import pytest
from absl import flags
from absl.testing import flagsaver

from launch import run
from launch import sweep
from launch.support import arms
from launch.support import cli
from launch.support import record
from tests.launch.support import test_lock

BASE = "gin_configs/runs/quickstart.gin"
WINDOWS, SEEDS = "config.ConnectorConfig.video_window=[(2, 2), (3, 3)]", "train.TrainConfig.seed=[0, 1, 2]"


@pytest.fixture
def start():
    """Runs the command with these arguments and returns its exit status."""
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
    with pytest.raises(ValueError, match="equally many values; got .*window: 2, train.TrainConfig.seed: 3"):
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
    ([f"--gin_file={BASE}", "--seeds=0,x"], "--seeds must be whole numbers such as 0,1,2; got 'x'"),
    ([f"--gin_file={BASE}", "--seeds=0,0"], "names of arms must be distinct"),
    ([f"--gin_file={BASE}", "--seeds=0", "--through=pod", "--evaluate=x"], "cannot be used with --through"),
    ([f"--gin_file={BASE}", "--axis=train.TrainConfig.sed=[0]"], "sed"),
    ([f"--gin_file={BASE}", "--axis=train.TrainConfig.seed=[0, 'x']"], "seed must be int; got 'x'"),
    (["summary"], "a summary needs the folder of a sweep")])
def test_mistakes_are_one_sentence_before_anything_starts(start, tmp_path, capsys, arguments, words):
    assert start(*arguments, f"--workdir={tmp_path / 'w'}") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "w").exists()


# A stand-in for launch.train: writes metrics, settings and a checkpoint, or fails where the test says so.
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
(workdir / "config.gin").write_text(sys.argv[1])
for item in ("state", "data", "sums"):
    (workdir / "checkpoints" / "4" / item).mkdir(parents=True, exist_ok=True)
    (workdir / "checkpoints" / "4" / item / "content").touch()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    lock = threading.Lock()   # gin has one global configuration; arms start in threads

    def command(arm, python, workdir, through="", init_from=None):
        with lock:
            text = record.gin_text(run.resolve(arm.gin_files, arm.bindings))
        return [python, str(script), text, f"--workdir={workdir}"]

    monkeypatch.setattr(arms.Arm, "command", command)
    return tmp_path / "sweep"


def test_a_sweep_goes_on_behind_failures_and_sums_up(start, folder, capsys):
    arguments = (f"--gin_file={BASE}", f"--axis={SEEDS}", "--gin=train.TrainConfig.steps = 4",
                 f"--workdir={folder}", "--jobs=2")
    assert start(*arguments) == 2
    captured = capsys.readouterr()
    assert "failed arms: seed-1" in captured.err and "seed-2: finished" in captured.out
    assert "broken on purpose" in (folder / "seed-1.log").read_text()
    (folder / "healed").touch()
    assert start(*arguments) == 0
    assert "seed-0: finished before" in capsys.readouterr().out
    assert [(folder / f"seed-{n}" / "started").read_text() for n in range(3)] == ["x", "xx", "x"]

    (folder / "seed-2" / "scores.json").write_text(json.dumps({"data/heldout": {"count_accuracy": 0.75}}))
    assert start("summary", f"--workdir={folder}") == 0
    table = capsys.readouterr().out
    seeds, arms_of = (rows_of(part) for part in table.split("Every arm:"))
    assert seeds == [["arm", "seeds", "step", "loss", "accuracy", "heldout: count_accuracy"],
                     ["all seeds", "3", "4.0000 ± 0.0000", "0.8 ± 2.5", "0.5000 ± 0.0000", "0.75"]]
    assert arms_of == [["arm", "step", "loss", "accuracy", "heldout: count_accuracy"],
                       ["seed-0", "4", "1.75", "0.5", ""], ["seed-1", "4", "0.75", "0.5", ""],
                       ["seed-2", "4", "-0.25", "0.5", "0.75"]]
    written = json.loads((folder / "summary.json").read_text())
    assert written["seed-1"]["loss"] == pytest.approx(0.75)
    # Losses 1.75, 0.75 and -0.25: standard deviation 1, Student's t of 2 degrees of freedom 4.302653.
    expected = {"mean": 0.75, "half": 4.302653 / 3 ** 0.5, "num": 3}
    assert written["all seeds"]["loss"] == pytest.approx(expected)
    page = (folder / "summary.html").read_text()
    assert page.count("<svg") == 1 and page.count('fill-opacity="0.18"') == 1


def rows_of(text):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if "---" not in line[0]]


def test_arms_are_compared_to_a_baseline_seed_by_seed(start, folder, capsys):
    (folder.parent / "sweep").mkdir(parents=True)
    (folder / "healed").touch()
    arguments = (f"--gin_file={BASE}", "--axis=optim.OptimConfig.weight_decay=[0.0, 0.1]", "--seeds=0,2",
                 "--gin=train.TrainConfig.steps = 4", f"--workdir={folder}")
    assert start(*arguments) == 0
    for name, value in (("weight_decay-0_seed-0", 0.5), ("weight_decay-0_seed-2", 0.1),
                        ("weight_decay-0.1_seed-0", 0.75), ("weight_decay-0.1_seed-2", 0.45)):
        (folder / name / "scores.json").write_text(json.dumps({"heldout": {"f1": value}}))
    capsys.readouterr()
    assert start("summary", f"--workdir={folder}", "--baseline=weight_decay-0", "--metric=loss,accuracy") == 0
    table = capsys.readouterr().out.partition("seed by seed:")[2].partition("Every arm")[0]
    # Differences 0.25 and 0.35 vary less than the scores, which the seed moves by 0.4 and 0.3.
    assert rows_of(table)[0] == ["arm", "seeds", "loss", "accuracy", "heldout: f1"]
    assert rows_of(table)[1][-1] == "0.30 ± 0.64"   # t of 1 degree of freedom: 12.706 x 0.0707 / sqrt(2)
    assert (folder / "summary.html").read_text().count("<svg") == 2
    assert start("summary", f"--workdir={folder}", "--baseline=seed-0") == 2
    assert "--baseline must be one of ['weight_decay-0', 'weight_decay-0.1']" in capsys.readouterr().err


def test_seeds_are_those_of_the_run_and_of_its_data(start, tmp_path, capsys):
    assert start(f"--gin_file={BASE}", "--seeds=3,4", f"--workdir={tmp_path}", "--dry_run") == 0
    for line, seed in zip(capsys.readouterr().out.splitlines(), (3, 4), strict=True):
        bindings = [word.removeprefix("--gin=") for word in shlex.split(line) if word.startswith("--gin=")]
        config = run.resolve([BASE], bindings)
        assert config.train.seed == config.data.seed == seed and line.endswith(f"/seed-{seed}")


def test_arms_trained_at_a_time_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 0, 1, 2, 7})
    assert sweep.shares(1) == [[0, 1, 2, 3, 7]]
    assert sweep.shares(2) == [[0, 2, 7], [1, 3]]
    assert sweep.shares(6) == [[0], [1], [2], [3], [7], [0]]


def test_a_trained_arm_is_scored_once(start, folder, capsys, monkeypatch):
    calls = []
    real = subprocess.Popen

    def popen(command, **options):
        if "launch.evaluate" in command:
            calls.append(command)
            [output] = [word.partition("=")[2] for word in command if word.startswith("--output=")]
            command = [sys.executable, "-c", f"open({output!r}, 'w').write('{{\"d\": {{\"f1\": 0.5}}}}')"]
        return real(command, **options)

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    arguments = (f"--gin_file={BASE}", "--seeds=0", "--gin=train.TrainConfig.steps = 4",
                 f"--workdir={folder}", f"--evaluate={folder}")
    assert start(*arguments) == 0 and start(*arguments) == 0
    assert len(calls) == 1 and f"--data={folder}" in calls[0]
    assert json.loads((folder / "seed-0" / "scores.json").read_text()) == {"d": {"f1": 0.5}}


def test_an_arm_without_its_last_checkpoint_is_trained_again(start, folder, capsys):
    arguments = (f"--gin_file={BASE}", "--axis=train.TrainConfig.seed=[0]", f"--workdir={folder}",
                 "--gin=train.TrainConfig.steps = 4")
    assert start(*arguments) == 0
    assert "seed-0: started (it has no checkpoint)" in capsys.readouterr().out
    shutil.rmtree(folder / "seed-0" / "checkpoints" / "4" / "sums")   # a kill in the last save
    assert start(*arguments) == 0
    assert "seed-0: started (it has no checkpoint)" in capsys.readouterr().out
    assert start(*arguments) == 0
    assert "seed-0: finished before" in capsys.readouterr().out


@pytest.mark.slow(6)
def test_an_arm_that_a_killed_sweep_left_running_is_waited_for(start, folder, capsys, monkeypatch):
    left = subprocess.Popen([sys.executable, "-c", test_lock.HOLD, str(folder / "seed-2")], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": str(run.ROOT)})
    assert left.stdout.readline() == "held\n"
    paused = []

    def pause(seconds):
        paused.append([path.name for path in folder.glob("*/started")])
        if len(paused) == 2:
            left.communicate("")

    monkeypatch.setattr(sweep, "time", types.SimpleNamespace(sleep=pause))   # other threads sleep, too
    assert start(f"--gin_file={BASE}", "--axis=train.TrainConfig.seed=[0, 2]", f"--workdir={folder}",
                 "--gin=train.TrainConfig.steps = 4") == 0
    said = capsys.readouterr().out
    assert said.count(f"seed-2: waiting for process {left.pid}, which is training it") == 1
    assert paused == [[], []] and said.index("waiting") < said.index("seed-0: started")


def test_a_sweep_with_other_settings_is_refused_and_its_record_is_kept(start, folder, capsys):
    arguments = (f"--gin_file={BASE}", "--gin=train.TrainConfig.steps = 4", f"--workdir={folder}")
    assert start(*arguments, "--axis=train.TrainConfig.seed=[0]") == 0
    before = (folder / sweep.RECORD).read_text()
    assert start(*arguments, "--axis=train.TrainConfig.seed=[0, 2]", "--gin=sharding.MeshConfig.fsdp = 2",
                 "--gin=optim.OptimConfig.weight_decay = 0.1") == 2
    error = capsys.readouterr().err
    assert "seed-0 (optim.weight_decay: 0.7, now 0.1)" in error and error.count(" now ") == 1
    assert (folder / sweep.RECORD).read_text() == before and not (folder / "seed-2").exists()


def test_arms_of_an_earlier_call_stay_in_the_summary(start, folder, capsys):
    arguments = (f"--gin_file={BASE}", "--gin=train.TrainConfig.steps = 4", f"--workdir={folder}")
    assert start(*arguments, "--axis=train.TrainConfig.seed=[0]") == 0
    assert start(*arguments, "--axis=train.TrainConfig.seed=[2]") == 0
    capsys.readouterr()
    assert start("summary", f"--workdir={folder}") == 0
    table = capsys.readouterr().out
    assert "| seed-0 | 4 |" in table and "| seed-2 | 4 |" in table
