"""MobileNet: names and counts, and that the fused network is the stock one, in training and in eval."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mnops
from mnops import reference


def timm_state(width=1.0, in_chans=3, classes=1000):
    """Names and shapes of timm's mobilenetv1_100: stem, blocks.STAGE.BLOCK, classifier."""
    pointwise = [[64], [128] * 2, [256] * 2, [512] * 6, [1024] * 2]
    shapes = {}

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    channels = int(32 * width)
    shapes["conv_stem.weight"] = (channels, in_chans, 3, 3)
    norm("bn1", channels)
    for s, stage in enumerate(pointwise):
        for b, out in enumerate(stage):
            block, out = f"blocks.{s}.{b}", int(out * width)
            shapes[f"{block}.conv_dw.weight"] = (channels, 1, 3, 3)
            norm(f"{block}.bn1", channels)
            shapes[f"{block}.conv_pw.weight"] = (out, channels, 1, 1)
            norm(f"{block}.bn2", out)
            channels = out
    return shapes | {"classifier.weight": (classes, channels), "classifier.bias": (classes,)}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return mnops.MobileNet(**{"num_classes": 10, "width_mult": 0.25, **options})


def stock_of(model):
    stock = copy.deepcopy(model)
    stock.fused = False
    return stock


# ---- names and counts ----


@pytest.mark.parametrize("width", [1.0, 0.75, 0.5, 0.25])
def test_state_dict_is_timms(width):
    state = mnops.MobileNet(width_mult=width).state_dict()
    assert [(k, tuple(v.shape)) for k, v in state.items()] == list(timm_state(width).items())
    assert len(state) == 164


# arXiv:1704.04861, tables 4 to 7, counted exactly: parameters, mult-adds at 224, 192, 160, 128
COUNTS = {
    1.0: (4_231_976, 568_740_352, 418_121_728, 290_675_200, 186_400_768),
    0.75: (2_585_560, 325_400_448, 239_273_472, 166_396_800, 106_770_432),
    0.5: (1_331_592, 149_497_088, 109_970_432, 76_524_800, 49_160_192),
    0.25: (470_072, 41_030_272, 30_212_608, 21_059_200, 13_570_048),
}


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("width", COUNTS)
def test_parameters_and_mult_adds(width, fused, padding):
    model = mnops.MobileNet(width_mult=width, fused=fused, padding=padding).eval().to("meta")
    parameters, *mult_adds = COUNTS[width]
    assert sum(p.numel() for p in model.parameters()) == parameters
    for size, expected in zip((224, 192, 160, 128), mult_adds):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size, device="meta"))
        assert counter.get_total_flops() == 2 * expected


def test_widths_between():
    assert mnops.MobileNet(width_mult=1.25).num_features == 1280  # timm's mobilenetv1_125
    assert mnops.MobileNet(width_mult=0.3).conv_stem.out_channels == 16  # 9.6: 8 would be less than 90 %
    assert all(
        c % 8 == 0
        for c in (m.out_channels for m in make(width_mult=0.37).modules() if isinstance(m, nn.Conv2d))
    )


