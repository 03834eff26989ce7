"""Names of TPU slices: by chips here, by cores or chips in the cloud."""

import pytest

from molmo2_jax.cost import chips


def test_cloud_names_count_cores_where_they_do():
    assert chips.find("v5p-256") == chips.find("v5p:4x4x8") and chips.find("v5p-256").chips == 128
    assert chips.find("v6e-256").chips == 256 and chips.find("v5litepod-16").chips == 16
    assert (chips.find("v5p-256").hosts, chips.find("v6e-8").hosts, chips.find("v6e-16").hosts) == (32, 1, 4)
    assert chips.find("v5p-384").topology == "4x4x12" and chips.find("v4-640").topology == "4x4x20"
    with pytest.raises(ValueError, match=r"v5p:2x2x2 \(v5p-16, 8 chips\).*got 'v5p-17'"):
        chips.find("v5p-17")
    assert chips.find("tpu7x-128") == chips.find("tpu7x:4x4x4") and chips.find("tpu7x-128").devices == 128


@pytest.mark.parametrize("name", ["v5e-32000", "v5litepod-3", "v5e:3x3", "v5e", "v5litepod"])
def test_an_unknown_slice_of_a_chip_lists_both_names_of_those_that_exist(name):
    with pytest.raises(ValueError, match=rf"v5e:4x8 \(v5litepod-32, 32 chips\).*got '{name}'") as caught:
        chips.find(name)
    assert "v5p" not in str(caught.value)


def test_an_unknown_chip_lists_the_chips():
    with pytest.raises(ValueError, match=r"v4:SIDES \(v4-NUMBER\), v5e:SIDES \(v5litepod-NUMBER\)") as caught:
        chips.find("v9-8")
    assert all(f"{chip}:SIDES" in str(caught.value) for chip in chips.CHIPS)


def test_no_two_slices_have_one_name_and_shapes_are_sorted_by_chips():
    slices = chips.known()
    assert len({one.cloud_name for one in slices}) == len({one.name for one in slices}) == len(slices)
    counts = [one.chips for one in slices if one.chip.name == "v5p"]
    assert counts == sorted(counts)
