"""Attention compiled for TPUs without having one: it fits, memory is linear, and training selects it."""

import collections
import functools
import importlib.util
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from molmo2_jax import config as config_lib
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax.attention import attend
from molmo2_jax.attention import tree_mask
from molmo2_jax.model import text
from tests import packs
from tests import tiny

MIB = 2**20
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu exists for Linux on x86 only")


@pytest.fixture(autouse=True)
def no_other_process_is_waited_for(monkeypatch):
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # do not query the cloud's metadata server


@pytest.fixture(autouse=True)
def programs_for_tpus_are_not_kept():
    """Disables the compilation cache, from which programs for an absent TPU cannot be loaded."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@functools.cache
def mesh(topology):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return sharding.make_mesh(sharding.MeshConfig(), devices[:1])


def compiled_attention(topology, length, num_heads, num_kv_heads, head_dim):
    """Returns (compiled forward and backward pass of one layer in bfloat16, bytes of its queries)."""
    place = NamedSharding(mesh(topology), PartitionSpec())
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    q, k = array(1, length, num_heads, head_dim), array(1, length, num_kv_heads, head_dim)
    integers = array(1, length, dtype=jnp.int32)

    def both(q, k, v, grad, mask):
        plan = attend.plan(mask, num_heads, num_kv_heads, head_dim)
        out, pull = jax.vjp(lambda *x: attend.attend(*x, plan), q, k, v)
        return out, *pull(grad)

    with jax.set_mesh(mesh(topology)):
        lowered = jax.jit(both).lower(q, k, k, q, tree_mask.TreeMask(integers, integers))
        return lowered.compile(), 2 * length * num_heads * head_dim


@needs_libtpu
@pytest.mark.parametrize("topology, head_dim", [("v5e:2x2", 64), ("v6e:2x2", 72), ("tpu7x:2x2x1", 128)])
@pytest.mark.slow(9)
def test_kernels_compile_for_every_chip_and_head_size(topology, head_dim):
    compiled, size = compiled_attention(topology, 2560, 8, 8, head_dim)
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * size


@needs_libtpu
@pytest.mark.slow(35)
def test_temporary_memory_is_linear_in_the_length():
    """For 16,384 tokens the dense mask of a row would take 256 MiB per byte of an entry, scores 32 GiB."""
    sizes = [compiled_attention("v5p:2x2x1", length, 32, 8, 128)[0].memory_analysis().temp_size_in_bytes
             for length in (8192, 16_384)]
    assert sizes[1] < 400 * MIB
    assert sizes[1] < 2.2 * sizes[0]


LENGTH = 2048
MODEL = config_lib.Molmo2Config(
    vision=tiny.MODEL.vision, connector=tiny.MODEL.connector,
    text=config_lib.TextConfig(vocab_size=64, additional_vocab_size=16, width=64, num_layers=4, num_heads=2,
                               num_kv_heads=1, head_dim=64, mlp_width=64, max_positions=LENGTH))


def lowered_train_step(devices, **fields):
    """Returns the train step of a small model over one row of 2048 tokens, lowered for these devices."""
    config = train.TrainConfig(steps=1, loss_chunk=64, **fields)
    model = config.model(MODEL)
    tower = optim.Tower(lr=1e-3, warmup=1)
    tx = optim.make(optim.OptimConfig(vit=tower, connector=tower, llm=tower), config.steps)
    rows = packs.random_rows(0, MODEL, 1, LENGTH, M=4, R=16)
    with jax.set_mesh(devices):
        place = NamedSharding(devices, PartitionSpec())
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), rows)
        state = state_lib.abstract(model, tx, devices)
        return jax.jit(functools.partial(train.train_step, model, tx, config)).lower(state, batch)


def kernels(lowered):
    return sorted(re.findall(r'kernel_name = "(\w+)"', lowered.as_text()))


FORWARD, BACKWARD = "tree_attention", "tree_attention_gradients"


@needs_libtpu
@pytest.mark.slow(15)
def test_training_selects_the_kernel_on_a_tpu_by_default():
    """The calls that remain with another implementation are attention among the patches of a crop."""
    without_a_flag, with_it = (collections.Counter(kernels(lowered_train_step(mesh("v5e:2x2"), **fields)))
                               for fields in ({}, {"attention": "blocked"}))
    assert without_a_flag - with_it == {FORWARD: 2, BACKWARD: 1}  # forward once more for remat
    assert not with_it - without_a_flag


@needs_libtpu
@pytest.mark.slow(40)
def test_the_compiled_decoder_runs_each_kernel_once_and_holds_nothing_quadratic():
    """Where remat keeps the outputs of the forward kernel, the compiler drops its second run."""
    length = 4096
    decoder = text.Decoder(MODEL.text, "bfloat16", remat="attention")
    place = NamedSharding(mesh("v5e:2x2"), PartitionSpec())
    array = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    integers = np.zeros((1, length), np.int32)
    embeddings = np.zeros((1, length, MODEL.text.width), np.float32)
    inputs = embeddings, integers, tree_mask.TreeMask(integers, integers)
    params = jax.tree.map(array, nn.unbox(jax.eval_shape(decoder.init, jax.random.key(0), *inputs))["params"])

    def loss(params, *inputs):
        return (decoder.apply({"params": params}, *inputs)[0] ** 2).sum()

    with jax.set_mesh(mesh("v5e:2x2")):
        lowered = jax.jit(jax.grad(loss)).lower(params, *jax.tree.map(array, inputs))
    compiled = lowered.compile()
    program = compiled.as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * length ** 2  # scores of one head
    shapes = [[int(x) for x in found.split(",")]
              for found in re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program)]
    assert length in map(max, shapes) and max(map(math.prod, shapes)) < length ** 2


def test_the_work_list_is_made_once_for_all_layers():
    assert lowered_train_step(tiny.mesh()).as_text().count("stablehlo.sort") == 1
