"""The blocks against the same modules run by stock PyTorch: BatchNorm's rules, hooks, fallbacks, copies."""

import copy
import pickle

import pytest
import torch
import torch.nn.utils.prune
from accuracy import TINY
from torch import nn

import mnops
from mnops import Pending
from mnops.nn import DepthwiseConvBNAct, DepthwiseSeparable, PointwiseConvBNAct, chain

BLOCKS = {
    "depthwise": lambda **o: DepthwiseConvBNAct(6, **o),
    "depthwise 5x5 s2": lambda **o: DepthwiseConvBNAct(6, 5, 2, **o),
    "depthwise dilated": lambda **o: DepthwiseConvBNAct(6, 3, dilation=2, **o),
    "depthwise same": lambda **o: DepthwiseConvBNAct(6, 3, 2, "same", **o),
    "depthwise bias": lambda **o: DepthwiseConvBNAct(6, bias=True, **o),
    "pointwise": lambda **o: PointwiseConvBNAct(6, 4, **o),
    "pointwise bias": lambda **o: PointwiseConvBNAct(6, 4, bias=True, **o),
    "separable": lambda **o: DepthwiseSeparable(6, 4, **o),
    "separable s2 same": lambda **o: DepthwiseSeparable(6, 4, 3, 2, "same", **o),
}
each_block = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())


def randomise(module):
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean):
                if t is not None:
                    nn.init.normal_(t)
            if m.running_var is not None:
                nn.init.uniform_(m.running_var, 0.5, 2)
    return module.double()


def pair(make, change=lambda block: None, **options):
    """A block and its copy that runs stock; `change` is applied to both."""
    block = randomise(make(**options))
    change(block)
    stock = copy.deepcopy(block)
    stock.fused = False
    return block, stock


def norms(block):
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def run(block, x):
    """Everything a forward and backward leave behind."""
    x = x.detach().clone().requires_grad_()
    z = block(x)
    block.zero_grad()
    z.square().sum().backward()
    grads = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in block.named_buffers()}
    return {"z": z, "dx": x.grad, "grads": grads, "buffers": buffers}


def assert_equal(block, stock, steps=2):
    for _ in range(steps):
        x = torch.randn(3, 6, 9, 8, dtype=torch.float64)
        # a bias before a BatchNorm in training has a gradient of zero, which stock sees through rounding
        torch.testing.assert_close(run(block, x), run(stock, x), rtol=1e-9, atol=1e-9)


@each_block
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "hardswish", "silu"])
def test_training_then_eval(make, act):
    block, stock = pair(make, act=act)
    assert_equal(block.train(), stock.train())
    assert_equal(block.eval(), stock.eval())
    with torch.no_grad():
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(block(x), stock(x))


def set_norms(**attributes):
    def change(block):
        for norm in norms(block):
            for name, value in attributes.items():
                setattr(norm, name, value)

    return change


