"""Every test runs on eight pretend CPU devices; set before anything imports jax."""

import os
import pathlib

_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# Programs compiled by an earlier run are read back: most of the suite's time is compilation.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

from absl import flags

flags.FLAGS.mark_as_parsed()  # grain's worker processes read flags
