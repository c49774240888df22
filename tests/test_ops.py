"""The ops on every backend that serves here: against the reference, stock PyTorch, and at the edges."""

import functools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact, enough
from cases import ACTS, CASES, DTYPES, Case, vectors
from mnops._C import cpu_capability

import mnops
from mnops import Pending, backends, ops

STOCK_ACTS = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}
GRADIENTS = ("dx", "dweight", "dmean", "dvar", "dgamma", "dbeta")
case_and_dtype = pytest.mark.parametrize(
    ("case", "dtype"),
    # the whole table in fp32 and bf16; the other dtypes share their code
    [
        (c, d)
        for c in CASES
        for d in DTYPES
        if d in (torch.float32, torch.bfloat16) or c.label in ("plain", "nchw")
    ],
    ids=str,
)


def spelled_out(pending):
    """z of a pending tensor, in stock operations."""
    mean, var, gamma, beta = (v[:, None, None] for v in pending[1:5])
    return STOCK_ACTS[pending.act]((pending.x - mean) / (var + pending.eps).sqrt() * gamma + beta)


def stock_conv(case, pending, weight):
    y = case.stock_conv(spelled_out(pending), weight)
    return y, y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)


def conv_and_gradients(case, conv, x, weight, mean, var, gamma, beta, *cotangents):
    """y, mean_y, var_y, and the gradients of all inputs given those of all outputs."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, mean, var, gamma, beta)]
    outputs = conv(Pending(leaves[0], *leaves[2:], 1e-3, case.act), leaves[1])
    grads = torch.autograd.grad(outputs, leaves, [g.to(o) for g, o in zip(cotangents, outputs)])
    return dict(zip(("y", "mean_y", "var_y", *GRADIENTS), (*outputs, *grads)))


def by_reference(function):
    @functools.wraps(function)
    def run(*args):
        with mnops.backend("reference"):
            return function(*args)

    return run


def draw(case, dtype, device):
    """x, weight, mean, var, gamma, beta, g, g_mean, g_var."""
    x, weight = case.x(dtype, device), case.weight(dtype, device)
    norm = vectors(case.shape[1], dtype, device)
    y = by_reference(case.conv)(x, weight)[0]
    cotangents = torch.randn(y.shape), torch.randn(y.shape[1]), torch.randn(y.shape[1])
    return [
        x,
        weight,
        *norm,
        *(g.to(device, d) for g, d in zip(cotangents, (dtype, norm[0].dtype, norm[0].dtype))),
    ]


def tensor_cores(device):
    """Namespaces of the backends that multiply on them on this device, or emulate that."""
    return "mnops_triton", "mnops_cuda_emulated", *(["mnops"] if device == "cuda" else [])


def multiplies_bf16(op, x):
    """Whether the CPU rounds both factors of this op's products to bf16 (bfmmla)."""
    native = x.device.type == "cpu" and backends.choose(op, "cpu") == "mnops"
    return native and op == "pointwise_conv2d" and x.dtype == torch.bfloat16 and cpu_capability() == "neon_bf16"


def rounded_conv(case, pending, weight):
    """stock_conv with both factors in x's dtype, as stock PyTorch has them in half precision and under autocast."""
    y = case.stock_conv(spelled_out(pending).to(pending.x), weight.to(pending.x))
    return y, y.float().mean((0, 2, 3)), y.float().var((0, 2, 3), correction=0)


def enough_against_reference(op, device, channels):
    """One draw where the reference serves, which would be compared with itself: it runs, and all is finite."""
    return range(1) if backends.choose(op, device) == "mnops_reference" else enough(channels)


def assert_near_reference(case, draws):
    run = functools.partial(conv_and_gradients, case, case.conv)
    exact = functools.partial(conv_and_gradients, case, functools.partial(stock_conv, case))
    # Tensor cores take a weight in x's dtype, as stock PyTorch's convolution does under autocast.
    op = f"{case.op}_conv2d"
    device = draws[0][0].device.type
    rounded = op != "depthwise_conv2d" and backends.choose(op, device) in tensor_cores(device)

    def other(x, weight, *rest):
        if multiplies_bf16(op, x):  # the reference keeps z and gy in fp32
            return conv_and_gradients(case, functools.partial(rounded_conv, case), x, weight, *rest)
        return by_reference(run)(x, weight.to(x.dtype) if rounded else weight, *rest)

    assert_as_exact(run, other, exact, draws, f"{case} {draws[0][0].dtype}")


