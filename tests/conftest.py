"""What all tests share: which backends they run on, and hypothesis settings."""

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that spin for tiny tensors starve a busy machine

import hypothesis
import pytest
import torch

import mnops
from mnops import backends

if backends.INTERPRETED:
    import interpreter

    interpreter.mend()

# No deadline: a first call on a busy machine may take long. derandomize: a failure is everybody's.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=100)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.register_profile("few", deadline=None, derandomize=True, max_examples=20)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def missing(backend: str, device: str) -> str | None:
    """Why the tests cannot run on this backend and device here; None if they can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return backends.why_not(backend, "depthwise_conv2d", device)


PLACES = [(b.name, device) for b in backends.BACKENDS.values() for device in b.devices or ("cpu", "cuda")]


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    """Every (backend, device) there may be."""
    return request.param


@pytest.fixture(params=[p for p in PLACES if missing(*p) is None], ids="-".join)
def device(request):
    """The device to test on, with each backend that serves it forced in turn."""
    name, device = request.param
    with mnops.backend(name):
        yield device


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
