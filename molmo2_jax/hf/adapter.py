"""Adapters (finetune.py) as PEFT folders: adapter_config.json and adapter_model.safetensors.

Two spellings, because readers differ: "native" has the names of transformers' own molmo2 model, for
transformers and peft; "legacy" has those of the released checkpoints, for vLLM and the remote code, where
q, k, v are one matrix, and up, gate another. There the A's are stacked and B is block-diagonal, so the rank
of a fused matrix is the sum of its parts'. vLLM reads one rank and one alpha for all modules: the others are
padded with zeros, and alpha grows with the rank. Adapters with a shared A keep their rank.

R rank of a tensor in the folder.

Source: peft 0.21 (config.py, tuners/lora); vLLM, lora/peft_helper.py.
"""

import functools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import finetune
from molmo2_jax.hf import processor
from molmo2_jax.hf import shards
from molmo2_jax.hf import source as source_lib
from molmo2_jax.hf import weights

CONFIG, TENSORS = shards.ADAPTER, "adapter_model.safetensors"
Spelling = Literal["native", "legacy"]
_PREFIX = "base_model.model."
_REFUSED = {"use_dora": "DoRA", "modules_to_save": "modules_to_save", "trainable_token_indices":
            "trainable_token_indices", "target_parameters": "target_parameters", "lora_bias": "lora_bias",
            "fan_in_fan_out": "fan_in_fan_out", "alora_invocation_tokens": "aLoRA"}


