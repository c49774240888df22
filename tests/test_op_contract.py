"""The ops as PyTorch sees them (schema, fake kernel, autograd, FLOPs), and what they refuse."""

import pytest
import torch
from cases import CASES, Case, vectors
from torch.utils.flop_counter import FlopCounterMode

import mnops
from mnops import Pending, ops, reference
from mnops.ops import _register


def op_samples(name):
    """Arguments of the forward op `name`, as its schema takes them."""
    kernel = {"depthwise_conv2d": 3, "stem_conv2d": 3}.get(name, 1)
    for layout, dtype, grad in (("nchw", torch.float32, True), ("channels_last", torch.bfloat16, False)):
        case = Case("", name.split("_")[0], (2, 8, 6, 7), 4, kernel, layout=layout)
        x, norm = case.x(dtype, "cpu"), vectors(8, dtype, "cpu")
        pending = (*(t.requires_grad_(grad) for t in norm), 1e-5, "relu")
        if name.startswith("norm"):
            yield x.requires_grad_(grad), *pending
            continue
        weight = case.weight(dtype, "cpu").requires_grad_(grad)
        geometry = {"depthwise_conv2d": ([2, 1], [0, 1, 1, 2], [1, 1]), "stem_conv2d": ([2, 2], [0, 1, 1, 1])}
        for arguments in (pending, (None, None, None, None, 1e-5, "none")):
            for measure in (True, False):
                yield x.requires_grad_(grad), weight, *arguments, *geometry.get(name, ()), measure


NAMES = ("depthwise_conv2d", "pointwise_conv2d", "stem_conv2d", "norm_act", "norm_act_pool")
ON_CPU = sorted({b.namespace for b in mnops.backends.BACKENDS.values() if "cpu" in (b.devices or ("cpu",))})
namespaces = pytest.mark.parametrize("namespace", ON_CPU)


@namespaces
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(namespace, name):
    op = getattr(getattr(torch.ops, namespace), name).default
    for args in op_samples(name):
        torch.library.opcheck(op, args)
        if name == "norm_act":
            torch.library.opcheck(op, (*args, torch.randn_like(args[0])))


@namespaces
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_backward(namespace, name):
    op = getattr(getattr(torch.ops, namespace), f"{name}_backward").default
    for args in op_samples(name):
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        out = getattr(reference, name)(*args)
        if name.startswith("norm"):
            torch.library.opcheck(op, (torch.randn_like(out), *args))
            continue
        *args, measure = args
        y, mean, var = out
        stats = (torch.randn_like(mean), torch.randn_like(var)) if measure else (None, None)
        for need in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(op, (torch.randn_like(y), *stats, y, mean, *args, *need))


@namespaces
def test_opcheck_separable(namespace):
    op = getattr(getattr(torch.ops, namespace), "separable_conv2d", None)
    case = Case("", "depthwise", (2, 6, 7, 5))
    for dtype in (torch.float32, torch.bfloat16):
        x, taps, weight = case.x(dtype, "cpu"), case.weight(dtype, "cpu"), torch.randn(4, 6, 1, 1).to(dtype)
        norm = (*vectors(6, dtype, "cpu"), 1e-3, "relu")
        for pending, mid in ((norm, norm), ((None, None, None, None, 1e-5, "none"), norm)):
            torch.library.opcheck(op, (x, taps, weight, *pending, *mid, [2, 1], [0, 1, 1, 2], [1, 1]))


@pytest.mark.parametrize("case", [c for c in CASES if "plain" in c.label or "stride" in c.label], ids=str)
def test_flops_are_those_of_stock(case):
    x, weight = case.x(torch.float32, "cpu"), case.weight(torch.float32, "cpu")
    with FlopCounterMode(display=False) as ours:
        case.conv(x, weight)
    with FlopCounterMode(display=False) as stock:
        case.stock_conv(x, weight)
    assert ours.get_total_flops() == stock.get_total_flops() > 0
    with FlopCounterMode(display=False) as both:  # the input's gradient and the weight's each cost a forward
        case.conv(x.requires_grad_(), weight.requires_grad_())[0].sum().backward()
    assert both.get_total_flops() == 3 * ours.get_total_flops()