# ---- the fused network is the stock one ----


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (64, 64)),
        ({"act": "relu6"}, (65, 47)),
        ({"padding": "same"}, (64, 64)),
        ({"padding": "same", "act": "relu6", "bn_eps": 1e-3}, (63, 50)),
        ({"act": "hardswish", "in_chans": 1}, (40, 72)),
        ({"act": "silu", "width_mult": 0.37, "in_chans": 5}, (33, 33)),
        ({"bn_momentum": None, "num_classes": 0}, (32, 32)),
    ],
    ids=str,
)
def test_equals_stock(device, options, size):
    model = make(**options).double().to(device)
    stock = stock_of(model)
    x = torch.randn(4, model.in_chans, *size, dtype=torch.float64, device=device)
    results = []
    for net in (model, stock):
        images = x.clone().requires_grad_()
        for _ in range(2):  # the second step reads the running statistics the first left
            net.zero_grad()
            logits = net.train()(images)
            logits.square().sum().backward()
        with torch.no_grad():
            evaluated = net.eval()(images)
        grads = [p.grad for p in net.parameters()]
        results.append([logits, evaluated, images.grad, grads, dict(net.named_buffers())])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def twenty_losses(net, lr, channels_last=False):
    """Losses of 20 steps of SGD, 32 images of 64 x 64 each: ten coarse patterns with noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, 3, 8, 8, generator=generator), scale_factor=8, mode="bilinear")
    optimizer, losses = torch.optim.SGD(net.parameters(), lr, momentum=0.9), []
    for _ in range(20):
        labels = torch.randint(10, (32,), generator=generator)
        images = patterns[labels] + 0.3 * torch.randn(32, 3, 64, 64, generator=generator)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(("act", "beta", "lr"), [("silu", 1.5, 0.02), ("relu", 2.0, 0.003)])
def test_twenty_steps_follow_the_stock_network(act, beta, lr):
    """The losses of 20 steps through all 27 layers agree to 1e-4 in fp32.

    They can only where stock agrees with itself: stock in NCHW and in channels_last differ in nothing but the
    order of their sums, and are compared first. From its usual start (biases 0) the ReLU network parts from
    itself by 1e-2 within 20 steps, at any rate from 1e-4 up: rounding decides on which side of zero a value
    falls, and 27 BatchNorms amplify it. Biases in [1, beta], which keep most values off the kink, and these
    rates keep it within 1e-6 of itself; the smooth network learns meanwhile.
    """
    model = make(act=act)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 1, beta)
    stock, other = stock_of(model), stock_of(model).to(memory_format=torch.channels_last)
    ours, theirs = twenty_losses(model, lr), twenty_losses(stock, lr)
    torch.testing.assert_close(twenty_losses(other, lr, channels_last=True), theirs, rtol=2e-5, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    if act == "silu":
        assert ours[-1] < 0.6 * ours[0]
    buffers = dict(model.named_buffers()), dict(stock.named_buffers())
    torch.testing.assert_close(*buffers, rtol=1e-3, atol=1e-4)


def saved_bytes(model, x):
    """Bytes of the distinct storages kept for backward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(t):
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).sum()  # noqa: F841 keeps the graph
    return sum(s.nbytes() for pointer, s in saved.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_saved_for_backward(dtype):
    """MobileNet-1.0-224: of a convolution's output and its activation the fused network keeps one."""
    model = mnops.MobileNet().to(dtype)
    x = torch.randn(2, 3, 224, 224).to(dtype)
    fused, stock = saved_bytes(model, x), saved_bytes(stock_of(model), x)
    assert fused <= 0.52 * stock, f"fused {fused / 2**20:.1f} MiB, stock {stock / 2**20:.1f} MiB"


# ---- interface ----


def test_features_and_head():
    model = make(num_classes=7).eval()
    x = torch.randn(2, 3, 64, 96)
    for net in (model, stock_of(model)):
        features = net.forward_features(x)
        assert features.shape == (2, 256, 2, 3)
        torch.testing.assert_close(net.forward_head(features), net(x))
        torch.testing.assert_close(net.forward_head(features, pre_logits=True), features.mean((2, 3)))
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)


def test_reset_classifier():
    model = make(num_classes=5).double()
    model.reset_classifier(3)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert not any("classifier" in k for k in model.state_dict())


def test_dropout_is_before_the_classifier():
    model, x = make(dropout=0.5).train(), torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert 0.3 < features.eq(0).float().mean() - F.relu(-features).sum() < 0.95
    model.eval()
    torch.testing.assert_close(model(x), model(x))


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (32, 31), (97, 64)])
def test_any_image_size(size):
    model = make().eval()
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(model(x), stock_of(model)(x), rtol=1e-4, atol=1e-5)


def test_any_image_layout():
    model = make().eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    for strange in (
        x.contiguous(memory_format=torch.channels_last),
        F.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
    ):
        torch.testing.assert_close(model(strange), expected, rtol=1e-5, atol=1e-6)


def test_small_final_map_in_training():
    model = make()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: make(num_classes=-1), "num_classes must be an int of 0 or more, got -1"),
        (lambda: make(num_classes=1.5), "num_classes must be an int of 0 or more, got 1.5"),
        (lambda: make(width_mult=0), "width_mult must be positive, got 0"),
        (lambda: make(width_mult=float("nan")), "width_mult must be positive, got nan"),
        (lambda: make(in_chans=0), "in_chans must be a positive int, got 0"),
        (lambda: make(act="gelu"), "act must be one of none, relu, .* got 'gelu'"),
        (lambda: make(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: make(padding="valid"), "padding must be .* got 'valid'"),
        (lambda: make(bn_eps=-1.0), "bn_eps must not be negative, got -1.0"),
        (lambda: make()(torch.zeros(3, 64, 64)), r"x must be \(N, 3, H, W\), got \(3, 64, 64\)"),
        (lambda: make()(torch.zeros(2, 1, 64, 64)), r"x must be \(N, 3, H, W\), got \(2, 1, 64, 64\)"),
        (lambda: make()(torch.zeros(2, 3, 64, 64).byte()), "x must be float32, .* got torch.uint8"),
        (lambda: make()(torch.zeros(0, 3, 64, 64)), "at least one value per channel"),
        (lambda: make().load_state_dict(make(width_mult=0.5).state_dict()), "size mismatch"),
    ],
)
def test_bad_input(make_it, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        make_it()


def test_empty_batch_in_eval():
    assert make().eval()(torch.zeros(0, 3, 64, 64)).shape == (0, 10)


def test_fused_is_an_attribute():
    model = make(fused=False)
    assert not model.blocks[4][1].fused
    model.fused = True
    assert model.blocks[4][1].fused


def test_copies():
    model = make().eval()
    x = torch.randn(1, 3, 64, 64)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(x), model(x), rtol=0, atol=0)
        copied.fused = False
        assert model.blocks[0][0].fused


@pytest.mark.parametrize("place", ["blocks.2.1", "blocks.2", "blocks", "blocks.2.1.bn1"])
def test_hooks_anywhere(place):
    model = make().double()
    stock, seen = stock_of(model), []
    for net in (model, stock):
        net.get_submodule(place).register_forward_hook(lambda m, args, out: seen.append(out))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x), stock(x))
    torch.testing.assert_close(seen[0], seen[1])


