"""depthwise_conv_bn_act and pointwise_conv_bn_act against F.conv2d + F.batch_norm + activation."""

import pytest
import torch
import torch.nn.functional as F

import mnops
from mnops import functional

C, OUT = 6, 5


def setting(kind, affine=True, running=True):
    out = C if kind == "depthwise" else OUT
    weight = torch.randn(C, 1, 3, 3) if kind == "depthwise" else torch.randn(OUT, C, 1, 1)
    gamma, beta = (torch.randn(out), torch.randn(out)) if affine else (None, None)
    stats = (torch.randn(out), torch.rand(out) + 0.5) if running else (None, None)
    tensors = [torch.randn(2, C, 7, 8), weight, gamma, beta, *stats]
    return [t if t is None else t.double() for t in tensors]


def stock(kind, tensors, training, momentum=0.1, eps=1e-5, act=F.relu):
    x, weight, gamma, beta, mean, var = tensors
    y = F.conv2d(x, weight, None, 2, 1, 1, C) if kind == "depthwise" else F.conv2d(x, weight)
    return act(F.batch_norm(y, mean, var, gamma, beta, training, momentum, eps))


def fused(kind, tensors, training, **options):
    if kind == "depthwise":
        return mnops.depthwise_conv_bn_act(*tensors, training=training, stride=2, padding=1, **options)
    return mnops.pointwise_conv_bn_act(*tensors, training=training, **options)


def with_gradients(function, kind, tensors, training, **options):
    """Output, gradients, and the running statistics afterwards."""
    leaves = [t if t is None else t.clone().requires_grad_(i < 4) for i, t in enumerate(tensors)]
    z = function(kind, leaves, training, **options)
    wanted = [t for t in leaves[:4] if t is not None]
    return [z, *torch.autograd.grad(z.square().sum(), wanted), *(t for t in leaves[4:] if t is not None)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_equals_stock(device, kind, affine, training):
    tensors = [t if t is None else t.to(device) for t in setting(kind, affine)]
    ours, theirs = (with_gradients(f, kind, tensors, training) for f in (fused, stock))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_options_reach_the_norm(kind):
    tensors = setting(kind)
    ours = with_gradients(fused, kind, tensors, True, momentum=0.3, eps=0.1, act="silu")
    theirs = with_gradients(stock, kind, tensors, True, momentum=0.3, eps=0.1, act=F.silu)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_without_running_statistics(kind):
    tensors = setting(kind, running=False)
    ours, theirs = (with_gradients(f, kind, tensors, True) for f in (fused, stock))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="running_mean and running_var must be given both"):
        fused(kind, tensors, False)


def test_default_padding_keeps_the_size():
    x, weight, *rest = setting("depthwise")
    assert mnops.depthwise_conv_bn_act(x, weight, *rest).shape == x.shape


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_an_error_changes_nothing(kind):
    x, *tensors = setting(kind)
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError, match="act must be one of"):
        fused(kind, [x, *tensors], True, act="tanh")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused(kind, [x[:1, :, :1, :1], *tensors], True)
    with pytest.raises(ValueError, match="at least one value per channel"):
        fused(kind, [x[:0], *tensors], True)
    with pytest.raises(ValueError, match="weight of the norm must be"):
        fused(kind, [x, tensors[0], tensors[1][:2], *tensors[2:]], True)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0)
    assert len(fused(kind, [x[:0], *tensors], False)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics_in_one_call_are_those_of_stock_operations(dtype, monkeypatch):
    batch = torch.randn(2, 37, dtype=dtype, requires_grad=True)
    mean, var = batch[0] * 1, batch[1].exp()  # with a history, as an op's
    results = []
    for natively in (True, False):
        running = [torch.linspace(-1, 2, 37, dtype=dtype) for _ in range(2)]
        versions = [v._version for v in running]
        if not natively:
            monkeypatch.setattr(functional, "_natively", lambda *args: False)
        functional.update_running(*running, mean, var, 50, 0.1)
        assert all(v._version > before and not v.requires_grad for v, before in zip(running, versions))
        results.append(running)
    torch.testing.assert_close(*results)
