"""Answering by the commands on a mesh: as one process, as two, and on the mesh that is chosen by default."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch import evaluate
from launch import generate
from launch import run
from launch.support import answering
from launch.support import cli
from launch.support import hosts
from launch.support import record
from launch.support import trained
from molmo2_jax import checkpoint
from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import sharding
from molmo2_jax.hf import weights
from molmo2_jax.model import quantized
from tests.launch import commands
from tests.launch import test_mains

model_folder, data_folder = test_mains.model_folder, test_mains.data_folder
flags_as_before = commands.flags_as_before
LOGPROB_TOLERANCE = 1e-4
GIB = 2**30


def asked(model_folder, data_folder, *more):
    return [f"--model={model_folder}", f"--image={data_folder / 'a.png'}", "--json", "--max_new_tokens=4",
            "--prompt=Point to the red circle.", "--prompt=Where?", *more]


def same(found, wanted):
    """Asserts equal answers, each a line of JSON, but for rounding of their probabilities."""
    found, wanted = ([json.loads(line) for line in text.splitlines()] for text in (found, wanted))
    assert len(found) == len(wanted) == 2
    for one, other in zip(found, wanted):
        assert one["text"] == other["text"] and one["new_tokens"] == other["new_tokens"]
        assert one["logprob"] == pytest.approx(other["logprob"], abs=LOGPROB_TOLERANCE)


@pytest.mark.slow(14)
def test_generate_and_evaluate_answer_on_the_mesh_of_the_flag_as_on_one_device(
        model_folder, data_folder, tmp_path, capsys):
    outputs, scores = [], []
    for number, mesh in enumerate(([], ["--mesh=tensor=2,data=2"])):
        assert commands.start(generate.main, *asked(model_folder, data_folder, *mesh)) == 0
        outputs.append(capsys.readouterr().out)
        file = tmp_path / f"{number}.json"
        assert commands.start(evaluate.main, f"--model={model_folder}", f"--data={data_folder}", *mesh,
                              "--max_new_tokens=4", "--rows=1", f"--output={file}") == 0
        scores.append(json.loads(file.read_text()))
        capsys.readouterr()
    same(*outputs)
    assert scores[0] == scores[1] and scores[0]


@pytest.mark.slow(60)
def test_two_processes_answer_as_one(model_folder, data_folder, tmp_path, capsys):
    assert commands.start(generate.main, *asked(model_folder, data_folder)) == 0
    alone = capsys.readouterr().out
    arguments = asked(model_folder, data_folder, "--mesh=tensor=2")
    first, second = two_processes("launch.generate", arguments)
    same(first, alone)
    assert not second

    # With a replica for each process, the second one has no row, and needs no media.
    blind = asked(model_folder, pathlib.Path("/nowhere"))
    first, second = two_processes("launch.generate", asked(model_folder, data_folder), blind)
    same(first, alone)
    assert not second
    streamed = [[one for one in given if one != "--json"] + ["--stream"]
                for given in (asked(model_folder, data_folder), blind)]
    assert commands.start(generate.main, *streamed[0]) == 0
    text = capsys.readouterr().out
    assert two_processes("launch.generate", *streamed) == [text, ""]

    wanted, found = tmp_path / "wanted.json", tmp_path / "found.json"
    arguments = [f"--model={model_folder}", f"--data={data_folder}", "--max_new_tokens=4", "--rows=2"]
    assert commands.start(evaluate.main, *arguments, f"--output={wanted}") == 0
    two_processes("launch.evaluate", [*arguments, f"--output={found}"])  # on the mesh that is chosen
    assert json.loads(found.read_text()) == json.loads(wanted.read_text())


@pytest.mark.slow(20)
def test_media_that_cannot_be_read_end_both_processes_with_one_sentence(model_folder, tmp_path):
    arguments = asked(model_folder, tmp_path / "nowhere")
    printed = two_processes("launch.generate", arguments, status=cli.USER_ERROR, stream="stderr")
    for text in printed:
        assert text.splitlines()[-1].startswith("error: ") and "nowhere/a.png" in text.splitlines()[-1]


def two_processes(module, arguments, of_second=None, status=0, stream="stdout"):
    """Returns what each of two processes with one device each prints; of_second: arguments of the second, if
    they are others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=1")
    running = [subprocess.Popen(
        [sys.executable, "-m", module, *map(str, given)], cwd=run.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(run.ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
                          hosts.VARIABLE: f"localhost:{port},2,{index}"})
        for index, given in enumerate((arguments, of_second or arguments))]
    printed = [one.communicate() for one in running]
    assert [one.returncode for one in running] == [status] * 2, printed
    # Gloo, which connects processes on CPU, prints to standard output, too.
    return ["".join(line for line in texts[stream == "stderr"].splitlines(True)
                    if not line.startswith("[Gloo]")) for texts in printed]