# ---- bad input: the rule and the value received ----

X, DW, PW, STEM = (torch.zeros(s) for s in ((2, 8, 6, 6), (8, 1, 3, 3), (4, 8, 1, 1), (4, 8, 3, 3)))
V = torch.ones(8)
BAD = [
    (lambda: ops.depthwise_conv2d(X[0], DW), r"depthwise_conv2d: x must be \(N, C, H, W\), got \(8, 6, 6\)"),
    (
        lambda: ops.depthwise_conv2d(X, PW),
        r"weight must be \(C, 1, K, K\) with C = 8 as in x, got \(4, 8, 1, 1\)",
    ),
    (
        lambda: ops.depthwise_conv2d(X, DW[:4]),
        r"weight must be \(C, 1, K, K\) with C = 8 as in x, got \(4, 1, 3, 3\)",
    ),
    (lambda: ops.depthwise_conv2d(X, DW[..., :2]), r"got \(8, 1, 3, 2\)"),
    (lambda: ops.depthwise_conv2d(X, DW[0]), r"got \(1, 3, 3\)"),
    (lambda: ops.depthwise_conv2d(X.int(), DW), r"x must be float32, float64, .* got torch.int32"),
    (lambda: ops.depthwise_conv2d(X.to(torch.complex64), DW), r"got torch.complex64"),
    (lambda: ops.depthwise_conv2d(X, DW.double()), r"weight must be torch.float32 as x, got torch.float64"),
    (lambda: ops.depthwise_conv2d(X.double(), DW), r"weight must be torch.float64 as x, got torch.float32"),
    (
        lambda: ops.depthwise_conv2d(X.half(), DW.bfloat16()),
        r"torch.float16 as x or torch.float32, got torch.bfloat16",
    ),
    (lambda: ops.depthwise_conv2d(X, DW.to("meta")), r"weight must be on cpu as x, got meta"),
    (lambda: ops.depthwise_conv2d(X, DW, stride=0), r"stride must be positive, got \[0, 0\]"),
    (
        lambda: ops.depthwise_conv2d(X, DW, stride=(1, 2, 3)),
        r"stride must be one int or two, got \(1, 2, 3\)",
    ),
    (lambda: ops.depthwise_conv2d(X, DW, dilation=0), r"dilation must be positive, got \[0, 0\]"),
    (
        lambda: ops.depthwise_conv2d(X, DW, padding=-1),
        r"padding must not be negative, got \[-1, -1, -1, -1\]",
    ),
    (
        lambda: ops.depthwise_conv2d(X, DW, padding=(1, 2, 3)),
        r"padding must be one int, two or four, got \(1, 2, 3\)",
    ),
    (
        lambda: ops.depthwise_conv2d(X, DW, padding="full"),
        r'padding must be ints, "same" or "valid", got .full.',
    ),
    (
        lambda: ops.depthwise_conv2d(X, DW, dilation=4),
        r"the kernel must fit the padded input, got K = 3, dilation \[4, 4\]",
    ),
    (
        lambda: ops.depthwise_conv2d(X[:, :, :0], DW, padding=4),
        r"C, H and W of x must be positive, got \(2, 8, 0, 6\)",
    ),
    (
        lambda: ops.depthwise_conv2d(X[:0], DW, measure=True),
        r"at least one value per channel, got \(0, 8, 6, 6\)",
    ),
    (lambda: ops.depthwise_conv2d(None, DW), r"x must be a Tensor or a Pending one, got NoneType"),
    (
        lambda: ops.depthwise_conv2d(Pending(X, act="gelu"), DW),
        r"act must be one of none, relu, .* got 'gelu'",
    ),
    (lambda: ops.depthwise_conv2d(Pending(X, V), DW), r"mean and var must be given together"),
    (lambda: ops.depthwise_conv2d(Pending(X, weight=V), DW), r"mean and var must be given together"),
    (
        lambda: ops.depthwise_conv2d(Pending(X, V, V[:4]), DW),
        r"var must be \(C,\) with C = 8 as in x, got \(4,\)",
    ),
    (lambda: ops.depthwise_conv2d(Pending(X, V, V, V[None]), DW), r"weight of the norm must be \(C,\)"),
    (lambda: ops.depthwise_conv2d(Pending(X, V, V, V, V.to("meta")), DW), r"bias of the norm must be on cpu"),
    (
        lambda: ops.pointwise_conv2d(X, DW),
        r"pointwise_conv2d: weight must be \(O, C, 1, 1\) with C = 8 as in x",
    ),
    (lambda: ops.pointwise_conv2d(X, PW[:, :4]), r"got \(4, 4, 1, 1\)"),
    (lambda: ops.pointwise_conv2d(X[0], PW), r"pointwise_conv2d: x must be \(N, C, H, W\)"),
    (lambda: ops.pointwise_conv2d(X[:0], PW, measure=True), r"at least one value per channel"),
    (lambda: ops.stem_conv2d(X, DW), r"stem_conv2d: weight must be \(O, C, K, K\) with C = 8 as in x"),
    (lambda: ops.stem_conv2d(X, STEM[..., :1]), r"got \(4, 8, 3, 1\)"),
    (lambda: ops.stem_conv2d(X, STEM, padding=-2), r"stem_conv2d: padding must not be negative"),
    (lambda: ops.norm_act(Pending(X[0], V, V)), r"norm_act: x must be \(N, C, H, W\)"),
    (lambda: ops.norm_act(Pending(X, V[:1], V)), r"norm_act: mean must be \(C,\)"),
    (lambda: ops.norm_act(Pending(X, V, V), X[:1]), r"norm_act: residual must be .* as x, got \(1, 8"),
    (lambda: ops.norm_act(Pending(X, V, V), X.half()), r"residual must be torch.float32 as x"),
    (lambda: ops.norm_act(Pending(X, V, V), X.to("meta")), r"residual must be on cpu as x, got meta"),
    (lambda: ops.norm_act_pool(X[0]), r"norm_act_pool: x must be \(N, C, H, W\)"),
    (lambda: ops.norm_act_pool(Pending(X, V, V, act="?")), r"norm_act_pool: act must be one of"),
    (lambda: ops.separable_conv2d(X, DW, (V, V, V, V, 0, "none"), DW), r"weight must be \(O, C, 1, 1\) with C = 8"),
    (lambda: ops.separable_conv2d(X, DW, (V, V, V, V[:4], 0, "none"), PW), r"bias of the norm must be \(C,\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m[:50] for _, m in BAD])
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("call", [call for call, _ in BAD], ids=[m[:50] for _, m in BAD])
def test_native_kernels_refuse_it_too(call, monkeypatch):
    """Python only words the error: nothing that breaks the contract may get past them."""
    run = _register.run
    monkeypatch.setattr(_register, "run", lambda name, args, check: run(name, args, lambda *args: None))
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        call()


def test_fake_kernel_checks_the_same_contract():
    with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match="K, K"):
        args = torch.zeros(2, 8, 6, 6), torch.zeros(4, 1, 3, 3), None, None, None, None, 1e-5, "none"
        torch.ops.mnops.depthwise_conv2d(*args, [1, 1], [1, 1, 1, 1], [1, 1], False)


@pytest.mark.parametrize("size", [2**31, 2**32, 2**50, 2**63 - 1])
@pytest.mark.parametrize("op", ["stem_conv2d", "depthwise_conv2d"])
def test_steps_that_are_no_ints_are_refused(op, size):
    """Not cut short: a stride of 0 would divide by it."""
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(4, 1 if "depthwise" in op else 4, 3, 3)
    arguments = [dict(stride=(1, size)), dict(stride=(size, 1)), dict(padding=(0, 0, size, 0))]
    for given in [*arguments, *([dict(dilation=(1, size))] if "depthwise" in op else [])]:
        with mnops.backend("cpu"), torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
            getattr(ops, op)(x, weight, **given)