def compare_with_reference(case, dtype, device):
    channels = min(case.shape[1], case.out or case.shape[1])
    draws = [draw(case, dtype, device) for _ in enough_against_reference(f"{case.op}_conv2d", device, channels)]
    assert_near_reference(case, draws)
    # The statistics are those of the y that is stored.
    y, mean, var = (t.double() for t in case.conv(*draws[0][:2]))
    var_of_y, mean_of_y = torch.var_mean(y, (0, 2, 3), correction=0)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close((mean, var), (mean_of_y, var_of_y), **tolerance)


@case_and_dtype
def test_against_reference(device, case, dtype):
    compare_with_reference(case, dtype, device)


def chained_unit(case, x, w1, g1, b1, w2, g2, b2):
    """1x1 -> BatchNorm -> act -> the case's convolution -> BatchNorm -> act, by the ops."""
    y1, m1, v1 = ops.pointwise_conv2d(x, w1, measure=True)
    y2, m2, v2 = case.conv(Pending(y1, m1, v1, g1, b1, 1e-5, case.act), w2)
    return ops.norm_act(Pending(y2, m2, v2, g2, b2, 1e-5, case.act))


def stock_unit(case, x, w1, g1, b1, w2, g2, b2):
    z1 = F.batch_norm(F.conv2d(x, w1), None, None, g1, b1, training=True)
    y2 = case.stock_conv(STOCK_ACTS[case.act](z1), w2)
    return STOCK_ACTS[case.act](F.batch_norm(y2, None, None, g2, b2, training=True))


@case_and_dtype
def test_as_exact_as_stock(device, case, dtype):
    if case.label == "one value a channel":
        pytest.skip("BatchNorm has nothing to train on")
    if dtype == torch.float64:
        pytest.skip("fp64 is the measure")
    n, channels, height, width = case.shape
    before = Case("", "pointwise", (n, 4, height, width), channels, layout=case.layout)

    def draw_unit():
        x, w1, w2 = before.x(dtype, device), before.weight(dtype, device), case.weight(dtype, device)
        norms = [
            t.to(device) for c in (channels, len(w2)) for t in (torch.rand(c) + 0.5, torch.randn(c) * 0.5)
        ]
        inputs = [x, w1, *norms[:2], w2, *norms[2:]]
        return [*inputs, torch.randn(stock_unit(case, *inputs).shape, device=device).to(dtype)]

    names = ("z", "dx", "dw1", "dgamma1", "dbeta1", "dw2", "dgamma2", "dbeta2")

    def run(unit, *tensors):
        *leaves, g = (t.detach().clone().requires_grad_() for t in tensors)
        z = unit(case, *leaves)
        return dict(zip(names, (z, *torch.autograd.grad(z, leaves, g.to(z)))))

    ours, stock = functools.partial(run, chained_unit), functools.partial(run, stock_unit)
    draws = [draw_unit() for _ in enough(min(channels, case.out or channels))]
    assert_as_exact(ours, stock, stock, draws, f"{case} {dtype}")


LABELS = ("plain", "nchw", "7x7", "odd sizes")