def replace_norms(**options):
    def change(block):
        for name, child in list(block.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(block, name, nn.BatchNorm2d(child.num_features, **options).double())

    return change


def freeze(block):
    for norm in norms(block):
        norm.eval()


def freeze_affine(block):
    for norm in norms(block):
        norm.weight.requires_grad_(False)
        norm.bias.requires_grad_(False)


RULES = {
    "momentum None": set_norms(momentum=None),
    "momentum 0": set_norms(momentum=0.0),
    "momentum 1": set_norms(momentum=1.0),
    "eps": set_norms(eps=0.5),
    "no running statistics": replace_norms(track_running_stats=False),
    "tracking switched off": set_norms(track_running_stats=False),
    "affine False": replace_norms(affine=False),
    "frozen affine": freeze_affine,
    "no bias": replace_norms(bias=False),
}


@each_block
@pytest.mark.parametrize("change", RULES.values(), ids=RULES.keys())
def test_batch_norm_rule(make, change):
    block, stock = pair(make, change)
    assert_equal(block.train(), stock.train(), steps=3)
    assert_equal(block.eval(), stock.eval())


@each_block
def test_frozen_norm_in_a_training_model(make):
    block, stock = pair(make)
    freeze(block), freeze(stock)
    before = {name: b.clone() for name, b in block.named_buffers()}
    assert_equal(block, stock)
    torch.testing.assert_close(dict(block.named_buffers()), before, rtol=0, atol=0)


def test_num_batches_tracked():
    block = DepthwiseSeparable(6, 4)
    for _ in range(3):
        block(torch.randn(2, 6, 4, 4))
    block.eval()(torch.randn(2, 6, 4, 4))
    assert [norm.num_batches_tracked.item() for norm in norms(block)] == [3, 3]


@each_block
def test_one_value_per_channel(make):
    block, stock = pair(make)
    x = torch.randn(1, 6, 1, 1, dtype=torch.float64)
    for b in (block, stock):
        before = copy.deepcopy(norms(b)[0].running_mean)
        with pytest.raises(
            ValueError, match="Expected more than 1 value per channel when training, got input size"
        ):
            b(x)
        assert norms(b)[0].running_mean.equal(before)
        b.eval()
    torch.testing.assert_close(block(x), stock(x))


@each_block
def test_empty_batch(make):
    block, stock = pair(make)
    x = torch.randn(0, 6, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one value per channel"):
        block(x)
    assert norms(block)[0].num_batches_tracked == 0
    assert block.eval()(x).shape == stock.eval()(x).shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_module(dtype):
    """model.bfloat16() makes the norm's vectors half; sums and statistics stay fp32."""
    block, stock = pair(BLOCKS["separable"])
    block, x = block.to(dtype), torch.randn(4, 6, 8, 8)
    z = block(x.to(dtype))
    z.float().square().sum().backward()
    expected = stock.to(dtype).double()(x.to(dtype).double())
    assert z.dtype == dtype
    assert (z.double() - expected).square().mean().sqrt() < 8 * torch.finfo(
        dtype
    ).eps * expected.square().mean().sqrt()
    assert all(p.grad.dtype == dtype for p in block.parameters())
    assert block.bn1.running_mean.dtype == dtype
    torch.testing.assert_close(block.bn1.running_var.double(), stock.bn1.running_var, rtol=0.05, atol=0.05)


@each_block
def test_bias_gradient_is_there(make):
    block = make().train()
    block(torch.randn(2, 6, 4, 4)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    for m in block.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            assert m.bias.grad.abs().max() < TINY


# ---- the chain ----


def test_between_two_convolutions_one_stored_tensor():
    block = DepthwiseSeparable(6, 4)
    pending = chain(block, torch.randn(2, 6, 8, 8))
    assert isinstance(pending, Pending)
    assert pending.act == "relu"
    torch.testing.assert_close(mnops.ops.norm_act(pending).mean((0, 2, 3)).shape, torch.Size([4]))
    assert pending.weight is block.bn2.weight
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block(torch.randn(2, 6, 8, 8))
    maps = {t.untyped_storage().data_ptr(): t for t in saved if t.dim() == 4 and t.shape[2] == 8}
    assert len(maps) == 3  # x, the depthwise output, the pointwise output


def test_chain_through_sequential_and_strangers():
    net = nn.Sequential(
        DepthwiseSeparable(6, 4), nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU()), PointwiseConvBNAct(5, 3)
    )
    net = randomise(net)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(mnops.ops.norm_act(chain(net, x)), net(x))


@pytest.mark.parametrize("child", ["", "conv_dw", "bn1", "conv_pw", "bn2"])
def test_hooks_fire_with_real_tensors(child):
    block, stock = pair(BLOCKS["separable"])
    seen = []
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    for b in (block, stock):
        module = b.get_submodule(child) if child else b
        module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
        module.register_full_backward_hook(lambda m, gin, gout: seen.append((gin[0], gout[0])))
        inner = chain(b, Pending(x.clone().requires_grad_()))
        mnops.ops.norm_act(inner).square().sum().backward()
    torch.testing.assert_close(seen[:2], seen[2:])
    assert_equal(block, stock)


def test_a_hook_may_change_the_output():
    block = BLOCKS["separable"]()
    block.register_forward_hook(lambda m, args, out: out * 2)
    x = torch.randn(2, 6, 4, 4)
    copied = copy.deepcopy(block)
    torch.testing.assert_close(mnops.ops.norm_act(chain(block, x)), copied(x))


REPLACED = {
    "GroupNorm": lambda b: setattr(b, "bn1", nn.GroupNorm(2, 6)),
    "Identity": lambda b: setattr(b, "bn1", nn.Identity()),
    "subclass": lambda b: setattr(b, "bn1", type("Mine", (nn.BatchNorm2d,), {})(6)),
    "circular padding": lambda b: setattr(
        b, "conv_dw", nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="circular")
    ),
    "grouped": lambda b: setattr(b, "conv_dw", nn.Conv2d(6, 6, 3, padding=1, groups=2)),
    "dense": lambda b: setattr(b, "conv_dw", nn.Conv2d(6, 6, 3, padding=1)),
    "oblong": lambda b: setattr(b, "conv_dw", nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=6)),
    "strided 1x1": lambda b: setattr(b, "conv_pw", nn.Conv2d(6, 4, 1, 2)),
    "padding as text": lambda b: setattr(b, "conv_dw", nn.Conv2d(6, 6, 4, padding="same", groups=6)),
    "weight_norm": lambda b: nn.utils.parametrizations.weight_norm(b.conv_pw),
    "pruned": lambda b: nn.utils.prune.l1_unstructured(b.conv_pw, "weight", 0.5),
}


