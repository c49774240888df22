"""A pending tensor in the hands of somebody who holds, changes or watches it: what stock's would be."""

import collections
import copy
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from fused_models import NETWORKS
from test_fuse import X, assert_same, everything, made, pair, run
from torch import nn

import mnops
from mnops.fuse import Conv2d
from mnops.lazy import LazyTensor


class Layers(nn.Module):
    """conv, bn and dw, bn2, called by `call(self, x)`."""

    def __init__(self, call, bias=False):
        super().__init__()
        self.call = call
        self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=bias), nn.BatchNorm2d(4)
        self.dw, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.call(self, x)

    def first(self, x):
        return self.bn(self.conv(x))

    def second(self, x):
        return self.bn2(self.dw(x))


Pair = collections.namedtuple("Pair", "a b")


def keywords(m, x):
    a, b = m.first(input_of(x)), F.relu(m.first(x.flip(3)))
    total = torch.add(input=a, other=b) + torch.add(a, b, alpha=2) + a.add(other=b) + F.relu(input=b)
    return torch.cat(tensors=[total, *Pair(a, b)], axis=1) + torch.cat(Pair(a, b), 1).repeat(1, 2, 1, 1)[:, :12]


def input_of(x):
    return x * 1


def out(m, x):
    with torch.no_grad():
        a = m.first(x)
        total = torch.add(a, a.flip(0), out=torch.empty(0, dtype=a.dtype))
    return m.second(m.first(x)) + total


def by_keyword(m, x):
    return m.bn2(input=m.dw(input=m.bn(input=m.conv(input=x))))


def named_tuple(m, x):
    return torch.stack(Pair(m.first(x), m.second(m.first(x))), 1)


def data(m, x):
    a = m.first(x)
    a.data.mul_(2)
    return m.second(a)


def written_by_numpy(m, x):
    """Out of sight of the version counters, through every alias that there is."""
    a, b, c, d = m.first(x), m.first(x.flip(2)), m.conv(x), m.first(x.flip(3))
    a.detach().numpy()[...] *= 2
    torch.from_dlpack(b.detach()).view(-1).numpy()[::2] = 1
    c.detach()[:, 1:].numpy()[...] *= 3
    e = torch.empty(0, dtype=d.dtype).set_(d.untyped_storage(), 0, d.shape, d.stride())
    e.numpy()[...] += 1
    return m.second(a) + m.second(b) + m.second(m.bn(c)) + m.second(d)


def other_data(m, x):
    a = m.first(x)
    a.data = a.data.sign()  # as a network with binary activations
    return m.second(a)


def detached(m, x):
    a = m.first(x)
    a.detach().mul_(2)
    return m.second(a)


def detached_in_place(m, x):
    a = m.first(x)
    a.detach_()
    assert not a.requires_grad
    return m.second(a) + x.sum() * 0


def detached_without_grad(m, x):
    a = m.first(x)
    with torch.no_grad():
        a.detach_()
    return m.second(a) + x.sum() * 0


