"""Checkpoints of single towers, from which stage 1 starts: a Qwen3 or OLMo 3 decoder, a SigLIP2 ViT.

Source: reference: scripts/prepare_pretrained_model.py.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax

from molmo2_jax import config as config_lib
from molmo2_jax import state
from molmo2_jax.hf import config as hf_config
from molmo2_jax.hf import processor
from molmo2_jax.hf import shards
from molmo2_jax.hf import source as source_lib
from molmo2_jax.hf import weights
from molmo2_jax.model import molmo2

Tower = Literal["qwen3", "olmo3", "siglip2"]
_TOWERS: dict[str, Tower] = {"qwen3": "qwen3", "olmo3": "olmo3", "siglip": "siglip2",
                             "siglip_vision_model": "siglip2"}  # by model_type
# Parts of a SigLIP2 checkpoint that Molmo2 does not use.
_SIGLIP2_UNUSED = re.compile(r"text_model\.|vision_model\.(head|post_layernorm)\.|logit_(scale|bias)$")
# Fields implied by the shapes of tensors, which are compared.
_SIZES = frozenset("""
    hidden_size image_size intermediate_size num_hidden_layers vocab_size
    """.split())
# Fields without effect on a tower's activations, in addition to those of hf/config.py: those of a text tower,
# a pooling head or generation, and the maximum length, which by itself scales nothing.
_NO_EFFECT = frozenset("""
    decoder_start_token_id diversity_penalty do_sample early_stopping finetuning_task forced_bos_token_id
    forced_eos_token_id initializer_factor length_penalty max_length max_position_embeddings min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences pretraining_tp prefix
    projection_dim projection_size repetition_penalty sep_token_id suppress_tokens task_specific_params
    temperature tokenizer_class top_k top_p typical_p use_return_dict vision_use_head
    """.split())
_SIGLIP2_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")


def kind(folder: str | pathlib.Path) -> Tower:
    """Returns the kind of tower in a checkpoint folder, by the model_type of its config.json.

    Raises:
      ValueError: the model_type is not that of a supported tower.
    """
    path = pathlib.Path(folder) / "config.json"
    found = processor.read_json(path).get("model_type")
    if found not in _TOWERS:
        raise ValueError(f"model_type of a tower must be one of {tuple(_TOWERS)}; {path} has {found!r}")
    return _TOWERS[found]


def import_tower(folder: str | pathlib.Path, tower: Tower, config: config_lib.Molmo2Config,
                 dtype: str = "float32", place: source_lib.Place | None = None) -> dict[str, Any]:
    """Returns {path: array} of the parameters in a tower's own checkpoint, from which training starts.

    Args:
      tower: "qwen3" or "olmo3" (decoder, base table, head), or "siglip2" (ViT; layers after
        `config.vision.num_layers` and the text tower are left out).

    Raises:
      ValueError: the checkpoint is not the tower that `config` describes; the message lists all differences.
    """
    folder = pathlib.Path(folder)
    if tower not in _TOWERS.values():
        raise ValueError(f"a tower must be one of {tuple(dict.fromkeys(_TOWERS.values()))}; got {tower!r}")
    shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    source = source_lib.Source(weights.entries(config, tower), shapes, shards.open_folder(folder))

    def is_unused(name: str) -> bool:
        if tower != "siglip2":
            return config.text.tied_head and name == weights.HEAD.legacy[0]
        match = _SIGLIP2_LAYER.match(name)
        return bool(_SIGLIP2_UNUSED.match(name)) or (
            bool(match) and int(match[1]) >= config.vision.num_layers)

    problems = source.problems(is_unused) + differences(
        processor.read_json(folder / "config.json"), tower, config)
    if problems:
        raise ValueError(f"{folder} must hold the {tower} tower of the model: " + "; ".join(problems))
    return source_lib.load(source, source.places, dtype, place)


def differences(values: Mapping[str, Any], tower: Tower, config: config_lib.Molmo2Config) -> list[str]:
    """Returns the differences between a tower's config.json and our model, in words.

    Every field must be known: compared with the model, implied by the shapes of the tensors, or without
    effect on activations. Ignored on purpose, as in the reference: OLMo 3's sliding window, and which of its
    layers have rope scaling, which Molmo2 chooses itself.
    """
    problems: list[str] = []
    top = hf_config.Section("", values, problems)
    top.seen |= _NO_EFFECT
    if tower == "siglip2":
        _compare_vision(top, config.vision)
    else:
        _compare_text(top, tower, config.text)
    top.finish()
    return problems


def _compare_vision(top: hf_config.Section, config: config_lib.VisionConfig) -> None:
    section = top
    if "vision_config" in top.values:
        section = hf_config.Section("vision_config", top.values["vision_config"], top.problems)
        top.seen |= {"vision_config", "text_config"}
    section.seen |= _NO_EFFECT | _SIZES
    section.expect(config.num_heads, "num_attention_heads")
    section.expect(config.norm_eps, "layer_norm_eps")
    section.expect("gelu_pytorch_tanh", "hidden_act")
    section.expect(config.patch_size, "patch_size")
    section.expect(3, "num_channels")
    if section is not top:
        section.finish()


def _compare_text(top: hf_config.Section, tower: Tower, config: config_lib.TextConfig) -> None:
    top.seen |= _SIZES
    top.expect(config.num_heads, "num_attention_heads")
    top.expect(config.num_kv_heads, "num_key_value_heads")
    top.expect(config.head_dim, "head_dim")
    top.expect(config.norm_eps, "rms_norm_eps")
    top.expect("silu", "hidden_act")
    top.expect(False, "attention_bias", "mlp_bias", "qkv_bias", "use_sliding_window")
    top.expect(True, "use_qk_norm")
    top.expect(config.tied_head, "tie_word_embeddings")
    top.expect(config.rope_theta, "rope_theta")
    top.expect(1.0, "partial_rotary_factor")
    top.seen |= {"sliding_window", "max_window_layers"}  # without effect unless use_sliding_window
    if tower == "qwen3":
        top.expect(["full_attention"] * config.num_layers, "layer_types")
    top.seen |= {"layer_types", "rope_scaling", "rope_parameters"}
    for name, given in _ropes(top.values):
        _compare_rope(hf_config.Section(name, given, top.problems), tower, config)


def _ropes(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns (name, values) of each description of rope; rope_parameters may have one per type of layer."""
    given = values.get("rope_parameters")
    nested = {f"rope_parameters.{name}": one for name, one in given.items()
              if isinstance(one, Mapping)} if isinstance(given, Mapping) else {}
    found = nested or {"rope_parameters": given}
    return [(name, one) for name, one in ({"rope_scaling": values.get("rope_scaling")} | found).items()
            if one is not None]


