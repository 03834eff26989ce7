"""Checks that a folder is a Molmo2 checkpoint that other programs can read.

From the files alone: names, shapes and dtypes of tensors, fields of every JSON file, token ids. If
transformers is installed, compare.py also compares how it reads the folder with how we do.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import compare
from molmo2_jax.hf import compare_pointer
from molmo2_jax.hf import config as hf_config
from molmo2_jax.hf import processor
from molmo2_jax.hf import remote_code
from molmo2_jax.hf import shards
from molmo2_jax.hf import source as source_lib
from molmo2_jax.hf import weights
from molmo2_jax.inputs import tokenizer as tokenizers

FILES = ("config.json", "generation_config.json", processor.IMAGE_FILE, processor.VIDEO_FILE,
         processor.PROCESSOR_FILE, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Fields that the released remote code and vLLM read. Their defaults are those of other models, so each field
# must be present, if only as null.
FIELDS = {
    "config.json": {
        "": "model_type architectures use_frame_special_tokens use_cache tie_word_embeddings "
            + " ".join(hf_config.TOKEN_FIELDS),
        "vit_config": "hidden_size intermediate_size num_hidden_layers num_attention_heads "
                      "num_key_value_heads head_dim hidden_act layer_norm_eps image_default_input_size "
                      "image_patch_size image_num_pos",
        "adapter_config": "vit_layers pooling_attention_mask hidden_size num_attention_heads "
                          "num_key_value_heads head_dim hidden_act intermediate_size text_hidden_size",
        "text_config": "hidden_size num_attention_heads num_key_value_heads head_dim vocab_size "
                       "additional_vocab_size qkv_bias num_hidden_layers intermediate_size hidden_act "
                       "max_position_embeddings rope_theta rope_scaling rope_scaling_layers use_qk_norm "
                       "qk_norm_type layer_norm_eps norm_after"},
    processor.IMAGE_FILE: {"": "image_processor_type size resample image_mean image_std max_crops "
                               "overlap_margins patch_size pooling_size"},
    processor.VIDEO_FILE: {"": "video_processor_type size resample image_mean image_std patch_size "
                               "pooling_size frame_sample_mode num_frames max_fps sampling_fps"},
    processor.PROCESSOR_FILE: {"": "processor_class image_use_col_tokens use_single_crop_col_tokens "
                                   "use_single_crop_start_token video_use_col_tokens "
                                   "use_frame_special_tokens"},
}
_OF_POINTER = set(hf_config.POINTER_TOKEN_FIELDS) | set(hf_config.POINTER_FIELDS) | {
    "low_res_image_start_token_id", "patch_embed_dim", "token_prediction_rotary_theta"}


def _fields_of(file: str, section: str, has_pointer: bool) -> list[str]:
    """Returns the fields that readers need, which are others for a model with a pointer."""
    fields = FIELDS[file][section].split()
    if not has_pointer:
        return fields
    if (file, section) == ("config.json", ""):
        return [field for field in fields if field not in hf_config.TOKEN_FIELDS] + sorted(_OF_POINTER)
    more = {("config.json", "adapter_config"): ["positional_embeddings", "attention_pooling_out_layer"],
            (processor.PROCESSOR_FILE, ""): ["use_low_res_token_for_global_crops"]}
    return fields + more.get((file, section), [])


class Original(NamedTuple):
    """The model that a folder was exported from."""
    params: Mapping[str, Any]
    config: config_lib.Molmo2Config
    inputs: config_lib.InputConfig
    tokenizer: tokenizers.Tokenizer


def verify(folder: str | pathlib.Path, original: Original | None = None, with_logits: bool = True,
           is_vllm: bool = False, logits_to: pathlib.Path | None = None) -> list[compare.Check]:
    """Returns all checks of a folder; it passes if none has the status FAIL.

    Args:
      original: configs and tokenizer must equal these, and parameters, after rounding to the folder's dtype,
        bit for bit.
      with_logits: compare with transformers, which needs memory for the model in float32.
      is_vllm, logits_to: see compare.with_transformers.
    """
    folder, report = pathlib.Path(folder), compare.Report()
    report.run("files", _check_files, folder)
    config = report.run("config.json", _read_configs, folder)
    report.run("fields for the remote code and vLLM", _check_fields, folder)
    opened = report.run("names and shapes of tensors", _open, folder, config)
    dtype = report.run("dtypes", _check_dtypes, folder, opened)
    tokenizer = report.run("token ids", _check_token_ids, folder, config)
    report.run("remote code", _check_remote_code, folder)
    if original is not None:
        report.run("same as the original", _compare, folder, original, dtype, tokenizer)
    if not with_logits:
        report.skip("transformers", "not requested")
    elif not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        report.skip("transformers", "torch and transformers are not installed")
    elif opened and opened.config.pointer is not None:
        compare_pointer.with_transformers(report, folder, opened, tokenizer)
    else:
        compare.with_transformers(report, folder, opened, tokenizer, is_vllm, logits_to)
    return report.checks


def table(checks: list[compare.Check]) -> str:
    """Returns one line per check, and the count of each status."""
    width = max(len(check.name) for check in checks)
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "FAIL", "skipped")}
    lines = [f"{check.status:8}{check.name:{width}}  {check.detail}" for check in checks]
    return "\n".join([*lines, ", ".join(f"{count} {status}" for status, count in counts.items())])


def _check_files(folder: pathlib.Path) -> str:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    return f"{len(FILES)} files besides the weights"


def _read_configs(folder: pathlib.Path) -> tuple[config_lib.Molmo2Config, str]:
    config, _ = checkpoint.read_config(folder)
    t, v = config.text, config.vision
    return config, (f"{t.qk_norm} style, {t.num_layers} layers of {t.width}, ViT {v.num_layers} of "
                    f"{v.width}, vocabulary {t.vocab_size} + {t.additional_vocab_size}")


def _check_fields(folder: pathlib.Path) -> str:
    problems, count = [], 0
    has_pointer = (folder / "config.json").is_file() and processor.read_json(
        folder / "config.json").get("model_type") == "molmo_point"
    for file, sections in FIELDS.items():
        if not (folder / file).is_file():
            problems.append(f"{file} is missing")
            continue
        values = processor.read_json(folder / file)
        for section in sections:
            part, fields = values.get(section) if section else values, _fields_of(file, section, has_pointer)
            absent = [field for field in fields if field not in (part or {})]
            count += len(fields)
            if absent:
                problems.append(f"{' '.join(filter(None, (file, section)))} lacks {', '.join(absent)}")
    values = processor.read_json(folder / "config.json")
    wanted = processor.uses_frame_tokens(folder)
    if values.get("use_frame_special_tokens") is not wanted:
        problems.append(f"use_frame_special_tokens must be {str(wanted).lower()} as in "
                        f"{processor.PROCESSOR_FILE}, or the remote code finds no videos")
    if values.get("tie_word_embeddings"):
        problems.append("tie_word_embeddings must be false: the head has only the rows of the base table")
    for name in ("vit_config", "adapter_config", "text_config"):
        part = values.get(name) or {}
        width, heads = part.get("hidden_size", 0), part.get("num_attention_heads", 1)
        if width % heads:
            problems.append(f"hidden_size of {name} must be a multiple of its {heads} heads for vLLM, "
                            f"got {width}")
    if problems:
        raise ValueError("; ".join(problems))
    return f"{count} fields"


def _open(folder: pathlib.Path, config: config_lib.Molmo2Config) -> tuple[checkpoint.Opened, str]:
    opened = checkpoint.open_checkpoint(folder)
    tensors = opened.source.tensors
    if opened.spelling != "legacy":
        raise ValueError("tensors must have the released names, since only transformers reads others; got "
                         f"{min(tensors)}, ...")
    table = tensors[weights.EMBEDDING.legacy[0]].shape
    if table[0] != config.text.vocab_size:  # as transformers' save_pretrained writes it
        raise ValueError(f"{weights.EMBEDDING.legacy[0]} must have the {config.text.vocab_size} rows of the "
                         f"base vocabulary; got {table[0]}")
    if config.pointer is None and weights.HEAD.legacy[0] not in tensors:
        raise ValueError(f"missing {weights.HEAD.legacy[0]}: a tied head is stored too")
    files = {tensor.path for tensor in tensors.values()}
    size = sum(int(np.prod(tensor.shape)) * tensor.dtype.itemsize for tensor in tensors.values())
    return opened, f"{len(tensors)} tensors, {size / 1e9:.3g} GB in {len(files)} files"


def _check_dtypes(folder: pathlib.Path, opened: checkpoint.Opened) -> tuple[str, str]:
    tensors = opened.source.tensors
    first = next(iter(tensors.values())).dtype
    others = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype != first]
    if others:
        raise ValueError(f"all tensors must be {first} like the first; {', '.join(others)}")
    values = processor.read_json(folder / "config.json")
    for field in ("dtype", "torch_dtype"):
        if values.get(field) not in (None, str(first)):
            raise ValueError(f"{field} of config.json must be {str(first)!r} like the tensors; "
                             f"got {values[field]!r}")
    if (folder / shards.INDEX).is_file():
        size = sum(int(np.prod(tensor.shape)) * first.itemsize for tensor in tensors.values())
        total = processor.read_json(folder / shards.INDEX).get("metadata", {}).get("total_size")
        if total != size:
            raise ValueError(f"total_size of {shards.INDEX} must be {size}; got {total}")
    return str(first), str(first)


def _check_token_ids(folder: pathlib.Path, config: config_lib.Molmo2Config
                     ) -> tuple[tokenizers.Tokenizer, str]:
    tokenizer = tokenizers.Tokenizer.from_file(folder, config.text.vocab_size)
    stored = {token["content"]: token["id"]
              for token in processor.read_json(folder / "tokenizer.json").get("added_tokens", [])}
    settings = processor.read_json(folder / "tokenizer_config.json")
    generation = processor.read_json(folder / "generation_config.json")
    wanted_ids = {text: config.special_id(text) for text in config_lib.SPECIAL_TOKENS}
    if config.pointer is not None:
        wanted_ids |= processor.choice_ids(config)
    problems = [f"{text} must have id {number}, tokenizer.json has {stored.get(text)}"
                for text, number in wanted_ids.items() if stored.get(text) != number][:5]
    if settings.get("padding_side") != "left":
        problems.append(f"padding_side must be 'left', got {settings.get('padding_side')!r}")
    for name, wanted in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        given = generation.get(f"{name}_token_id")
        if wanted != given and wanted not in (given if isinstance(given, list) else []):
            problems.append(f"{name}_token_id of generation_config.json must be {wanted}, got {given}")
    pad = settings.get("pad_token")
    pad_ids = tokenizer.encode(pad["content"] if isinstance(pad, dict) else pad or "")
    if pad_ids != [generation.get("pad_token_id")]:
        problems.append(f"pad_token {pad!r} must be the pad_token_id {generation.get('pad_token_id')}")
    if problems:
        raise ValueError("; ".join(problems))
    first = config.special_id(config_lib.SPECIAL_TOKENS[0])
    return tokenizer, f"{len(config_lib.SPECIAL_TOKENS)} from {first} on, EOS {tokenizer.eos_id}"


def _check_remote_code(folder: pathlib.Path) -> str:
    code = remote_code.read(folder)
    return f"{len(code.files)} files" if code.auto_maps else "none"


def _compare(folder: pathlib.Path, original: Original, dtype: str, tokenizer: tokenizers.Tokenizer) -> str:
    """Returns how much is the same. Parameters are read one at a time."""
    given, problems = weights.flatten(original.params), []

    def place(path: str, shape: tuple[int, ...], kind: np.dtype, read: source_lib.Read) -> None:
        whole = (slice(None),) * len(shape)
        if path not in given or tuple(given[path].shape) != shape:
            problems.append(f"{path} is {list(shape)} instead of "
                            f"{list(given[path].shape) if path in given else 'absent'}")
            return
        wanted = np.asarray(given[path])
        if wanted.dtype != kind:
            wanted = wanted.astype(kind)
        if read(whole).tobytes() != wanted.tobytes():
            problems.append(f"{path} differs")

    found, config, inputs = checkpoint.import_checkpoint(folder, dtype=dtype, place=place)
    problems += [f"{path} is missing" for path in sorted(set(given) - set(weights.flatten(found)))]
    for name, ours, theirs in (("model", config, original.config), ("inputs", inputs, original.inputs)):
        problems += compare.differences(name, dataclasses.asdict(ours), dataclasses.asdict(theirs))
    ids = [(one.encode(compare.QUESTION), one.special, one.bos_id, one.eos_id)
           for one in (tokenizer, original.tokenizer)]
    if ids[0] != ids[1]:
        problems.append("the tokenizer writes other ids")
    if problems:
        raise ValueError("; ".join(problems))
    return f"{len(given)} parameters, bit for bit in {dtype}"