@pytest.mark.parametrize("case", [c for c in CASES if c.label in LABELS], ids=str)
def test_variance_at_a_mean_of_1000_deviations(device, case):
    weight = case.weight(torch.float32, device)
    weight = weight.abs() / weight.abs().sum((1, 2, 3), keepdim=True)  # an average: mean 1000 stays 1000
    x = torch.randn_like(case.x(torch.float32, device)) + 1000
    case = Case("shifted", case.op, case.shape, case.out, case.kernel, padding=0, layout=case.layout)
    y, mean, var = case.conv(x, weight)
    var_of_y, mean_of_y = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), mean_of_y, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), var_of_y, rtol=1e-4, atol=0)  # mean(y^2) - mean^2: off by 0.1


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_batch_norm_at_a_mean_of_1000_deviations(device, layout):
    def ours(x, gamma, beta):  # the statistics by a convolution that is the identity
        identity = torch.eye(x.shape[1]).to(x)[:, :, None, None]
        y, mean, var = ops.pointwise_conv2d(x, identity, measure=True)
        return ops.norm_act(Pending(y, mean, var, gamma, beta, 1e-5, "silu"))

    def stock(x, gamma, beta):
        return F.silu(F.batch_norm(x, None, None, gamma, beta, training=True))

    def run(norm, *tensors):
        *leaves, g = (t.clone().requires_grad_() for t in tensors)
        z = norm(*leaves)
        return dict(zip(("z", "dx", "dgamma", "dbeta"), (z, *torch.autograd.grad(z, leaves, g))))

    def draw_shifted():
        x = torch.randn_like(Case("", "", (4, 16, 9, 11), layout=layout).x(torch.float32, device)) + 1000
        return x, *(t.to(device) for t in (torch.rand(16) + 0.5, torch.randn(16), torch.randn(x.shape)))

    runs = (functools.partial(run, norm) for norm in (ours, stock, stock))
    assert_as_exact(*runs, [draw_shifted() for _ in enough(16)], "mean 1000")


def norm_and_gradients(op, act, *tensors):
    *leaves, g = (t.detach().clone().requires_grad_() for t in tensors)
    z = op(Pending(*leaves, 1e-3, act))
    names = ("z", "dx", "dmean", "dvar", "dgamma", "dbeta")
    return dict(zip(names, (z, *torch.autograd.grad(z, leaves, g))))


def stock_pool(pending):
    return spelled_out(pending).mean((2, 3))


def draw_norm(op, case, dtype, device):
    g = torch.randn(case.shape if op is ops.norm_act else case.shape[:2]).to(device, dtype)
    return case.x(dtype, device), *vectors(case.shape[1], dtype, device), g


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layout", ["channels_last", "nchw", "sliced"])
@pytest.mark.parametrize("op", [ops.norm_act, ops.norm_act_pool], ids=["norm_act", "norm_act_pool"])
def test_norm_act_against_reference(device, op, layout, act, dtype):
    run = functools.partial(norm_and_gradients, op, act)
    exact = functools.partial(norm_and_gradients, stock_pool if op is ops.norm_act_pool else spelled_out, act)
    for shape in ((2, 16, 7, 5), (3, 13, 1, 1), (1, 1, 4, 9), (2, 40, 6, 6)):
        case = Case("", "", shape, layout=layout)
        draws = [draw_norm(op, case, dtype, device) for _ in enough_against_reference(op.__name__, device, shape[1])]
        assert_as_exact(run, by_reference(run), exact, draws, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "nchw", "sliced"])
def test_norm_act_with_a_residual(device, layout, dtype):
    """The sum is rounded once; its gradient passes to the residual as it is."""

    def run(op, x, mean, var, gamma, beta, residual, g):
        leaves = [t.detach().clone().requires_grad_() for t in (x, mean, var, gamma, beta, residual)]
        *leaves, residual = leaves
        z = op(Pending(*leaves, 1e-3, "silu"), residual)
        names = ("z", "dx", "dmean", "dvar", "dgamma", "dbeta", "dresidual")
        return dict(zip(names, (z, *torch.autograd.grad(z, [*leaves, residual], g))))

    case = Case("", "", (2, 13, 7, 5), layout=layout)
    draws = [
        (*draw_norm(ops.norm_act, case, dtype, device)[:-1], case.x(dtype, device),
         torch.randn(case.shape).to(device, dtype)) for _ in enough(13)
    ]  # fmt: skip
    ours = functools.partial(run, ops.norm_act)
    exact = functools.partial(run, lambda pending, residual: spelled_out(pending) + residual)
    assert_as_exact(ours, by_reference(ours), exact, draws, layout)
    z = ops.norm_act(Pending(*draws[0][:5], 1e-3, "silu"), draws[0][5].contiguous())
    assert z.is_contiguous() == (layout == "nchw")


def test_residual_alone(device):
    x, residual = torch.randn(2, 2, 3, 4, 5, device=device)
    torch.testing.assert_close(ops.norm_act(x, residual), x + residual)
    torch.testing.assert_close(ops.norm_act(Pending(x), residual), x + residual)
    torch.testing.assert_close(ops.norm_act(Pending(x, act="relu"), residual), x.relu() + residual)


