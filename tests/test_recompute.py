"""recompute=True: the same step bit by bit, with less kept for the backward."""

import copy

import pytest
import torch
from torch import nn

import mnops
from mnops import Pending
from mnops.nn import DepthwiseSeparable


def held_bytes(forward):
    """Bytes allocated by forward and still there after it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        alive = forward()
    del alive
    events = profile.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]")


def grads(model, x, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x).float().square().mean()
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"output_stride": 16}], ids=str)
def test_the_same_step(options, autocast):
    torch.manual_seed(0)
    model = mnops.MobileNet(10, 0.25, **options)
    other = mnops.MobileNet(10, 0.25, recompute=True, **options)
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 3, 64, 64)
    for ours, kept in zip(grads(other, x, autocast), grads(model, x, autocast), strict=True):
        assert torch.equal(ours, kept)
    for ours, kept in zip(other.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, kept)  # the norms saw each batch once


def test_less_is_kept():
    model = mnops.MobileNet(10, 0.5)
    x = torch.randn(4, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    stock, other = copy.deepcopy(model), mnops.MobileNet(10, 0.25, recompute=True)
    stock.fused = False
    kept, least, most = (held_bytes(lambda m=m: m(x)) for m in (model, other, stock))
    assert kept <= 0.53 * most
    assert least <= 0.35 * most


def test_a_changed_weight_is_refused():
    block = DepthwiseSeparable(4, 8, recompute=True)
    y = block(torch.randn(2, 4, 5, 5, requires_grad=True))
    with torch.no_grad():
        block.conv_dw.weight.mul_(2)
    with pytest.raises(RuntimeError, match="must stay as they were"):
        y.sum().backward()


def test_twice_backward_and_second_derivatives():
    block = DepthwiseSeparable(3, 4, act="silu", recompute=True).double()
    plain = copy.deepcopy(block)
    plain.recompute = False
    x = torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True)
    y = block(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(y.sum(), x))

    def penalty(b):
        (g,) = torch.autograd.grad(b(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *b.parameters()])

    for ours, kept in zip(penalty(block), penalty(plain), strict=True):
        torch.testing.assert_close(ours, kept, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pending", [False, True])
def test_of_a_pending_input_and_a_frozen_norm(pending):
    block = DepthwiseSeparable(4, 8, stride=2, recompute=True)
    plain = copy.deepcopy(block)
    plain.recompute = False
    for b in (block, plain):
        b.bn1.eval()
    x = torch.randn(2, 4, 6, 7, requires_grad=True)
    norm = ()
    if pending:
        norm = (torch.rand(4, requires_grad=True), torch.rand(4) + 0.5, None, None, 1e-5, "relu")
    given = Pending(x, *norm) if pending else x
    inputs = (x, *norm[:1])
    ours, kept = (torch.autograd.grad(b.chain(given).x.square().sum(), inputs) for b in (block, plain))
    for a, b in zip(ours, kept, strict=True):
        assert torch.equal(a, b)


def test_compiled_it_keeps():
    block = DepthwiseSeparable(4, 8, recompute=True)
    x = torch.randn(2, 4, 5, 5)
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))


def test_hooks_see_what_they_always_saw():
    block, seen = DepthwiseSeparable(4, 8, recompute=True), []
    block.conv_dw.register_forward_hook(lambda module, args, out: seen.append(out.shape))  # stock modules now
    block(torch.randn(2, 4, 5, 5)).sum().backward()
    assert seen == [(2, 4, 5, 5)]
    assert isinstance(block.bn1, nn.BatchNorm2d)
