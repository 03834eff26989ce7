"""Several processes that are killed while they save go on as if nothing had happened."""

import pytest

from benchmarks import kills
from tests.launch import test_train

world = test_train.world
STEPS = ("train.TrainConfig.steps = 8",)


@pytest.fixture(scope="module")
def make(world, tmp_path_factory):
    """Makes runs of eight steps; ends what is left of their processes."""
    made = []

    def run(name):
        made.append(kills.Run(world[0], tmp_path_factory.mktemp("runs") / name, STEPS))
        return made[-1]
    yield run
    for one in made:
        one.close()


@pytest.mark.slow
def test_four_processes_killed_in_a_save_go_on_as_two_bit_for_bit(make):
    alone, killed = make("alone"), make("killed")
    alone.start(2)
    alone.finish()
    killed.start(4)
    killed.until(lambda: killed.saved() == [3] and killed.is_saving(3))
    killed.kill()
    killed.start(2)
    killed.finish()
    assert "going on behind step" in killed.log.read_text()
    assert killed.record() == alone.record()
    assert len(killed.record()["metrics"]) == 8 and len(killed.record()["positions"]) == kills.DEVICES
