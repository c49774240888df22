"""The CUDA kernels against the reference, under the emulation: test_cuda.py runs this file.

Every test runs with the threads of a block first to last, then everything again in other orders, which must
not change a bit: see csrc/cuda/emulation/cuda.h. An access beyond an array stops the process.
"""

import ctypes
import os

import pytest
import torch
from accuracy import assert_as_exact
from cases import ACTS, CASES, DTYPES, Case
from test_op_contract import op_samples
from test_ops import (
    by_reference,
    compare_with_reference,
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
from torch._subclasses.fake_tensor import FakeTensorMode

import mnops
from mnops import Pending, ops

LIBRARY = ctypes.CDLL(os.environ["MNOPS_CUDA_EMULATION"])
ORDERS = (1, 2, 3)  # last to first, and two shuffles


@pytest.fixture(autouse=True)
def _cuda(request):
    launches = LIBRARY.mnops_cuda_emulation_launches()
    with mnops.backend("cuda"):
        yield
    if not {"plans", "device"} & set(request.node.originalname.split("_")):
        assert LIBRARY.mnops_cuda_emulation_launches() > launches, "no kernel ran"


def in_every_order(run):
    """run, whose results must be the same bits in whatever order threads run."""

    def checked(*inputs):
        LIBRARY.mnops_cuda_emulation_order(0)
        results = run(*inputs)
        for order in ORDERS:
            LIBRARY.mnops_cuda_emulation_order(order)
            for name, again in run(*inputs).items():
                assert torch.equal(again, results[name]), f"{name} depends on the order of threads ({order})"
        return results

    return checked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("op", [ops.norm_act, ops.norm_act_pool], ids=["norm_act", "norm_act_pool"])
def test_norm_act(op, act, dtype):
    def run(*inputs):
        return norm_and_gradients(op, act, *inputs)

    def exact(*inputs):
        return norm_and_gradients(stock_pool if op is ops.norm_act_pool else spelled_out, act, *inputs)

    flat = ("nchw", (3, 13, 3, 5)), ("nchw", (2, 16, 4, 8))
    layouts = ("channels_last", (2, 16, 7, 5)), *flat, ("sliced", (1, 40, 3, 4))
    for layout, shape in layouts:
        case = Case("", "", shape, layout=layout)
        draws = [draw_norm(op, case, dtype, "cpu")]
        assert_as_exact(in_every_order(run), by_reference(run), exact, draws, shape)


FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
STEMS = (
    *((c, d) for c in CASES for d in (FP32, BF16) if c.op == "stem"),
    *((c, d) for c in CASES for d in (FP16, FP64) if c.op == "stem" and c.label in ("plain", "nchw", "7x7")),
    *((Case("40 out, tiles", "stem", (1, 3, 26, 25), 40, stride=2, layout="nchw"), d) for d in (FP32, BF16)),
    (
        Case("strides apart", "stem", (2, 4, 5, 37), 9, kernel=2, stride=3, padding=(3, 0, 0, 5), act="silu"),
        FP16,
    ),
)


@pytest.mark.parametrize(("case", "dtype"), STEMS, ids=str)
def test_stem(case, dtype):
    LIBRARY.mnops_cuda_emulation_order(len(case.label) % 4)
    compare_with_reference(case, dtype, "cpu")


def same_bits_in_every_order(case, dtype):
    def run(*inputs):
        return conv_and_gradients(case, case.conv, *inputs)

    in_every_order(run)(*draw(case, dtype, "cpu"))


def test_stem_at_a_mean_of_1000_deviations():
    case = Case("", "stem", (2, 3, 24, 25), 40, stride=2, padding=0)
    weight = case.weight(FP32, "cpu").abs()
    weight = weight / weight.sum((1, 2, 3), keepdim=True)  # an average: mean 1000 stays 1000
    x = torch.randn(case.shape) * weight[0].numel() ** 0.5 + 1000
    y, mean, var = case.conv(x, weight)
    var_of_y, mean_of_y = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), mean_of_y, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), var_of_y, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_stem_keeps_nan(dtype):
    case = Case("", "stem", (2, 3, 9, 9), 8, stride=2)
    x = case.x(dtype, "cpu")
    x[0, :, 1, 1] = torch.nan
    y, mean, var = case.conv(x, case.weight(dtype, "cpu"))
    assert y[0, :, 0, 0].isnan().all() and not y[1].isnan().any() and mean.isnan().all() and var.isnan().all()