ONE_OF_EACH = [c for c in CASES if c.label == "plain"]
each_op = pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)


@each_op
@pytest.mark.parametrize("layout", ["channels_last", "nchw", "sliced"])
def test_memory_format_is_the_inputs(device, case, layout):
    case = Case("", case.op, case.shape, case.out, case.kernel, case.stride, case.padding, layout=layout)
    x, weight = case.x(torch.float32, device).requires_grad_(), case.weight(torch.float32, device)
    y, _, _ = case.conv(x, weight)
    (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape, device=device))
    expected = torch.contiguous_format if layout == "nchw" else torch.channels_last
    for t in (y, dx, ops.norm_act(Pending(x, act="relu"))):
        assert t.is_contiguous(memory_format=expected), t.stride()


@each_op
@pytest.mark.parametrize("given", ["mean var", "mean var gamma", "mean var beta", ""])
def test_parts_of_a_norm(device, case, given):
    """Absent vectors: gamma is 1, beta is 0, and without mean and var z = act(x)."""
    x, weight, *norm, g, g_mean, g_var = draw(case, torch.float64, device)
    names = ("mean", "var", "gamma", "beta")
    mean, var, gamma, beta = (v.requires_grad_() if name in given else None for name, v in zip(names, norm))
    leaves = [t.requires_grad_() for t in (x, weight, mean, var, gamma, beta) if t is not None]
    outputs = case.conv(Pending(x, mean, var, gamma, beta, 1e-5, "silu"), weight)
    found = torch.autograd.grad(outputs, leaves, (g, g_mean, g_var))
    z = x
    if given:
        z = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        z = z if gamma is None else z * gamma[:, None, None]
        z = z if beta is None else z + beta[:, None, None]
    y = case.stock_conv(F.silu(z), weight)
    expected = y, y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(expected, leaves, (g, g_mean, g_var))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@each_op
def test_gradients_only_where_asked(device, case):
    inputs = draw(case, torch.float64, device)
    everything = conv_and_gradients(case, case.conv, *inputs)
    for wanted, name in enumerate(GRADIENTS):
        x, weight, *norm = (t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate(inputs[:6]))
        outputs = case.conv(Pending(x, *norm, 1e-3, case.act), weight)
        (found,) = torch.autograd.grad(outputs, (x, weight, *norm)[wanted], inputs[6:])
        torch.testing.assert_close(found, everything[name], rtol=1e-9, atol=1e-9)


@each_op
def test_outputs_that_get_no_gradient(device, case):
    *inputs, g, g_mean, g_var = draw(case, torch.float64, device)
    cotangents = (g, g_mean, g_var)
    for used in ((0,), (1,), (2,), (0, 2)):
        zeroed = [t if i in used else torch.zeros_like(t) for i, t in enumerate(cotangents)]
        expected = conv_and_gradients(case, case.conv, *inputs, *zeroed)
        x, weight, *norm = leaves = [t.detach().clone().requires_grad_() for t in inputs]
        outputs = case.conv(Pending(x, *norm, 1e-3, case.act), weight)
        found = torch.autograd.grad([outputs[i] for i in used], leaves, [cotangents[i] for i in used])
        torch.testing.assert_close(
            dict(zip(GRADIENTS, found)), {k: expected[k] for k in GRADIENTS}, rtol=1e-9, atol=1e-9
        )


@each_op
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "expanded", "sliced"])
def test_gradient_of_any_layout(device, case, layout):
    *inputs, g, g_mean, g_var = draw(case, torch.float32, device)
    g = {
        "nchw": lambda: g,
        "channels_last": lambda: g.contiguous(memory_format=torch.channels_last),
        "expanded": lambda: g[:1, :, :1, :1].expand(g.shape),
        "sliced": lambda: F.pad(g, (1, 1, 1, 0))[:, :, 1:, 1:-1],
    }[layout]()
    results = [conv_and_gradients(case, case.conv, *inputs, v, g_mean, g_var) for v in (g, g.contiguous())]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@each_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_weight_with_half_x(device, case, dtype):
    draws = [draw(case, dtype, device) for _ in enough(4)]
    for inputs in draws:
        inputs[1] = inputs[1].float() * 1.01  # no half number
    assert_near_reference(case, draws)
    assert conv_and_gradients(case, case.conv, *draws[0])["dweight"].dtype == torch.float32


