"""Which Hugging Face tensor holds which of our parameters: one table for import and export.

A rule says that some of our parameters, in torch's layout and concatenated along axis 0, equal some tensors
concatenated along axis 0. So one form covers `[q, k, v]` against one fused tensor, one against one, and two
embedding tables against one joint table. Names have several spellings:

    legacy   the released checkpoints, the remote code and vLLM; the one we write
    native   transformers' own `molmo2` model, `save_pretrained(save_original_format=False)`

and "qwen3", "olmo3" and "siglip2" for single towers from which training starts. Released models with a
pointer (MolmoPoint) have some other names than those without, and more tensors; no native spelling exists.

Source: reference: olmo/hf_model/convert_molmo2_to_hf.py, convert_molmo_point_to_hf.py,
scripts/prepare_pretrained_model.py; transformers: conversion_mapping.py.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import numpy as np
from flax import traverse_util

from molmo2_jax import config as config_lib
from molmo2_jax import state
from molmo2_jax.model import molmo2

# linear: [in, *out] against [out, in]. merge: [heads, head_dim, out] against [out, in]. vector: flattened.
# table: unchanged. convolution: [rows x columns x colours, out] against [out, colours, rows, columns].
Layout = Literal["linear", "merge", "vector", "table", "convolution"]
Spelling = Literal["legacy", "native", "qwen3", "olmo3", "siglip2"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Parameters (paths from the root of the tree) and the tensors with the same rows.

    `tower` names the stack whose layer number replaces "{}" in the names; our parameters of a stack hold all
    its layers along axis 0.
    """
    ours: tuple[str, ...]
    legacy: tuple[str, ...]
    native: tuple[str, ...]
    layout: Layout
    tower: Literal["text", "vision"] | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rule for one layer: `paths`, at index `layer` of their stack, hold the rows of `tensors`."""
    paths: tuple[str, ...]
    tensors: tuple[str, ...]
    layout: Layout
    layer: int | None


def _text(ours: str, legacy: str, native: str, layout: Layout) -> Rule:
    """Returns a rule of a decoder layer; several names are separated by spaces."""
    return Rule(tuple(f"text/layers/{x}" for x in ours.split()),
                tuple(f"model.transformer.blocks.{{}}.{x}.weight" for x in legacy.split()),
                tuple(f"model.language_model.layers.{{}}.{x}.weight" for x in native.split()), layout, "text")


def _vision(ours: str, legacy: str, native: str, layout: Layout) -> list[Rule]:
    """Returns the rules for the weight and the bias of a ViT layer's linear or norm."""
    weight = "scale" if layout == "vector" else "kernel"
    return [Rule((f"vision/layers/{ours}/{mine}",),
                 (f"model.vision_backbone.image_vit.transformer.resblocks.{{}}.{legacy}.{theirs}",),
                 (f"model.vision_tower.layers.{{}}.{native}.{theirs}",), shape, "vision")
            for mine, theirs, shape in ((weight, "weight", layout), ("bias", "bias", "vector"))]


def _pooling(letter: str, layout: Layout) -> list[Rule]:
    return [Rule((f"connector/pool/{letter}/{mine}",),
                 (f"model.vision_backbone.image_pooling_2d.w{letter}.{theirs}",),
                 (f"model.multi_modal_projector.image_pooling_2d.{letter}_proj.{theirs}",), shape)
            for mine, theirs, shape in (("kernel", "weight", layout), ("bias", "bias", "vector"))]


def _project(ours: str, legacy: str) -> Rule:
    return Rule((f"connector/project/{ours}/kernel",),
                (f"model.vision_backbone.image_projector.{legacy}.weight",),
                (f"model.multi_modal_projector.image_projector.{ours}_proj.weight",), "linear")


EMBEDDING = Rule(("base_embedding", "new_embedding"),
                 ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding"),
                 ("model.language_model.embed_tokens.weight",), "table")
HEAD = Rule(("head",), ("lm_head.weight",), ("lm_head.weight",), "linear")
FINAL_NORM = Rule(("text/final_norm/scale",), ("model.transformer.ln_f.weight",),
                  ("model.language_model.norm.weight",), "vector")