def features_with_grad(m, x):
    with torch.no_grad():
        a = m.first(x)
    a.requires_grad_()
    assert a.is_leaf and a.requires_grad
    y = m.second(a)
    if torch.is_grad_enabled():
        (g,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
        y = y + g
    return y + x.sum() * 0


def other_shape(m, x):
    a = m.first(x)
    a.unsqueeze_(1)
    assert a.shape == (*x.shape[:1], 1, 4, *x.shape[2:]) and a.dim() == 5 and a.size(1) == 1
    a.squeeze_(1).transpose_(2, 3)
    return m.second(a)


def constructors(m, x):
    a = m.first(x)
    plain = a.detach()
    return m.second(a) * torch.tensor(plain) + torch.as_tensor(a) + torch.from_numpy(plain.numpy())


def branches(m, x):
    a = F.relu(m.first(x))
    return m.second(a) + F.max_pool2d(a, 3, 1, 1) + m.second(F.hardswish(a)) * a.mean((2, 3), keepdim=True)


def in_place_sums(m, x):
    a = m.first(x)
    y = m.second(F.relu(a))
    a += y
    a.relu_()
    return m.second(a) + y


def masked(m, x):
    a = m.first(x)
    a[a < 0] *= 0.1
    return m.second(torch.where(a > 1, a, 2 * a).masked_fill(a > 2, 1.0)) if a.mean() < 9 else a


def seen_before_it_changed(m, x):
    a, b = m.first(x), m.first(x.flip(2))
    parts = a[:, :2], b[:, 2:]
    F.relu_(a)
    b += b
    return m.second(a) + m.second(b) + torch.cat(parts, 1)


CALLS = [
    seen_before_it_changed, keywords, out, by_keyword, named_tuple, data, written_by_numpy, other_data, detached,
    detached_in_place, detached_without_grad, features_with_grad, other_shape, constructors, branches, in_place_sums,
    masked,
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
def test_calls(call):
    stock, fused = pair(lambda: Layers(call))
    assert sum(type(m) is Conv2d for m in fused.modules()) == 2
    assert_same(stock, fused)


@pytest.mark.parametrize("change", ["add_", "mul_", "relu_"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_changed_output_of_a_convolution(change, bias):
    """What its norm made of it before does not follow."""

    def call(m, x):
        a = m.conv(x)
        b = m.bn(a)
        getattr(a, change)(*[] if change == "relu_" else [2])
        return m.second(b) + a * b

    stock, fused = pair(lambda: Layers(call, bias))
    for mode in (True, False):
        for context in (torch.no_grad, torch.inference_mode):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = X.contiguous(memory_format=layout)
                with context():
                    torch.testing.assert_close(fused.train(mode)(x), stock.train(mode)(x))


# ---- the norm's vectors change ----


def test_outputs_held_over_a_step():
    """By a hook, an attribute of the model, an object that the model returns."""

    @dataclasses.dataclass
    class Out:
        features: torch.Tensor
        y: torch.Tensor

    def call(m, x):
        m.held = m.first(x)
        return Out(F.relu(m.held), m.second(m.held))

    results = []
    for model in pair(lambda: Layers(call)):
        kept = []
        model.bn2.register_forward_hook(lambda m, args, out, kept=kept: kept.append(out))
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        out = model(X)
        out.y.square().sum().backward()
        optimiser.step()
        results.append([t.detach() for t in (out.features, out.y, model.held, *kept)])
    torch.testing.assert_close(*results)


def test_an_output_of_a_part_held_over_a_step_is_refused():
    """Where no forward of the fused model ends, it is told, not computed from the new parameters."""
    _, fused = pair(NETWORKS["v2"])
    early, late = fused[0](X), fused[0](X)
    value = early + 0
    optimiser = torch.optim.SGD(fused.parameters(), 0.1)
    run(fused)
    assert torch.equal(early, value)
    late = fused[0](X)
    optimiser.step()
    with pytest.raises(RuntimeError, match="mnops left the output of 0.0 pending, and a vector of its BatchNorm"):
        late + 0
    with pytest.raises(RuntimeError, match="a vector of its BatchNorm was changed in place since"):
        fused[1](late)


def test_a_norm_in_eval_then_in_training():
    """Values as stock's, which autograd would give gradients of the new statistics: ours are of those that it used."""

    def call(m, x):
        training = m.bn.training
        a = m.bn.eval()(m.conv(x))
        b = m.bn.train(training)(m.conv(x))
        return a * b + b

    stock, fused = pair(lambda: Layers(call))
    with torch.no_grad():
        torch.testing.assert_close(fused(X), stock(X))
    torch.testing.assert_close(fused.state_dict(), stock.state_dict())


@pytest.mark.parametrize("make", [NETWORKS["v2"], NETWORKS["bias"], lambda: mnops.MobileNet(5, 0.25)])
def test_eval_and_training_in_one_backward(make):
    """As if each had its own, in which nobody could have changed the running statistics."""
    model = made(make)
    fused = mnops.fuse(copy.deepcopy(model), everything)
    for x, mode in ((X, False), (X.flip(0), True)):
        model.train(mode)(x).square().sum().backward()
    (fused.eval()(X).square().sum() + fused.train()(X.flip(0)).square().sum()).backward()
    for a, b in zip(fused.parameters(), model.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fused.state_dict(), model.state_dict())


# ---- gradients of what is pending ----


def test_gradient_of_a_held_output():
    """It is right, or refused: never that of a part of the paths."""

    def call(m, x):
        m.held = m.first(x)
        m.watched = m.first(x.flip(2))
        if torch.is_grad_enabled():
            m.watched.retain_grad()
        return m.second(m.held).sum() + m.held.square().sum() + m.second(m.watched).square().sum()

    stock, fused = pair(lambda: Layers(call))
    for model in (stock, fused):
        z = model(X)
        if model is fused:
            for function in (torch.autograd.grad, torch.autograd.backward):
                with pytest.raises(RuntimeError, match="mnops left the output of conv pending, and the gradient goes"):
                    function(z, inputs=[model.held])
        else:
            torch.autograd.grad(z, [model.held], retain_graph=True)
        z.backward()
    torch.testing.assert_close(fused.watched.grad, stock.watched.grad)
    held = fused.first(X)
    (g,) = torch.autograd.grad(held.square().sum(), held)  # nothing went past it
    torch.testing.assert_close(g, 2 * held.detach())


# ---- elsewhere ----


def test_autocast_begins_between_two_layers():
    """What is pending in fp32 is normalised in fp32: its mean may be far away."""

    def call(m, x):
        with torch.autocast("cpu", enabled=False):
            a = m.first(x.float() + 100)
        return m.second(a)

    stock = Layers(call)
    fused, exact = mnops.fuse(copy.deepcopy(stock)), copy.deepcopy(stock)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fused(X.float()), stock(X.float())
    exact = exact(X.float())
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 2 * (expected - exact).norm()


def test_threads():
    """Each trains a copy of its own."""
    _, fused = pair(NETWORKS["v3"])
    expected, failed = run(copy.deepcopy(fused)), []

    def train():
        try:
            for _ in range(5):
                torch.testing.assert_close(run(copy.deepcopy(fused)), expected)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def replica(model):
    """What nn.DataParallel makes of a module: tensors in place of parameters."""
    modules = list(model.modules())
    copies = {m: m._replicate_for_data_parallel() for m in modules}
    for m, copied in copies.items():
        for name, child in m._modules.items():
            copied._modules[name] = copies[child]
        for name, p in m._parameters.items():
            setattr(copied, name, p if p is None else p * 1)
        copied._buffers = {name: b if b is None else b.clone() for name, b in m._buffers.items()}
    return copies[model]


@pytest.mark.parametrize("make", [NETWORKS["v3"], lambda: mnops.MobileNet(5, 0.25)], ids=["fused", "MobileNet"])
def test_replicas_of_data_parallel(make):
    model = mnops.fuse(made(make))
    for mode in (True, False):
        copied = replica(model.train(mode))
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(copied(X), model(X))


def test_devices_without_kernels():
    _, fused = pair(NETWORKS["v3"])
    assert copy.deepcopy(fused).to("meta")(X.to("meta")).shape == (4, 5)
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        assert fused(fake.from_tensor(X)).shape == (4, 5)


def test_a_forward_of_its_own():
    """A convolution whose forward somebody replaced is left alone, and the report says so."""
    model = made(NETWORKS["v2"])
    conv = model[1].conv[0][0]
    forward = conv.forward
    conv.forward = lambda x: forward(x) * 2
    expected = model.eval()(X)
    assert type(mnops.fuse(model, everything)[1].conv[0][0]) is nn.Conv2d
    assert "1.conv.0.0  left alone: its forward was replaced" in str(mnops.fusion_report(model))
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=1), dict(kernel_size=2), dict(kernel_size=4, stride=2, padding=1),
        dict(kernel_size=9, padding=4), dict(kernel_size=3, stride=(1, 2), padding=(2, 0)),
        dict(kernel_size=5, stride=2, padding=(0, 3), dilation=2), dict(kernel_size=4, padding="same", dilation=3),
        dict(kernel_size=3, padding=1, padding_mode="reflect"), dict(kernel_size=(3, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_geometries(options):
    layers = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, groups=5, **options)
    stock, fused = pair(lambda: nn.Sequential(*layers, nn.BatchNorm2d(5), nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7)))
    assert_same(stock, fused)


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (1, 3, 2, 3), (0, 3, 4, 4), (3, 3, 3, 1)], ids=str)
def test_sizes(shape):
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 3, 1, 1, groups=5), nn.BatchNorm2d(5)
    )
    stock, fused = pair(layers)
    x = torch.randn(shape, dtype=torch.float64)
    if shape[0]:
        assert_same(stock, fused, x)
    for mode in (True, False):
        assert fused.train(mode)(x).shape == stock.train(mode)(x).shape


