"""Whether a folder is what other programs expect of a Molmo2 checkpoint, check by check.

From the files: names, shapes and dtypes of tensors, fields of every JSON file, token ids. With transformers
installed, what it makes of the folder: configs, tokenizer, chat template, and logits on text, an image,
several images and a video, which must be ours.
"""

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import config as hf_config
from molmo2_jax.hf import processor
from molmo2_jax.hf import remote_code
from molmo2_jax.hf import shards
from molmo2_jax.hf import source as source_lib
from molmo2_jax.hf import weights
from molmo2_jax.inputs import image
from molmo2_jax.inputs import packing
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2

# Share of the largest logit. Measured: 3e-6 for random small models and the trained nano model; without the
# mask of visual tokens, which transformers leaves out without mm_token_type_ids, over 4e-4.
LOGITS_TOLERANCE = 1e-4
QUESTION = "How many red circles are there in 2.5 s?"
FILES = ("config.json", "generation_config.json", processor.IMAGE_FILE, processor.VIDEO_FILE,
         processor.PROCESSOR_FILE, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# What the released remote code and vLLM read. Their own defaults are those of other models, so each field
# must be there, if only as null.
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


class Check(NamedTuple):
    name: str
    status: Literal["ok", "FAIL", "skipped"]
    detail: str


class Original(NamedTuple):
    """What a folder was made from."""
    params: Mapping[str, Any]
    config: config_lib.Molmo2Config
    inputs: config_lib.InputConfig
    tokenizer: tokenizers.Tokenizer


class _Report:
    """Runs checks; each returns its detail, or a value and the detail."""

    def __init__(self):
        self.checks: list[Check] = []

    def run(self, name: str, check: Callable, *values) -> Any:
        """Returns the check's value, None if it fails or if a value it needs is None."""
        if any(value is None for value in values):
            self.skip(name, "needs a check that failed")
            return None
        try:
            found = check(*values)
        except Exception as error:  # whatever it is, the folder did not pass
            words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self.checks.append(Check(name, "FAIL", words))
            return None
        value, detail = found if isinstance(found, tuple) else (True, found)
        self.checks.append(Check(name, "ok", detail))
        return value

    def skip(self, name: str, why: str) -> None:
        self.checks.append(Check(name, "skipped", why))


def verify(folder: str | pathlib.Path, original: Original | None = None, with_logits: bool = True
           ) -> list[Check]:
    """Returns all checks of a folder; it passes if none has the status FAIL.

    Args:
      original: parameters, configs and tokenizer must be these, parameters after rounding to the folder's
        dtype bit for bit.
      with_logits: compare with transformers, which takes the memory of the model in float32.
    """
    folder, report = pathlib.Path(folder), _Report()
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
        report.skip("transformers", "not asked for")
    elif not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        report.skip("transformers", "torch and transformers are not installed")
    else:
        _verify_with_transformers(report, folder, opened, tokenizer)
    return report.checks


def table(checks: list[Check]) -> str:
    """Returns one line per check, and the count of each status."""
    width = max(len(check.name) for check in checks)
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "FAIL", "skipped")}
    lines = [f"{check.status:8}{check.name:{width}}  {check.detail}" for check in checks]
    return "\n".join([*lines, ", ".join(f"{count} {status}" for status, count in counts.items())])


# From the files alone


def _check_files(folder: pathlib.Path) -> str:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    return f"{len(FILES)} files beside the weights"


def _read_configs(folder: pathlib.Path) -> tuple[config_lib.Molmo2Config, str]:
    config, _ = checkpoint.read_config(folder)
    t, v = config.text, config.vision
    return config, (f"{t.qk_norm} style, {t.num_layers} layers of {t.width}, ViT {v.num_layers} of "
                    f"{v.width}, vocabulary {t.vocab_size} + {t.additional_vocab_size}")


def _check_fields(folder: pathlib.Path) -> str:
    problems, count = [], 0
    for file, sections in FIELDS.items():
        if not (folder / file).is_file():
            problems.append(f"{file} is missing")
            continue
        values = processor.read_json(folder / file)
        for section, fields in sections.items():
            part = values.get(section) if section else values
            absent = [field for field in fields.split() if field not in (part or {})]
            count += len(fields.split())
            if absent:
                problems.append(f"{' '.join(filter(None, (file, section)))} lacks {', '.join(absent)}")
    values = processor.read_json(folder / "config.json")
    if values.get("use_frame_special_tokens") is not True:
        problems.append("use_frame_special_tokens must be true, or the remote code counts no videos")
    if values.get("tie_word_embeddings"):
        problems.append("tie_word_embeddings must be false: the two tables of the embedding are no head")
    for name in ("vit_config", "adapter_config", "text_config"):
        part = values.get(name) or {}
        width, heads = part.get("hidden_size", 0), part.get("num_attention_heads", 1)
        if width % heads:
            problems.append(f"vLLM divides hidden_size {width} of {name} by {heads} heads")
    if problems:
        raise ValueError("; ".join(problems))
    return f"{count} fields"


