"""Tests run on eight simulated CPU devices and within a time limit; this is set before jax is imported."""

import hashlib
import os
import pathlib
import time

_ROOT = pathlib.Path(__file__).parent.parent
_CACHES = _ROOT / ".pytest_cache" / "jax"
_KEPT_DAYS = 14


def _processor() -> str:
    """Returns a key for the processor's features: programs compiled for one may crash on another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    abilities = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(abilities).encode()).hexdigest()[:12]


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    # Unoptimised code from the older emitters compiles in a quarter of the time, and tests run a program
    # only once or twice.
    "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    # By default, devices that wait 40 s for each other, as on a busy machine, end the process.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
    "--xla_cpu_collective_call_terminate_timeout_seconds=3000",
    "--xla_cpu_collective_timeout_seconds=3000"]).strip()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# If TensorFlow is installed (for seqio), etils would use it for gs:// instead of the tests' fake.
os.environ["EPATH_USE_TF"] = "false"
# Compilation takes most of the time, so workers and later runs share compiled programs. A worker that reads
# a half-written program cannot unpack it, and compiles again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHES / _processor()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import hypothesis
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()  # grain's worker processes read flags

# On a busy machine, drawing or running an example may take arbitrarily long.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")

pytest_plugins = ["tests.limits", "tests.browser"]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")


def pytest_configure(config):
    config.left_out = 0
    if not hasattr(config, "workerinput"):
        _forget_old_programs()


def _forget_old_programs() -> None:
    oldest = time.time() - _KEPT_DAYS * 24 * 3600
    for path in _CACHES.glob("**/*"):
        if path.is_file() and path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


def pytest_collection_modifyitems(config, items):
    """Drops slow tests unless requested, and starts with the most expensive files."""
    from tests import limits  # pytest imports its plugins first
    asked = config.option.slow or config.option.markexpr or any("::" in one for one in config.args)
    slow = [] if asked else [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.left_out = len(slow)
    costs = {}
    for item in items:
        costs[item.path] = costs.get(item.path, 0) + limits.cost(item)
    items.sort(key=lambda item: -costs[item.path])


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    config = node.config
    config.left_out = max(config.left_out, getattr(node, "workeroutput", {}).get("left_out", 0))


def pytest_terminal_summary(terminalreporter, config):
    if config.left_out:
        terminalreporter.write_line(
            f"{config.left_out} slow tests were not run; `bash launch/test.sh --slow` runs them too")
