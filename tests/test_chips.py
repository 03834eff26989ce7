"""Names of TPU slices: chips here, cores or chips in the cloud."""

import pytest

from molmo2_jax import chips


def test_cloud_names_count_cores_where_they_do():
    assert chips.find("v5p-256") == chips.find("v5p:4x4x8") and chips.find("v5p-256").chips == 128
    assert chips.find("v6e-256").chips == 256 and chips.find("v5litepod-16").chips == 16
    assert (chips.find("v5p-256").hosts, chips.find("v6e-8").hosts, chips.find("v6e-16").hosts) == (32, 1, 4)
    with pytest.raises(ValueError, match=r"v5p:2x2x2 \(v5p-16, 8 chips\).*got 'v5p-17'"):
        chips.find("v5p-17")
    with pytest.raises(ValueError, match="v4:..., v5e:..., v5p:..., v6e:...; got 'v9'"):
        chips.find("v9")
