"""Checks that a PEFT folder fits its base, holds the adapters it was exported from, and acts as they do."""

import importlib.util
import pathlib
from typing import Any

import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import finetune
from molmo2_jax.hf import adapter
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import compare
from molmo2_jax.hf import processor
from molmo2_jax.hf import shards
from molmo2_jax.inputs import tokenizer as tokenizers


def base_of(folder: pathlib.Path) -> str:
    """Returns the name or folder of the base that a PEFT folder names."""
    return processor.read_json(folder / adapter.CONFIG).get("base_model_name_or_path") or ""


def verify(folder: pathlib.Path, base: pathlib.Path,
           original: tuple[finetune.LoraConfig, Any] | None = None, with_logits: bool = True
           ) -> list[compare.Check]:
    """Returns all checks of a PEFT folder; it passes if none has the status FAIL.

    Args:
      base: Hugging Face folder of the base.
      original: settings and trained parameters that the folder must hold, after rounding to its dtype.
      with_logits: compare peft's logits on transformers' model with ours.
    """
    report = compare.Report()
    config = report.run("base", lambda: (checkpoint.read_config(base)[0], str(base)))
    read = report.run("adapters fit the base", _read, folder, config)
    if original is not None:
        report.run("same as the original", _compare, folder, config, *original)
    name = "logits: peft"
    if not with_logits:
        report.skip(name, "not requested")
    elif read and adapter.spelling_of(folder) == "legacy":
        report.skip(name, "transformers cannot load vLLM's names")
    elif not all(map(importlib.util.find_spec, ("torch", "transformers", "peft"))):
        report.skip(name, "torch, transformers and peft are not installed")
    else:
        report.run(name, _compare_logits, folder, base, read)
    return report.checks


def _read(folder: pathlib.Path, config: config_lib.Molmo2Config):
    lora, params = adapter.read(folder, config)
    count = len(adapter.matrices(folder))
    return (lora, params), f"{count} modules of rank {lora.rank}, scale {lora.scale:g}"


def _compare(folder: pathlib.Path, config: config_lib.Molmo2Config, lora: finetune.LoraConfig, params) -> str:
    held = shards.open_file(folder / adapter.TENSORS)
    kind = next(iter(held.values())).dtype
    found = adapter.matrices(folder)
    wanted = adapter.tensors(lora, params, config, adapter.spelling_of(folder))
    problems = [f"{name} is {'missing' if name in wanted else 'not one of them'}"
                for name in sorted(set(found) ^ set(wanted))]
    problems += [f"{letter} of {name} differs" for name in sorted(set(found) & set(wanted))
                 for letter, ours, theirs in zip("AB", wanted[name], found[name])
                 if not np.array_equal(ours.astype(kind).astype(np.float32), theirs)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("; ".join(problems[:5]) + more)
    return f"{len(wanted)} modules, bit for bit in {kind}"


def _compare_logits(folder: pathlib.Path, base: pathlib.Path, read) -> str:
    from molmo2_jax.hf import peer
    params, config, inputs = checkpoint.import_checkpoint(base)
    lora, adapters = read
    tokenizer = tokenizers.Tokenizer.from_file(base, config.text.vocab_size)
    cases = compare.examples(config, inputs, tokenizer)
    group = [one for one, _ in cases.values()]
    plain = compare.our_logits(params, config, group)
    ours = compare.our_logits(finetune.merged(lora, params, adapters), config, group)
    del params
    model = peer.with_adapter(peer.load(base), folder)
    error = size = change = 0.0
    for sequence, own, before in zip(group, ours, plain):
        theirs = peer.logits(model, [sequence], config)[0]
        error, size = max(error, float(np.abs(theirs - own).max())), max(size, float(np.abs(theirs).max()))
        change = max(change, float(np.abs(own - before).max()))
    words = (f"{len(group)} kinds of input, differ by at most {error:.1e}, {error / size:.1e} of the "
             f"largest; the adapters change logits by up to {change:.1e}")
    if not error <= compare.LOGITS_TOLERANCE * size:
        raise ValueError(f"logits must agree within {compare.LOGITS_TOLERANCE} of the largest; {words}")
    return words
