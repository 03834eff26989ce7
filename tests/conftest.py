"""Every test runs on eight pretend CPU devices; set before anything imports jax."""

import os
import pathlib

_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"

os.environ["JAX_PLATFORMS"] = "cpu"
# The cheapest machine code takes half the time to compile, and tests run a program once or twice.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0"]).strip()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# Where TensorFlow is installed (for seqio) it would look for gs:// in the cloud, not in the tests' memory.
os.environ["EPATH_USE_TF"] = "false"
# Programs compiled by an earlier run are read back: most of the suite's time is compilation.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

from absl import flags

flags.FLAGS.mark_as_parsed()  # grain's worker processes read flags

# Files that take longest, longest first: workers that start with them end together.
SLOWEST = (
    "hf/test_real_widths.py", "test_aot.py", "test_sharding.py", "test_train.py",
    "launch/test_hosts.py", "test_decode.py", "launch/test_quickstart.py",
    "test_optim.py", "test_generate.py", "attention/test_pallas_tpu.py", "launch/test_train.py",
    "attention/test_compile_tpu.py", "hf/test_transformers.py", "test_checkpoint.py",
    "attention/test_flash.py", "test_evaluate.py", "hf/test_shipped_model.py",
    "launch/test_mains.py", "data_pipelines/test_pipeline.py", "attention/test_on_a_mesh.py",
    "test_architecture.py")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # xdist would start with the files of the most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    root = pathlib.Path(__file__).parent
    place = {root / name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
