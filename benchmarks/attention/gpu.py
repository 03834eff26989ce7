"""Tree attention on an NVIDIA GPU against its peers, in one run; and compiled for an H100 that is not there.

  pip install "jax[cuda12]" torch
  python -m benchmarks.attention.gpu [--pack=video-4] [--length=16384] [--calls=50]
  python -m benchmarks.attention.gpu --table=compile

Peers: FlexAttention of PyTorch with the same rule and its mask of blocks (made before, not timed; so is our
list of tiles); cuDNN through JAX, with the mask as a dense bias, and on `causal` with its own causal mask;
the blocked path of plain XLA. Rates count the visible pairs alone: 4 x head width x heads FLOP forward, 2.5
times that backward. The ratio is FlexAttention's time over that of each.

`compile` needs no GPU, only the packages jax-cuda12-plugin and nvidia-cuda-nvcc-cu12, and
JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1: it prints what the compiler says of registers, and what it had to spill.
"""

import functools
import glob
import os
import re
import statistics
import subprocess
import tempfile
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory, too

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from absl import flags
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from benchmarks.attention import packs as attention_packs
from benchmarks.attention import peers as attention_peers
from molmo2_jax import sharding
from molmo2_jax.attention import attend
from molmo2_jax.attention import tree_mask

_TABLE = flags.DEFINE_enum("table", "time", ["time", "compile"], "What to print.")
_PACK = flags.DEFINE_multi_enum("pack", ["video-4", "image-pack", "causal"], list(attention_packs.PACKS),
                                "What rows are made of.")
