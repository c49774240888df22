"""The registry: which backend serves, how one is forced, and what is said where one does not serve."""

import subprocess
import sys
import types

import pytest
import torch
from conftest import missing

import mnops
from mnops import backends, ops


def test_place_is_tested_here(place):
    """All tests of ops run on every backend and device there is; this says which ones this machine lacks."""
    if reason := missing(*place):
        pytest.skip(f"backend {place[0]} on {place[1]}: {reason}")


X, W = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)


def called(function) -> set[str]:
    """Namespaces of the ops that ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {e.key.split("::")[0] for e in profile.key_averages() if e.key.startswith("mnops")}


def test_the_best_backend_is_the_default():
    assert called(lambda: ops.depthwise_conv2d(X, W)) == {"mnops"}


def test_forcing_nests_and_ends():
    with mnops.backend("reference"):
        assert called(lambda: ops.depthwise_conv2d(X, W)) == {"mnops_reference"}
        with mnops.backend("cpu"):
            assert called(lambda: ops.depthwise_conv2d(X, W)) == {"mnops"}
        assert called(lambda: ops.depthwise_conv2d(X, W)) == {"mnops_reference"}
    with pytest.raises(KeyError), mnops.backend("reference"):
        raise KeyError
    assert called(lambda: ops.depthwise_conv2d(X, W)) == {"mnops"}


def test_backward_runs_where_forward_ran():
    x = X.clone().requires_grad_()
    with mnops.backend("reference"):
        y, _, _ = ops.depthwise_conv2d(x, W)
    assert called(y.sum().backward) == {"mnops_reference"}


def test_unknown_name():
    with pytest.raises(ValueError, match="backend must be one of cpu, reference, .* got 'tpu'"):
        mnops.backend("tpu")


def test_forcing_one_that_does_not_serve_says_why():
    with mnops.backend("cpu"), pytest.raises(RuntimeError, match="it runs on cpu tensors, not on meta"):
        ops.depthwise_conv2d(X.to("meta"), W.to("meta"))


def test_reasons():
    assert backends.why_not("cpu", "depthwise_conv2d", "cpu") is None
    assert backends.why_not("reference", "depthwise_conv2d", "cuda") is None
    assert "not on cpu" in backends.why_not("cuda", "depthwise_conv2d", "cpu")
    if not torch.cuda.is_available():
        assert "CUDA" in backends.why_not("cuda", "depthwise_conv2d", "cuda")


@pytest.fixture
def partial(monkeypatch):
    """A backend "cuda" on the CPU, the reference without a pointwise_conv2d; the arguments are Backend's others."""

    def make(**others):
        module = types.ModuleType("only_depthwise")
        module.depthwise_conv2d = mnops.reference.depthwise_conv2d
        monkeypatch.setitem(sys.modules, module.__name__, module)
        given = {"devices": ("cpu",), "module": module.__name__, "fallback": "cpu", **others}
        monkeypatch.setitem(backends.BACKENDS, "cuda", backends.Backend("cuda", "mnops_reference", **given))
        monkeypatch.setattr(backends, "_chosen", {})

    return make


W1 = torch.randn(6, 4, 1, 1)


def test_ops_that_a_backend_lacks_are_its_fallbacks(partial):
    partial()
    with mnops.backend("cuda"):
        assert called(lambda: ops.depthwise_conv2d(X, W)) == {"mnops_reference"}
        assert called(lambda: ops.pointwise_conv2d(X, W1)) == {"mnops"}
    assert backends.serving("cuda", "pointwise_conv2d", "cpu") == "cpu"
    assert backends.why_not("cuda", "pointwise_conv2d", "cpu") == "it has no kernel for pointwise_conv2d on cpu"


def test_a_fallback_that_does_not_serve_says_why_too(partial, monkeypatch):
    partial(fallback="triton")
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.Backend("triton", "", ("cpu",), "mnops.triton"))
    monkeypatch.setitem(sys.modules, "triton", None)  # not installed
    monkeypatch.delitem(sys.modules, "mnops.triton", raising=False)
    said = "'cuda' does not serve it: it has no kernel for .*'triton' does not serve it: the package triton is not installed"
    with mnops.backend("cuda"), pytest.raises(RuntimeError, match=said):
        ops.pointwise_conv2d(X, W1)


@pytest.mark.parametrize("absent", [{"missing": lambda: "it was not built"}, {"devices": ("cuda",)}])
def test_a_backend_that_is_absent_is_not_replaced(partial, absent):
    partial(**absent)
    with mnops.backend("cuda"), pytest.raises(RuntimeError, match="it was not built|not on cpu") as raised:
        ops.pointwise_conv2d(X, W1)
    assert "'cpu'" not in str(raised.value)


@pytest.mark.parametrize(("value", "expected"), [("reference", "mnops_reference"), ("", "mnops")])
def test_environment_variable(value, expected, monkeypatch):
    monkeypatch.setenv("MNOPS_BACKEND", value)
    code = "from mnops import backends; print(backends.choose('norm_act', 'cpu'))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == expected
    )


def test_wrong_environment_variable(monkeypatch):
    monkeypatch.setenv("MNOPS_BACKEND", "tpu")
    result = subprocess.run([sys.executable, "-c", "import mnops"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "MNOPS_BACKEND must be one of cpu, reference" in result.stderr


def test_import_is_light():
    heavy = {"torchvision", "timm", "matplotlib", "sklearn", "PIL", "tensorboard", "torch._dynamo", "triton"}
    code = (
        f"import torch, sys; a = set(sys.modules); import mnops; print(*({heavy} & (set(sys.modules) - a)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