@each_op
def test_weight_and_vectors_of_any_strides(device, case):
    x, weight, *norm, g, g_mean, g_var = draw(case, torch.float32, device)
    expected = conv_and_gradients(case, case.conv, x, weight, *norm, g, g_mean, g_var)
    norm = [torch.stack([v, v], 1)[:, 0].requires_grad_() for v in norm]
    for strange in (
        weight.contiguous(memory_format=torch.channels_last),
        weight.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
        torch.stack([weight, weight], -1)[..., 0],
    ):
        leaves = [x.requires_grad_(), strange.requires_grad_(), *norm]
        outputs = case.conv(Pending(x, *norm, 1e-3, case.act), strange)
        grads = torch.autograd.grad(outputs, leaves, (g, g_mean, g_var))
        found = dict(zip(expected, (*outputs, *grads)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_op
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_empty_batch(device, case, layout):
    case = Case(
        "", case.op, (0, *case.shape[1:]), case.out, case.kernel, case.stride, case.padding, layout=layout
    )
    x, weight = (
        case.x(torch.float32, device).requires_grad_(),
        case.weight(torch.float32, device).requires_grad_(),
    )
    norm = vectors(case.shape[1], torch.float32, device)
    y, mean, var = case.conv(Pending(x, *norm, 1e-5, "relu"), weight, measure=False)
    assert y.shape == case.stock_conv(x, weight).shape
    assert mean.shape == var.shape == (0,)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape
    assert dweight.eq(0).all()
    assert ops.norm_act(Pending(x, *norm)).shape == x.shape
    assert ops.norm_act_pool(Pending(x, *norm)).shape == x.shape[:2]
    with pytest.raises(ValueError, match="at least one value per channel"):
        case.conv(x, weight, measure=True)


@each_op
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck_and_gradgradcheck(device, case, act):
    shape = {"depthwise": (2, 3, 4, 3), "pointwise": (2, 3, 2, 2), "stem": (2, 2, 4, 3)}[case.op]
    case = Case("", case.op, shape, 2, 3 if case.op != "pointwise" else 1, case.stride, case.padding, act=act)
    x, weight = case.x(torch.float64, device), case.weight(torch.float64, device)
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, *vectors(shape[1], x.dtype, device))]

    def function(x, weight, *norm):
        return case.conv(Pending(x, *norm, 1e-3, act), weight)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("op", [ops.norm_act, ops.norm_act_pool], ids=["norm_act", "norm_act_pool"])
def test_gradcheck_and_gradgradcheck_of_norms(device, op, act):
    inputs = [torch.randn(2, 3, 2, 3), *vectors(3, torch.float64, device)]
    inputs = [t.to(device, torch.float64).requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: op(Pending(*t, 1e-3, act)), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: op(Pending(*t, 1e-3, act)), inputs)
    if op is ops.norm_act:
        inputs.append(torch.randn_like(inputs[0]).requires_grad_())
        assert torch.autograd.gradgradcheck(lambda *t: op(Pending(*t[:5], 1e-3, act), t[5]), inputs)


def test_third_derivative(device):
    """create_graph inside create_graph: the reference's product is itself differentiable."""
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, device=device, requires_grad=True)

    def third(conv):
        y = conv(x, weight)
        (a,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (b,) = torch.autograd.grad(a.pow(2).sum(), weight, create_graph=True)
        return torch.autograd.grad(b.pow(2).sum(), (x, weight))

    ours = third(lambda x, w: ops.depthwise_conv2d(Pending(x, act="silu"), w, padding=1)[0])
    stock = third(lambda x, w: F.conv2d(F.silu(x), w, padding=1, groups=2))
    torch.testing.assert_close(ours, stock)


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, case, dtype):
    x, weight, *norm = draw(case, torch.float32, device)[:6]
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with torch.autocast(device, dtype=dtype):
        y, mean, _ = case.conv(Pending(x, *norm), weight)
        z = ops.norm_act(Pending(y, act="relu"))
    assert (y.dtype, mean.dtype, z.dtype) == (dtype, torch.float32, dtype)
    dx, dweight = torch.autograd.grad(z.float().sum(), (x, weight))
    assert (dx.dtype, dweight.dtype) == (torch.float32, torch.float32)
    with torch.autocast(device, dtype=dtype):  # as F.conv2d, fp64 stays
        assert case.conv(x.double(), weight.double())[0].dtype == torch.float64


