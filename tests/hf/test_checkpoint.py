"""Checkpoint folders: the round trip is the identity, and a broken folder costs one sentence, not minutes."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from molmo2_jax import config as config_lib
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import shards
from molmo2_jax.hf import weights
from molmo2_jax.inputs import image
from molmo2_jax.model import molmo2
from tests import packs

CONFIG = packs.random_config("qwen3", 0)
INPUTS = config_lib.InputConfig(max_crops=3, max_frames=16, max_fps=1.5, overlap_margins=(1, 0), max_images=2)
TOWER_TOLERANCE = 2e-5  # float32; measured 4e-6 on values of size 5


def export(folder, config=CONFIG, params=None, **options):
    params = packs.random_params(config) if params is None else params
    return checkpoint.export_checkpoint(params, config, INPUTS, None, folder, **options)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("style", packs.STYLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_undoes_export(style, dtype, tmp_path):
    config = packs.random_config(style, 3)
    params = packs.random_params(config)
    export(tmp_path / "a", config, params, dtype=dtype, max_shard_bytes=3e4)
    once, config_once, inputs = checkpoint.import_checkpoint(tmp_path / "a", dtype=dtype)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else x.dtype), params)
    same(once, rounded)
    assert inputs == INPUTS and config_once.text.tied_head == config.text.tied_head
    assert config_once.connector.image_window == config.connector.image_window
    checkpoint.export_checkpoint(once, config_once, inputs, None, tmp_path / "b", dtype=dtype)
    twice, config_twice, _ = checkpoint.import_checkpoint(tmp_path / "b", dtype=dtype)
    same(twice, once)
    assert config_twice == config_once


def test_other_readers_of_safetensors_see_the_same_numbers(tmp_path):
    params = packs.random_params(CONFIG)
    export(tmp_path / "a", params=params)
    tensors = safetensors.numpy.load_file(tmp_path / "a" / shards.SINGLE)
    t = CONFIG.text
    q = params["text"]["layers"]["attn"]["q"]["kernel"][1]
    fused = tensors["model.transformer.blocks.1.self_attn.att_proj.weight"]
    np.testing.assert_array_equal(fused[:t.num_heads * t.head_dim], q.reshape(t.width, -1).T)
    mlp = params["text"]["layers"]["mlp"]
    np.testing.assert_array_equal(
        tensors["model.transformer.blocks.0.mlp.ff_proj.weight"],
        np.concatenate([mlp["up"]["kernel"][0].T, mlp["gate"]["kernel"][0].T]))
    np.testing.assert_array_equal(tensors["model.vision_backbone.image_projector.w1.weight"],
                                  params["connector"]["project"]["gate"]["kernel"].T)


def test_shards_stay_below_the_limit_and_the_index_adds_up(tmp_path):
    limit = 20_000
    folder = export(tmp_path / "a", max_shard_bytes=limit)
    index = json.loads((folder / shards.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        with safetensors.safe_open(folder / file, "np") as tensors:
            sizes = [tensors.get_tensor(name).nbytes for name in tensors.keys()]  # noqa: SIM118
            assert sum(sizes) <= limit or len(sizes) == 1
            assert all(index["weight_map"][name] == file for name in tensors.keys())  # noqa: SIM118
            total += sum(sizes)
    assert total == index["metadata"]["total_size"]


def test_parameters_in_flax_boxes_are_exported(tmp_path):
    boxes = weights.abstract_params(CONFIG, boxed=True)
    params = packs.random_params(CONFIG)
    boxed = {path: boxes[path].replace_boxed(x) for path, x in weights.flatten(params).items()}
    export(tmp_path / "a", params=weights.unflatten(boxed))
    same(checkpoint.import_checkpoint(tmp_path / "a")[0], params)


def test_parameters_are_placed_straight_onto_their_shards(tmp_path):
    params = packs.random_params(CONFIG)
    folder = export(tmp_path / "a", params=params, max_shard_bytes=3e4)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    asked = []

    def place(path, shape, dtype, read):
        axis = max((n for n, size in enumerate(shape) if size % 2 == 0), default=None,
                   key=lambda n: (n > 0, shape[n]))
        spec = [None if n != axis else "fsdp" for n in range(len(shape))]
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

        def note(index):
            asked.append((path, index))
            return read(index)
        return jax.make_array_from_callback(shape, sharding, note)

    placed, _, _ = checkpoint.import_checkpoint(folder, place=place)
    same(placed, params)
    assert any(part != slice(None) for _, index in asked for part in index)


def test_reading_part_of_a_parameter_reads_only_its_rows(tmp_path, monkeypatch):
    folder = export(tmp_path / "a")
    read, count = shards.Tensor.read, []
    monkeypatch.setattr(shards.Tensor, "read", lambda self, *at: count.append(read(self, *at)) or count[-1])
    wanted = {"base_embedding": (slice(10, 14), slice(None)),
              "text/layers/attn/k/kernel": (slice(1, 2), slice(None), slice(0, 1), slice(None))}

    def place(path, shape, dtype, read):
        count.clear()
        if path in wanted:
            read(wanted[path])
            size = math.prod(len(range(*part.indices(n))) for part, n in zip(wanted[path], shape))
            assert sum(x.size for x in count) == size > 0
        return np.zeros(shape)

    checkpoint.import_checkpoint(folder, place=place)


def test_a_tied_head_is_stored_and_recognised_by_its_bits(tmp_path):
    config = packs.random_config("qwen3_tied", 0)
    folder = export(tmp_path / "a", config)
    tensors = safetensors.numpy.load_file(folder / shards.SINGLE)
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["model.transformer.wte.embedding"])
    params, found, _ = checkpoint.import_checkpoint(folder)
    assert found.text.tied_head and "head" not in params
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += 1
    safetensors.numpy.save_file(tensors, folder / shards.SINGLE)
    params, found, _ = checkpoint.import_checkpoint(folder)
    assert not found.text.tied_head and params["head"].shape == (config.text.width, config.text.vocab_size)
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings is true.*they differ"):
        checkpoint.import_checkpoint(folder)


def test_a_tied_checkpoint_may_leave_the_head_out(tmp_path):
    config = packs.random_config("qwen3_tied", 0)
    folder = export(tmp_path / "a", config)
    tensors = safetensors.numpy.load_file(folder / shards.SINGLE)
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, folder / shards.SINGLE)
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        checkpoint.import_checkpoint(folder)
    edit_config(folder, tie_word_embeddings=True)
    params, found, _ = checkpoint.import_checkpoint(folder)
    assert found.text.tied_head
    same(params, packs.random_params(config))


def edit_config(folder, **fields):
    values = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        section = values
        *sections, name = name.split("__")
        for part in sections:
            section = section[part]
        section[name] = value
    (folder / "config.json").write_text(json.dumps(values))


def test_spare_vit_layers_are_skipped_only_where_the_config_counts_them(tmp_path):
    params = packs.random_params(CONFIG)
    folder = export(tmp_path / "a", params=params)
    depth = CONFIG.vision.num_layers
    tensors = safetensors.numpy.load_file(folder / shards.SINGLE)
    extra = {name.replace(f"resblocks.{depth - 1}", f"resblocks.{depth}"): x for name, x in tensors.items()
             if f"resblocks.{depth - 1}." in name}
    safetensors.numpy.save_file(tensors | extra, folder / shards.SINGLE)
    with pytest.raises(ValueError, match=rf"unexpected .*resblocks\.{depth}\.attention\.wk\.bias"):
        checkpoint.import_checkpoint(folder)
    edit_config(folder, vit_config__num_hidden_layers=depth + 1,
                adapter_config__vit_layers=[tap - depth - 1 for tap in CONFIG.connector.taps])
    again, config, _ = checkpoint.import_checkpoint(folder)
    assert config.vision.num_layers == depth
    same(again, params)


def test_layers_behind_the_last_tap_are_not_written(tmp_path):
    config = packs.random_config("qwen3", 1)
    deeper = dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, num_layers=config.vision.num_layers + 2))
    params = packs.random_params(deeper)
    again, found, _ = checkpoint.import_checkpoint(export(tmp_path / "a", deeper, params))
    assert found.vision.num_layers == config.vision.num_layers
    kept = jax.tree.map(lambda x: x[:config.vision.num_layers], params["vision"]["layers"])
    same(again["vision"]["layers"], kept)


def break_truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-7])


def break_cut_to_nothing(folder):
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"")


def break_remove(folder):
    sorted(folder.glob("*.safetensors"))[2].unlink()


def replace_tensor(folder, name, make):
    index = json.loads((folder / shards.INDEX).read_text())["weight_map"]
    path = folder / index[name]
    tensors = safetensors.numpy.load_file(path)
    tensors[name] = make(tensors[name])
    safetensors.numpy.save_file(tensors, path)


def break_shape(folder):
    replace_tensor(folder, "model.transformer.ln_f.weight", lambda x: x[:-1])


def break_dtype(folder):
    replace_tensor(folder, "model.transformer.ln_f.weight", lambda x: x.astype(np.int32))


def break_sizes(folder):
    edit_config(folder, text_config__intermediate_size=CONFIG.text.mlp_width + 1)


def break_index(folder):
    index = json.loads((folder / shards.INDEX).read_text())
    index["weight_map"]["model.transformer.ghost"] = min(index["weight_map"].values())
    (folder / shards.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(("damage", "message"), [
    (break_truncate, r"a shard must be complete; .*model-00002.* bytes, its header speaks of"),
    (break_cut_to_nothing, r"a shard must be a complete safetensors file; .*model-00001.* has 0 bytes"),
    (break_remove, r"every shard of the index must be there; .* lacks model-00003"),
    (break_shape, r"model\.transformer\.ln_f\.weight is \[\d+\] instead of \[\d+\]"),
    (break_dtype, r"tensors must be one of .*ln_f\.weight in .* is I32"),
    (break_sizes, r"blocks\.0\.mlp\.ff_proj\.weight is .* instead of .*blocks\.1\.mlp\.ff_out\.weight is"),
    (break_index, r"shards must hold what the index says; .* lacks model\.transformer\.ghost"),
    (lambda folder: (folder / shards.INDEX).unlink(), "must hold model.safetensors or"),
    (lambda folder: (folder / "config.json").write_text("{"), "must hold a readable config.json"),
    (lambda folder: (folder / "processor_config.json").write_text('{"use_single_crop_col_tokens": true}'),
     "use_single_crop_col_tokens must be False, got True"),
    (lambda folder: (folder / "preprocessor_config.json").write_text('{"patch_size": 99}'),
     "preprocessor_config.json.patch_size must be")])
def test_a_broken_folder_costs_one_sentence_and_no_reading(damage, message, tmp_path, monkeypatch):
    folder = export(tmp_path / "a", max_shard_bytes=3e4)
    checkpoint.import_checkpoint(folder)
    damage(folder)
    monkeypatch.setattr(checkpoint, "_load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        checkpoint.import_checkpoint(folder)


def test_parameters_that_do_not_fit_the_config_are_all_named(tmp_path):
    params = packs.random_params(CONFIG)
    del params["connector"]["pool"]["k"]["bias"]
    params["vision"]["position"] = params["vision"]["position"][:-1]
    params["ghost"] = np.zeros(3)
    wanted = r"connector/pool/k/bias is missing.*ghost is \(3,\).*vision/position"
    with pytest.raises(ValueError, match=wanted):
        export(tmp_path / "a", params=params)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path):
    folder = export(tmp_path / "a")
    (folder / "mine.txt").write_text("notes")
    with pytest.raises(ValueError, match="new or empty folder"):
        export(folder)
    assert (folder / "mine.txt").exists()
    export(folder, overwrite=True)
    assert not (folder / "mine.txt").exists()
    checkpoint.import_checkpoint(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_interrupted_export_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.processor, "write", lambda *_: {"preprocessor_config.json": object()})
    with pytest.raises(TypeError):
        export(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_no_folder_of_that_name(tmp_path):
    script = ("import os, signal, sys\n"
              "from molmo2_jax.hf import shards\n"
              "from tests.hf import test_checkpoint as t\n"
              "write = shards._write_file\n"
              "def once(path, *rest):\n"
              "    write(path, *rest)\n"
              "    if '00002' in path.name: os.kill(os.getpid(), signal.SIGKILL)\n"
              "shards._write_file = once\n"
              "t.export(t.pathlib.Path(sys.argv[1]), max_shard_bytes=2e4)\n")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False,
                          cwd=pathlib.Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == -9
    assert not (tmp_path / "a").exists()
    left = list(tmp_path.rglob("*.safetensors"))
    assert len(left) == 2 and all(path.relative_to(tmp_path).parts[0].startswith(".a.") for path in left)


def test_remote_code_is_passed_on_with_its_auto_map(tmp_path):
    source = export(tmp_path / "source")
    (source / "modeling_molmo2.py").write_text("# theirs\n")
    folder = export(tmp_path / "a", code_from=source)
    assert not list(folder.glob("*.py"))  # nothing refers to the file
    edit_config(source, auto_map={"AutoConfig": "modeling_molmo2.X"})
    folder = export(tmp_path / "b", code_from=source)
    assert (folder / "modeling_molmo2.py").read_text() == "# theirs\n"
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {"AutoConfig": "modeling_molmo2.X"}
    checkpoint.import_checkpoint(folder)


def test_processor_files_nested_as_transformers_saves_them_are_read(tmp_path):
    folder = export(tmp_path / "a")
    read = lambda name: json.loads((folder / name).read_text())
    nested = read("processor_config.json") | {"image_processor": read("preprocessor_config.json"),
                                              "video_processor": read("video_preprocessor_config.json")}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).unlink()
    assert checkpoint.read_config(folder)[1] == INPUTS


def text_logits(config, flat, tokens):
    """Logits of the decoder alone, other towers at zero."""
    shapes = weights.abstract_params(config)
    params = weights.unflatten({path: flat.get(path, np.zeros(leaf.shape, np.float32))
                                for path, leaf in shapes.items()})
    one = packs.sequence(np.random.default_rng(0), config, None, (len(tokens) - 1,))
    batch = packs.row([dataclasses.replace(one, tokens=tokens)], config, len(tokens), 0, 0)
    return np.asarray(jax.jit(molmo2.Molmo2(config, attention="dense").apply)({"params": params}, batch))[0]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_tied", "olmo3"])
def test_a_language_model_of_its_own_becomes_the_decoder(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = packs.random_config("olmo" if kind == "olmo3" else kind, 0)
    config = dataclasses.replace(base, text=dataclasses.replace(base.text, yarn=None))
    t = config.text
    sizes = dict(vocab_size=t.vocab_size, hidden_size=t.width, num_hidden_layers=t.num_layers,
                 num_attention_heads=t.num_heads, num_key_value_heads=t.num_kv_heads, head_dim=t.head_dim,
                 intermediate_size=t.mlp_width, rms_norm_eps=1e-6, tie_word_embeddings=t.tied_head,
                 rope_parameters={"rope_type": "default", "rope_theta": t.rope_theta}, pad_token_id=None,
                 bos_token_id=None, eos_token_id=None, initializer_range=0.2)
    if kind == "olmo3":
        heads = dict(num_heads=4, num_kv_heads=2, head_dim=t.width // 4)  # its head width follows
        config = dataclasses.replace(config, text=dataclasses.replace(t, **heads))
        del sizes["head_dim"]
        sizes |= dict(num_attention_heads=4, num_key_value_heads=2,
                      layer_types=["full_attention"] * t.num_layers,
                      rope_parameters=dict.fromkeys(("full_attention", "sliding_attention"),
                                                    sizes["rope_parameters"]))
        model = transformers.Olmo3ForCausalLM(transformers.Olmo3Config(**sizes))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value += 0.3 * torch.randn_like(value)
    model.eval().save_pretrained(tmp_path)
    flat = checkpoint.import_tower(tmp_path, "olmo3" if kind == "olmo3" else "qwen3", config)
    assert {path.split("/")[0] for path in flat} == {"base_embedding", "text"} | (
        set() if t.tied_head else {"head"})
    tokens = np.random.default_rng(0).integers(0, t.vocab_size, 20).astype(np.int32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
    assert wanted.std() > 0.1
    np.testing.assert_allclose(text_logits(config, flat, tokens), wanted, atol=TOWER_TOLERANCE, rtol=0)


def test_a_siglip2_checkpoint_becomes_the_vit(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    nano = config_lib.nano()
    v = nano.vision
    model = transformers.SiglipModel(transformers.SiglipConfig(
        text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=32, max_position_embeddings=8, projection_size=v.width),
        vision_config=dict(hidden_size=v.width, intermediate_size=v.mlp_width, image_size=v.image_size,
                           num_hidden_layers=v.num_layers + 2, num_attention_heads=v.num_heads,
                           patch_size=v.patch_size, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
    )).eval()
    model.save_pretrained(tmp_path)
    flat = checkpoint.import_tower(tmp_path, "siglip2", nano)
    assert all(path.startswith("vision/") for path in flat)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, v.image_size, v.image_size, 3), np.uint8)
    patches = np.stack([image.patchify(one[None], v.patch_size)[0] for one in pixels])[None]
    module = molmo2.vision.VisionTransformer(v, nano.connector.taps)
    ours = np.asarray(jax.jit(module.apply)({"params": weights.unflatten(flat)["vision"]}, patches))[0]
    normalised = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
        hidden = model.vision_model(normalised, output_hidden_states=True).hidden_states
    wanted = np.concatenate([hidden[tap + 1].numpy() for tap in nano.connector.taps], -1)
    np.testing.assert_allclose(ours, wanted, atol=TOWER_TOLERANCE, rtol=0)


def test_a_tower_of_other_sizes_is_refused(tmp_path):
    folder = export(tmp_path / "a")
    shutil.copy(folder / shards.SINGLE, tmp_path / shards.SINGLE)
    with pytest.raises(ValueError, match="must hold the qwen3 tower.*missing model.embed_tokens.weight"):
        checkpoint.import_tower(tmp_path, "qwen3", CONFIG)
