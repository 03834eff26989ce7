"""config.json of a checkpoint folder <-> Molmo2Config.

We write the released ("legacy") form, which the remote code, transformers' native `molmo2` and vLLM all
read. We read that form and the one that native transformers writes. Every field must be known, and must agree
with our model and with the other fields. One error lists all problems.

A model with a pointer is `molmo_point`, which only its own remote code reads. The fields of OWN_FIELDS, which
nobody else reads, are written only where they differ from the default.

What we write for the 4B equals the released config.json field by field, with three exceptions:
`transformers_version` is left out, `auto_map` is written only with the files it names (hf/remote_code.py),
and `use_frame_special_tokens` equals that of the processor file. The reference's converter reads that field
from the wrong object and writes false; but the remote code counts videos by the end token that the field
selects, so it must be the one that the processor writes.

Source: reference: olmo/hf_model/configuration_molmo2.py, configuration_molmo_point.py; transformers:
models/molmo2/configuration_molmo2.py.
"""

import math
from collections.abc import Mapping
from typing import Any

from molmo2_jax import config as config_lib

_REQUIRED = object()
_SIGLIP2_LAYERS = 27  # of SigLIP2; the released config.json says 27 although 25 are stored

# Hub field -> the token whose id it holds.
TOKEN_FIELDS = {
    "image_start_token_id": "<im_start>", "low_res_image_start_token_id": "<low_res_im_start>",
    "image_end_token_id": "<im_end>", "image_low_res_id": "<im_low>", "image_patch_id": "<im_patch>",
    "image_col_id": "<im_col>", "frame_start_token_id": "<frame_start>", "frame_end_token_id": "<frame_end>",
}
_OTHER_TOKEN_FIELDS = {"image_high_res_id": "<im_patch>", "image_token_id": "<im_patch>",
                       "video_token_id": "<im_patch>"}
# Of a model with a pointer; low_res_image_start_token_id is null in its released files.
POINTER_TOKEN_FIELDS = {
    **{field: token for field, token in TOKEN_FIELDS.items()
       if field not in ("image_low_res_id", "low_res_image_start_token_id")},
    "image_high_res_id": "<im_patch>", "image_non_indexable_patch_id": "<im_low>",
    "patch_token_id": "<|token_index|>", "subpatch_token_id": "<|vit_index|>",
    "location_token_id": "<|vit_loc|>",
}
# How points are chosen: field -> (the class's default, the values that we implement; the first is written).
POINTER_FIELDS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "patch_location": ("3x3", ("3x3",)), "no_more_points_class": (False, (True,)),
    "patch_embedding_kind": ("linear", ("image_feature0",)),
    "embed_selected_vit_patch": ("linear", ("linear",)), "embed_location": (False, (False,)),
    "layer_norm_x": (True, (True,)), "norm_logits": (True, (True,)),
    "mask_patches": ("always", ("always", "inference")),
    "mask_subpatches": ("inference", ("inference", "always")),
    "mask_repeats": ("inference", ("inference", "all")),
    "token_prediction_rotary": (True, ("one_d",)),
}
# Our own fields -> those of PointerConfig.
OWN_FIELDS = {"patch_score_scale": "score_scale", "pointing_loss_weight": "loss_weight",
              "location_from_raw_state": "raw_location_reference"}
_POINTER_ROWS, _POINTER_EPS = 128, 1e-6   # of the added tokens' head; of the norms: both are fixed

# Fields that cannot change the logits: bookkeeping of transformers, initialisation, dropout (a training
# setting here), precision and choice of kernels.
_NO_EFFECT = frozenset("""
    _attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path
    architectures attention_dropout attn_implementation auto_map bos_token_id chunk_size_feed_forward dtype
    embedding_dropout eos_token_id experts_implementation float32_attention id2label image_feature_dropout
    initializer_range label2id name_or_path num_labels output_attentions output_hidden_states
    pad_token_id problem_type residual_dropout return_dict torch_dtype transformers_version use_cache
    """.split())