TEXT_LAYER = (
    _text("attn_norm/scale", "attn_norm", "input_layernorm", "vector"),
    _text("attn/q/kernel attn/k/kernel attn/v/kernel", "self_attn.att_proj",
          "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "linear"),
    _text("attn/q_norm/scale", "self_attn.q_norm", "self_attn.q_norm", "vector"),
    _text("attn/k_norm/scale", "self_attn.k_norm", "self_attn.k_norm", "vector"),
    _text("attn/o/kernel", "self_attn.attn_out", "self_attn.o_proj", "merge"),
    _text("mlp_norm/scale", "ff_norm", "post_attention_layernorm", "vector"),
    # Up before gate, the reverse of the usual order; swapped, the model still runs.
    _text("mlp/up/kernel mlp/gate/kernel", "mlp.ff_proj", "mlp.up_proj mlp.gate_proj", "linear"),
    _text("mlp/down/kernel", "mlp.ff_out", "mlp.down_proj", "linear"),
)
PATCH = (
    Rule(("vision/patch/kernel",), ("model.vision_backbone.image_vit.patch_embedding.weight",),
         ("model.vision_tower.patch_embedding.weight",), "linear"),
    Rule(("vision/patch/bias",), ("model.vision_backbone.image_vit.patch_embedding.bias",),
         ("model.vision_tower.patch_embedding.bias",), "vector"),
    Rule(("vision/position",), ("model.vision_backbone.image_vit.positional_embedding",),
         ("model.vision_tower.positional_embedding",), "table"),
)
VISION_LAYER = (
    *_vision("norm1", "attention_norm", "layer_norm1", "vector"),
    *_vision("q", "attention.wq", "self_attn.q_proj", "linear"),
    *_vision("k", "attention.wk", "self_attn.k_proj", "linear"),
    *_vision("v", "attention.wv", "self_attn.v_proj", "linear"),
    *_vision("o", "attention.wo", "self_attn.o_proj", "merge"),
    *_vision("norm2", "ffn_norm", "layer_norm2", "vector"),
    *_vision("fc1", "feed_forward.w1", "mlp.fc1", "linear"),
    *_vision("fc2", "feed_forward.w2", "mlp.fc2", "linear"),
)
CONNECTOR = (*_pooling("q", "linear"), *_pooling("k", "linear"), *_pooling("v", "linear"),
             *_pooling("o", "merge"), _project("gate", "w1"), _project("up", "w3"), _project("down", "w2"))


def _linear(ours: str, legacy: str) -> list[Rule]:
    return [Rule((f"pointer/{ours}/{mine}",), (f"model.{legacy}.{theirs}",), (), layout)
            for mine, theirs, layout in (("kernel", "weight", "linear"), ("bias", "bias", "vector"))]


NEW_HEAD = Rule(("new_head",), ("lm_head.new_output_embeddings",), (), "linear")
POINTER = (Rule(("pointer/norm/scale",), ("model.point_predictor.x_norm.weight",), (), "vector"),
           *_linear("patch_q", "point_predictor.patch_q"), *_linear("patch_k", "point_predictor.patch_k"),
           *_linear("sub_q", "point_predictor.subpatch_q"), *_linear("sub_k", "point_predictor.subpatch_k"),
           *_linear("location", "point_predictor.subpatch_loc_k"),
           Rule(("pointer/no_more",), ("model.point_predictor.add_no_point_class_embed.vector",), (),
                "vector"),
           *_linear("embed_sub", "build_vit_embedding"))
# How names of released models without a pointer begin, and those with one.
_POINTER_NAMES = (("model.vision_backbone.image_vit.", "model.vit."),
                  ("model.vision_backbone.", "model.connector."),
                  ("lm_head.weight", "lm_head.output_embeddings"))

# OLMo 3 names its norms by their position; the native model's names, and ours, are the same for both orders.
_OLMO3_NORMS = {"input_layernorm": "post_attention_layernorm",
                "post_attention_layernorm": "post_feedforward_layernorm"}
_SIGLIP2_NAMES = (("model.vision_tower.layers", "vision_model.encoder.layers"),
                  ("model.vision_tower.patch_embedding", "vision_model.embeddings.patch_embedding"),
                  ("model.vision_tower.positional_embedding",
                   "vision_model.embeddings.position_embedding.weight"),
                  ("self_attn.o_proj", "self_attn.out_proj"))


def _respell(rule: Rule, spelling: Spelling) -> Rule | None:
    """Returns the rule with a tower's own names as `native`; None if it is not part of that tower."""
    if spelling in ("legacy", "native"):
        return rule
    is_vision = rule in PATCH or rule in VISION_LAYER
    if is_vision != (spelling == "siglip2") or rule in (*CONNECTOR, NEW_HEAD, *POINTER):
        return None
    if rule is EMBEDDING:
        return dataclasses.replace(rule, ours=rule.ours[:1], native=("model.embed_tokens.weight",))

    def name_of(native: str) -> str:
        if spelling == "siglip2":
            for old, new in _SIGLIP2_NAMES:
                native = native.replace(old, new)
            return native
        if spelling == "olmo3":
            parts = native.split(".")
            native = ".".join(_OLMO3_NORMS.get(part, part) for part in parts)
        return native.replace("model.language_model.", "model.")

    patch = spelling == "siglip2" and rule.ours == ("vision/patch/kernel",)
    return dataclasses.replace(rule, native=tuple(map(name_of, rule.native)),
                               layout="convolution" if patch else rule.layout)


def head_names(config: config_lib.Molmo2Config) -> tuple[str, ...]:
    """Returns the tensors of the head in the legacy spelling; with a pointer, of both heads."""
    return HEAD.legacy if config.pointer is None else (*map(_with_pointer, HEAD.legacy), *NEW_HEAD.legacy)


def _with_pointer(name: str) -> str:
    """Returns the legacy name of a tensor in a model with a pointer, from that in one without."""
    old, new = next((pair for pair in _POINTER_NAMES if name.startswith(pair[0])), ("", ""))
    return new + name.removeprefix(old)


def entries(config: config_lib.Molmo2Config, spelling: Spelling) -> Iterator[Entry]:
    """Yields the table for a model, layer by layer, each parameter and each tensor once.

    A tied head is a separate entry that names the table again. ViT layers after the last tap have
    parameters but no entry in the legacy spelling, whose readers do not create them.

    Raises:
      ValueError: a model with a pointer has no native spelling.
    """
    has_pointer = config.pointer is not None
    if has_pointer and spelling == "native":
        raise ValueError("transformers has no model that points by choosing visual tokens; "
                         f"got {config.pointer}")
    depth = {"text": config.text.num_layers, "vision": config.vision.num_layers}
    if spelling == "legacy":
        depth["vision"] = max(config.connector.taps) + 1
    heads = (HEAD, NEW_HEAD) if has_pointer else (HEAD,)
    connector = [rule for rule in CONNECTOR
                 if config.connector.has_output or not rule.ours[0].startswith("connector/pool/o/")]
    for group in ((EMBEDDING,), TEXT_LAYER, (FINAL_NORM, *heads, *PATCH), VISION_LAYER, connector,
                  POINTER if has_pointer else ()):
        rules = [respelt for rule in group if (respelt := _respell(rule, spelling))]
        for layer in range(depth[group[0].tower]) if group and group[0].tower else (None,):
            for rule in rules:
                paths, layout = rule.ours, rule.layout
                if rule.ours in (HEAD.ours, NEW_HEAD.ours) and config.text.tied_head:
                    if spelling in ("qwen3", "olmo3"):
                        continue  # a tied checkpoint of a decoder has no head
                    table = "base_embedding" if rule.ours == HEAD.ours else "new_embedding"
                    paths, layout = (table,), "table"
                names = rule.legacy if spelling == "legacy" else rule.native
                if has_pointer and spelling == "legacy":
                    names = tuple(map(_with_pointer, names))
                yield Entry(paths, tuple(name.format(layer) for name in names), layout, layer)


@functools.lru_cache(maxsize=16)
def _boxed_params(config: config_lib.Molmo2Config) -> dict[str, Any]:
    return state.boxed_params(molmo2.Molmo2(config, attention="dense"))


def abstract_params(config: config_lib.Molmo2Config, boxed: bool = False) -> dict[str, Any]:
    """Returns {path: jax.ShapeDtypeStruct} of the model's parameters; nothing is computed.

    With `boxed`, each is in a flax box, whose `names` are the logical axes.
    """
    tree = _boxed_params(config)
    return traverse_util.flatten_dict(tree, sep="/") if boxed else flatten(tree)


def rows(shape: tuple[int, ...], layout: Layout) -> int:
    """Returns the number of rows of a parameter of `shape` (one layer) in torch's layout."""
    if layout in ("linear", "convolution"):
        return math.prod(shape[1:])
    return {"merge": shape[-1], "vector": math.prod(shape), "table": shape[0]}[layout]


def torch_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Returns the shape of one layer's parameter in torch's layout."""
    count = rows(shape, layout)
    if layout == "convolution":
        side = math.isqrt(shape[0] // 3)
        return (count, 3, side, side)
    return (count,) if layout == "vector" else (count, math.prod(shape) // count)


def to_torch(x, layout: Layout) -> np.ndarray:
    """Returns one layer's parameter in torch's layout."""
    x = np.asarray(x)
    shape = torch_shape(x.shape, layout)
    if layout == "convolution":
        return x.reshape(*shape[2:], 3, shape[0]).transpose(3, 2, 0, 1)
    if layout in ("linear", "merge"):
        return x.reshape(shape[1], shape[0]).T
    return x.reshape(shape)


def from_torch(x: np.ndarray, shape: tuple[int, ...], layout: Layout) -> np.ndarray:
    """Returns torch's rows as a parameter of `shape` (one layer); the inverse of `to_torch`."""
    if layout == "convolution":
        x = x.transpose(2, 3, 1, 0)
    elif layout in ("linear", "merge"):
        x = x.T
    return x.reshape(shape)


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested parameter tree of {path: array}."""
    return traverse_util.unflatten_dict(flat, sep="/")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {path: array} of a nested parameter tree; flax boxes are opened."""
    return traverse_util.flatten_dict(nn.meta.unbox(tree), sep="/")