def _open(folder: pathlib.Path, config: config_lib.Molmo2Config) -> tuple[checkpoint.Opened, str]:
    opened = checkpoint.open_checkpoint(folder)
    tensors = opened.source.tensors
    if opened.spelling != "legacy":
        raise ValueError("tensors must have the released names, others than transformers read no other; got "
                         f"{min(tensors)}, ...")
    table = tensors[weights.EMBEDDING.legacy[0]].shape
    if table[0] != config.text.vocab_size:  # what transformers' save_pretrained makes of it
        raise ValueError(f"{weights.EMBEDDING.legacy[0]} must have the {config.text.vocab_size} rows of the "
                         f"base vocabulary; got {table[0]}")
    if weights.HEAD.legacy[0] not in tensors:
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
    problems = [f"{text} must have id {config.special_id(text)}, tokenizer.json has {stored.get(text)}"
                for text in config_lib.SPECIAL_TOKENS if stored.get(text) != config.special_id(text)]
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
        problems += _differences(name, dataclasses.asdict(ours), dataclasses.asdict(theirs))
    ids = [(QUESTION, one.encode(QUESTION), one.special, one.bos_id, one.eos_id)
           for one in (tokenizer, original.tokenizer)]
    if ids[0] != ids[1]:
        problems.append("the tokenizer writes other ids")
    if problems:
        raise ValueError("; ".join(problems))
    return f"{len(given)} parameters, bit for bit in {dtype}"


def _differences(name: str, ours: Any, theirs: Any) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [text for field in ours for text in
                _differences(f"{name}.{field}", ours[field], theirs.get(field))]
    # Initialisation is not part of the format.
    return [] if ours == theirs or name.endswith("init_std") else [f"{name} is {ours} instead of {theirs}"]


# With transformers


def examples(config: config_lib.Molmo2Config, inputs: config_lib.InputConfig,
             tokenizer: tokenizers.Tokenizer, question: str = QUESTION, seed: int = 0
             ) -> dict[str, tuple[types.Sequence, list[np.ndarray]]]:
    """Returns {kind: (Sequence, stills)}: a question about random pixels, through the real input pipeline."""
    rng = np.random.default_rng(seed)
    side = config.vision.image_size
    pixels = lambda rows, columns: rng.integers(
        0, 256, (max(int(rows * side), 1), max(int(columns * side), 1), 3)).astype(np.uint8)
    stills = [pixels(1.2, 2.3), pixels(0.8, 0.5), pixels(0.4, 1.0)][:inputs.max_images]
    frames = np.stack([pixels(1, 1) for _ in range(min(3, inputs.max_frames))])
    seconds = np.arange(len(frames)) / inputs.max_fps
    clip = types.Frames(frames, seconds, side, side, float(seconds[-1]), inputs.max_fps)
    seen = {"text": (None, []),
            "image": (image.crops_of_images(stills[:1], config, inputs, tokenizer), stills[:1]),
            "video": (image.crops_of_frames(clip, config, inputs, tokenizer), [])}
    if len(stills) > 1:
        seen["several images"] = image.crops_of_images(stills, config, inputs, tokenizer), stills
    branch = types.Branch(turns=(question,))
    return {kind: (sequences.build(crops, [branch], tokenizer), used) for kind, (crops, used) in seen.items()}


def our_logits(params: Mapping[str, Any], config: config_lib.Molmo2Config, group: list[types.Sequence]
               ) -> list[np.ndarray]:
    """Returns float32[T, V] logits of each sequence in float32."""
    T, M, R = (max(len(getattr(one, name)) for one in group) for name in ("tokens", "patches", "pooled"))
    W = max(one.pooled.shape[-1] for one in group)
    shape = types.RowShape(T=T, M=M, R=R, W=W)
    batch = packing.stack([packing.join([one], shape, config.vision.patch_shape) for one in group])
    rows = jax.jit(molmo2.Molmo2(config, remat="none").apply)({"params": params}, batch)
    return [np.asarray(row[:len(one.tokens)]) for row, one in zip(rows, group)]


def _verify_with_transformers(report: _Report, folder: pathlib.Path, opened: checkpoint.Opened | None,
                              tokenizer: tokenizers.Tokenizer | None) -> None:
    report.run("transformers: config", _check_their_config, folder, opened)
    cases = None
    if opened and tokenizer:
        cases = examples(opened.config, opened.inputs, tokenizer)
    report.run("transformers: tokenizer and chat template", _check_their_tokenizer, folder, opened, cases)
    if importlib.util.find_spec("torchvision"):
        report.run("transformers: processor", _check_their_processor, folder, cases)
    else:
        report.skip("transformers: processor", "torchvision is not installed")
    # Ours first, so that one model is held at a time.
    ours = report.run("logits: ours", _compute_ours, folder, cases)
    model = report.run("transformers: tensors", _load_theirs, folder)
    for kind in cases or ():
        report.run(f"logits: {kind}", _compare_logits, kind, model, opened, cases, ours)