def test_stem_of_nothing():
    x, weight = torch.randn(0, 3, 8, 8).requires_grad_(), torch.randn(8, 3, 3, 3).requires_grad_()
    y, _, _ = ops.stem_conv2d(x, weight, 2, 1)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.randn(y.shape))
    assert y.shape == (0, 8, 4, 4) and dx.shape == x.shape and not dweight.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stem_same_bits(dtype):
    same_bits_in_every_order(Case("two tiles", "stem", (1, 3, 31, 23), 12, stride=2), dtype)


# ---- separable_conv2d ----

KIB = 1 << 10
H100, A100, SM_86 = (227 * KIB, 228 * KIB, 132), (163 * KIB, 164 * KIB, 108), (99 * KIB, 100 * KIB, 84)
PIXELS, OUTPUTS = (128, 64, 32, 16), (128, 64, 64, 64)  # rows of csrc/cuda/separable_tile.h


def set_limits(block, multiprocessor, count, row=-1):
    """Bytes of shared memory of a block and of a multiprocessor, their number; a row of the table or -1."""
    LIBRARY.mnops_cuda_emulation_limits(ctypes.c_int64(block), ctypes.c_int64(multiprocessor), count, row)


def plan(n, channels, height, width, out, kernel=3, stride=1, padding=1, dilation=1, itemsize=2):
    """Row of the table, height and width of a rectangle, blocks that share one, bytes of shared memory."""
    reach = dilation * (kernel - 1) + 1 - 2 * padding
    size = (height - reach) // stride + 1, (width - reach) // stride + 1
    shape = (ctypes.c_int * 10)(n, channels, height, width, out, *size, kernel, stride, dilation)
    found = (ctypes.c_int64 * 5)()
    LIBRARY.mnops_cuda_separable_plan(shape, itemsize, found)
    return tuple(found)


def check_separable(case, out, dtype, every_order=False):
    def run(*inputs):
        return separable(case, *inputs)

    def stock(*inputs):
        return stock_separable(case, *inputs)

    draws = [draw_separable(case, out, dtype, "cpu")]
    ours = in_every_order(run) if every_order else run
    assert_as_exact(ours, by_reference(run), stock, draws, f"{case} {dtype} {out}")