@pytest.mark.parametrize("gib, sizes", [(31.25, (4, 1)), (15.75, (2, 2)), (9.0, (1, 4)), (1.0, (1, 4))])
def test_the_fewest_devices_that_fit_share_the_weights_and_the_others_the_rows(gib, sizes, monkeypatch):
    monkeypatch.setattr(answering, "_memory", lambda _: gib * GIB)
    settings = trained.Settings(config_lib.molmo2_8b(), config_lib.InputConfig(), None)
    mesh = answering.smallest_mesh(settings, "bfloat16", 4, 512, jax.devices()[:4])
    assert (mesh.shape["data"], mesh.shape["tensor"]) == sizes
    one = answering.smallest_mesh(settings, "bfloat16", 1, 512, jax.devices()[:4])
    assert one.size == one.shape["tensor"] == sizes[1]


def test_a_processor_is_one_device_whatever_it_pretends_to_be():
    settings = trained.Settings(config_lib.nano(), config_lib.InputConfig(), None)
    assert answering.smallest_mesh(settings, "float32", 8, 512, jax.devices()).size == 1


def test_parameters_are_read_onto_the_chosen_mesh_in_the_dtype_of_the_computation():
    def choose(settings):
        assert settings.mesh is None and settings.model.text.num_layers > 0
        return sharding.mesh_of_first(sharding.MeshConfig(fsdp=1, tensor=2))

    source = trained.load("assets/nano", mesh=choose, dtype="bfloat16")
    whole = trained.load("assets/nano")
    for path, leaf in jax.tree_util.tree_leaves_with_path(source.params):
        wanted = whole.params
        for key in path:
            wanted = wanted[key.key]
        is_small = path[-1].key in ("scale", "bias", "position")
        assert leaf.dtype == ("float32" if is_small else "bfloat16")
        np.testing.assert_array_equal(leaf, wanted.astype(leaf.dtype))
        assert leaf.sharding.mesh.shape["tensor"] == 2
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(source.params))


def test_8_bits_are_made_of_each_parameter_as_it_is_read(tmp_path):
    """A folder with weights of Hugging Face, and a work directory with the same ones."""
    mesh = sharding.mesh_of_first(sharding.MeshConfig(fsdp=2, tensor=2))
    whole = trained.load("assets/nano")
    config = run.RunConfig(model=whole.model, inputs=whole.inputs)
    record.save(tmp_path, record.gin_text(config))
    whole.tokenizer.save(tmp_path)
    checkpoint.save_params(str(tmp_path), jax.device_put(whole.params))
    for path in ("assets/nano", tmp_path):
        found = weights.flatten(trained.load(path, mesh=mesh, weights="int8").params)
        for name, leaf in weights.flatten(whole.params).items():
            if not decode.is_in_8_bits(name):
                np.testing.assert_array_equal(found[name], leaf)
                continue
            wanted = quantized.quantize(leaf, quantized.summed_axes(name))
            jax.tree.map(np.testing.assert_array_equal, found[name], wanted)
            assert not found[name].values.sharding.is_fully_replicated


@pytest.mark.slow(10)
def test_the_flag_of_8_bits_reaches_the_answers(model_folder, data_folder, capsys):
    found = []
    for more in ([], ["--weights=int8"], ["--weights=int8", "--mesh=tensor=2"]):
        assert commands.start(generate.main, *asked(model_folder, data_folder, *more)) == 0
        found.append(capsys.readouterr().out)
    same(found[1], found[2])
    logprobs = [[json.loads(line)["logprob"] for line in text.splitlines()] for text in found]
    assert logprobs[0] != logprobs[1]
