"""Which implementation serves an op: the registry, the choice, and the reason where one does not serve.

A backend is a `torch.ops` namespace with the schemas of `torch.ops.mnops`. To add one: a module or folder
whose functions have the names and arguments of the ops it serves, and one line in BACKENDS.
"""

import importlib
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

from mnops import _native, measured


class Backend(NamedTuple):
    name: str
    namespace: str  # of torch.ops
    devices: tuple[str, ...]  # device types it runs on; empty: every one
    module: str | None  # holds the kernels as Python functions; None: they are in the native library
    missing: Callable[[], str | None] = lambda: None  # why this machine lacks it altogether, None if it does not
    traced: bool = False  # within module.inlined() its functions are what a compiler can look into
    fallback: str | None = None  # the backend that serves, where this one is forced, the ops that it lacks


# Triton runs its kernels on the CPU, as NumPy, where this is set before it is imported: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Here the CUDA kernels run on the CPU, compiled as plain C++: for tests.
EMULATED = _native.cuda_emulation() is not None

# In order of preference: by default the first that serves the op on the tensor's device is taken.
BACKENDS = {
    b.name: b
    for b in (
        Backend("cpu", "mnops", ("cpu",), None),
        Backend("reference", "mnops_reference", (), "mnops.reference"),
        # After the reference until a GPU has run their tests: forced, not chosen.
        Backend("cuda", "mnops_cuda_emulated", ("cpu",), None, fallback="triton")
        if EMULATED
        else Backend("cuda", "mnops", ("cuda",), None, _native.cuda_missing, fallback="triton"),
        Backend(
            "triton", "mnops_triton", ("cuda", "cpu") if INTERPRETED else ("cuda",), "mnops.triton",
            traced=not INTERPRETED,
        ),
    )
}


def why_absent(name: str, device: str) -> str | None:
    """Why backend `name` serves no op on tensors of device type `device`; None if it serves some."""
    backend = BACKENDS[name]
    if backend.devices and device not in backend.devices:
        return f"it runs on {' and '.join(backend.devices)} tensors, not on {device}"
    if backend.module is not None:
        try:
            importlib.import_module(backend.module)
        except ImportError as error:
            return str(error)
    return backend.missing()


def why_not(name: str, op: str, device: str) -> str | None:
    """Why backend `name` does not itself serve `op` on tensors of device type `device`; None if it does."""
    if absent := why_absent(name, device):
        return absent
    backend = BACKENDS[name]
    if backend.module is None:
        found = torch._C._dispatch_has_kernel_for_dispatch_key(f"{backend.namespace}::{op}", device.upper())
    else:
        found = hasattr(importlib.import_module(backend.module), op)
    return None if found else f"it has no kernel for {op} on {device}"


def serving(name: str, op: str, device: str) -> str:
    """The backend that serves `op` on device type `device` where `name` is forced: itself, or the fallback for an
    op that it lacks. One that is absent altogether is not replaced. Raises RuntimeError with the reasons."""
    fallback = BACKENDS[name].fallback
    return _first([name, fallback] if fallback and why_absent(name, device) is None else [name], op, device)


def _first(names: Iterable[str], op: str, device: str) -> str:
    reasons = {}
    for name in names:
        reasons[name] = why_not(name, op, device)
        if reasons[name] is None:
            return name
    said = "; ".join(f"backend {name!r} does not serve it: {why}" for name, why in reasons.items())
    raise RuntimeError(f"{op}: {said}")


def _known(name: str, what: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(BACKENDS)}, got {name!r}")


_forced: str | None = os.environ.get("MNOPS_BACKEND") or None
if _forced:
    _known(_forced, "MNOPS_BACKEND")
_chosen: dict[tuple[str | None, str, str, measured.Shape | None], str] = {}


def _choose(forced: str | None, op: str, device: str, shape: measured.Shape | None = None) -> str:
    key = forced, op, device, shape
    if key not in _chosen:
        fastest = measured.best(op, shape) if device == measured.DEVICE and not forced else []
        name = serving(forced, op, device) if forced else _first([*fastest, *BACKENDS], op, device)
        _chosen[key] = BACKENDS[name].namespace
    return _chosen[key]


# torch.compiler.assume_constant_result, whose call would load the compiler (seconds): the compiler guards on the
# arguments, and need not look inside.
_choose._dynamo_marked_constant = True


def choose(op: str, device: str, args: tuple = ()) -> str:
    """The `torch.ops` namespace that serves `op` on device type `device`: the forced backend's, or the one measured
    to be fastest on such a GPU (with `args`, the op's own: for such a layer), or the first that serves.

    Raises RuntimeError with the reason if neither the forced backend nor its fallback serves it.
    """
    known = args and device == measured.DEVICE and op in measured.OPS and _forced is None
    if known and not torch.compiler.is_compiling():  # a compiler's graph takes the op's usual one
        return _choose(None, op, device, measured.Shape.of(op, args))
    return _choose(_forced, op, device)


def recording(x: Tensor | Proxy) -> bool:
    """Whether the run on x is recorded (torch.export, torch.onnx, torch.jit.trace, torch.fx) to run elsewhere.

    Stock operations are recorded then, which need no mnops there; a forced backend keeps the ops.
    """
    recorded = torch.compiler.is_exporting() or torch._C._get_tracing_state() or isinstance(x, Proxy)
    return recorded and _forced is None


def transformed() -> bool:
    """Whether torch.func or forward-mode AD look on; to be asked outside of a compiler."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def wants_stock(x: Tensor | Proxy) -> bool:
    """Whether stock operations are to run on x: they need no mnops where they run, and have every rule."""
    return recording(x) or (not torch.compiler.is_compiling() and transformed())


def chosen_native(op: str, device: str) -> bool:
    """Whether something faster than the reference serves op on this device type, or a backend is forced."""
    return _forced is not None or choose(op, device) != BACKENDS["reference"].namespace


def _together(forced: str | None, ops: tuple[str, ...], device: str) -> bool:
    reference = BACKENDS["reference"].namespace
    try:
        return len({_choose(forced, op, device) == reference for op in ops}) == 1
    except RuntimeError:
        return False


_together._dynamo_marked_constant = True


def together(*ops: str, device: str) -> bool:
    """Whether on device type `device` the reference serves all of these ops, or none."""
    return _together(_forced, ops, device)


class backend:
    """Context manager that forces one backend: `with mnops.backend("reference"): ...`. The innermost counts.

    The environment variable MNOPS_BACKEND forces one from the start. An op that "cuda" lacks (pointwise_conv2d)
    goes to "triton". An unknown name raises ValueError; where neither serves an op, RuntimeError gives the reasons
    when it is called.
    """

    def __init__(self, name: str) -> None:
        _known(name, "backend")
        self.name = name

    def __enter__(self) -> None:
        global _forced
        self.previous, _forced = _forced, self.name

    def __exit__(self, *error: object) -> None:
        global _forced
        _forced = self.previous
