"""The registry: which backend serves, how one is forced, and what is said where one does not serve."""

import subprocess
import sys

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
    # triton comes with torch.utils.flop_counter where it is installed
    heavy = {"torchvision", "timm", "matplotlib", "sklearn", "PIL", "tensorboard", "torch._dynamo"}
    code = (
        f"import torch, sys; a = set(sys.modules); import mnops; print(*({heavy} & (set(sys.modules) - a)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
