"""How transformers reads a checkpoint folder compared with how we do: the checks of verify.py that need it.

Configs, tokenizer, chat template, processor, and logits for text, an image, several images and a video must
equal ours.

T tokens, V base vocabulary, M crops, S side of a crop in pixels.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import config as hf_config
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2

# Relative to the largest logit. Measured: 3e-6 for random small models and the trained nano model; over 4e-4
# without the mask of visual tokens, which transformers omits without mm_token_type_ids.
LOGITS_TOLERANCE = 1e-4
QUESTION = "How many red circles are there in 2.5 s?"
Rule = Callable[[config_lib.Molmo2Config], config_lib.Molmo2Config]  # to the model whose logits are compared


class Check(NamedTuple):
    """One check and its result; `detail` says what was found."""
    name: str
    status: Literal["ok", "FAIL", "skipped"]
    detail: str


class Report:
    """Runs checks; each returns its detail, or a value and the detail."""

    def __init__(self):
        self.checks: list[Check] = []

    def run(self, name: str, check: Callable, *values) -> Any:
        """Returns the check's value; None if it fails or if one of `values` is None."""
        if any(value is None for value in values):
            self.skip(name, "needs a check that failed")
            return None
        try:
            found = check(*values)
        except Exception as error:  # any error means that the folder did not pass
            words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self.checks.append(Check(name, "FAIL", words))
            return None
        value, detail = found if isinstance(found, tuple) else (True, found)
        self.checks.append(Check(name, "ok", detail))
        return value

    def skip(self, name: str, why: str) -> None:
        """Records a check as skipped."""
        self.checks.append(Check(name, "skipped", why))