def _entries(config: config_lib.Molmo2Config, spelling: Spelling) -> list[weights.Entry]:
    """Returns the entries of kernels whose tensors are matrices; of the ViT those up to the last tap, which
    are all that an exported model has."""
    last = max(config.connector.taps)
    return [entry for entry in weights.entries(config, spelling)
            if entry.layout in ("linear", "merge") and all(path.endswith("/kernel") for path in entry.paths)
            and not (entry.paths[0].startswith("vision/layers/") and (entry.layer or 0) > last)]


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _matrices(lora: finetune.LoraConfig, leaves: Mapping[str, Any], module: str, layer: int | None
              ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (A [R, in], B [out, R]) of one layer of a module, as PEFT stores them."""
    modules = [path.removesuffix("/lora/b") for path in leaves if path.endswith("/lora/b")]
    a = leaves[f"{finetune.owner(lora, module, modules)}/lora/a"]
    b = leaves[f"{module}/lora/b"]
    if layer is not None:
        a, b = a[layer], b[layer]
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T


def _fused(parts: Sequence[tuple[np.ndarray, np.ndarray] | None], rows: Sequence[int]
           ) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B of matrices stacked along their rows. A part without adapter is None; parts with equal
    A's share it."""
    found = [part for part in parts if part is not None]
    shared = all(np.array_equal(a, found[0][0]) for a, _ in found)
    rank = found[0][0].shape[0]
    b = np.zeros((sum(rows), rank if shared else rank * len(found)), np.float32)
    first = place = 0
    for part, count in zip(parts, rows, strict=True):
        if part is not None:
            b[first:first + count, place:place + rank] = part[1]
            place += 0 if shared else rank
        first += count
    return found[0][0] if shared else np.concatenate([a for a, _ in found]), b


def tensors(lora: finetune.LoraConfig, trained, config: config_lib.Molmo2Config, spelling: Spelling
            ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {module: (A [R, in], B [out, R])}, all of the same rank R."""
    leaves = finetune.flat(trained)
    shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    found = {}
    for entry in _entries(config, spelling):
        modules = [path.removesuffix("/kernel") for path in entry.paths]
        parts = [_matrices(lora, leaves, module, entry.layer) if f"{module}/lora/b" in leaves else None
                 for module in modules]
        if len(entry.tensors) == len(parts):
            found |= {_module(name): part for name, part in zip(entry.tensors, parts) if part is not None}
        elif any(part is not None for part in parts):
            stacked = entry.layer is not None
            rows = [weights.rows(shapes[path][stacked:], entry.layout) for path in entry.paths]
            found[_module(entry.tensors[0])] = _fused(parts, rows)
    rank = max(a.shape[0] for a, _ in found.values())
    return {name: (np.pad(a, ((0, rank - len(a)), (0, 0))), np.pad(b, ((0, 0), (0, rank - len(a)))))
            for name, (a, b) in found.items()}


def write(folder: str | pathlib.Path, lora: finetune.LoraConfig, trained, config: config_lib.Molmo2Config,
          spelling: Spelling, base: str, dtype: str = "float32") -> int:
    """Writes a PEFT folder and returns the rank of its matrices.

    base: name or folder of the base model, as the folder's readers find it.

    Raises:
      ValueError: parameters are trained in full, which such a folder cannot express.
    """
    if lora.full:
        raise ValueError("an adapter's folder holds adapters only; got a run that also trains "
                         f"{', '.join(lora.full)} in full: export without --adapter")
    found = tensors(lora, trained, config, spelling)
    rank = len(next(iter(found.values()))[0])
    grown = math.sqrt(rank / lora.rank) if lora.rslora else rank / lora.rank
    patterns = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in found})
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "inference_mode": True, "r": rank, "lora_alpha": lora.alpha * grown,
        "lora_dropout": lora.dropout, "use_rslora": lora.rslora,
        "use_dora": False, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "revision": None,
        # vLLM compares last parts of names; peft takes a single string as a regular expression.
        "target_modules": (sorted({name.rpartition(".")[2] for name in found}) if spelling == "legacy" else
                           "|".join(patterns))}
    out = pathlib.Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    pending = [shards.Pending(f"{_PREFIX}{name}.lora_{letter}.weight", part.shape,
                              functools.partial(list, [part]))
               for name, pair in found.items() for letter, part in zip("AB", pair)]
    shards.write_file(out / TENSORS, pending, source_lib.dtype_of(dtype))
    processor.write_json(out / CONFIG, values)
    return rank


def read(folder: str | pathlib.Path, config: config_lib.Molmo2Config) -> tuple[finetune.LoraConfig, Any]:
    """Returns (settings, trained parameters) of a PEFT folder for a model, in either spelling.

    Fused matrices are divided again, and rows of A without effect are left out. All modules get the rank of
    the largest; smaller ones are padded with zeros, and B is multiplied so that one alpha fits all.

    Raises:
      ValueError: it is no LoRA, has parts that finetune.py has not, or its tensors do not fit the model.
    """
    folder = pathlib.Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"an adapter's folder must hold {CONFIG}; got {folder}")
    values = processor.read_json(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"an adapter must be of peft_type LORA; {folder} has {values.get('peft_type')!r}")
    extra = [what for name, what in _REFUSED.items() if values.get(name)]
    if values.get("bias", "none") != "none":
        extra.append(f"bias={values['bias']!r}")
    if extra:
        raise ValueError(f"an adapter must consist of A and B alone; {folder} uses {', '.join(extra)}")
    given = matrices(folder)
    by_name = {_module(name): (entry, number) for spelling in ("native", "legacy")
               for entry in _entries(config, spelling) for number, name in enumerate(entry.tensors)}
    unknown = sorted(set(given) - set(by_name))
    if unknown:
        raise ValueError(f"modules of an adapter must be kernels of this model; {folder} has "
                         f"{', '.join(unknown[:3])}" + (f" and {len(unknown) - 3} more" if len(unknown) > 3
                                                        else ""))
    return _stacked(folder, values, given, by_name, config)


def spelling_of(folder: pathlib.Path) -> Spelling:
    """Returns whose names the modules of a folder have.

    Raises:
      ValueError: as `matrices`.
    """
    prefixes = ("model.transformer.", "model.vision_backbone.")
    return "legacy" if all(name.startswith(prefixes) for name in matrices(folder)) else "native"


def matrices(folder: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {module: (A, B)} of the tensors of a folder, float32.

    Raises:
      ValueError: a tensor has another name, or A or B is missing, or their ranks differ.
    """
    held: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in shards.open_file(folder / TENSORS).items():
        match = re.fullmatch(rf"(?:{re.escape(_PREFIX)})?(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise ValueError(f"tensors of an adapter must be called MODULE.lora_A.weight or "
                             f"MODULE.lora_B.weight; {folder} has {name}")
        held.setdefault(match[1], {})[match[2]] = tensor.read().astype(np.float32)
    wrong = [name for name, pair in held.items()
             if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]]
    if wrong or not held:
        raise ValueError("every module of an adapter must have A [rank, in] and B [out, rank]; "
                         f"{folder}: {', '.join(wrong[:3]) or 'no tensors'}")
    return {name: (pair["A"], pair["B"]) for name, pair in held.items()}


def _stacked(folder, values: Mapping[str, Any], given, by_name, config: config_lib.Molmo2Config
             ) -> tuple[finetune.LoraConfig, Any]:
    """Returns (settings, trained parameters) of matrices by module."""
    rslora, alpha = bool(values.get("use_rslora")), float(values.get("lora_alpha", 8))
    shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    parts: dict[str, dict[int | None, tuple[np.ndarray, np.ndarray]]] = {}
    shared = []   # whether the kernels of a fused matrix use the same rows of A
    for name, (a, b) in given.items():
        entry, number = by_name[name]
        own = _pattern(values.get("alpha_pattern"), name, alpha)
        b = b * np.float32(own / (math.sqrt(len(a)) if rslora else len(a)))
        first, used = 0, []
        for path in _paths(entry, number):
            shape = shapes[path][entry.layer is not None:]
            rows = weights.rows(shape, entry.layout)
            part = b[first:first + rows]
            if math.prod(shape) != a.shape[1] * rows or len(part) < rows:
                raise ValueError(f"an adapter must fit the model; {folder}: {name} has A {list(a.shape)} and "
                                 f"B {list(b.shape)}, {path} of the model is {list(shape)}")
            first += rows
            # Stacked and padded matrices have columns of zeros in B, whose rows of A have no effect.
            columns = part.any(axis=0) if b.any() else np.ones(len(a), bool)
            if columns.any():
                used.append(columns)
                parts.setdefault(path, {})[entry.layer] = a[columns], part[:, columns]
        if first != len(b):
            raise ValueError(f"an adapter must fit the model; {folder}: B of {name} has {len(b)} rows "
                             f"instead of {first}")
        if len(used) > 1:
            shared.append(all((columns == used[0]).all() for columns in used))
    rank = max(len(a) for layers in parts.values() for a, _ in layers.values())
    # `b` contains the scale already, so that ranks and alphas of single modules can differ.
    scale = alpha / (math.sqrt(int(values.get("r", rank))) if rslora else int(values.get("r", rank)))
    lora = finetune.LoraConfig(
        targets="|".join(sorted(parts)), rank=rank, rslora=rslora, share_a=bool(shared) and all(shared),
        alpha=scale * (math.sqrt(rank) if rslora else rank), dropout=float(values.get("lora_dropout") or 0))
    boxed = finetune.boxed_trained(lora, weights.unflatten(weights.abstract_params(config, boxed=True)))
    leaves = {path: np.zeros(box.value.shape, np.float32) for path, box in finetune.flat(boxed).items()}
    for path, layers in parts.items():
        module = path.removesuffix("/kernel")
        for layer, (a, b) in layers.items():
            where = () if layer is None else (layer,)
            if f"{module}/lora/a" in leaves:
                leaves[f"{module}/lora/a"][where].reshape(-1, rank)[:, :len(a)] = a.T
            leaves[f"{module}/lora/b"][where].reshape(rank, -1)[:len(a)] = b.T / np.float32(scale)
    return lora, finetune.nested(leaves)


def _paths(entry: weights.Entry, number: int) -> Sequence[str]:
    """Returns the kernels whose rows are those of an entry's tensor."""
    return entry.paths if len(entry.tensors) < len(entry.paths) else entry.paths[number:number + 1]


def _pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """Returns the value of the first pattern that matches the end of a module's name, as peft looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return default
