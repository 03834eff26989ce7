"""Checkpoint folders: import undoes export, and a broken folder gives an error before weights are read."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from molmo2_jax import config as config_lib
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import shards
from molmo2_jax.hf import source
from molmo2_jax.hf import weights
from tests import packs

CONFIG = packs.random_config("qwen3", 0)
INPUTS = config_lib.InputConfig(max_crops=3, max_frames=16, max_fps=1.5, overlap_margins=(1, 0), max_images=2)


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


def test_parameters_are_placed_directly_on_their_shards(tmp_path):
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


def test_onto_puts_each_parameter_where_its_sharding_says(tmp_path):
    params = packs.random_params(CONFIG)
    folder = export(tmp_path / "a", params=params)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = {path: jax.sharding.PartitionSpec(*("fsdp" if size % 8 == 0 and size == max(leaf.shape) else None
                                               for size in leaf.shape))
            for path, leaf in weights.abstract_params(CONFIG).items()}
    spec = {path: one if list(one).count("fsdp") == 1 else jax.sharding.PartitionSpec()
            for path, one in spec.items()}
    shardings = {path: jax.sharding.NamedSharding(mesh, one) for path, one in spec.items()}
    placed, _, _ = checkpoint.import_checkpoint(folder, place=source.onto(shardings))
    same(placed, params)
    flat = weights.flatten(placed)
    assert {path: leaf.sharding for path, leaf in flat.items()} == shardings
    assert any(len(leaf.addressable_shards) == 8 and not leaf.is_fully_replicated for leaf in flat.values())


@pytest.mark.parametrize("style", packs.STYLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_in_small_pieces_changes_nothing(style, dtype, tmp_path, monkeypatch):
    folder = export(tmp_path / "a", packs.random_config(style, 1))
    whole, _, _ = checkpoint.import_checkpoint(folder, dtype=dtype)
    monkeypatch.setattr(source, "_CHUNK", 100)
    read, count = shards.Tensor.read, []
    monkeypatch.setattr(shards.Tensor, "read", lambda self, *at: count.append(at) or read(self, *at))
    same(checkpoint.import_checkpoint(folder, dtype=dtype)[0], whole)
    assert len(count) > 500


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writing_in_small_pieces_changes_no_byte(dtype, tmp_path, monkeypatch):
    config = packs.random_config("olmo", 1)
    whole = export(tmp_path / "a", config, dtype=dtype)
    monkeypatch.setattr(shards, "_CHUNK", 100)
    pieces = export(tmp_path / "b", config, dtype=dtype)
    assert (whole / shards.SINGLE).read_bytes() == (pieces / shards.SINGLE).read_bytes()


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


def test_layers_after_the_last_tap_are_not_written(tmp_path):
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


def break_append(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes() + b"more")


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


def rewrite_header(change):
    """Returns a damage that changes the header of the second shard but not its data."""
    def damage(folder):
        path = sorted(folder.glob("*.safetensors"))[1]
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + length])
        text = json.dumps(change(header)).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])
    return damage


def first_tensor(header):
    return next(entry for name, entry in header.items() if name != "__metadata__")


def share_bytes(header):
    """Gives the first two tensors of equal size the same place."""
    entries = {}
    for name, entry in header.items():
        if name != "__metadata__":
            other = entries.setdefault(tuple(entry["shape"]), entry)
            if other is not entry:
                entry["data_offsets"] = other["data_offsets"]
                return header
    raise AssertionError("no two tensors of one shape")


def without_offsets(header):
    del first_tensor(header)["data_offsets"]
    return header


def negative(header):
    first_tensor(header)["shape"] = [-1, -1]
    return header


@pytest.mark.parametrize(("damage", "message"), [
    (rewrite_header(lambda header: []), "a shard's header must be an object; .*00002.* has list"),
    (rewrite_header(without_offsets), "a header must give dtype, shape and data_offsets; .* in .*00002"),
    (rewrite_header(negative), "a header must give dtype, shape and data_offsets; .*-1"),
    (rewrite_header(share_bytes), r"tensors of a shard must be contiguous; .* instead of"),
    (lambda folder: (folder / shards.INDEX).write_text('{"weight_map": [1]}'), "JSON with a weight_map"),
    (lambda folder: (folder / shards.INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'),
     r"must name files of its folder; .*\.\./x"),
    (break_truncate, r"a shard must be complete; .*model-00002.* bytes, its header describes"),
    (break_append, r"a shard must end with its last tensor; .*00002.* bytes instead of"),
    (break_cut_to_nothing, r"a shard must be a complete safetensors file; .*model-00001.* has 0 bytes"),
    (break_remove, r"every shard of the index must exist; .* lacks model-00003"),
    (break_shape, r"model\.transformer\.ln_f\.weight is \[\d+\] instead of \[\d+\]"),
    (break_dtype, r"tensors must be one of .*ln_f\.weight in .* is I32"),
    (break_sizes, r"blocks\.0\.mlp\.ff_proj\.weight is .* instead of .*blocks\.1\.mlp\.ff_out\.weight is"),
    (break_index, r"shards must contain the tensors of the index; .* lacks model\.transformer\.ghost"),
    (lambda folder: (folder / shards.INDEX).unlink(), "must hold model.safetensors or"),
    (lambda folder: (folder / "config.json").write_text("{"), "must hold a readable config.json"),
    (lambda folder: (folder / "processor_config.json").write_text('{"use_single_crop_col_tokens": true}'),
     "use_single_crop_col_tokens must be False, got True"),
    (lambda folder: (folder / "preprocessor_config.json").write_text('{"patch_size": 99}'),
     "preprocessor_config.json.patch_size must be")])
def test_a_broken_folder_is_refused_before_weights_are_read(damage, message, tmp_path, monkeypatch):
    folder = export(tmp_path / "a", max_shard_bytes=3e4)
    checkpoint.import_checkpoint(folder)
    damage(folder)
    monkeypatch.setattr(shards.Tensor, "read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        checkpoint.import_checkpoint(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4900000000\n"


@pytest.mark.parametrize(("content", "words"), [
    (POINTER, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<!doctype html><title>404</title>", "is a page of HTML"),
    (b"\xef\xbb\xbf\n <HTML><body>Sign in</body>", "is a page of HTML"),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a page of HTML or XML"),
    (b"Entry not found", "is a text that begins 'Entry not found'"),
    (b"", "has 0 bytes and is empty: download the file again"),
    (b"PK\x03\x04" + bytes(200), "is a zip archive, as torch.save writes"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is a pickle, as older versions of torch.save write"),
    (b"GGUF\x03" + bytes(90), "is a GGUF file"),
    ((1000).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "sh', "is truncated or no safetensors file"),
])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_file_of_another_format_is_named(content, words, is_sharded, tmp_path):
    folder = export(tmp_path / "a", max_shard_bytes=3e4 if is_sharded else 1e9)
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        checkpoint.import_checkpoint(folder)
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", shards.INDEX, "preprocessor_config.json"])
@pytest.mark.parametrize(("content", "words"), [
    (POINTER, "is a Git LFS pointer"), (b"<html></html>", "is a page of HTML"), (b"", "is empty"),
    (b"PK\x03\x04\x00\x00", "is a zip archive")])
def test_a_json_file_of_another_format_is_named(name, content, words, tmp_path):
    folder = export(tmp_path / "a", max_shard_bytes=3e4)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {words}"):
        checkpoint.import_checkpoint(folder)


def test_adapters_are_refused_with_and_without_a_model_in_the_folder(tmp_path):
    folder = export(tmp_path / "a")
    (folder / shards.ADAPTER).write_text('{"peft_type": "LORA"}')
    for weights_name in ("adapter_model.safetensors", "adapter_model.bin"):
        with pytest.raises(ValueError, match=r"a PEFT adapter \(adapter_config.json\): import it with"):
            checkpoint.import_checkpoint(folder)
        next(folder.glob("*.safetensors")).rename(folder / weights_name)


def test_weights_of_other_formats_are_named(tmp_path):
    folder = export(tmp_path / "a")
    (folder / shards.SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"got .* with pytorch_model.bin: save the model again as"):
        checkpoint.import_checkpoint(folder)


def test_byte_order_marks_in_json_files_change_nothing_and_other_encodings_are_refused(tmp_path):
    folder = export(tmp_path / "a", max_shard_bytes=3e4)
    params, *configs = checkpoint.import_checkpoint(folder)
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    again, *configs_again = checkpoint.import_checkpoint(folder)
    assert configs_again == configs and len(list(folder.glob("*.json"))) > 3
    jax.tree.map(np.testing.assert_array_equal, again, params)
    for name in ("config.json", shards.INDEX, "preprocessor_config.json"):
        path = folder / name
        kept = path.read_bytes()
        path.write_bytes(kept.decode("utf-8-sig").encode("utf-16"))
        with pytest.raises(ValueError, match=rf"{name}: text must be UTF-8; got .*probably UTF-16"):
            checkpoint.import_checkpoint(folder)
        path.write_bytes(kept)


def test_parameters_that_do_not_fit_the_config_are_all_named(tmp_path):
    params = packs.random_params(CONFIG)
    del params["connector"]["pool"]["k"]["bias"]
    params["vision"]["position"] = params["vision"]["position"][:-1]
    params["ghost"] = np.zeros(3)
    wanted = r"connector/pool/k/bias is missing.*ghost is \(3,\).*vision/position"
    with pytest.raises(ValueError, match=wanted):
        export(tmp_path / "a", params=params)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_without_overwrite(tmp_path):
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


@pytest.mark.slow(7)
def test_a_killed_export_leaves_no_folder_of_that_name(tmp_path):
    script = ("import os, signal, sys\n"
              "from molmo2_jax.hf import shards\n"
              "from tests.hf import test_checkpoint as t\n"
              "write = shards.write_file\n"
              "def once(path, *rest):\n"
              "    write(path, *rest)\n"
              "    if '00002' in path.name: os.kill(os.getpid(), signal.SIGKILL)\n"
              "shards.write_file = once\n"
              "t.export(t.pathlib.Path(sys.argv[1]), max_shard_bytes=2e4)\n")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False,
                          cwd=pathlib.Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == -9
    assert not (tmp_path / "a").exists()
    left = list(tmp_path.rglob("*.safetensors"))
    assert len(left) == 2 and all(path.relative_to(tmp_path).parts[0].startswith(".a.") for path in left)


def test_processor_files_nested_as_transformers_saves_them_are_read(tmp_path):
    folder = export(tmp_path / "a")
    read = lambda name: json.loads((folder / name).read_text())
    nested = read("processor_config.json") | {"image_processor": read("preprocessor_config.json"),
                                              "video_processor": read("video_preprocessor_config.json")}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).unlink()
    assert checkpoint.read_config(folder)[1] == INPUTS
