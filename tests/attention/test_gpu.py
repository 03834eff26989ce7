"""The kernels for NVIDIA GPUs, interpreted, against dense attention; and lowered without a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from molmo2_jax.attention import gpu
from molmo2_jax.attention import tiling as tiling_lib
from molmo2_jax.attention import tree_mask
from tests.attention import reference
from tests.attention import rows


# Groups and head widths that are no powers of two, lengths that are no multiple of a tile.
@pytest.mark.parametrize("rows_, length, num_heads, num_kv_heads, head_dim, tiles", [
    (2, 100, 6, 2, 72, (16, 32)),
    (1, 150, 8, 1, 128, (128, 32)),
])
def test_kernels_equal_dense_attention_on_random_packs(
        rows_, length, num_heads, num_kv_heads, head_dim, tiles):
    tiling = tiling_lib.Tiling(query_tile=tiles[0], key_tile=tiles[1], ring=0, interpret=True)
    for seed in range(12):
        mask = rows.random_mask(seed, rows_, length)
        reference.assert_equal_to_dense(reference.kernel("gpu", tiling), mask, *rows.random_tensors(
            seed, rows_, length, num_heads, num_kv_heads, head_dim))


@pytest.mark.parametrize("dtype, head_dim", [(jnp.bfloat16, 128), (jnp.float32, 72)])
def test_kernels_lower_for_cuda_without_a_gpu(dtype, head_dim):
    tiling = gpu.choose_tiling(head_dim)
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    q, k = array(2, 300, 8, head_dim), array(2, 300, 2, head_dim)
    mask = tree_mask.TreeMask(*[array(2, 300, dtype=np.int32)] * 2)

    def both(q, k, v, grad, mask):
        work = tiling_lib.prepare(mask, tree_mask.all_queries(mask), tiling)
        out, pull = jax.vjp(functools.partial(gpu.attend, work=work, tiling=tiling), q, k, v)
        return out, *pull(grad)

    exported = export.export(jax.jit(both), platforms=["cuda"], disabled_checks=[
        export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")])(q, k, k, q, mask)
    assert len(re.findall(r"@__gpu\$xla.gpu.triton", exported.mlir_module())) == 3
