"""Work directories with adapters: loaded, exported in two spellings, read back, verified; mistakes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from launch import convert
from launch import run
from launch.support import adapted
from launch.support import cli
from launch.support import record
from launch.support import trained
from molmo2_jax import checkpoint
from molmo2_jax import config as config_lib
from molmo2_jax import finetune
from molmo2_jax import state
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.hf import verify_adapter
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2
from tests import packs
from tests.launch import commands

flags_as_before, start = commands.flags_as_before, commands.start

NANO = config_lib.nano()
MODEL = dataclasses.replace(
    NANO, vision=dataclasses.replace(NANO.vision, num_layers=1, width=32, num_heads=2, mlp_width=64),
    connector=dataclasses.replace(NANO.connector, taps=(0,), num_heads=2, mlp_width=64),
    text=dataclasses.replace(NANO.text, num_layers=2, width=32, head_dim=8, mlp_width=64))
INPUTS = config_lib.InputConfig(max_crops=1, high_res_crops=1, max_frames=4, overlap_margins=(1, 1))
LORA = finetune.LoraConfig(targets="decoder", rank=2, alpha=4.0)


def write_run(folder, base, lora, tokenizer, seed=1):
    """Writes a work directory with random adapters, without training; returns what it holds."""
    source = trained.load(base)
    boxed = state.boxed_trained(molmo2.Molmo2(source.model), lora)
    fresh = finetune.create(lora, jax.random.key(seed), boxed, source.params)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), fresh)
    checkpoint.save_params(str(folder), params)
    adapted.write(folder, adapted.Note(adapted.whole(base), finetune.fingerprint(source.params), lora))
    tokenizer.save(folder)
    record.save(folder, record.gin_text(run.RunConfig(model=source.model, inputs=source.inputs)))
    return params


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(Hugging Face folder of a base, work directory with adapters, its parameters)."""
    root = tmp_path_factory.mktemp("made")
    tokenizer = tokenizers.train_small(["Point to the red circle."], MODEL.text.vocab_size)
    base = hf_checkpoint.export_checkpoint(packs.random_params(MODEL), MODEL, INPUTS, tokenizer, root / "hf")
    return base, root / "run", write_run(root / "run", base, LORA, tokenizer)


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def test_a_work_directory_is_loaded_with_its_adapters_merged(made):
    base, folder, params = made
    plain, source = trained.load(base).params, trained.load(folder)
    assert_close(source.params, finetune.merged(LORA, plain, params), 1e-6)
    assert source.adapter.note.lora == LORA
    change = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), source.params, plain)
    assert change["text"]["layers"]["attn"]["q"]["kernel"] > 0.01 and change["head"] == 0
    again = trained.load(folder, dtype="bfloat16").params   # the fingerprint does not depend on it
    assert again["text"]["layers"]["attn"]["q"]["kernel"].dtype == np.dtype("bfloat16")


@pytest.mark.slow(12)
@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_exported_adapters_are_read_back_and_verified(name, made, tmp_path, capsys):
    base, folder, _ = made
    assert start(convert.main, "export", f"--model={folder}", f"--output={tmp_path / 'out'}",
                 "--adapter") == 0
    assert "--max-lora-rank of at least 6" in capsys.readouterr().out
    out = tmp_path / "out" / name
    assert verify_adapter.base_of(out) == str(base)
    arguments = (f"--hf={out}", f"--against={folder}", "--nologits")
    assert start(convert.main, "verify", *arguments) == 0
    assert f"{14 if name == 'transformers' else 8} modules" in capsys.readouterr().out
    assert start(convert.main, "import", f"--model={base}", f"--adapter={out}",
                 f"--output={tmp_path / 'again'}") == 0
    assert_close(trained.load(tmp_path / "again").params, trained.load(folder).params, 1e-6)
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(other / "checkpoints")
    write_run(other, base, LORA, trained.load(base).tokenizer, seed=2)
    assert start(convert.main, "verify", f"--hf={out}", f"--against={other}", "--nologits") == 1
    assert "differs" in capsys.readouterr().out


@pytest.mark.slow(40)
def test_exported_adapters_compute_our_logits_in_peft(made, tmp_path, capsys):
    pytest.importorskip("peft")
    _, folder, _ = made
    assert start(convert.main, "export", f"--model={folder}", f"--output={tmp_path / 'out'}",
                 "--adapter") == 0
    assert start(convert.main, "verify", f"--hf={tmp_path / 'out' / 'transformers'}") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "logits: peft" in line)
    assert line.startswith("ok") and "4 kinds of input" in line
    assert float(line.rpartition("by up to ")[2]) > 0.05   # they are not ignored


def test_the_default_export_is_merged(made, tmp_path):
    _, folder, _ = made
    assert start(convert.main, "export", f"--model={folder}", f"--output={tmp_path / 'out'}") == 0
    assert_close(trained.load(tmp_path / "out").params, trained.load(folder).params, 0)


def changed(folder, target, **values):
    target = shutil.copytree(folder, target)
    note = json.loads((target / adapted.NAME).read_text())
    (target / adapted.NAME).write_text(json.dumps(note | values))
    return target


def test_a_base_that_is_gone_or_another_is_one_sentence(made, tmp_path, capsys):
    base, folder, _ = made
    with pytest.raises(ValueError, match=r"need their base in /gone \(or in another folder"):
        trained.load(changed(folder, tmp_path / "gone", base="/gone"))
    tokenizer = trained.load(base).tokenizer
    weights = packs.random_params(MODEL, seed=5)
    other = hf_checkpoint.export_checkpoint(weights, MODEL, INPUTS, tokenizer, tmp_path / "hf")
    with pytest.raises(ValueError, match="adapters in .* belong to the base with the fingerprint") as caught:
        trained.load(changed(folder, tmp_path / "other", base=str(other)))
    assert "\n" not in str(caught.value)
    assert start(convert.main, "export", f"--model={base}", f"--output={tmp_path / 'x'}",
                 "--adapter") == cli.USER_ERROR
    assert "adapters must be in the work directory of a run that trained them" in capsys.readouterr().err
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"import it with its base \(launch.convert import --model=BASE"):
        trained.load(adapter)


def test_a_run_begins_with_a_base_and_resumes_with_the_same_adapters(made, tmp_path):
    base, _, _ = made
    with pytest.raises(ValueError, match="needs --init_from, the work directory or .*; got none"):
        adapted.begin(tmp_path, None, LORA)
    assert adapted.begin(tmp_path, base, LORA) == str(base)
    adapted.keep(tmp_path, str(base), LORA, "a")
    assert adapted.begin(tmp_path, None, dataclasses.replace(LORA, dropout=0.0)) == str(base)
    with pytest.raises(ValueError, match="must resume with the adapters that it began with, .*alpha=4.0.*"):
        adapted.begin(tmp_path, base, dataclasses.replace(LORA, alpha=8.0))
    with pytest.raises(ValueError, match="belong to the base with the fingerprint a, .* have b"):
        adapted.keep(tmp_path, str(base), LORA, "b")
    (tmp_path / adapted.NAME).write_text("{}")
    with pytest.raises(ValueError, match="adapter.json must hold base, fingerprint and lora"):
        adapted.read(tmp_path)