def test_one_value_is_refused_as_stock_does():
    said = []
    for model in pair(lambda: Layers(lambda m, x: m.first(x))):
        before = copy.deepcopy(model.bn.state_dict())
        with pytest.raises(ValueError, match="more than 1 value per channel") as error:
            model(X[:1, :, :1, :1])
        assert torch.equal(model.bn.running_mean, before["running_mean"])
        said.append(str(error.value))
    assert said[0] == said[1]


def test_nothing_waits_for_ever():
    """Parts called by themselves, of which nobody holds an output."""
    from mnops import lazy

    _, fused = (m.eval() for m in pair(NETWORKS["v2"]))
    with torch.no_grad():
        for _ in range(600):
            fused[0](X[:1, :, :2, :2])
    assert len(lazy._here.waiting) <= 1001
    fused(X)
    assert not lazy._here.waiting


def test_what_hooks_hold_is_lazy_until_the_end():
    """The chain is not broken by who only holds."""
    _, fused = pair(NETWORKS["v2"])
    held = []
    fused[1].conv[0][1].register_forward_hook(lambda m, args, out: held.append(out))
    report = mnops.fusion_report(fused, X)
    assert next(layer for layer in report if layer.name == "1.conv.0.0").events == ["chained into 1.conv.1.0"]
    assert type(held[0]) is LazyTensor and held[0]._data is not None
