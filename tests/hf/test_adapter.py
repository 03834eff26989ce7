"""Adapters as PEFT folders: peft computes our logits and gradients from them, and they are read back."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from molmo2_jax import config as config_lib
from molmo2_jax import finetune
from molmo2_jax import loss
from molmo2_jax import state as state_lib
from molmo2_jax.hf import adapter
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import weights
from molmo2_jax.model import molmo2
from tests import packs

LOGITS_TOLERANCE = 2e-5    # float32, on logits of size 5; measured 1e-5
GRADIENT_TOLERANCE = 1e-4  # relative, of each matrix; measured 2e-5
DELTA_TOLERANCE = 1e-6     # of sums of products, float32
LORA = finetune.LoraConfig(targets="all", rank=3, alpha=6.0, dropout=0.0)


def model_of(config):
    return molmo2.Molmo2(config, remat="none", attention="dense")


@functools.cache
def made(style, lora=LORA, seed=0):
    """Returns (config, base, trained parameters of which B is random too)."""
    config = packs.random_config(style, seed)
    base = packs.random_params(config)
    boxed = state_lib.boxed_trained(model_of(config), lora)
    fresh = finetune.create(lora, jax.random.key(seed), boxed, base)
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32), fresh)
    return config, base, moved


def whole(lora, base, trained):
    return finetune.merged(lora, finetune.frozen(lora, base, "float32"), trained)


LORAS = {"all": LORA, "shared A": dataclasses.replace(LORA, share_a=True),
         "rsLoRA": dataclasses.replace(LORA, rslora=True),
         "q and v": dataclasses.replace(LORA, targets="text/layers/attn/[qv]/kernel", rank=2)}


def deltas(folder, config):
    """Returns {module: scale * B A} of a PEFT folder, from its files alone."""
    values = json.loads((folder / "adapter_config.json").read_text())
    held = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    rank = values["r"]
    scale = values["lora_alpha"] / (rank ** 0.5 if values["use_rslora"] else rank)
    names = {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in held}
    for name in names:
        assert held[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
    return {name: scale * held[f"base_model.model.{name}.lora_B.weight"]
            @ held[f"base_model.model.{name}.lora_A.weight"] for name in names}


@pytest.mark.parametrize("spelling", ["native", "legacy"])
@pytest.mark.parametrize("name", LORAS)
def test_matrices_of_a_folder_are_the_change_of_each_kernel_and_are_read_back(name, spelling, tmp_path):
    lora = LORAS[name]
    config, base, trained = made("qwen3", lora)
    rank = adapter.write(tmp_path, lora, trained, config, spelling, "base")
    grows = spelling == "legacy" and not lora.share_a
    assert rank == lora.rank * ({"q and v": 2}.get(name, 3) if grows else 1)
    changed = weights.flatten(jax.tree.map(lambda a, b: np.asarray(a) - b, whole(lora, base, trained), base))
    found = deltas(tmp_path, config)
    seen = set()
    for entry in weights.entries(config, spelling):
        rows = [weights.to_torch(changed[path] if entry.layer is None else changed[path][entry.layer],
                                 entry.layout) for path in entry.paths]
        rows = rows if len(entry.tensors) == len(rows) else [np.concatenate(rows)]
        for tensor, wanted in zip(entry.tensors, rows):
            module = tensor.removesuffix(".weight")
            if module in found:
                seen.add(module)
                np.testing.assert_allclose(found[module], wanted, rtol=0, atol=DELTA_TOLERANCE)
            else:
                assert np.abs(wanted).max() == 0 or entry.paths[0].startswith("vision/layers"), module
    assert seen == set(found)
    read, parameters = adapter.read(tmp_path, config)
    again = weights.flatten(whole(read, base, parameters))
    used = max(config.connector.taps) + 1   # ViT layers after the last tap are not exported
    for path, wanted in weights.flatten(whole(lora, base, trained)).items():
        part = slice(0, used if path.startswith("vision/layers") else None)
        np.testing.assert_allclose(again[path][part], wanted[part], rtol=0, atol=DELTA_TOLERANCE,
                                   err_msg=path)
    assert read.rank == lora.rank and read.scale == pytest.approx(lora.scale)
    assert read.share_a == (lora.share_a and spelling == "legacy")   # where A's are one matrix


@pytest.mark.slow(40)
@pytest.mark.parametrize("style", packs.STYLES)
def test_peft_computes_our_logits_and_gradients(style, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from tests.hf import test_gradients
    config, base, trained = made(style)
    folder = checkpoint.export_checkpoint(base, config, config_lib.InputConfig(), None, tmp_path / "base")
    adapter.write(tmp_path / "adapter", LORA, trained, config, "native", str(folder))
    plain = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    model = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"), is_trainable=True).eval()
    batch = test_gradients.trees(config)
    theirs = test_gradients.their_logits(model, batch)
    test_gradients.their_loss(theirs, batch, 0.0).backward()

    frozen = jax.tree.map(jnp.asarray, finetune.frozen(LORA, base, "float32"))

    @jax.jit
    def ours(trained):
        def value(trained):
            apply = functools.partial(model_of(config).apply,
                                      {"params": finetune.joined(LORA, frozen, trained)})
            logits = apply(batch)
            sums = loss.chunked_sums(apply(batch, method="hidden"), functools.partial(apply, method="logits"),
                                     apply(method="head_kernel"), batch.targets, batch.weights, 16, "float32")
            return loss.objective(sums, 0.0)[0], logits
        return jax.grad(value, has_aux=True)(trained)

    gradients, logits = ours(trained)
    real = batch.example[0] >= 0
    np.testing.assert_allclose(np.asarray(logits)[0, real], theirs.detach().numpy()[0, real], rtol=0,
                               atol=LOGITS_TOLERANCE)
    found = adapter.tensors(LORA, jax.tree.map(np.asarray, gradients), config, "native")
    given = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    assert len(given) == 2 * len(found)
    for module, pair in found.items():
        for letter, own in zip("AB", pair):
            want = given[f"base_model.model.{module}.lora_{letter}.default.weight"].numpy()
            # A change of all keys alike changes no softmax.
            floor = 1e-3 if ".k_proj" in module else 0
            error = np.linalg.norm(own - want) / max(np.linalg.norm(want), floor)
            assert error <= GRADIENT_TOLERANCE, (module, letter, error)


def test_adapters_of_another_shape_or_kind_are_one_sentence(tmp_path):
    config, _, trained = made("qwen3")
    other = dataclasses.replace(config, text=dataclasses.replace(config.text, width=config.text.width + 4))
    adapter.write(tmp_path, LORA, trained, config, "native", "base")
    with pytest.raises(ValueError, match="an adapter must fit the model|must be kernels of this model"):
        adapter.read(tmp_path, other)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (({"peft_type": "IA3"}, "must be of peft_type LORA; .* has 'IA3'"),
                            ({"use_dora": True}, "must consist of A and B alone; .* uses DoRA"),
                            ({"bias": "all"}, "uses bias='all'"),
                            ({"modules_to_save": ["lm_head"]}, "uses modules_to_save")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            adapter.read(tmp_path, config)
    with pytest.raises(ValueError, match="must hold adapter_config.json"):
        adapter.read(tmp_path / "nowhere", config)
    full = dataclasses.replace(LORA, targets="decoder", full=("connector",))
    with pytest.raises(ValueError, match="also trains connector in full: export without --adapter"):
        adapter.write(tmp_path, full, trained, config, "native", "base")


def test_ranks_and_alphas_of_single_modules_are_followed(tmp_path):
    config, base, trained = made("qwen3", LORAS["q and v"])
    adapter.write(tmp_path, LORAS["q and v"], trained, config, "native", "base")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    held = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in held if ".0.self_attn.q_proj.lora_A" in name)
    for letter, part in (("A", np.s_[:1]), ("B", np.s_[:, :1])):
        key = name.replace("lora_A", f"lora_{letter}")
        held[key] = np.ascontiguousarray(held[key][part])   # rank 1
    safetensors.numpy.save_file(held, tmp_path / "adapter_model.safetensors")
    values |= {"rank_pattern": {"layers.0.self_attn.q_proj": 1}, "alpha_pattern": {"layers.0.*q_proj": 10}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    lora, parameters = adapter.read(tmp_path, config)
    change = np.asarray(whole(lora, base, parameters)["text"]["layers"]["attn"]["q"]["kernel"][0]
                        - base["text"]["layers"]["attn"]["q"]["kernel"][0])
    a, b = (held[name.replace("lora_A", f"lora_{letter}")] for letter in "AB")
    np.testing.assert_allclose(change.reshape(config.text.width, -1), (10.0 * b @ a).T, rtol=0, atol=1e-6)
