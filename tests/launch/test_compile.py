"""What launch.compile refuses before it compiles anything."""

import pytest
from absl import flags
from absl.testing import flagsaver

from launch import compile as compile_lib
from molmo2_jax import aot

SFT = "gin_configs/runs/sft_8b.gin"


@pytest.fixture(autouse=True)
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def refused(**values):
    with flagsaver.flagsaver(**values), pytest.raises(ValueError) as caught:
        compile_lib.main([])
    return str(caught.value)


def test_a_wrong_topology_is_one_sentence_with_those_that_exist():
    message = refused(gin_file=[SFT], topology="v5p:3x3x3")
    assert "v5p:4x4x8 (v5p-256, 128 chips)" in message and "\n" not in message
    assert "known are v4:" in refused(gin_file=[SFT], topology=None)


def test_a_model_alone_has_no_step_to_compile(monkeypatch):
    monkeypatch.setattr(aot, "prepare", lambda: pytest.fail("went on"))
    message = refused(gin_file=["gin_configs/models/nano.gin"], topology="v5p-256")
    assert "run.RunConfig.data, run.RunConfig.optim, run.RunConfig.train" in message