def _check_their_config(folder: pathlib.Path, opened: checkpoint.Opened) -> str:
    from molmo2_jax.hf import peer
    theirs, generation = peer.configs(folder)
    read, ours = hf_config.read(json.loads(theirs.to_json_string()), "transformers' config"), opened.config
    read = dataclasses.replace(  # pooling windows stand elsewhere, a tied head in the tensors
        read, text=dataclasses.replace(read.text, tied_head=ours.text.tied_head),
        connector=dataclasses.replace(read.connector, image_window=ours.connector.image_window,
                                      video_window=ours.connector.video_window))
    problems = _differences("config", dataclasses.asdict(ours), dataclasses.asdict(read))
    if problems:
        raise ValueError("; ".join(problems))
    return f"{type(theirs).__name__}, stops at {generation.eos_token_id}"


def _fold(tokens: np.ndarray, config: config_lib.Molmo2Config, placeholder: int) -> list[int]:
    """Returns the ids with each run of visual tokens, and the times between frames, as one placeholder."""
    visual = {config.special_id(token) for token in config_lib.SPECIAL_TOKENS}
    folded: list[int] = []
    for token in tokens.tolist():
        if token not in visual:
            folded.append(token)
        elif not folded or folded[-1] != placeholder:
            folded.append(placeholder)
    return folded


def _messages(stills: list, question: str = QUESTION) -> list[dict]:
    parts = [{"type": "image", "image": one} for one in stills]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _check_their_tokenizer(folder: pathlib.Path, opened: checkpoint.Opened, cases: dict) -> str:
    from molmo2_jax.hf import peer
    theirs = peer.tokenizer(folder)
    placeholder = opened.config.special_id("<|image|>")
    for kind, (one, stills) in cases.items():
        if kind == "video":  # times of frames stand between its visual tokens
            continue
        text = theirs.apply_chat_template(_messages(stills), tokenize=False, add_generation_prompt=True)
        found = [theirs.bos_token_id, *theirs(text, add_special_tokens=False).input_ids]
        wanted = _fold(one.tokens, opened.config, placeholder)
        if found != wanted:
            raise ValueError(f"the prompt of {kind} must be {wanted}; transformers writes {found}, {text!r}")
    if theirs.padding_side != "left":
        raise ValueError(f"padding_side must be 'left'; got {theirs.padding_side!r}")
    return f"{type(theirs).__name__}, prompts of {len(cases) - 1} kinds"


def _check_their_processor(folder: pathlib.Path, cases: dict) -> str:
    from molmo2_jax.hf import peer
    theirs = peer.processor(folder)
    for kind, (one, stills) in cases.items():
        if not stills:
            continue
        found = theirs.apply_chat_template(_messages(stills), tokenize=True, add_generation_prompt=True,
                                           return_dict=True, return_tensors="pt")
        pooled = found["image_token_pooling"].numpy()
        if found["input_ids"][0].tolist() != one.tokens.tolist():
            raise ValueError(f"ids of {kind} must be ours; got {len(found['input_ids'][0])} ids instead of "
                             f"{len(one.tokens)} or others")
        if not np.array_equal(pooled, one.pooled[:, :pooled.shape[1]]):
            raise ValueError(f"the pooled patches of {kind} must be ours")
        pixels = np.rint((found["pixel_values"].numpy() + 1) * 127.5)
        if not np.array_equal(pixels, one.patches):
            raise ValueError(f"the pixels of {kind} must be ours; "
                             f"they differ by up to {np.abs(pixels - one.patches).max():.0f} of 255")
    return f"{type(theirs).__name__}, ids, pooled patches and pixels of images"


def _compute_ours(folder: pathlib.Path, cases: dict) -> tuple[dict[str, np.ndarray], str]:
    params, config, _ = checkpoint.import_checkpoint(folder)
    logits = dict(zip(cases, our_logits(params, config, [one for one, _ in cases.values()])))
    if not all(np.isfinite(x).all() for x in logits.values()):
        raise ValueError("logits must be finite")
    return logits, f"{sum(len(x) for x in logits.values())} positions"


def _load_theirs(folder: pathlib.Path):
    from molmo2_jax.hf import peer
    return peer.load(folder), "none missing, left over or of another shape"


def _compare_logits(kind: str, model, opened: checkpoint.Opened, cases: dict, ours: dict) -> str:
    from molmo2_jax.hf import peer
    theirs = peer.logits(model, [cases[kind][0]], opened.config)[0]
    error, size = float(np.abs(theirs - ours[kind]).max()), float(np.abs(theirs).max())
    words = f"differ by {error:.1e} at most, {error / size:.1e} of the largest"
    if not error <= LOGITS_TOLERANCE * size:
        raise ValueError(f"logits must agree within {LOGITS_TOLERANCE} of the largest; {words}")
    return words