@pytest.fixture
def exact():
    """fp32 products in fp32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def any_device():
    yield
    set_limits(227 * KIB, 228 * KIB, 4)


DEPTHWISE = [c for c in CASES if c.op == "depthwise"]
SEPARABLE = (
    *(
        (c, d)
        for i, c in enumerate(DEPTHWISE)
        for d in ((FP32, BF16) if i % 3 == 0 else (FP32, BF16)[i % 2 :][:1])
    ),
    *((c, d) for c in DEPTHWISE[:2] for d in (FP16, FP64)),
)


@pytest.mark.parametrize(("case", "dtype"), SEPARABLE, ids=str)
def test_separable(case, dtype, exact):
    LIBRARY.mnops_cuda_emulation_order(len(case.label) % 4)
    check_separable(case, 24, dtype)


ROWS = (
    *(
        (row, Case("", "depthwise", (2, 72, 9, 14)), 136) for row in range(4)
    ),  # several rectangles, chunks, blocks of outputs
    *(
        (row, Case("", "depthwise", (1, 40, 12, 9), kernel=5, padding=2, stride=2, layout="nchw"), 24)
        for row in range(4)
    ),
    *((row, Case("", "depthwise", (1, 33, 5, 6)), 41) for row in range(4)),  # nothing is aligned
    (None, Case("", "depthwise", (1, 72, 9, 8)), 41),  # no row fits
)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize(("row", "case", "out"), ROWS, ids=str)
def test_separable_rows(row, case, out, dtype, exact, any_device):
    """Every row of the table."""
    if row is None:
        set_limits(20 * KIB, 20 * KIB, 4)
    else:
        set_limits(227 * KIB, 228 * KIB, 4, row)
    found, height, width, _, _ = plan(
        *case.shape, out, case.kernel, case.stride, case.padding, itemsize=dtype.itemsize
    )
    assert found == (-1 if row is None else row) and height * width <= PIXELS[found]
    check_separable(case, out, dtype, every_order=True)


def test_separable_tf32(any_device):
    """Where torch allows it: products of 10 bits, sums of 24."""
    case = Case("", "depthwise", (1, 40, 9, 8))
    inputs = draw_separable(case, 48, FP32, "cpu")
    exact = separable(case, *(t.double() for t in inputs))["y"]
    errors = {}
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = precision
            y = in_every_order(lambda *inputs: separable(case, *inputs))(*inputs)["y"]
            errors[precision] = ((y - exact).norm() / exact.norm()).item()
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert errors["ieee"] < 1e-6 and 1e-5 < errors["tf32"] < 2**-11, errors


def test_separable_weights_of_fp32_with_half_x():
    case = Case("", "depthwise", (1, 20, 6, 7))
    x, taps, *norms, weight = draw_separable(case, 12, BF16, "cpu")
    taps, weight = taps.float() * 1.01, weight.float() * 1.01  # no half numbers
    ours = separable(case, x, taps, *norms, weight)["y"].double()
    exact = by_reference(separable)(case, *(t.double() for t in (x, taps, *norms, weight)))["y"]
    stock = by_reference(separable)(case, x, taps, *norms, weight.to(BF16))["y"].double()
    assert (ours - exact).norm() <= 2 * (stock - exact).norm()


MOBILENET = [
    (32, 112, 64, 1), (64, 112, 128, 2), (128, 56, 128, 1), (128, 56, 256, 2), (256, 28, 256, 1),
    (256, 28, 512, 2), (512, 14, 512, 1), (512, 14, 1024, 2), (1024, 7, 1024, 1),
]  # fmt: skip


@pytest.mark.parametrize("limits", [H100, A100, SM_86], ids=["H100", "A100", "sm_86"])
def test_separable_plans(limits, any_device):
    """On every device every layer of MobileNet has a row, with rectangles that fill more than half of it."""
    set_limits(*limits)
    for channels, size, out, stride in MOBILENET:
        for n in (1, 256):
            for itemsize in (2, 4):
                row, height, width, groups, shared = plan(
                    n, channels, size, size, out, stride=stride, itemsize=itemsize
                )
                assert row >= 0 and shared <= limits[0]
                out_size = size // stride
                tiles = -(-out_size // height) * -(-out_size // width)
                assert height * width <= PIXELS[row] and tiles * height * width >= out_size**2
                assert tiles * PIXELS[row] < 2 * max(out_size**2, 32)
                assert 1 <= groups <= -(-out // OUTPUTS[row])


def test_separable_of_nothing_and_of_extremes():
    for shape, out in (((0, 8, 4, 4), 8), ((1, 8, 1, 1), 1)):
        case = Case("", "depthwise", shape)
        y = separable(case, *draw_separable(case, out, BF16, "cpu"))["y"]
        assert y.shape == (shape[0], out, *shape[2:])


SHORT = {"plain", "nchw", "stride 2 odd", "5x5", "5x5 stride 2", "channels 13"}
DEPTHWISES = (
    *((c, FP32) for c in CASES if c.op == "depthwise"),
    *((c, d) for c in CASES for d in (BF16, FP16, FP64) if c.op == "depthwise" and c.label in SHORT),
    # several bands, strips and blocks of channels; phases of dilation that end apart
    *((Case("bands", "depthwise", (1, 40, 33, 9), act="hardswish"), d) for d in (FP32, FP16)),
    *((Case("bands of cells", "depthwise", (1, 40, 31, 11), stride=2), d) for d in (FP32, BF16)),
    *((Case("channels 144", "depthwise", (2, 144, 5, 6), padding=(1, 0, 0, 2)), d) for d in (FP32, BF16)),
    (Case("dilation 4", "depthwise", (1, 8, 9, 18), padding=4, dilation=4, act="none"), BF16),
    (Case("stride 2 dilation 2", "depthwise", (1, 8, 9, 8), stride=2, padding=2, dilation=2), FP32),
    (Case("5x5/2 dilation 3", "depthwise", (1, 8, 15, 16), 0, 5, 2, (6, 5, 7, 0), 3, "nchw", "silu"), FP32),
    (Case("5x5/2 dilation 3", "depthwise", (1, 8, 15, 16), 0, 5, 2, (6, 5, 7, 0), 3), BF16),
    (Case("11x11 stride 4", "depthwise", (1, 5, 23, 21), kernel=11, stride=4, padding=5), BF16),
)


@pytest.mark.parametrize(("case", "dtype"), DEPTHWISES, ids=str)
def test_depthwise(case, dtype):
    LIBRARY.mnops_cuda_emulation_order(len(case.label) % 4)
    compare_with_reference(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_depthwise_same_bits(kernel, stride, dtype):
    case = Case("", "depthwise", (2, 24, 11, 10), kernel=kernel, stride=stride, padding=kernel // 2)
    same_bits_in_every_order(case, dtype)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_activations(stride, act):
    for channels in (8, 5):
        case = Case("", "depthwise", (2, channels, 6, 7), stride=stride, act=act)
        compare_with_reference(case, FP32, "cpu")


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_depthwise_at_a_mean_of_1000_deviations(dtype, layout):
    case = Case("", "depthwise", (2, 16, 30, 29), padding=0, layout=layout)
    weight = torch.zeros(16, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    x = case.x(FP32, "cpu") + 1000
    y, mean, var = case.conv(x.to(dtype), weight.to(dtype))
    var_of_y, mean_of_y = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), mean_of_y, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), var_of_y, rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_depthwise_keeps_nan(dtype, layout):
    case = Case("", "depthwise", (2, 8, 9, 9), layout=layout)
    x = case.x(dtype, "cpu")
    x[0, :, 1, 1] = torch.nan
    y, mean, var = case.conv(Pending(x, act="relu6"), case.weight(dtype, "cpu"))
    assert y[0, :, :3, :3].isnan().all() and not y[0, :, 3:].isnan().any() and not y[1].isnan().any()
    assert mean.isnan().all() and var.isnan().all()


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_reads_nothing_beyond_its_tensors(kernel, stride):
    """x, g and y lie amid NaN: one that a kernel read and used would show."""
    case = Case("", "depthwise", (1, 8, 6, 7), kernel=kernel, stride=stride, padding=kernel // 2)

    def amid_nan(t):
        wide = torch.full((t.numel() + 2048,), torch.nan, dtype=t.dtype)
        held = wide[1024 : 1024 + t.numel()].view(t.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return held.copy_(t)

    x, weight, g = case.x(FP32, "cpu"), case.weight(FP32, "cpu"), torch.rand(8) + 0.5
    norm, geometry = (g, g, g, g, 1e-3, "relu"), ([stride] * 2, [kernel // 2] * 4, [1, 1])
    op = torch.ops.mnops_cuda_emulated
    y, mean, var = op.depthwise_conv2d(amid_nan(x), weight, *norm, *geometry, True)
    assert mnops.backends.BACKENDS["cuda"].namespace == "mnops_cuda_emulated"
    y_r, mean_r, var_r = mnops.reference.depthwise_conv2d(x, weight, *norm, *geometry, True)
    torch.testing.assert_close((y, mean, var), (y_r, mean_r, var_r))
    g_y = torch.randn(y.shape)
    for needs in ((True, True), (True, False), (False, True)):
        got = op.depthwise_conv2d_backward(
            amid_nan(g_y), g, g, amid_nan(y), mean, amid_nan(x), weight, *norm, *geometry, *needs
        )
        expected = mnops.reference.depthwise_conv2d_backward(
            g_y, g, g, y, mean, x, weight, *norm, *geometry, *needs
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_depthwise_of_nothing():
    x, weight = torch.randn(0, 8, 8, 8).requires_grad_(), torch.randn(8, 1, 3, 3).requires_grad_()
    y, _, _ = ops.depthwise_conv2d(x, weight, 2, 1)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.randn(y.shape))
    assert y.shape == (0, 8, 4, 4) and dx.shape == x.shape and not dweight.any()


@pytest.mark.parametrize("name", ["depthwise_conv2d", "stem_conv2d", "norm_act", "norm_act_pool"])
def test_fakes_say_what_kernels_give(name):
    """Shapes, strides and dtypes of the outputs, and that no argument is changed."""
    op = getattr(torch.ops.mnops_cuda_emulated, name).default
    for args in op_samples(name):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", ["channels_last", "nchw", "sliced"])
def test_fake_of_separable_says_what_kernels_give(layout):
    case = Case("", "depthwise", (2, 8, 6, 7), stride=2, layout=layout)
    x, taps, *vectors, weight = draw_separable(case, 12, BF16, "cpu")
    norms = *vectors[:4], 1e-5, "relu", *vectors[4:], 1e-5, "silu"
    args = x, taps, weight, *norms, [2, 2], [1, 1, 1, 1], [1, 1]
    op = torch.ops.mnops_cuda_emulated.separable_conv2d.default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_fakes_on_a_device_that_is_not_here():
    """What torch.compile plans with where the network is for a GPU."""
    with FakeTensorMode():
        x = torch.empty(2, 9, 8, 3, device="cuda", dtype=BF16).permute(0, 3, 1, 2)
        weight = torch.empty(8, 3, 3, 3, device="cuda")
        y, mean, var = torch.ops.mnops_cuda_emulated.stem_conv2d(
            x, weight, *(None,) * 4, 1e-5, "none", [2, 2], [0, 1, 0, 1], True
        )
    assert y.shape == (2, 8, 4, 4) and y.stride(1) == 1 and y.dtype == BF16 and y.device.type == "cuda"
    assert mean.shape == var.shape == (8,) and mean.dtype == FP32


@pytest.mark.skipif(not mnops.backends.INTERPRETED, reason="the package triton is not installed")
def test_a_network_whose_pointwise_layers_are_tritons():
    """Losses and gradients are the reference's; the ops that there are in CUDA run there."""
    network = mnops.MobileNet(num_classes=3, width_mult=0.25, stages=(((32, 1), (64, 2)),))
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    results = {}
    for name in ("cuda", "reference"):
        with mnops.backend(name), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as ran:
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            results[name] = loss, *torch.autograd.grad(loss, list(network.parameters()))
        if name == "cuda":
            found = {e.key for e in ran.key_averages() if e.key.startswith("mnops") and "::" in e.key}
            found.discard("mnops::update_running")  # of BatchNorm's vectors, which lie on the CPU here
    torch.testing.assert_close(results["cuda"], results["reference"], rtol=1e-3, atol=1e-4)
    emulated = "stem_conv2d", "depthwise_conv2d", "norm_act_pool"
    expected = [*(f"mnops_cuda_emulated::{op}" for op in emulated), "mnops_triton::pointwise_conv2d"]
    assert found == {*expected, *(f"{op}_backward" for op in expected)}
