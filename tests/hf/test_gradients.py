"""Weighted loss and its gradients on packed trees equal those of PyTorch autograd through transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import functools

import jax
import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax import loss
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import weights
from molmo2_jax.model import molmo2
from tests import packs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4      # relative, of each parameter's gradient; measured 1.4e-5, 3.4e-5 of the floor
LOSS_TOLERANCE = 1e-5  # relative; measured 7e-8
Z_WEIGHT = 0.03        # large, so that its gradient matters


def trees(config):
    """Returns a full row of two message trees about videos, with different loss weights."""
    rng = np.random.default_rng(0)
    held = [packs.sequence(rng, config, packs.video(rng, config, 4), (5, 9, 3)),
            packs.sequence(rng, config, packs.video(rng, config, 2), (6, 4))]
    batch = packs.row(held, config, sum(len(one.tokens) for one in held), 6, 12)
    return batch._replace(weights=batch.weights * rng.random(batch.weights.shape).astype(np.float32))


def whole(x):
    return torch.from_numpy(np.asarray(x, np.int64))


def their_logits(model, batch):
    """Returns the logits of a model of transformers, with the dense mask of the reference's rule."""
    hidden = torch.from_numpy(np.where(packs.seen_by_the_reference(batch), 0, np.finfo(np.float32).min))
    return model(
        input_ids=whole(batch.tokens), position_ids=whole(batch.positions),
        attention_mask=hidden[:, None].float(), video_token_pooling=whole(batch.pooled[0]),
        pixel_values_videos=torch.from_numpy(batch.patches[0].astype(np.float32) / 127.5 - 1),
        video_grids=whole([[4, 1, 2], [2, 1, 2]])).logits


def their_loss(logits, batch, z_weight):
    """Returns the weighted loss of logits."""
    scale = torch.from_numpy(batch.weights)
    log_z = torch.logsumexp(logits, -1)
    targets = whole(np.where(batch.weights > 0, batch.targets, 0))  # visual tokens are never targets
    nll = log_z - torch.gather(logits, -1, targets[..., None])[..., 0]
    return (scale * (nll + z_weight * log_z ** 2)).sum() / scale.sum()


def their_gradients(model, config, batch):
    """Returns (loss, {path: gradient}) by autograd."""
    value = their_loss(their_logits(model, batch), batch, Z_WEIGHT)
    value.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    flat = {path: np.zeros(leaf.shape, np.float32) for path, leaf in weights.abstract_params(config).items()}
    for entry in weights.entries(config, "native"):
        rows = np.concatenate([gradients[name] for name in entry.tensors])
        for path in entry.paths:  # a tied head contributes to the gradient of the table
            part = flat[path] if entry.layer is None else flat[path][entry.layer]
            count = weights.rows(part.shape, entry.layout)
            part += weights.from_torch(rows[:count], part.shape, entry.layout)
            rows = rows[count:]
        assert not len(rows)
    return float(value.detach()), flat


@pytest.mark.slow(16)
@pytest.mark.parametrize("style", packs.STYLES)
def test_loss_and_gradients_of_a_packed_tree_equal_autograd(style, tmp_path):
    config = packs.random_config(style, 0)
    params = packs.random_params(config)
    batch = trees(config)
    folder = checkpoint.export_checkpoint(params, config, config_lib.InputConfig(), None, tmp_path / "m")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    wanted, wanted_gradients = their_gradients(model, config, batch)

    @jax.jit
    def ours(params):
        def value(params):
            module = molmo2.Molmo2(config)
            hidden = module.apply({"params": params}, batch, method="hidden")
            apply = functools.partial(module.apply, {"params": params})
            head = functools.partial(apply, method="logits")
            kernel = apply(method="head_kernel")
            sums = loss.chunked_sums(hidden, head, kernel, batch.targets, batch.weights, 16, "float32")
            return loss.objective(sums, Z_WEIGHT)[0]
        return jax.value_and_grad(value)(params)

    got, gradients = ours(params)
    assert abs(float(got) - wanted) <= LOSS_TOLERANCE * wanted
    for path, gradient in weights.flatten(gradients).items():
        want = wanted_gradients[path]
        # Added to all keys alike, a key bias of the pooling attention or the ViT cannot change a softmax.
        floor = 1e-3 if path.endswith("/k/bias") else 0
        error = np.linalg.norm(np.asarray(gradient) - want) / max(np.linalg.norm(want), floor)
        assert np.linalg.norm(want) > 0 and error <= TOLERANCE, (path, error, np.linalg.norm(want))