def test_stock_blocks_inside():
    """A user's own module among the blocks gets real tensors."""
    model = make().double()
    model.blocks[3][2] = nn.Sequential(
        nn.Conv2d(128, 128, 3, padding=1), nn.GroupNorm(4, 128), nn.ReLU()
    ).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x), stock_of(model)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """A step under autocast is as near to fp64 as stock's under the same autocast."""
    model = make().train()
    x, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))

    def step(net, autocast):
        with torch.autocast("cpu", dtype, enabled=autocast):
            logits = net(x.to(net.conv_stem.weight.dtype))
            loss = F.cross_entropy(logits, labels)
        net.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()]).double(), logits

    fused, logits = step(model, True)
    stock, _ = step(stock_of(model), True)
    exact, _ = step(stock_of(model).double(), False)
    assert logits.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert (fused - exact).norm() <= 2 * (stock - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_network(dtype):
    model = make().eval()
    x = torch.randn(4, 3, 64, 64)
    exact = stock_of(model).to(dtype).double()(x.to(dtype).double())
    errors = [(net.to(dtype)(x.to(dtype)).double() - exact).norm() for net in (model, stock_of(model))]
    assert errors[0] <= 2 * errors[1]


def test_checkpointing():
    model = make().double()
    stock = stock_of(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def features(net):
        return torch.utils.checkpoint.checkpoint(net.forward_features, x, use_reentrant=False)

    for net in (model, stock):
        net.forward_head(features(net)).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in stock.parameters()])


def test_penalty_on_the_gradient():
    """Double backward through all layers."""

    def penalty(net, x):
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    model = make(act="silu").double()
    x = torch.randn(3, 3, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(penalty(model, x), penalty(stock_of(model), x), rtol=1e-6, atol=1e-9)


def hook(model):
    model.blocks[1][0].register_forward_pre_hook(lambda module, args: None)


def half(model):
    model.blocks[2][0].bn2.train()


def without_gamma(model):
    model.blocks[1][0].bn1.weight = None


def unfused(model):
    model.blocks[3][1].fused = False


def other_act(model):
    model.blocks[2][1].act = "silu"


def strided(model):
    model.blocks[2][1].conv_dw.stride = (2, 2)


def other_parameter(model):
    conv = model.blocks[3][2].conv_pw
    conv.weight = torch.nn.Parameter(conv.weight.detach() * 2)


def other_values(model):
    model.blocks[3][2].conv_pw.weight.data.mul_(2)
    model.blocks[1][1].bn1.running_var.mul_(3)


def other_buffer(model):
    model.blocks[4][0].bn2.running_mean = torch.ones_like(model.blocks[4][0].bn2.running_mean)


def other_eps(model):
    model.blocks[0][0].bn1.eps = 0.5


def one_less(model):
    del model.blocks[3][4]


def one_more(model):
    model.blocks[4].append(copy.deepcopy(model.blocks[4][1]))


def parametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.blocks[4][1].conv_pw)


def own_forward(model):
    conv = model.blocks[1][0].conv_dw
    conv.forward = lambda x: 2 * torch.nn.Conv2d.forward(conv, x)


def through_state_dict(model):
    model.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()})


# how many blocks run in calls of several, then
CHANGES = {
    hook: 11, half: 11, without_gamma: 13, unfused: 7, other_act: 5, parametrised: 11, own_forward: 11,
    strided: 13, other_parameter: 13, other_values: 13, other_buffer: 13, other_eps: 13, one_less: 12, one_more: 14,
    through_state_dict: 13,
}  # fmt: skip


def depthwise(layers):
    return layers.ints[:: reference.LAYER_INTS].count(reference.LAYER_KINDS.index("depthwise"))


@pytest.mark.parametrize("before", [False, True], ids=["first", "after a run"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_inference_is_one_call_where_every_block_allows_it(change, before, monkeypatch):
    model = mnops.MobileNet(10, 0.25).eval()
    for bn in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(bn.running_mean, 0, 0.1)
        torch.nn.init.uniform_(bn.running_var, 0.5, 2)
    x, calls, run = torch.randn(2, 3, 40, 40), [], mnops.nn.run_layers
    monkeypatch.setattr(mnops.nn, "run_layers", lambda *args: calls.append(depthwise(args[1])) or run(*args))
    with torch.no_grad():
        if before:
            model(x)
            assert calls == [13]
        change(model)
        calls.clear()
        found = model(x)
        monkeypatch.setattr(mnops.nn, "separable_chain", lambda module, x: None)
        torch.testing.assert_close(found, model(x), rtol=1e-6, atol=1e-6)
    assert sum(calls) == CHANGES[change]
    assert len(calls) == 1 or sum(calls) < 13


def test_a_plan_does_not_keep_its_network():
    model = mnops.MobileNet(10, 0.25).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    gone = weakref.ref(model.blocks)
    assert model.blocks in mnops.nn._plans
    del model
    gc.collect()
    assert gone() is None
