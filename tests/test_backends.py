"""The registry: which backend serves, how one is forced, and what is said where one does not serve."""

import subprocess
import sys
import types

import pytest
import torch
from conftest import missing

import mnops
from mnops import backends, measured, ops


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
    said = "'cuda' does not serve it: it has no kernel .*the package triton is not installed"
    with mnops.backend("cuda"), pytest.raises(RuntimeError, match=said):
        ops.pointwise_conv2d(X, W1)


@pytest.mark.parametrize("absent", [{"missing": lambda: "it was not built"}, {"devices": ("cuda",)}])
def test_a_backend_that_is_absent_is_not_replaced(partial, absent):
    partial(**absent)
    with mnops.backend("cuda"), pytest.raises(RuntimeError, match="it was not built|not on cpu") as raised:
        ops.pointwise_conv2d(X, W1)
    assert "'cpu'" not in str(raised.value)


@pytest.fixture
def measured_here(monkeypatch):
    """The CPU in place of a GPU of 9.0, with a table whose lines are given."""

    def use(*lines):
        table = {}
        for capability, op, shape, backend in lines:
            table.setdefault(capability, {}).setdefault(op, {})[measured.Shape(*shape)] = backend
        monkeypatch.setattr(measured, "TABLE", table)
        monkeypatch.setattr(measured, "OPS", frozenset(op for ops in table.values() for op in ops))
        monkeypatch.setattr(measured, "DEVICE", "cpu")
        monkeypatch.setattr(measured, "capability", lambda: 90)
        monkeypatch.setattr(backends, "_chosen", {})

    return use


def test_a_layer_is_served_by_what_was_fastest_for_the_nearest(measured_here):
    few, many = (4, 3, 1, 1, 8), (4, 3, 1, 1, 512)
    measured_here(
        (90, "depthwise_conv2d", few, "reference"), (90, "depthwise_conv2d", many, "cpu"),
        (80, "depthwise_conv2d", few, "cpu"), (80, "stem_conv2d", (4, 3, 2, 3, 8), "reference"),
    )  # fmt: skip
    x = {c: torch.randn(1, c, 5, 5) for c in (4, 96)}
    weight = {c: torch.randn(c, 1, 3, 3) for c in x}
    run = lambda c, *stride: ops.depthwise_conv2d(x[c], weight[c], *stride)  # noqa: E731
    assert called(lambda: run(4)) == {"mnops_reference"}
    assert called(lambda: run(96)) == {"mnops"}
    assert called(lambda: run(4, 2)) == {"mnops"}  # of no measured kind: the first that serves
    # 8.0 has rows of the stem, but 9.0 is nearer
    assert called(lambda: ops.stem_conv2d(torch.randn(1, 3, 8, 8), torch.randn(8, 3, 3, 3), 2)) == {"mnops"}
    others = [(90, "depthwise_conv2d", (4, k, 1, 1, 8), "reference") for k in (5, 7)]
    measured_here((90, "depthwise_conv2d", few, "cpu"), *others)
    assert called(lambda: run(4)) == {"mnops"}
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")  # knows the op, not the layer
    assert called(lambda: compiled(4)) == {"mnops_reference"}
    with mnops.backend("cpu"):
        assert called(lambda: run(4)) == {"mnops"}
    assert not backends.together("depthwise_conv2d", "separable_conv2d", device="cpu")  # the reference serves one


def test_what_was_fastest_and_is_absent_is_replaced(measured_here):
    measured_here((90, "pointwise_conv2d", (4, 1, 1, 4, 6), "cuda"))
    assert called(lambda: ops.pointwise_conv2d(X, W1)) == {"mnops"}


def test_the_committed_table_is_of_backends_that_there_are():
    assert {name for ops in measured.TABLE.values() for rows in ops.values() for name in rows.values()} <= set(
        backends.BACKENDS
    )


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