def differences(name: str, ours: Any, theirs: Any) -> list[str]:
    """Returns the fields of nested dicts that differ, in words, apart from those of initialisation."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [text for field in ours for text in
                differences(f"{name}.{field}", ours[field], theirs.get(field))]
    # The format has no fields for initialisation.
    is_free = name.endswith(("init_std", "freeze_patch_row"))
    return [] if ours == theirs or is_free else [f"{name} is {ours} instead of {theirs}"]


def examples(config: config_lib.Molmo2Config, inputs: config_lib.InputConfig,
             tokenizer: tokenizers.Tokenizer, question: str = QUESTION, seed: int = 0
             ) -> dict[str, tuple[types.Sequence, list[np.ndarray]]]:
    """Returns {kind: (Sequence, images)}: a question about random pixels, through the real input pipeline."""
    rng = np.random.default_rng(seed)
    side = config.vision.image_size
    pixels = lambda rows, columns: rng.integers(
        0, 256, (max(int(rows * side), 1), max(int(columns * side), 1), 3)).astype(np.uint8)
    stills = [pixels(1.2, 2.3), pixels(0.8, 0.5), pixels(0.4, 1.0)][:inputs.max_images]
    frames = np.stack([pixels(1, 1) for _ in range(min(3, inputs.max_frames))])
    seconds = np.arange(len(frames)) / inputs.max_fps
    clip = types.Frames(frames, seconds, side, side, float(seconds[-1]), inputs.max_fps)
    seen = {"text": (None, []),
            "image": (crops_lib.crops_of_images(stills[:1], config, inputs, tokenizer), stills[:1]),
            "video": (crops_lib.crops_of_frames(clip, config, inputs, tokenizer), [])}
    if len(stills) > 1:
        seen["several images"] = crops_lib.crops_of_images(stills, config, inputs, tokenizer), stills
    branch = types.Branch(turns=(question,))
    return {kind: (sequences.build(crops, [branch], tokenizer), used) for kind, (crops, used) in seen.items()}


def as_vllm(config: config_lib.Molmo2Config) -> config_lib.Molmo2Config:
    """Returns the model as vLLM (0.32) computes it.

    Attention is causal for visual tokens too, and visual features replace the embedding of `<im_patch>`.
    """
    return dataclasses.replace(config, visual_attention="causal", visual_merge="replace")


def our_logits(params: Mapping[str, Any], config: config_lib.Molmo2Config, group: list[types.Sequence]
               ) -> list[np.ndarray]:
    """Returns float32[T, V] logits of each sequence in float32."""
    T, M, R = (max(len(getattr(one, name)) for one in group) for name in ("tokens", "patches", "pooled"))
    W = max(one.pooled.shape[-1] for one in group)
    shape = types.RowShape(T=T, M=M, R=R, W=W)
    batch = rows_lib.stack([rows_lib.join([one], shape, config.vision.patch_shape) for one in group])
    rows = jax.jit(molmo2.Molmo2(config, remat="none").apply)({"params": params}, batch)
    return [np.asarray(row[:len(one.tokens)]) for row, one in zip(rows, group)]


def with_transformers(report: Report, folder: pathlib.Path, opened: checkpoint.Opened | None,
                      tokenizer: tokenizers.Tokenizer | None, is_vllm: bool = False,
                      logits_to: pathlib.Path | None = None) -> None:
    """Adds the checks that need transformers to the report.

    Args:
      is_vllm: both sides compute the logits of the model `as_vllm`.
      logits_to: an .npz file to write with "KIND/tokens", "KIND/logits" and "KIND/still N" or
        "KIND/frames" of each question.
    """
    report.run("transformers: config", _check_their_config, folder, opened)
    cases = None
    if opened and tokenizer:
        cases = examples(opened.config, opened.inputs, tokenizer)
    report.run("transformers: tokenizer and chat template", _check_their_tokenizer, folder, opened, cases)
    if importlib.util.find_spec("torchvision"):
        report.run("transformers: processor", _check_their_processor, folder, cases)
    else:
        report.skip("transformers: processor", "torchvision is not installed")
    # Ours first, so that only one model is in memory at a time.
    rule = as_vllm if is_vllm else lambda config: config
    ours = report.run("logits: ours", _compute_ours, folder, cases, rule)
    if logits_to is not None:
        report.run("logits: written", _write_logits, logits_to, cases, ours)
    model = report.run("transformers: tensors", _load_theirs, folder)
    for kind in cases or ():
        report.run(f"logits: {kind}", _compare_logits, kind, model, opened, cases, ours, rule)


def _check_their_config(folder: pathlib.Path, opened: checkpoint.Opened) -> str:
    from molmo2_jax.hf import peer
    theirs, generation = peer.configs(folder)
    read, ours = hf_config.read(json.loads(theirs.to_json_string()), "transformers' config"), opened.config
    read = dataclasses.replace(  # pooling windows are in other files, a tied head shows only in the tensors
        read, text=dataclasses.replace(read.text, tied_head=ours.text.tied_head),
        connector=dataclasses.replace(read.connector, image_window=ours.connector.image_window,
                                      video_window=ours.connector.video_window))
    problems = differences("config", dataclasses.asdict(ours), dataclasses.asdict(read))
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
        if kind == "video":  # has frame times between its visual tokens
            continue
        text = theirs.apply_chat_template(_messages(stills), tokenize=False, add_generation_prompt=True)
        found = [theirs.bos_token_id, *theirs(text, add_special_tokens=False).input_ids]
        wanted = _fold(one.tokens, opened.config, placeholder)
        if found != wanted:
            raise ValueError(f"the prompt for {kind} must be {wanted}; transformers writes {found}, {text!r}")
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
            raise ValueError(f"token ids for {kind} must equal ours; got {len(found['input_ids'][0])} ids, "
                             f"ours are {len(one.tokens)}")
        if not np.array_equal(pooled, one.pooled[:, :pooled.shape[1]]):
            raise ValueError(f"pooled patches for {kind} must equal ours")
        pixels = np.rint((found["pixel_values"].numpy() + 1) * 127.5)
        if not np.array_equal(pixels, one.patches):
            raise ValueError(f"pixels for {kind} must equal ours; "
                             f"they differ by up to {np.abs(pixels - one.patches).max():.0f} of 255")
    return f"{type(theirs).__name__}, ids, pooled patches and pixels of images"


def _compute_ours(folder: pathlib.Path, cases: dict, rule: Rule) -> tuple[dict[str, np.ndarray], str]:
    params, config, _ = checkpoint.import_checkpoint(folder)
    logits = dict(zip(cases, our_logits(params, rule(config), [one for one, _ in cases.values()])))
    if not all(np.isfinite(x).all() for x in logits.values()):
        raise ValueError("logits must be finite")
    words = f"{sum(len(x) for x in logits.values())} positions"
    if rule is as_vllm:
        size = float(np.abs(params["new_embedding"][molmo2.PATCH_ROW]).max())
        words += (", causal, features replace the embedding of <im_patch>, whose largest value is "
                  f"{size:.2g}" + (": equal to adding them" if size == 0 else ""))
    return logits, words


def _pixels(patches: np.ndarray) -> np.ndarray:
    """Returns uint8[M, S, S, 3]; the inverse of inputs.image.patchify."""
    side, patch = math.isqrt(patches.shape[1]), math.isqrt(patches.shape[2] // 3)
    pixels = patches.reshape(-1, side, side, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(-1, side * patch, side * patch, 3)


def _write_logits(path: pathlib.Path, cases: dict, ours: dict[str, np.ndarray]) -> str:
    arrays: dict[str, Any] = {}
    for kind, (one, stills) in cases.items():
        arrays |= {f"{kind}/tokens": one.tokens, f"{kind}/logits": ours[kind]}
        arrays |= {f"{kind}/still {number}": still for number, still in enumerate(stills)}
        if len(one.patches) and not stills:
            arrays[f"{kind}/frames"] = _pixels(one.patches)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)
    return f"{path}, {path.stat().st_size / 1e6:,.1f} MB"


def _load_theirs(folder: pathlib.Path):
    from molmo2_jax.hf import peer
    return peer.load(folder), "none missing, unused or of another shape"


def _compare_logits(kind: str, model, opened: checkpoint.Opened, cases: dict, ours: dict, rule: Rule) -> str:
    from molmo2_jax.hf import peer
    theirs = peer.logits(model, [cases[kind][0]], rule(opened.config))[0]
    error, size = float(np.abs(theirs - ours[kind]).max()), float(np.abs(theirs).max())
    words = f"differ by at most {error:.1e}, {error / size:.1e} of the largest"
    if not error <= LOGITS_TOLERANCE * size:
        raise ValueError(f"logits must agree within {LOGITS_TOLERANCE} of the largest; they {words}")
    return words