class Section:
    """One JSON object of config.json: reads and checks its fields, and records which are known."""

    def __init__(self, name: str, values: Any, problems: list[str]):
        self.name, self.problems, self.seen = name, problems, set(_NO_EFFECT)
        self.values = values if isinstance(values, Mapping) else {}
        if not isinstance(values, Mapping):
            problems.append(f"{name} must be an object, got {values!r}")

    def complain(self, field: str, rule: str, value: Any) -> None:
        """Adds a problem: the rule that a field breaks, and its value."""
        self.problems.append(f"{self.name}{'.' if self.name else ''}{field} {rule}, got {value!r}")

    def read(self, *fields: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Returns the value of a field under any of its names; null counts as absent.

        A missing field without a default, or one of another type, adds a problem and gives 1.
        """
        self.seen.update(fields)
        found = {f: self.values[f] for f in fields if self.values.get(f) is not None}
        if not found:
            if default is _REQUIRED:
                self.complain(" or ".join(fields), f"must be given as {kind.__name__}", None)
                return 1
            return default
        field, value = next(iter(found.items()))
        if any(other != value for other in found.values()):
            self.complain(" and ".join(found), "must agree", list(found.values()))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number if kind is float else type(value) is kind):
            self.complain(field, f"must be of type {kind.__name__}", value)
            return 1
        return tuple(value) if kind is list else value

    def expect(self, wanted: Any, *fields: str) -> None:
        """Adds a problem if one of the fields is present and differs from the only value we implement."""
        self.seen.update(fields)
        for field in fields:
            value = self.values.get(field)
            if value is not None and value != wanted:
                self.complain(field, f"must be {wanted!r}", value)

    def expect_one_of(self, wanted: tuple[Any, ...], field: str) -> None:
        """Adds a problem if the field is present with a value that is not in `wanted`."""
        self.seen.add(field)
        value = self.values.get(field)
        if value is not None and value not in wanted:
            self.complain(field, f"must be one of {wanted}", value)

    def finish(self) -> None:
        """Adds a problem if the object has unknown fields."""
        unknown = sorted(set(self.values) - self.seen)
        if unknown:
            self.problems.append(f"unknown in {self.name or 'the top level'}: {', '.join(unknown)}")


_MODEL_TYPES = {"vit_config": ("molmo2", "molmo2_vision"), "vision_config": ("molmo2_vision",),
                "adapter_config": ("molmo2", "molmo2_adapter", "molmo_point"),
                "text_config": ("molmo2_text",)}


def _read_vision(section: Section, adapter: Section, is_legacy: bool) -> tuple[dict, tuple[int, ...]]:
    """Returns (fields of VisionConfig, taps)."""
    number = lambda *fields: section.read(*fields, kind=int)
    image = section.read("image_default_input_size", "image_size", kind=list)
    image = image if isinstance(image, tuple) and len(image) == 2 else (1, 1)
    patch, depth = number("image_patch_size", "patch_size"), number("num_hidden_layers")
    if image[0] != image[1] or image[0] % patch:
        section.complain("image size", f"must be square and a multiple of {patch}", list(image))
    section.expect((image[0] // patch) ** 2, "image_num_pos", "num_position_embeddings")
    fields = dict(image_size=image[0], patch_size=patch, width=number("hidden_size"),
                  num_heads=number("num_attention_heads"), head_dim=number("head_dim"),
                  mlp_width=number("intermediate_size"),
                  norm_eps=section.read("layer_norm_eps", kind=float, default=1e-6))
    section.expect(fields["num_heads"], "num_key_value_heads")
    section.expect("gelu_pytorch_tanh", "hidden_act")
    section.expect(3, "num_channels")
    section.expect(True, "attention_bias")
    taps = adapter.read("vit_layers", "vision_feature_layer", kind=list)
    taps = taps if isinstance(taps, tuple) and taps else (0,)
    if not all(isinstance(tap, int) and -depth <= tap < depth for tap in taps):
        adapter.complain("vit_layers", f"must name some of the {depth} ViT layers", list(taps))
        taps = (0,)
    taps = tuple(tap % depth for tap in taps)
    # Released configs count all layers of SigLIP2; released weights end with the last tap.
    return fields | {"num_layers": max(taps) + 1 if is_legacy else depth}, taps


def _read_connector(section: Section, vision: dict, text_width: int) -> dict:
    heads, head_dim = section.read("num_attention_heads", kind=int), section.read("head_dim", kind=int)
    section.expect(heads, "num_key_value_heads")
    section.expect(heads * head_dim, "hidden_size")
    section.expect(vision["width"], "hidden_size")
    section.expect(text_width, "text_hidden_size")
    section.expect("silu", "hidden_act")
    section.expect(True, "pooling_attention_mask", "attention_bias")
    section.expect(False, "mlp_bias")
    return dict(num_heads=heads, head_dim=head_dim, mlp_width=section.read("intermediate_size", kind=int))


def _read_pointer(top: Section, adapter: Section, text: dict
                  ) -> tuple[config_lib.PointerConfig | None, bool]:
    """Returns (settings of the pointer, whether the connector has an output layer)."""
    for field, (default, known) in POINTER_FIELDS.items():
        top.seen.add(field)
        value = top.values.get(field, default)   # null is a value of its own here
        if not any(type(value) is type(one) and value == one for one in known):
            top.complain(field, f"must be {' or '.join(map(repr, known))}", value)
    adapter.seen.add("positional_embeddings")
    if adapter.values.get("positional_embeddings", 16) is not None:
        adapter.complain("positional_embeddings", "must be null",
                         adapter.values.get("positional_embeddings", 16))
    if text["norm_eps"] != _POINTER_EPS:
        top.complain("layer_norm_eps of text_config", f"must be {_POINTER_EPS}, as of the pointer's norm",
                     text["norm_eps"])
    defaults = config_lib.PointerConfig()
    own = {ours: top.read(field, kind=float if ours == "score_scale" else type(getattr(defaults, ours)),
                          default=getattr(defaults, ours)) for field, ours in OWN_FIELDS.items()}
    width = top.read("patch_embed_dim", kind=int, default=256)
    theta = top.read("token_prediction_rotary_theta", kind=float, default=50000.0)
    has_output = adapter.read("attention_pooling_out_layer", kind=bool, default=False)
    try:
        return config_lib.PointerConfig(width=width, theta=float(theta), **own), has_output
    except ValueError as error:
        top.problems.append(str(error))
        return None, has_output


def _read_rope(section: Section, depth: int) -> dict:
    """Returns rope_theta and yarn. Without a list of layers, scaling applies to all of them."""
    where = f"{section.name}.rope"
    legacy = section.read("rope_scaling", kind=dict, default={})
    native = section.read("rope_parameters", kind=dict, default={})
    layers = section.read("rope_scaling_layers", kind=list, default=tuple(range(depth)))
    rope = Section(where, {**native, **legacy}, section.problems)
    differ = sorted(key for key in legacy if key in native and native[key] != legacy[key])
    if differ:
        section.complain("rope_scaling and rope_parameters", "must agree", differ)
    thetas = {float(x) for x in (section.read("rope_theta", kind=float, default=None),
                                 rope.read("rope_theta", kind=float, default=None)) if x is not None}
    if len(thetas) != 1:
        section.complain("rope_theta", "must be given once", sorted(thetas))
    section.expect(1.0, "partial_rotary_factor")
    if not all(isinstance(layer, int) and 0 <= layer < depth for layer in layers):
        section.complain("rope_scaling_layers", f"must be in 0..{depth - 1}", list(layers))
    yarn = read_yarn(rope, layers)
    rope.finish()
    return dict(rope_theta=max(thetas, default=1.0), yarn=yarn)


def read_yarn(rope: Section, layers: tuple[int, ...]) -> config_lib.YarnConfig | None:
    """Returns the scaling of a rope_scaling or rope_parameters object, for `layers`; None if unscaled."""
    kind = rope.read("rope_type", "type", kind=str, default="default")
    rope.expect(1.0, "partial_rotary_factor")
    if kind != "yarn":
        if kind != "default":
            rope.complain("rope_type", "must be 'default' or 'yarn'", kind)
        return None
    factor = rope.read("factor", kind=float)
    rope.expect(True, "truncate")
    return config_lib.YarnConfig(
        factor=factor, original_length=rope.read("original_max_position_embeddings", kind=int),
        beta_fast=rope.read("beta_fast", kind=float, default=32.0),
        beta_slow=rope.read("beta_slow", kind=float, default=1.0),
        attention_factor=rope.read("attention_factor", kind=float,
                                   default=0.1 * math.log(max(factor, 1)) + 1),
        layers=layers)


def _read_text(section: Section) -> dict:
    number = lambda *fields: section.read(*fields, kind=int)
    depth = number("num_hidden_layers")
    fields = dict(
        vocab_size=number("vocab_size"), additional_vocab_size=number("additional_vocab_size"),
        width=number("hidden_size"), num_layers=depth, num_heads=number("num_attention_heads"),
        num_kv_heads=number("num_key_value_heads"), head_dim=number("head_dim"),
        mlp_width=number("intermediate_size"), qk_norm=section.read("qk_norm_type", kind=str),
        norm_after=section.read("norm_after", kind=bool, default=False),
        norm_eps=section.read("layer_norm_eps", "rms_norm_eps", kind=float),
        tied_head=section.read("tie_word_embeddings", kind=bool, default=False),
        max_positions=number("max_position_embeddings"))
    section.expect("silu", "hidden_act")
    section.expect(False, "qkv_bias", "attention_bias")
    section.expect(True, "use_qk_norm")
    return fields | _read_rope(section, depth)


def read(values: Mapping[str, Any], where: str = "config.json") -> config_lib.Molmo2Config:
    """Returns the model that a config.json describes, with default pooling windows and initialisation.

    `tied_head` is that of the file. Released files say false even where the head is a copy of the embedding,
    which shows only in the tensors.

    Raises:
      ValueError: fields are missing, unknown or contradict each other; the message lists all.
    """
    problems: list[str] = []
    top = Section("", values, problems)
    is_legacy = "vit_config" in values and values.get("vision_config") is None
    name = "vit_config" if is_legacy else "vision_config"
    sections = {key: Section(key, values.get(key), problems)
                for key in (name, "adapter_config", "text_config")}
    top.seen.update(sections, ("vit_config",))
    text = _read_text(sections["text_config"])
    vision, taps = _read_vision(sections[name], sections["adapter_config"], is_legacy)
    connector = _read_connector(sections["adapter_config"], vision, text["width"])
    for key, section in sections.items():
        section.expect_one_of(_MODEL_TYPES[key], "model_type")
    pointer, token_fields = None, {**TOKEN_FIELDS, **_OTHER_TOKEN_FIELDS}
    if values.get("model_type") == "molmo_point":
        pointer, connector["has_output"] = _read_pointer(top, sections["adapter_config"], text)
        token_fields = POINTER_TOKEN_FIELDS | {"low_res_image_start_token_id": "<low_res_im_start>"}
    elif values.get("model_type") != "molmo2":
        top.complain("model_type", "must be 'molmo2' or 'molmo_point'", values.get("model_type"))
    top.seen |= {"model_type", "use_frame_special_tokens"}  # the processor's value of the latter counts
    for field in ("quantization_config", "quantization"):
        if values.get(field) is not None:
            top.complain(field, "must be absent, since only unquantised weights are read", values[field])
        top.seen.add(field)
    top.expect(False, "is_encoder_decoder")
    text["tied_head"] |= top.read("tie_word_embeddings", kind=bool, default=False)
    for field, token in token_fields.items():
        top.expect(text["vocab_size"] + config_lib.SPECIAL_TOKENS.index(token), field)
    for section in (top, *sections.values()):
        section.finish()
    if not problems:
        try:
            return config_lib.Molmo2Config(
                vision=config_lib.VisionConfig(**vision), text=config_lib.TextConfig(**text),
                connector=config_lib.ConnectorConfig(taps=taps, **connector), pointer=pointer)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(f"{where} must describe a Molmo2 model: " + "; ".join(problems))


def check_exportable(config: config_lib.Molmo2Config) -> None:
    """Checks that the hub format can represent a model.

    Raises:
      ValueError: it cannot.
    """
    if config.visual_attention != "image_tokens":
        raise ValueError("visual_attention must be 'image_tokens' to be exported, transformers supports no "
                         f"other; got {config.visual_attention!r}")
    t = config.text
    if config.pointer is None:
        config_lib.require(config.connector.has_output, "has_output must be True to be exported without a "
                           "pointer, transformers supports no other", False)
    elif (t.additional_vocab_size, t.norm_eps) != (_POINTER_ROWS, _POINTER_EPS):
        raise ValueError(f"additional_vocab_size and norm_eps must be {_POINTER_ROWS} and {_POINTER_EPS} to "
                         "be exported with a pointer, as in its remote code; "
                         f"got {t.additional_vocab_size} and {t.norm_eps}")
    if config.visual_merge != "add":
        raise ValueError("visual_merge must be 'add' to be exported, transformers supports no other; "
                         f"got {config.visual_merge!r}")
    width = config.connector.num_heads * config.connector.head_dim
    if width != config.vision.width:
        raise ValueError("num_heads x head_dim of the connector must equal the ViT's width to be exported; "
                         f"got {width} and {config.vision.width}")


def _write_vision(config: config_lib.Molmo2Config) -> tuple[dict, list[int]]:
    """Returns (vit_config, vit_layers), layers counted from the end as in the released files."""
    v = config.vision
    depth = _SIGLIP2_LAYERS if (v.width, v.num_layers) == (1152, 25) else v.num_layers
    section = {
        "model_type": "molmo2", "hidden_size": v.width, "intermediate_size": v.mlp_width,
        "num_hidden_layers": depth, "num_attention_heads": v.num_heads,
        "num_key_value_heads": v.num_heads, "head_dim": v.head_dim, "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": v.norm_eps, "image_default_input_size": [v.image_size, v.image_size],
        "image_patch_size": v.patch_size, "image_num_pos": v.num_patches, "attention_dropout": 0.0,
        "residual_dropout": 0.0, "initializer_range": 0.02, "float32_attention": True,
        "attn_implementation": "sdpa"}
    return section, [tap - depth for tap in config.connector.taps]


def _write_text(config: config_lib.TextConfig) -> dict:
    yarn = config.yarn
    scaling = None if yarn is None else {
        "rope_type": "yarn", "factor": yarn.factor, "attention_factor": yarn.attention_factor,
        "original_max_position_embeddings": yarn.original_length, "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow}
    return {
        "model_type": "molmo2_text", "hidden_size": config.width,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "vocab_size": config.vocab_size,
        "additional_vocab_size": config.additional_vocab_size, "qkv_bias": False,
        "num_hidden_layers": config.num_layers, "intermediate_size": config.mlp_width,
        "hidden_act": "silu", "embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0,
        "max_position_embeddings": config.max_positions, "rope_theta": config.rope_theta,
        "rope_scaling": scaling, "rope_scaling_layers": None if yarn is None else list(yarn.layers),
        "use_qk_norm": True, "qk_norm_type": config.qk_norm, "layer_norm_eps": config.norm_eps,
        "norm_after": config.norm_after, "initializer_range": config.init_std or 0.02, "use_cache": True,
        "attn_implementation": "sdpa"}


def write(config: config_lib.Molmo2Config, dtype: str = "float32", use_frame_special_tokens: bool = True
          ) -> dict[str, Any]:
    """Returns the config.json of a model in the released form, without `auto_map`.

    A tied head is written as untied, as in the released 4B: its copy of the embedding is stored. With a
    pointer it is written as tied, and not stored.

    Args:
      use_frame_special_tokens: as in the processor file (InputConfig).

    Raises:
      ValueError: see check_exportable.
    """
    check_exportable(config)
    vision, taps = _write_vision(config)
    c, t = config.connector, config.text
    adapter = {
        "model_type": "molmo2", "vit_layers": taps, "pooling_attention_mask": True,
        "hidden_size": config.vision.width, "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_heads, "head_dim": c.head_dim, "float32_attention": True,
        "attention_dropout": 0.0, "residual_dropout": 0.0, "hidden_act": "silu",
        "intermediate_size": c.mlp_width, "text_hidden_size": t.width, "image_feature_dropout": 0.0,
        "initializer_range": c.init_std or 0.02, "attn_implementation": "sdpa"}
    whole = {
        "model_type": "molmo2", "architectures": ["Molmo2ForConditionalGeneration"],
        **{field: config.special_id(token) for field, token in TOKEN_FIELDS.items()},
        "image_high_res_id": config.special_id("<im_patch>"),
        "use_frame_special_tokens": use_frame_special_tokens, "initializer_range": t.init_std or 0.02,
        "use_cache": True, "tie_word_embeddings": False, "dtype": dtype,
        "vit_config": vision, "adapter_config": adapter, "text_config": _write_text(t)}
    return whole if config.pointer is None else _with_pointer(whole, config, config.pointer)


def _with_pointer(values: dict[str, Any], config: config_lib.Molmo2Config, pointer: config_lib.PointerConfig
                  ) -> dict[str, Any]:
    """Returns the config.json of a model with a pointer, from what is written of it without one."""
    default = config_lib.PointerConfig()
    kept = {field: value for field, value in values.items() if field not in TOKEN_FIELDS}
    own = {field: getattr(pointer, ours) for field, ours in OWN_FIELDS.items()
           if getattr(pointer, ours) != getattr(default, ours)}
    tied = {"tie_word_embeddings": True} if config.text.tied_head else {}
    return kept | {
        "model_type": "molmo_point", "architectures": ["MolmoPointForConditionalGeneration"],
        **{field: config.special_id(token) for field, token in POINTER_TOKEN_FIELDS.items()},
        "low_res_image_start_token_id": None,
        **{field: known[0] for field, (_, known) in POINTER_FIELDS.items()},
        "patch_embed_dim": pointer.width, "token_prediction_rotary_theta": pointer.theta, **own,
        "adapter_config": values["adapter_config"] | {
            "model_type": "molmo_point", "positional_embeddings": None,
            "attention_pooling_out_layer": config.connector.has_output},
        "text_config": values["text_config"] | tied}