def _compare_rope(rope: hf_config.Section, tower: Tower, config: config_lib.TextConfig) -> None:
    """Adds a problem for scaling that the model does not have, or for a Qwen3 decoder, not in all layers."""
    rope.expect(config.rope_theta, "rope_theta")
    every = tuple(range(config.num_layers))
    chosen = config.yarn.layers if config.yarn else every
    found = hf_config.read_yarn(rope, chosen if tower == "olmo3" else every)
    if found is not None and found != config.yarn:
        ours = "none" if config.yarn is None else dataclasses.asdict(config.yarn)
        rope.complain("rope_type", f"must scale as the model does ({ours})", dataclasses.asdict(found))
    rope.finish()


def assemble(text: str | pathlib.Path, vision: str | pathlib.Path, config: config_lib.Molmo2Config, seed: int
             ) -> dict[str, Any]:
    """Returns the parameter tree that stage 1 starts from: the two towers, and the rest initialised randomly.

    Raises:
      ValueError: a folder is not the tower that `config` describes.
    """
    kinds = kind(text), kind(vision)
    wanted = "olmo3" if config.text.qk_norm == "olmo" else "qwen3"
    if kinds != (wanted, "siglip2"):
        raise ValueError(f"the towers of this model must be {wanted!r} and 'siglip2'; got {kinds}")
    flat = import_tower(text, kinds[0], config) | import_tower(vision, kinds[1], config)
    model = molmo2.Molmo2(config)

    @jax.jit
    def rest(key):  # the compiler drops the unused draws for the towers
        drawn = weights.flatten(state.init_params(model, key))
        return {path: value for path, value in drawn.items() if path not in flat}

    return weights.unflatten(flat | rest(jax.random.key(seed)))
