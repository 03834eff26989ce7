"""What tests that run torch share."""

import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    """Models this small are slower on several threads, and far slower beside other work."""
    if importlib.util.find_spec("torch"):
        import torch
        torch.set_num_threads(1)