@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED.keys())
def test_replaced_children(change):
    """What the ops do not cover takes the stock path; parametrised weights are read through the child."""
    block = DepthwiseSeparable(6, 4)
    change(block)
    block = block.double()
    if hasattr(block.conv_pw, "weight_mask"):  # pruning keeps its product outside state_dict
        block.conv_pw.weight = block.conv_pw.weight_orig * block.conv_pw.weight_mask
    state = copy.deepcopy(block.state_dict())
    x = torch.randn(3, 6, 8, 8, dtype=torch.float64)
    found = block(x)
    block.load_state_dict(state)
    block.fused = False
    torch.testing.assert_close(found, block(x))


# ---- modules as modules ----


@each_block
def test_copies(make):
    block = randomise(make())
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    block.eval()
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(copied(x), block(x), rtol=0, atol=0)


def test_children_are_plain():
    block = DepthwiseSeparable(6, 4)
    assert [(n, type(m)) for n, m in block.named_children()] == [
        ("conv_dw", nn.Conv2d), ("bn1", nn.BatchNorm2d), ("conv_pw", nn.Conv2d), ("bn2", nn.BatchNorm2d),
    ]  # fmt: skip
    assert [n for n, _ in DepthwiseConvBNAct(6).named_children()] == ["conv", "bn"]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert type(converted.bn1) is nn.SyncBatchNorm
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(converted.eval()(x), block.eval()(x))


@each_block
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_the_inputs(make, layout):
    assert make()(torch.randn(2, 6, 8, 8).contiguous(memory_format=layout)).is_contiguous(
        memory_format=layout
    )


def test_checkpointed_block():
    block, stock = pair(BLOCKS["separable"])
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    for b in (block, stock):
        z = torch.utils.checkpoint.checkpoint(b, x, use_reentrant=False)
        z.square().sum().backward()
    torch.testing.assert_close([p.grad for p in block.parameters()], [p.grad for p in stock.parameters()])
    torch.testing.assert_close(dict(block.named_buffers()), dict(stock.named_buffers()))


def test_double_backward_through_a_block():
    def penalty(block, x):
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *block.parameters()])

    block, stock = pair(BLOCKS["separable"], act="silu")
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(penalty(block, x), penalty(stock, x))


def test_forward_mode_and_func_transforms():
    def derivatives(block):
        with torch.autograd.forward_ad.dual_level():
            dual = block(torch.autograd.forward_ad.make_dual(x, tangent))
            forward_mode = torch.autograd.forward_ad.unpack_dual(dual).tangent
        gradient = torch.func.grad(lambda x: block(x).square().sum())(x)
        return forward_mode, *torch.func.jvp(block, (x,), (tangent,)), gradient

    block, stock = pair(BLOCKS["separable"], act="silu")
    x, tangent = torch.randn(2, 3, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(derivatives(block.eval()), derivatives(stock.eval()))


def test_inference_mode():
    block, stock = pair(BLOCKS["separable"])
    with torch.inference_mode():
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(block.train()(x), stock.train()(x))
        torch.testing.assert_close(block.eval()(x), stock.eval()(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DepthwiseConvBNAct(6, act="gelu"), "DepthwiseConvBNAct: act must be .* got 'gelu'"),
        (lambda: DepthwiseSeparable(6, 4, padding="valid"), "Separable: padding must be .* got 'valid'"),
        (lambda: PointwiseConvBNAct(6, 4)(torch.zeros(2, 5, 4, 4)), "pointwise_conv2d: weight .* with C = 5"),
        (lambda: DepthwiseConvBNAct(6)(torch.zeros(6, 4, 4)), "depthwise_conv2d: x must be"),
        (lambda: DepthwiseConvBNAct(6)(torch.zeros(2, 6, 4, 4).int()), "x must be float32"),
    ],
)  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