_LENGTH = flags.DEFINE_multi_integer("length", [16_384], "Tokens of the row.")
_CALLS = flags.DEFINE_integer("calls", 50, "Timed calls of each, in rounds of five; the median round counts.")
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
}
"""


def milliseconds(run, wait) -> float:
    """Returns the time of one call: the median of rounds of five calls between two waits."""
    wait(run())
    rounds = []
    for _ in range(max(1, _CALLS.value // 5)):
        start = time.perf_counter()
        for _ in range(5):
            out = run()
        wait(out)
        rounds.append((time.perf_counter() - start) / 5)
    return 1e3 * statistics.median(rounds)


def both_ways(function, q, k, v, grad):
    out, pull = jax.vjp(function, q, k, v)
    return out, pull(grad)


def cudnn(q, k, v, visible):
    """Returns attention by cuDNN where bool[B, T, S] allows; None is causal attention."""
    mask = None if visible is None else visible[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=visible is None, implementation="cudnn")


def time_in_jax(attention, mask, tensors) -> tuple[float, float]:
    """Returns milliseconds forward, and forward and backward, under a mask of whatever form is asked for."""
    q, k, v, grad = (jnp.asarray(x, jnp.bfloat16) for x in tensors)
    forward = jax.jit(lambda q, k, v, mask: attention(q, k, v, mask))
    both = jax.jit(lambda q, k, v, grad, mask: both_ways(lambda *x: attention(*x, mask), q, k, v, grad))
    return (milliseconds(lambda: forward(q, k, v, mask), jax.block_until_ready),
            milliseconds(lambda: both(q, k, v, grad, mask), jax.block_until_ready))


def time_flex(mask, tensors) -> tuple[float, float]:
    """Returns milliseconds of FlexAttention, compiled, forward, and forward and backward."""
    import torch
    from torch.nn.attention import flex_attention

    end, group = (torch.tensor(np.asarray(x[0]), device="cuda") for x in mask)
    rule, length = attention_peers.flex_rule(end, group), end.shape[0]
    blocks = flex_attention.create_block_mask(rule, None, None, length, length, device="cuda")
    run = torch.compile(functools.partial(flex_attention.flex_attention, block_mask=blocks, enable_gqa=True))
    q, k, v, grad = (torch.tensor(x.transpose(0, 2, 1, 3), device="cuda", dtype=torch.bfloat16)
                     for x in tensors)
    wait = lambda _: torch.cuda.synchronize()
    forward = milliseconds(lambda: run(q, k, v), wait)
    for x in (q, k, v):
        x.requires_grad_()
    return forward, milliseconds(lambda: torch.autograd.grad(run(q, k, v), (q, k, v), grad), wait)


def contenders(name):
    """Returns {who: function of (mask, tensors) -> (forward, both) in milliseconds}.

    What each makes of the mask for all layers of a step is made before, and not timed.
    """
    def planned(implementation, mask, tensors):
        plan = jax.jit(lambda mask: attend.plan(mask, HEADS, KV_HEADS, HEAD_DIM, implementation))(mask)
        return time_in_jax(attend.attend, plan, tensors)

    found = {"ours": functools.partial(planned, "pallas_gpu"), "FlexAttention": time_flex,
             "blocked": functools.partial(planned, "blocked"),
             "cuDNN, dense bias": lambda mask, tensors: time_in_jax(
                 cudnn, jax.jit(tree_mask.dense)(mask), tensors)}
    if name == "causal":
        found["cuDNN, causal"] = lambda mask, tensors: time_in_jax(cudnn, None, tensors)
    return found


def print_times() -> None:
    if jax.default_backend() != "gpu":
        raise SystemExit(f"times need an NVIDIA GPU; got {jax.default_backend()!r} (try --table=compile)")
    device = jax.devices()[0].device_kind
    print(f"{device}, {HEADS} query heads, {KV_HEADS} key heads of {HEAD_DIM}, bfloat16")
    print("| pack | tokens | density | way | fwd / fwd+bwd, ms | TFLOP/s | FlexAttention / this |")
    print("|---" * 7 + "|")
    for name in _PACK.value:
        for length in _LENGTH.value:
            mask = attention_packs.row(attention_packs.PACKS[name], length, 0)
            pairs = attention_packs.visible_pairs(mask)
            rng = np.random.default_rng(0)
            tensors = [rng.standard_normal((1, length, heads, HEAD_DIM), np.float32)
                       for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
            times = {}
            for who, measure in contenders(name).items():
                try:
                    times[who] = measure(mask, tensors)
                except Exception as error:  # a peer that is missing or cannot do this is a line of the table
                    print(f"{who}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            print_rows(name, length, pairs, times)


def print_rows(name, length, pairs, times) -> None:
    flops = 4 * HEAD_DIM * HEADS * pairs
    for who, (forward, both) in times.items():
        rates = f"{flops / forward / 1e9:.0f} / {3.5 * flops / both / 1e9:.0f}"
        flex = times.get("FlexAttention")
        ratio = f"{flex[0] / forward:.2f} / {flex[1] / both:.2f}" if flex else ""
        print(f"| {name} | {length} | {pairs / length ** 2:.1%} | {who} | {forward:.2f} / {both:.2f} | "
              f"{rates} | {ratio} |", flush=True)


def print_compiled() -> None:
    """Compiles one layer, forward and backward, for an H100, and prints what its kernels need."""
    try:
        import nvidia.cuda_nvcc
    except ImportError as error:
        raise SystemExit("--table=compile needs the packages jax-cuda12-plugin and nvidia-cuda-nvcc-cu12; "
                         f"got {error}") from error
    assembler = os.path.join(list(nvidia.cuda_nvcc.__path__)[0], "bin", "ptxas")
    os.environ["PATH"] = os.path.dirname(assembler) + os.pathsep + os.environ["PATH"]
    devices = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices[:1])
    print("| head width | tokens | kernel | registers | spilled, bytes | temporary of the layer, MiB |")
    print("|---" * 6 + "|")
    for head_dim in (64, 128):
        for length in _LENGTH.value:
            with tempfile.TemporaryDirectory() as folder:
                temporary = compile_layer(mesh, length, head_dim, folder)
                for path in sorted(glob.glob(f"{folder}/*.ptx")):
                    with open(path, encoding="utf-8") as lines:
                        kernel = re.search(r"\.entry (tree_\w+)", lines.read())
                    if kernel:
                        said = subprocess.run([assembler, "-v", "-arch=sm_90a", path, "-o", os.devnull],
                                              capture_output=True, text=True, check=True).stderr
                        registers, spilled = (re.search(pattern, said)[1] for pattern in (
                            r"Used (\d+) registers", r"(\d+) bytes spill stores"))
                        print(f"| {head_dim} | {length} | {kernel[1]} | {registers} | {spilled} | "
                              f"{temporary:.0f} |", flush=True)


def compile_layer(mesh, length, head_dim, folder) -> float:
    """Returns MiB of temporary memory of one layer, forward and backward; leaves the kernels in a folder."""
    place = NamedSharding(mesh, PartitionSpec())
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    q, k = array(1, length, HEADS, head_dim), array(1, length, KV_HEADS, head_dim)
    mask = tree_mask.TreeMask(*[array(1, length, dtype=jnp.int32)] * 2)

    def layer(q, k, v, grad, mask):
        plan = attend.plan(mask, HEADS, KV_HEADS, head_dim)
        return both_ways(lambda *x: attend.attend(*x, plan), q, k, v, grad)

    with jax.set_mesh(mesh):
        compiled = jax.jit(layer).lower(q, k, k, q, mask).compile(compiler_options={"xla_dump_to": folder})
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def main(_) -> None:
    {"time": print_times, "compile": print_compiled}[_TABLE.value]()


if __name__ == "__main__":
    app.run(main)
