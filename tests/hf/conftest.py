"""Fixtures of tests that run torch."""

import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    """Runs torch on one thread: small models are slower on several, especially on a busy machine."""
    if importlib.util.find_spec("torch"):
        import torch
        torch.set_num_threads(1)
