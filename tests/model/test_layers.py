"""Rotary tables: the constants of YaRN, and the same last bits as transformers."""

import dataclasses

import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax.hf import config as hf_config
from molmo2_jax.model import layers
from molmo2_jax.model import text

ANGLE_TOLERANCE = 5e-5  # radians at the last position; measured 3.5e-5, one rounded power of 64 (was 2.2e-3)


@pytest.mark.parametrize("preset", ["molmo2_4b", "molmo2_8b", "molmo2_o_7b", "nano"])
@pytest.mark.slow(8)
def test_rotary_frequencies_have_the_last_bits_of_transformers(preset):
    molmo2 = pytest.importorskip("transformers.models.molmo2.modeling_molmo2")
    config = getattr(config_lib, preset)()
    values = hf_config.write(config)["text_config"]
    theirs = molmo2.Molmo2TextConfig(**values)
    variants, of_layer = text.rope_variants(config.text)
    assert len(variants) == (2 if config.text.yarn else 1)
    for variant, scaled in zip(variants, (False, True)):
        table = molmo2.Molmo2RotaryEmbedding(theirs, scaled=scaled)
        wanted = table.inv_freq.numpy()
        assert variant[0].dtype == np.float32 and (variant[0] != wanted).sum() <= 1
        np.testing.assert_allclose(variant[0] * 36863.0, wanted * 36863.0, rtol=0, atol=ANGLE_TOLERANCE)
        assert variant[1] == table.attention_scaling
    scaled_layers = [layer for layer, variant in enumerate(of_layer) if variant]
    assert scaled_layers == [layer for layer in theirs.rope_scaling_layers if config.text.yarn]


def test_yarn_keeps_the_fast_half_and_divides_the_slow_end():
    t = config_lib.molmo2_o_7b().text
    plain = layers.inverse_frequencies(t.rope_theta, t.head_dim, None)
    scaled = layers.inverse_frequencies(t.rope_theta, t.head_dim, t.yarn)
    np.testing.assert_array_equal(scaled[:19], plain[:19])     # the ramp begins after dimension 18
    np.testing.assert_allclose(scaled[35:], plain[35:] / 8, rtol=1e-6)
    assert ((scaled < plain) & (scaled > plain / 8))[19:35].all()
    assert t.yarn.attention_factor == pytest.approx(1 + 0.1 * np.log(8), abs=1e-15)


def test_a_ramp_without_width_is_a_step():
    yarn = dataclasses.replace(config_lib.YarnConfig(), beta_fast=1.0, beta_slow=1.0, original_length=8192)
    scaled = layers.inverse_frequencies(5e5, 128, yarn)
    plain = layers.inverse_frequencies(5e5, 128, None)
    assert np.isfinite(scaled).all() and (scaled <= plain).all() and scaled[-1] < plain[-1]
