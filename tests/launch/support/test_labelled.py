"""launch.prepare --from makes a data folder that launch.check accepts, and says what it left out."""

import fractions
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import sources
from data_pipelines.world import write as world_write


def run(module, *arguments):
    return subprocess.run([sys.executable, "-m", f"launch.{module}", *arguments], capture_output=True,
                          text=True, check=False)


def write_export(folder, number=4):
    """Writes videos and a CSV of points of one moving object in each, with one point outside."""
    rows = ["video,time,x,y,label,track"]
    for clip in range(number):
        images = [np.full((32, 48, 3), 8 * frame, np.uint8) for frame in range(12)]
        world_write.encode(folder / f"{clip}.mp4", images, np.arange(13) * 2, fractions.Fraction(1, 24), 6)
        rows += [f"{clip}.mp4,{time},{10 + clip},{5 + 4 * time},ball,1" for time in (0.0, 0.25, 0.5, 0.75)]
    rows.append("0.mp4,0.5,480,5,cup,")
    (folder / "points.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.slow(23)
def test_an_export_becomes_a_folder_that_the_check_accepts(tmp_path):
    write_export(tmp_path)
    done = run("prepare", "--from=csv", f"--input={tmp_path}/points.csv", f"--output={tmp_path}/data",
               "--heldout=0.25")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/data/train/annotations.jsonl: 3 records" in done.stdout
    assert "4 videos or images, 4 points, 4 tracks; left out: 1\n" in done.stdout
    reason = "points.csv: row 18: cup: a point must be inside the frame of 48 x 32; got (480, 5)"
    assert reason in done.stdout and reason in (tmp_path / "data/left_out.txt").read_text()
    for split, number in (("train", 3), ("heldout", 1)):
        examples, errors = sources.read_folder(tmp_path / "data" / split)
        assert len(examples) == number and not errors
    done = run("check", f"--data={tmp_path}/data/train", f"--data={tmp_path}/data/heldout")
    assert done.returncode == 0 and "problems: none" in done.stdout, done.stdout


def test_a_missing_output_is_named_in_one_sentence(tmp_path):
    done = run("prepare", "--from=csv", f"--input={tmp_path}/points.csv")
    assert done.returncode == 2 and "--from needs --input, the export, and --output" in done.stderr
    assert "Traceback" not in done.stderr