def test_vectors_of_half_modules_are_widened(device):
    x, weight = (
        torch.randn(2, 8, 4, 4, device=device).bfloat16(),
        torch.randn(4, 8, 1, 1, device=device).bfloat16(),
    )
    norm = [v.bfloat16().requires_grad_() for v in vectors(8, torch.float32, device)]
    y, _, _ = ops.pointwise_conv2d(Pending(x, *norm), weight)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(y.float().sum(), norm))


def draw_separable(case, out, dtype, device):
    """x, its norm, depthwise weight, the norm between, weight."""
    channels = case.shape[1]
    norms = [v for _ in range(2) for v in vectors(channels, dtype, device)]
    weight = (torch.randn(out, channels, 1, 1) / channels**0.5).to(device, dtype)
    return case.x(dtype, device), case.weight(dtype, device), *norms, weight


def separable(case, x, taps, *rest):
    norm, mid, weight = rest[:4], rest[4:8], rest[8]
    geometry = case.stride, case.padding, case.dilation
    with torch.no_grad():
        pending = Pending(x, *norm, 1e-3, case.act)
        return {"y": ops.separable_conv2d(pending, taps, (*mid, 1e-5, case.act), weight, *geometry)}


def stock_separable(case, x, taps, *rest):
    norm, mid, weight = rest[:4], rest[4:8], rest[8]
    z = spelled_out(Pending(x, *norm, 1e-3, case.act)).to(x.dtype)
    z = spelled_out(Pending(case.stock_conv(z, taps), *mid, 1e-5, case.act)).to(x.dtype)
    return {"y": F.conv2d(z, weight)}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (c, d)
        for c in CASES
        for d in DTYPES
        if c.op == "depthwise" and (d in (torch.float32, torch.bfloat16) or c.label in ("plain", "nchw"))
    ],
    ids=str,
)
def test_separable(device, case, dtype):
    run, stock = functools.partial(separable, case), functools.partial(stock_separable, case)
    for out in (5, 48):  # fewer outputs than channels and more: weights small and large against the pixels
        draws = [draw_separable(case, out, dtype, device) for _ in enough(out)]
        assert_as_exact(run, by_reference(run), stock, draws, f"{case} {dtype} {out}")
        y = run(*draws[0])["y"]
        x = draws[0][0]
        nchw = x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.contiguous_format if nchw else torch.channels_last)


def test_separable_has_no_gradient(device):
    case = Case("", "depthwise", (1, 8, 5, 5))
    x, taps, *norms, weight = draw_separable(case, 4, torch.float32, device)
    with pytest.raises(RuntimeError, match=r"for inference, under torch.no_grad\(\)"):
        ops.separable_conv2d(x, taps.requires_grad_(), (*norms[4:], 1e-5, "relu"), weight, padding=1)


def test_separable_of_an_empty_batch(device):
    case = Case("", "depthwise", (0, 8, 5, 5))
    x, taps, *norms, weight = draw_separable(case, 4, torch.float32, device)
    with torch.no_grad():
        y = ops.separable_conv2d(x, taps, (*norms[4:], 1e-5, "relu"), weight, padding=1)
    assert y.shape == (0, 4, 5, 5)


def test_freed_memory_is_an_error():
    for freed in (0, 1):
        tensors = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
        tensors[freed].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="was freed"), mnops.backend("cpu"):
            ops.depthwise_conv2d(*tensors)


def test_more_threads_than_blocks_of_pixels():
    """A thread without pixels adds nothing to the weight gradient, whatever its memory held before."""
    x, weight, g = torch.randn(1, 16, 1, 60), torch.randn(20000, 16, 1, 1), torch.randn(1, 20000, 1, 60)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for pixels in (60, 3):
            y, _, _ = ops.pointwise_conv2d(x[..., :pixels], weight.requires_grad_())
            (found,) = torch.autograd.grad(y, weight, g[..., :pixels])
            expected = g[0, :, 0, :pixels] @ x[0, :, 0, :pixels].T
            torch.testing.assert_close(found[:, :, 0, 0], expected, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(threads)
