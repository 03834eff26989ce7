"""The loss is one weighted mean over the whole batch, however the batch is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax import loss

B, T, D, V = 2, 13, 6, 17
Z_WEIGHT = 1e-2


def arrays(seed=0):
    """Returns hidden states, head, targets and weights; half of the positions have weight 0."""
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random((B, T)) < 0.5, 0, rng.uniform(0.1, 2, (B, T)))
    return (rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32),
            rng.integers(0, V, (B, T)).astype(np.int32), weights.astype(np.float32))


def value(hidden, head, targets, weights, chunk=T):
    sums = loss.chunked_sums(hidden, jnp.matmul, head, targets, weights, chunk, "float32")
    return loss.objective(sums, Z_WEIGHT)


def test_the_loss_is_the_weighted_mean_of_cross_entropy_and_squared_log_partition():
    hidden, head, targets, weights = arrays()
    logits = (hidden @ head).astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    total, measured = value(hidden, head, targets, weights)
    expected_nll, expected_z = ((weights * x).sum() / weights.sum() for x in (nll, Z_WEIGHT * log_z**2))
    assert float(total) == pytest.approx(expected_nll + expected_z, rel=1e-5)
    assert float(measured["loss"]) == pytest.approx(expected_nll, rel=1e-5)
    assert float(measured["z_loss"]) == pytest.approx(expected_z, rel=1e-5)
    hits = (weights * (logits.argmax(-1) == targets)).sum() / weights.sum()
    assert float(measured["accuracy"]) == pytest.approx(hits, rel=1e-5)
    assert float(measured["loss_weight"]) == pytest.approx(weights.sum(), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
def test_chunks_change_neither_the_loss_nor_its_gradients(chunk):
    hidden, head, targets, weights = arrays()

    def total(hidden, head, chunk):
        return value(hidden, head, targets, weights, chunk)[0]

    grad = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)
    expected = jax.value_and_grad(
        lambda hidden, head: loss.objective(loss.token_sums(hidden @ head, targets, weights), Z_WEIGHT)[0],
        argnums=(0, 1))(hidden, head)
    for a, b in zip(jax.tree.leaves(grad(hidden, head, chunk)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


def test_rows_with_unequal_weight_may_be_summed_apart():
    """Micro-batches: sums add up, and one divisor serves all."""
    hidden, head, targets, weights = arrays()
    weights[0, 3:] = 0
    parts = [loss.chunked_sums(hidden[[n]], jnp.matmul, head, targets[[n]], weights[[n]], 4, "float32")
             for n in range(B)]
    together = loss.objective(jax.tree.map(jnp.add, *parts), Z_WEIGHT)[0]
    expected = value(hidden, head, targets, weights)[0]
    assert float(together) == pytest.approx(float(expected), rel=1e-6)
    mean_of_means = np.mean([float(loss.objective(part, Z_WEIGHT)[0]) for part in parts])
    assert abs(mean_of_means - float(expected)) > 1e-3  # otherwise the test shows nothing


def test_a_constant_factor_on_all_weights_cancels():
    hidden, head, targets, weights = arrays()
    assert float(value(hidden, head, targets, 64 * weights)[0]) == pytest.approx(
        float(value(hidden, head, targets, weights)[0]), rel=1e-6)


def test_targets_outside_the_vocabulary_are_harmless_where_nothing_is_learnt():
    hidden, head, targets, weights = arrays()
    strange = np.where(weights > 0, targets, np.where(np.arange(T) % 2, V + 5, -1))
    assert (strange != targets).any()

    def total(hidden, targets):
        return value(hidden, head, targets, weights, 4)[0]

    before, after = (jax.value_and_grad(total)(hidden, which) for which in (targets, strange))
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    assert (np.asarray(after[1])[weights == 0] == 0).all() and np.abs(after[1]).max() > 0


def test_a_batch_without_loss_tokens_has_loss_and_gradient_zero():
    hidden, head, targets, weights = arrays()
    total, grad = jax.value_and_grad(lambda h: value(h, head, targets, 0 * weights)[0])(hidden)
    assert float(total) == 0 and (np.asarray(grad) == 0).all()
