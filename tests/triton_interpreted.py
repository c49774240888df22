"""The Triton kernels against the reference, under Triton's interpreter: test_triton.py runs this file.

On a GPU test_ops.py puts the compiled kernels to everything. Here are shapes with every branch of the kernels
among them, small enough for an interpreter that needs a second for a few rows of pixels.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact
from cases import ACTS, CASES, Case, vectors
from interpreter import check_overflow
from test_ops import (
    assert_near_reference,
    by_reference,
    conv_and_gradients,
    draw,
    draw_norm,
    draw_separable,
    norm_and_gradients,
    separable,
    spelled_out,
    stock_pool,
    stock_separable,
)

import mnops
from mnops import Pending, ops

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _triton():
    with mnops.backend("triton"):
        yield
    check_overflow(False)  # which a test or two of each kernel switch on


TABLE = {str(c): c for c in CASES}
SMALL = (  # beside those of the table
    Case("small", "depthwise", (2, 16, 5, 9)),
    Case("two blocks of channels", "depthwise", (1, 40, 3, 5), layout="nchw"),
    Case("stride 2 small", "depthwise", (1, 16, 6, 7), stride=2),
    Case("bands", "depthwise", (1, 16, 17, 3), act="relu6"),
    Case("dilation 2", "depthwise", (1, 16, 5, 6), padding=2, dilation=2, act="hardswish"),
    Case("dilation 3 stride 2", "depthwise", (1, 8, 7, 8), stride=2, padding=3, dilation=3),
    Case("stride 2 dilation 2", "depthwise", (1, 8, 7, 6), stride=2, padding=2, dilation=2),
    Case("5x5", "depthwise", (1, 16, 4, 5), kernel=5, padding=2, act="hardswish"),
    Case("5x5 stride 2", "depthwise", (1, 16, 5, 6), kernel=5, stride=2, padding=2),
    Case("7x7", "depthwise", (1, 16, 3, 4), kernel=7, padding=3, act="silu"),
    Case("one-sided", "depthwise", (1, 16, 4, 5), padding=(0, 2, 1, 0)),
    Case("padding wider than the kernel", "depthwise", (1, 8, 2, 3), padding=4),
    Case("stride 3", "depthwise", (1, 8, 7, 6), stride=3),
    Case("several blocks", "pointwise", (1, 144, 12, 11), 136),
    Case("channels 13", "depthwise", (2, 13, 4, 4), layout="nchw", act="none"),
)
CHOSEN = (
    *((c, FP32) for c in SMALL),
    *((TABLE[f"depthwise-{label}"], FP32) for label in ("one pixel", "channels 1", "sliced", "no padding")),
    *((c, FP32) for c in CASES if c.op in ("pointwise", "stem")),
    *((c, d) for d in (FP16, BF16) for c in (SMALL[0], SMALL[2], SMALL[13])),
    *((TABLE[f"{op}-plain"], d) for d in (FP16, BF16) for op in ("pointwise", "stem")),
)


@pytest.mark.parametrize(("case", "dtype"), CHOSEN, ids=str)
def test_against_reference(case, dtype):
    check_overflow(case is SMALL[2] and dtype == FP32)
    slow = case.op == "depthwise" and (case.kernel > 3 or case.shape[1] > 16)
    assert_near_reference(case, [draw(case, dtype, "cpu") for _ in range(1 if slow else 2)])


@pytest.mark.parametrize(
    ("case", "out", "dtype"),
    [
        *((SMALL[0], out, FP32) for out in (5, 48, 130, 260)),  # 4 and 8 warps, and the two ops apart
        *((SMALL[2], 48, d) for d in (FP16, BF16)),
        *((SMALL[i], 24, FP32) for i in (1, 4, 7, 10)),
    ],
    ids=str,
)
def test_separable(case, out, dtype):
    check_overflow(case is SMALL[1] or (case is SMALL[2] and dtype == FP16))

    def run(*inputs):
        return separable(case, *inputs)

    def stock(*inputs):
        return stock_separable(case, *inputs)

    draws = [draw_separable(case, out, dtype, "cpu") for _ in range(2)]
    assert_as_exact(run, by_reference(run), stock, draws, f"{case} {dtype} {out}")


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("op", [ops.norm_act, ops.norm_act_pool], ids=["norm_act", "norm_act_pool"])
def test_norm_act_against_reference(op, act, dtype):
    check_overflow(act == "relu" and dtype == FP32)

    def run(*inputs):
        return norm_and_gradients(op, act, *inputs)

    def exact(*inputs):
        return norm_and_gradients(stock_pool if op is ops.norm_act_pool else spelled_out, act, *inputs)

    layouts = {"channels_last": (2, 16, 7, 5), "nchw": (3, 13, 1, 1), "sliced": (1, 136, 6, 6)}
    for layout, shape in layouts.items():
        case = Case("", "", shape, layout=layout)
        draws = [draw_norm(op, case, dtype, "cpu") for _ in range(2)]
        assert_as_exact(run, by_reference(run), exact, draws, shape)


ONE_OF_EACH = (SMALL[0], TABLE["pointwise-plain"], TABLE["stem-plain"])
each_op = pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda c: c.op)


@each_op
@pytest.mark.parametrize("act", [a for a in ACTS if a != "relu"])  # relu is everywhere
def test_activations(case, act):
    case = dataclasses.replace(case, shape=(1, case.shape[1], 3, 5), act=act)
    assert_near_reference(case, [draw(case, FP32, "cpu") for _ in range(2)])


@each_op
def test_mean_of_1000_deviations(case):
    weight = case.weight(FP32, "cpu").abs()
    weight = weight / weight.sum((1, 2, 3), keepdim=True)  # an average: mean 1000 stays 1000
    x = torch.randn(4, case.shape[1], 7, 7).to(memory_format=torch.channels_last)
    x = x * weight[0].numel() ** 0.5 + 1000
    y, mean, var = dataclasses.replace(case, padding=0).conv(x, weight)
    var_of_y, mean_of_y = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), mean_of_y, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), var_of_y, rtol=1e-4, atol=0)  # mean(y^2) - mean^2: off by 0.1


def test_norm_gradients_at_a_mean_of_1000_deviations():
    x = (torch.randn(2, 16, 5, 5) + 1000).to(memory_format=torch.channels_last)
    var, mean = torch.var_mean(x, (0, 2, 3))
    inputs = x, mean, var, torch.rand(16) + 0.5, torch.randn(16), torch.randn(x.shape)

    def run(*inputs):
        return norm_and_gradients(ops.norm_act, "silu", *inputs)

    def exact(*inputs):
        return norm_and_gradients(spelled_out, "silu", *inputs)

    assert_as_exact(run, by_reference(run), exact, [inputs], "mean 1000")


@each_op
def test_repeats_bit_by_bit(case):
    """Sums go through two stages in a fixed order; no atomics."""
    inputs = draw(dataclasses.replace(case, shape=(3, *case.shape[1:])), FP32, "cpu")
    first, again = (conv_and_gradients(case, case.conv, *inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@each_op
def test_nan_stays(case):
    x = case.x(FP32, "cpu")
    x[0, :, 1, 1] = torch.nan
    pending = Pending(x, *vectors(case.shape[1], FP32, "cpu"), 1e-5, "relu")
    y, mean, var = case.conv(pending, case.weight(FP32, "cpu"))
    assert y[0].isnan().any() and mean.isnan().all() and var.isnan().all()


@each_op
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_fp32_weight_with_half_x(case, dtype):
    draws = [draw(case, dtype, "cpu") for _ in range(2)]
    for inputs in draws:
        inputs[1] = inputs[1].float() * 1.01  # no half number
    assert_near_reference(case, draws)


@each_op
@pytest.mark.parametrize("layout", ["channels_last", "nchw", "sliced"])
def test_memory_format_is_the_inputs(case, layout):
    case = dataclasses.replace(case, layout=layout, shape=(1, case.shape[1], 4, 4))
    x, weight = case.x(FP32, "cpu").requires_grad_(), case.weight(FP32, "cpu")
    y, _, _ = case.conv(x, weight, measure=False)
    (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape))
    expected = torch.contiguous_format if layout == "nchw" else torch.channels_last
    for t in (y, dx, ops.norm_act(Pending(x, act="relu"))):
        assert t.is_contiguous(memory_format=expected), t.stride()


@each_op
def test_outputs_that_get_no_gradient(case):
    *inputs, g, g_mean, g_var = draw(case, FP32, "cpu")

    def gradients(backend, used):
        with mnops.backend(backend):
            x, weight, *norm = leaves = [t.detach().clone().requires_grad_() for t in inputs]
            outputs = case.conv(Pending(x, *norm, 1e-3, case.act), weight)
            return torch.autograd.grad(outputs[used], leaves, (g, g_mean, g_var)[used])

    for used in range(3):
        ours, reference = (gradients(backend, used) for backend in ("triton", "reference"))
        torch.testing.assert_close(ours, reference, rtol=2e-4, atol=2e-4)


@each_op
def test_gradients_only_where_asked(case):
    check_overflow(True)
    inputs = draw(case, FP32, "cpu")
    everything = conv_and_gradients(case, case.conv, *inputs)
    for wanted, name in enumerate(("dx", "dweight")):
        x, weight, *norm = (t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate(inputs[:6]))
        outputs = case.conv(Pending(x, *norm, 1e-3, case.act), weight)
        (found,) = torch.autograd.grad(outputs, (x, weight)[wanted], inputs[6:])
        torch.testing.assert_close(found, everything[name], rtol=1e-5, atol=1e-5)


def test_empty_batch_and_fp64_are_the_references():
    x, weight = torch.randn(0, 8, 4, 4), torch.randn(8, 1, 3, 3)
    assert ops.depthwise_conv2d(x, weight, padding=1)[0].shape == (0, 8, 4, 4)
    x, weight = torch.randn(1, 8, 4, 4).double(), weight.double()
    y, _, _ = ops.depthwise_conv2d(x, weight, padding=1)
    torch.testing.assert_close(y, F.conv2d(x, weight, padding=1, groups=8))


def test_running_statistics():
    from mnops.triton import update_running

    running_mean, running_var, mean, var = vectors(1500, FP32, "cpu")
    expected = running_mean.lerp(mean, 0.1), running_var.lerp(var * 1.25, 0.1)
    update_running(running_mean, running_var, mean, var, 0.1, 1.25)
    torch.testing.assert_close((running_mean, running_var), expected)


@pytest.fixture
def only_last_programs(monkeypatch):
    """Launches do their last programs only, in place, on a grid as if the device had room for all."""
    from triton.runtime import interpreter

    from mnops.triton import lanes, launch

    def last(*bounds):
        return range(bounds[0] - 2, bounds[0]) if len(bounds) == 1 and bounds[0] > 20000 else range(*bounds)

    executor = interpreter.GridExecutor
    monkeypatch.setattr(interpreter, "range", last, raising=False)
    monkeypatch.setattr(executor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(launch, "INTERPRETED_MULTIPROCESSORS", 10**6)
    monkeypatch.setattr(lanes, "MOST_GROUPS", 10**6)
    check_overflow(True)


def beyond(n, channels, size):
    """More than 2^31 elements in channels_last memory, of which what nobody touches takes none."""
    shape = n, channels, size, size
    x = torch.empty(shape, dtype=FP16, memory_format=torch.channels_last)
    assert x[:-1].numel() > 2**31
    x[-2:] = torch.randn(2, *shape[1:])
    return x


@pytest.mark.parametrize("op", ["depthwise_conv2d", "pointwise_conv2d", "norm_act"])
def test_offsets_beyond_2_31_elements(op, only_last_programs):
    """The last pixels of the last image, forward and backward, are those of that image alone."""
    import mnops.triton as kernels

    x, g = (beyond(8194, 64, 64) for _ in range(2))
    weight = torch.randn((64, 1, 3, 3) if op == "depthwise_conv2d" else (64, 64, 1, 1))
    geometry = ([1, 1], [1] * 4, [1, 1]) if op == "depthwise_conv2d" else ()
    args = (None,) * 4 + (1e-5, "relu", *geometry)
    if op == "norm_act":
        y, dx = kernels.norm_act(x, *args), kernels.norm_act_backward(g, x, *args)[0]
    else:
        y, mean, _ = getattr(kernels, op)(x, weight, *args, False)
        dx = getattr(kernels, f"{op}_backward")(g, None, None, y, mean, x, weight, *args, True, False)[0]
    alone = x[-1:].float().requires_grad_()
    expected = alone.relu()
    if op != "norm_act":
        groups = 64 if op == "depthwise_conv2d" else 1
        expected = F.conv2d(expected, weight.half().float(), padding=weight.shape[2] // 2, groups=groups)
    (expected_dx,) = torch.autograd.grad(expected, alone, g[-1:].float())
    for found, truth in ((y, expected), (dx, expected_dx)):
        found, truth = found[-1, :, -1, -4:].float(), truth[0, :, -1, -4:]
        torch.testing.assert_close(found, truth, rtol=1e-2, atol=1e-2)
