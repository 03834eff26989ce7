import subprocess
import sys

import pytest

from data_pipelines import sources


def _draw(*flags):
    return subprocess.run([sys.executable, "-m", "launch.draw", *flags], capture_output=True, text=True)


@pytest.mark.slow(9)
def test_a_drawn_folder_is_read_like_any_other(tmp_path):
    done = _draw(f"--output={tmp_path}", "--world=quickstart", "--split=heldout", "--examples=3",
                 "--workers=1")
    assert done.returncode == 0, done.stderr
    assert len(sources.examples(tmp_path / "heldout")) == 3


def test_an_output_must_be_named():
    done = _draw("--examples=1")
    assert done.returncode == 2
    assert done.stderr == "error: --output must name the folder to write into\n"
