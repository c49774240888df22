"""The Triton backend without a GPU: kernels under the interpreter, and as torch.compile and export see them.

On a GPU the tests of ops run on the compiled kernels as on every other backend's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mnops

triton = pytest.importorskip("triton", reason="the package triton is not installed")
HERE = Path(__file__).parent


def test_kernels_under_the_interpreter():
    """In a process of its own: Triton looks for TRITON_INTERPRET where it is imported."""
    file = str(HERE / "triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parent, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-20000:]}{result.stderr[-2000:]}"
    print(result.stdout.splitlines()[-1])


class Pretended:
    """A driver of a GPU that is not there, for tracing, which only asks what it would compile for."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


@pytest.fixture
def driver(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", Pretended())


X = torch.randn(2, 16, 6, 5).bfloat16().to(memory_format=torch.channels_last)
NORM = [torch.rand(16) + 0.5 for _ in range(4)]
PENDING = (*NORM, 1e-5, "relu")
CALLS = {  # op: arguments, kernels forward, kernels backward
    "depthwise_conv2d": ((X, torch.randn(16, 1, 3, 3), *PENDING, [1, 1], [1] * 4, [1, 1], True), 2, 2),
    "pointwise_conv2d": ((X, torch.randn(32, 16, 1, 1), *PENDING, True), 3, 3),
    "norm_act": ((X, *PENDING), 1, 2),
    "norm_act_pool": ((X, *PENDING), 1, 2),
}
AHEAD = {  # dtype, compute capability: "layer kernel" of the few that CI compiles, and how many those are
    ("bfloat16", 90): ("^depthwise 64 112/2 .*conv2d|^pointwise 32->64 .*conv2d|^stem .*wgrad", 4),
    ("bfloat16", 80): ("^pointwise 64->128 .*backward|^separable 32->64 .*conv2d", 2),  # most registers
    ("tf32", 80): ("^pointwise 128->128 .*[dw]grad|^separable 64->128 .*conv2d", 3),  # a kernel each
    ("tf32", 89): ("^pointwise 128->256 .*conv2d", 1),  # 99 KiB of shared memory
    ("float32", 90): ("^depthwise 32 112/1 .*2d_kernel|^pointwise 128->128 .*(incoming|statistics)", 4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", CALLS)
def test_compilers_see_the_kernels(op, driver):
    """AOTAutograd's graphs hold the launches, forward and backward, and no opaque op."""
    from torch._functorch.aot_autograd import aot_function

    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    arguments, forward, backward = CALLS[op]
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]

    def call(*given):
        replaced = dict(zip(tensors, given))
        return getattr(torch.ops.mnops_triton, op)(*(replaced.get(i, a) for i, a in enumerate(arguments)))

    with torch._subclasses.FakeTensorMode() as mode:
        given = [mode.from_tensor(arguments[i]).detach().requires_grad_() for i in tensors]
        outputs = aot_function(call, fw_compiler=keep, bw_compiler=keep)(*given)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        torch.autograd.grad(outputs, given, [torch.empty_like(o) for o in outputs])
    counts = [sum(name == "triton_kernel_wrapper_functional" for name in names) for names in graphs]
    assert counts == [forward, backward]
    assert not any("mnops" in name for names in graphs for name in names)


def test_export_keeps_the_op():
    """A program that is exported on one machine finds the kernels on the next."""

    class Module(torch.nn.Module):
        def forward(self, x, weight):
            return torch.ops.mnops_triton.pointwise_conv2d(x, weight, *NORM, 1e-5, "relu", False)[0]

    program = torch.export.export(Module(), CALLS["pointwise_conv2d"][0][:2])
    for p in (program, program.run_decompositions()):
        assert "mnops_triton.pointwise_conv2d.default" in {str(n.target) for n in p.graph.nodes}


@pytest.mark.parametrize("where", AHEAD, ids=lambda where: f"{where[0]} sm_{where[1]}")
def test_compiles_ahead_of_time_without_spills(where, tmp_path, monkeypatch):
    """A few of the kernels; `python -m mnops.triton.aot` compiles them all."""
    from mnops.triton import aot

    (dtype, arch), (select, count) = where, AHEAD[where]
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    rows = list(aot.binaries([dtype], [arch], select))
    assert len(rows) == count, rows
    for row in rows:
        assert row.spilled == 0, row
        assert row.resident * row.warps >= 8, row  # two warps for each of a multiprocessor's schedulers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tf32_by_torchs_switch():
    """fp32 products: as exact as cuDNN's under the same switch, on either side of it."""
    x = torch.randn(2, 64, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    weight = torch.randn(48, 64, 1, 1, device="cuda")
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    for allowed, least, most in ((True, 1e-5, 1e-3), (False, 0, 1e-6)):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed), mnops.backend("triton"):
            y, _, _ = mnops.ops.pointwise_conv2d(x, weight)
        assert least <= (y - exact).norm() / exact.norm() <= most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_other_stream_and_beyond_2_31_elements():
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), mnops.backend("triton"), torch.no_grad():
        x = torch.full((2**31 // (64 * 64 * 64) + 8, 64, 64, 64), 2.0, dtype=torch.bfloat16, device="cuda")
        x = x.to(memory_format=torch.channels_last)
        x[-1, :, -1, -1] = -3.0
        z = mnops.ops.norm_act(mnops.Pending(x, act="relu"))
        assert z[-1, :, -1, -1].eq(0).all() and z[-1, :, -1, -2].eq(2).all() and z[0].eq(2).all()
        weight = torch.ones(64, 1, 3, 3, dtype=torch.bfloat16, device="cuda")
        y, mean, _ = mnops.ops.depthwise_conv2d(x, weight, padding=1, measure=True)
        assert y[-1, :, -1, -1].eq(3).all() and y[-1, :, 5, 5].eq(18).all() and mean.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_running_statistics_on_a_gpu():
    from mnops.functional import update_running

    given = [torch.rand(1500, device="cuda") for _ in range(4)]
    found = {}
    for name in ("triton", "reference"):
        with mnops.backend(name):
            found[name] = [t.clone() for t in given]
            update_running(*found[name], 50, 0.1)
            assert all(t._version == 1 for t in found[name][:2])
    torch.testing.assert_close(found["triton"], found["reference"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_training_step():
    """Inductor runs the kernels that it sees, with the numbers of eager."""
    model = mnops.MobileNet(num_classes=5, width_mult=0.25).cuda()
    x = torch.randn(4, 3, 64, 64, device="cuda")
    with mnops.backend("triton"):
        compiled = torch.compile(model, fullgraph=True)
        for run in (model, compiled):
            model.zero_grad()
            logits = run(x)
            logits.square().sum().backward()
            gradient = model.classifier.weight.grad.clone()
            if run is model:
                expected = logits.detach(), gradient
        torch.testing.assert_close((logits.detach(), gradient), expected, rtol=2e-2, atol=2e-2)


def test_tiles_are_measured_once_and_kept(tmp_path, monkeypatch):
    from mnops.triton import launch, tune

    class OnGpu:
        device = torch.device("cuda", 0)

    measured, seconds = [], {"slow": 2.0, "fast": 1.0, "too large": float("inf")}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_milliseconds", lambda call: seconds[call()])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tune._known.cache_clear()

    def best(shape):
        return tune.best("op", shape, OnGpu, list(seconds), lambda tile: measured.append(tile) or tile)

    assert best((8, 8)) == "slow" and not measured  # the first guess, where the switch is off
    monkeypatch.setenv(tune.SWITCH, "1")
    with launch.recorded():
        assert best((8, 8)) == "slow" and not measured
    assert [best((8, 8)), best((8, 8))] == ["fast", "fast"]
    assert measured == list(seconds)
    tune._known.cache_clear()  # as in the next process
    assert best((8, 8)) == "fast" and len(measured) == 3
    best((9, 9))
    assert len(measured) == 6
    tune._known.cache_clear()


def test_64_bit_offsets():
    """Sizes beyond 2^31 elements reach the kernels as they are: nothing on the host overflows or allocates by
    data.
    """
    from mnops.triton import norm_act
    from mnops.triton.launch import recorded

    x = torch.empty((4096, 64, 112, 112), device="meta", memory_format=torch.channels_last)
    assert x.numel() > 2**31
    with recorded() as launches:
        z = norm_act(x, None, None, None, None, 1e-5, "relu")
    assert z.shape == x.shape and launches[0].arguments["P"] == 4096 * 112 * 112
