"""A folder of a model with a pointer against transformers: the checks of verify.py that need it.

transformers has no such model, and MolmoPoint's remote code runs with transformers 4.57.1 only. What is
compared: the logits of the base vocabulary with transformers' own molmo2, of the folder's tensors under the
names of a model without a pointer. An output layer of the connector that changes nothing is added where there
is none, and `<im_low>` becomes `<im_patch>`, whose embedding it has. So everything up to the head is checked,
but neither the scores of choices nor the logits of the added tokens.
"""

import dataclasses
import importlib.metadata
import pathlib
import tempfile

import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import compare
from molmo2_jax.hf import config as hf_config
from molmo2_jax.hf import processor
from molmo2_jax.hf import shards
from molmo2_jax.inputs import tokenizer as tokenizers

_LEFT_OUT = ("model.point_predictor.", "model.build_vit_embedding.", "lm_head.")
_NAMES = (("model.vit.", "model.vision_backbone.image_vit."),
          ("model.connector.", "model.vision_backbone."))
_EMBEDDING, _HEAD = "model.transformer.wte.embedding", "lm_head.output_embeddings"


def with_transformers(report: compare.Report, folder: pathlib.Path, opened: checkpoint.Opened,
                      tokenizer: tokenizers.Tokenizer | None) -> None:
    """Adds the checks that need transformers to the report."""
    report.skip("remote code: scores of choices", "MolmoPoint's remote code needs transformers 4.57.1 and is "
                f"not run here; installed is {importlib.metadata.version('transformers')}, which has no "
                "molmo_point of its own")
    cases = compare.examples(opened.config, opened.inputs, tokenizer) if tokenizer else None
    ours = report.run("logits: ours", _compute_ours, folder, cases)
    with tempfile.TemporaryDirectory() as scratch:
        model = report.run("transformers: tensors as those of molmo2", _load, opened, pathlib.Path(scratch))
        for kind in cases or ():
            report.run(f"logits of the base vocabulary: {kind}", _compare, kind, model, opened, cases, ours)


def without_pointer(config: config_lib.Molmo2Config) -> config_lib.Molmo2Config:
    """Returns the model without its pointer, and with an output layer of the connector."""
    return dataclasses.replace(config, pointer=None, connector=dataclasses.replace(
        config.connector, has_output=True))


def tensors_without_pointer(opened: checkpoint.Opened) -> list[shards.Pending]:
    """Returns the folder's tensors under the released names of a model without a pointer."""
    found = opened.source.tensors

    def name_of(name: str) -> str:
        old, new = next((pair for pair in _NAMES if name.startswith(pair[0])), ("", ""))
        return new + name.removeprefix(old)

    def copy(name: str, tensor: shards.Tensor) -> shards.Pending:
        return shards.Pending(name, tensor.shape, lambda: [tensor.read()])

    def made(name: str, value: np.ndarray) -> shards.Pending:
        return shards.Pending(name, value.shape, lambda: [value])

    renamed = [copy(name_of(name), tensor) for name, tensor in found.items()
               if not name.startswith(_LEFT_OUT)]
    renamed.append(copy("lm_head.weight", found.get(_HEAD, found[_EMBEDDING])))
    if not opened.config.connector.has_output:
        width, layer = opened.config.vision.width, "model.vision_backbone.image_pooling_2d.wo"
        renamed += [made(f"{layer}.weight", np.eye(width, dtype=np.float32)),
                    made(f"{layer}.bias", np.zeros(width, np.float32))]
    return renamed


def _load(opened: checkpoint.Opened, folder: pathlib.Path):
    from molmo2_jax.hf import peer
    shards.write_folder(folder, tensors_without_pointer(opened), np.dtype(np.float32), 5e9)
    processor.write_json(folder / "config.json", hf_config.write(without_pointer(opened.config)))
    return peer.load(folder), "none missing, unused or of another shape"


def _compute_ours(folder: pathlib.Path, cases: dict) -> tuple[dict[str, np.ndarray], str]:
    params, config, _ = checkpoint.import_checkpoint(folder)
    logits = dict(zip(cases, compare.our_logits(params, config, [one for one, _ in cases.values()])))
    if not all(np.isfinite(x).all() for x in logits.values()):
        raise ValueError("logits must be finite")
    return logits, f"{sum(len(x) for x in logits.values())} positions"


def _compare(kind: str, model, opened: checkpoint.Opened, cases: dict, ours: dict) -> str:
    from molmo2_jax.hf import peer
    config, one = opened.config, cases[kind][0]
    low, patch = config.special_id("<im_low>"), config.special_id("<im_patch>")
    seen: types.Sequence = dataclasses.replace(one, tokens=np.where(one.tokens == low, patch, one.tokens))
    theirs = peer.logits(model, [seen], without_pointer(config))[0]
    mine = ours[kind][:, :config.text.vocab_size]
    error, size = float(np.abs(theirs - mine).max()), float(np.abs(theirs).max())
    words = f"differ by at most {error:.1e}, {error / size:.1e} of the largest"
    if not error <= compare.LOGITS_TOLERANCE * size:
        raise ValueError(f"logits must agree within {compare.LOGITS_TOLERANCE} of the largest; they {words}")
    return words
