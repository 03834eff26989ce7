"""Other ways to attend, to compare ours with: on a TPU functions attend(q, k, v, mask); a rule for a GPU."""

import importlib

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from molmo2_jax.attention import tree_mask

TOKAMAX = "tokamax._src.ops.experimental.tpu.splash_attention"


def _heads_first(kernel, q, k, v):
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    return jax.vmap(kernel)(*(x.transpose(0, 2, 1, 3) for x in (q, k, v))).transpose(0, 2, 1, 3)


def splash(q, k, v, mask, tile: int = 1024):
    """Returns causal attention by the kernel that comes with JAX; `mask` is not looked at."""
    del mask
    length, num_heads = q.shape[1:3]
    causal = splash_attention_mask.CausalMask((length, length))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * num_heads), head_shards=1, q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=tile, block_kv=tile, block_kv_compute=512, block_q_dkv=tile, block_kv_dkv=tile,
            block_kv_dkv_compute=512, block_q_dq=tile, block_kv_dq=tile))
    return _heads_first(kernel, q, k, v)


def _tokamax(tile):
    """Returns tokamax's modules of kernel and masks, and the tiles.

    Raises:
      ValueError: the package is not installed.
    """
    try:
        kernel, masks = (importlib.import_module(f"{TOKAMAX}.splash_attention_{part}")
                         for part in ("kernel", "mask"))
    except ImportError as error:
        raise ValueError(f"this peer needs `pip install tokamax`; got {error}") from error
    config = kernel.SplashConfig(
        block_q=tile, block_kv=tile, block_kv_compute=512, block_q_dkv=tile, block_kv_dkv=tile,
        block_kv_dkv_compute=512, dq_reduction_steps=3)  # more steps: a copy of dq for every row of tiles
    return kernel, masks, config


def tokamax_causal(q, k, v, mask, tile: int = 1024):
    """Returns causal attention by tokamax's splash kernel; `mask` is not looked at."""
    del mask
    kernel, masks, config = _tokamax(tile)
    causal = masks.CausalMask((q.shape[1], q.shape[1]))
    return _heads_first(kernel.make_splash_mha_single_device(causal, config=config), q, k, v)


def tokamax_dense(q, k, v, mask, tile: int = 1024):
    """Returns attention of one row by tokamax's splash kernel, which is given the whole S x S mask."""
    kernel, _, config = _tokamax(tile)
    return _heads_first(kernel.make_dynamic_splash_mha(tree_mask.dense(mask)[0], config=config), q, k, v)


def flex_rule(end, group):
    """Returns the rule of the mask as FlexAttention calls it: (row, head, query, key) -> may it see."""
    def rule(b, h, i, j):
        del b, h
        return ((j <= i) & (i < end[j])) | ((group[i] == group[j]) & (group[j] >= 0))
    return rule


PEERS = {"splash, causal only": splash, "tokamax, causal only": tokamax_causal,
         "tokamax, mask as an array": tokamax_dense}
