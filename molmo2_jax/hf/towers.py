"""Checkpoints of single towers as the start of stage 1: a Qwen3 or OLMo 3 decoder, a SigLIP2 ViT.

Source: reference: scripts/prepare_pretrained_model.py.
"""

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
# Parts of a SigLIP2 checkpoint that no Molmo2 model reads.
_SIGLIP2_UNUSED = re.compile(r"text_model\.|vision_model\.(head|post_layernorm)\.|logit_(scale|bias)$")
_SIGLIP2_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")


def kind(folder: str | pathlib.Path) -> Tower:
    """Returns which tower a checkpoint folder holds, by the model_type of its config.json.

    Raises:
      ValueError: none that we know.
    """
    path = pathlib.Path(folder) / "config.json"
    found = processor.read_json(path).get("model_type")
    if found not in _TOWERS:
        raise ValueError(f"model_type of a tower must be one of {tuple(_TOWERS)}; {path} has {found!r}")
    return _TOWERS[found]


def import_tower(folder: str | pathlib.Path, tower: Tower, config: config_lib.Molmo2Config,
                 dtype: str = "float32", place: source_lib.Place | None = None) -> dict[str, Any]:
    """Returns {path: array} of the parameters that a tower's own checkpoint gives, to start training from.

    Args:
      tower: "qwen3" or "olmo3" (decoder, base table, head), or "siglip2" (ViT; the layers behind
        `config.vision.num_layers` and the text tower are left out).

    Raises:
      ValueError: the checkpoint is not the one `config` describes; all differences.
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
    """Returns what a tower's config.json says that tensors cannot and our model does otherwise, in words.

    Sizes follow from the tensors. OLMo 3's sliding window is dropped on purpose, as in the reference, and so
    are its rope scalings: which layers take one is the model's own choice.
    """
    problems: list[str] = []
    if tower == "siglip2":
        section = hf_config.Section("vision_config", values.get("vision_config", values), problems)
        section.expect(config.vision.num_heads, "num_attention_heads")
        section.expect(config.vision.norm_eps, "layer_norm_eps")
        section.expect("gelu_pytorch_tanh", "hidden_act")
        section.expect(config.vision.patch_size, "patch_size")
        return problems
    section, t = hf_config.Section("", values, problems), config.text
    section.expect(t.num_heads, "num_attention_heads")
    section.expect(t.num_kv_heads, "num_key_value_heads")
    section.expect(t.norm_eps, "rms_norm_eps")
    section.expect("silu", "hidden_act")
    section.expect(False, "attention_bias", "use_sliding_window")
    section.expect(t.tied_head, "tie_word_embeddings")
    for where, given in (("", values), *(("rope_parameters.", rope) for rope in _ropes(values))):
        hf_config.Section(where.rstrip("."), given, problems).expect(t.rope_theta, "rope_theta")
    return problems


def _ropes(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the rope_parameters, one for all layers or one per kind of layer."""
    given = values.get("rope_parameters") or {}
    nested = [one for one in given.values() if isinstance(one, Mapping)]
    return nested or [given]


def assemble(text: str | pathlib.Path, vision: str | pathlib.Path, config: config_lib.Molmo2Config, seed: int
             ) -> dict[str, Any]:
    """Returns the parameter tree that stage 1 starts from: two towers, the rest drawn as at initialisation.

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
    def rest(key):  # what is drawn for the towers is unused, so it is never computed
        drawn = weights.flatten(state.init_params(model, key))
        return {path: value for path, value in drawn.items() if path not in flat}

    return weights.unflatten(flat | rest(jax.random.key(seed)))
