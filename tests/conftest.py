"""What all tests share: which backends they run on, and hypothesis settings."""

import contextlib
import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that spin for tiny tensors starve a busy machine

import pytest
import torch

import mnops
from mnops import backends, ops

if backends.INTERPRETED:
    import interpreter

    interpreter.mend()

with contextlib.suppress(ImportError):  # where it is not installed, what needs it is skipped
    import hypothesis

    # No deadline: a first call on a busy machine may take long. derandomize: a failure is everybody's.
    hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=100)
    hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
    hypothesis.settings.register_profile("few", deadline=None, derandomize=True, max_examples=20)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# Each file is one process's: the longest begin first, so that none is left to the end.
LONGEST = [f"test_{name}.py" for name in ("compile", "cuda", "export", "fuse_compile", "readme", "train_run", "triton")]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


OPS = [name for name in ops.__all__ if name != "Pending"]


def missing(backend: str, device: str) -> str | None:
    """Why no test can run on this backend and device here; None if some can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    reasons = [backends.why_not(backend, op, device) for op in OPS]
    return None if None in reasons else reasons[0]


def unserved(backend: str, op: str, device: str) -> str | None:
    """Why neither this backend nor its fallback serves op; None if one does."""
    try:
        backends.serving(backend, op, device)
    except RuntimeError as error:
        return str(error)
    return None


def tested(request) -> list[str]:
    """The ops that a test of test_ops.py needs, the one that is tested first: its case's, those in its name, else
    all."""
    if "separable" in request.node.name:
        return ["separable_conv2d"]
    case = request.node.callspec.params.get("case")
    if hasattr(case, "op"):
        chained = ["pointwise_conv2d"] if "as_exact_as_stock" in request.node.name else []
        return [f"{case.op}_conv2d", "norm_act", *chained]
    return ["norm_act", "norm_act_pool"] if "norm_act" in request.node.name else OPS


@contextlib.contextmanager
def exact_products(device: str):
    """fp32 products in fp32, not tf32, on a GPU: what the tests hold against fp64."""
    if device == "cuda":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    else:
        yield


PLACES = [(b.name, device) for b in backends.BACKENDS.values() for device in b.devices or ("cpu", "cuda")]


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    """Every (backend, device) there may be."""
    return request.param


@pytest.fixture(params=[p for p in PLACES if missing(*p) is None], ids="-".join)
def device(request):
    """The device to test on, with each backend that serves it forced in turn."""
    name, device = request.param
    first, *others = tested(request)
    for reason in (backends.why_not(name, first, device), *(unserved(name, op, device) for op in others)):
        if reason:
            pytest.skip(f"backend {name}: {reason}")
    with mnops.backend(name), exact_products(device):
        yield device


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
