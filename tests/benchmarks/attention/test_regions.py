"""The compiler's schedule is read correctly, and the cycles of a row of tokens follow from it."""

import numpy as np
import pytest

from benchmarks.attention import regions as attention_regions

# A loop from 0x10 to 0x100: a branch around the body of a row and two kinds of tile.
BUNDLES = """
  0x5  : { %1 = sbr.rel (%p1) target = $region90 }
 0x10 LB: > { %2 = smov 0 }
 0x1b  : > { %3 = sbr.rel (%p2) target = $region50 }
 0x23  : > { %4 = sbr.rel (%p3) target = $region20 }
 0x30 PF: > { %5 = smov 0 } /* Start/End empty region 20 :: Start region 21 */
 0x33  : > { %6 = sbr.rel (%p4) target = $region30 }
 0x68 PF: > { %7 = smov 0 } /* Start/End empty region 30 */
 0x69  : > { %8 = sbr.rel (%p5) target = $region40 }
 0xae PF: > { %9 = smov 0 } /* Start/End empty region 40 */
 0xe0 PF: > { %10 = smov 0 } /* Start/End empty region 50 */
0x100 PF:  { %11 = smov 0 } /* Start/End empty region 90 */
"""


@pytest.fixture
def regions(tmp_path):
    path = tmp_path / "1-kernel-72-final_bundles.txt"
    path.write_text(BUNDLES)
    return attention_regions.read_regions(str(path))


def test_bodies_of_tiles_and_rows_are_distinguished_from_the_code_of_every_step(regions):
    assert regions.kinds == (0x30, 0x40) and regions.row == 8
    assert regions.step == 0x100 - 0x10 - 0x30 - 0x40 - 8


def test_a_row_costs_its_tiles_steps_and_rows_and_a_tile_at_least_its_products(regions):
    classes = np.array([[1, 0], [2, 3]])
    count = lambda tile: attention_regions.cycles("forward", regions, classes, (tile, tile), heads=1)
    assert count(128) == max(64, 0x30) + 2 * max(64, 0x40) + 3 * regions.step + 2 * regions.row
    assert count(512) == 3 * 1024 + 3 * regions.step + 2 * regions.row
