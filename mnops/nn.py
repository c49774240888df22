"""Convolution + BatchNorm + activation blocks, run chained: between two convolutions one stored tensor.

Parameters live in plain nn.Conv2d and nn.BatchNorm2d children; the fused forward reads them, so checkpoints,
SyncBatchNorm conversion, weight-decay groups and DDP work as with stock modules. A block is run in two ways:

    block(x: Tensor) -> Tensor                          like any module
    chain(block, x: Tensor | Pending) -> Pending        its BatchNorm and activation left to the next op

What the ops do not cover (another kind of convolution or norm, children with hooks) runs as stock modules;
so does what is recorded to be run elsewhere (`mnops.backends.wants_stock`).
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from mnops import backends, lazy, ops, sync
from mnops.functional import refuse_single_value, running_statistics, update_running
from mnops.ops import Pending
from mnops.ops._contract import same_padding
from mnops.ops.run_layers import Layers, run_layers
from mnops.recompute import recomputed
from mnops.reference import ACTIVATIONS, wide
from mnops.unchanged import Unchanged

__all__ = ["DepthwiseConvBNAct", "DepthwiseSeparable", "PointwiseConvBNAct", "chain"]

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
FEW_CHANNELS = 16  # stem_conv2d is made for images; a wide dense convolution is stock's


class Folded(nn.Identity):
    """Where a BatchNorm was that `mnops.deploy` folded into the convolution before it: for inference only."""

    def train(self, mode: bool = True) -> "Folded":
        if mode:
            raise RuntimeError(
                "deploy: a folded BatchNorm cannot be trained; train the model that the copy is of"
            )
        return super().train(mode)


NORMS = (*BATCH_NORMS, Folded)


def check_act(owner: str, act: str) -> str:
    if act not in ACTIVATIONS:
        raise ValueError(f"{owner}: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return act


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: the condition of nn.Module.__call__."""
    return "forward" in module.__dict__ or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def chain(module: nn.Module, x: Tensor | Pending) -> Pending:
    """Runs a module on a pending tensor.

    A block leaves its own norm and activation pending; an nn.Sequential chains its children; any other
    module, and one with hooks, gets and returns real tensors.
    """
    if not has_hooks(module):
        if isinstance(module, Block):
            return module.chain(x)
        if type(module) is nn.Sequential:
            if (found := separable_chain(module, x)) is not None:
                return found
            for child in module:
                x = chain(child, x)
            return x if isinstance(x, Pending) else Pending(x)
    return Pending(module(ops.norm_act(x)))


def conv_bn_act(
    x: Tensor | Pending, conv: nn.Module, bn: nn.Module, act: str, same: bool = False, fused: bool = True
) -> Pending:
    """conv on x, bn and act pending. same: padding is TensorFlow's SAME in place of conv.padding."""
    op = _op_of(conv, bn, same) if fused else None
    if op is None or backends.wants_stock(x.x if isinstance(x, Pending) else x):
        return Pending(_stock(ops.norm_act(x), conv, bn, act, same))
    measure = _measures(bn)
    weight, padding = _parameter(conv, "weight"), "same" if same else conv.padding
    if op == "depthwise":
        y, mean, var = ops.depthwise_conv2d(x, weight, conv.stride, padding, conv.dilation, measure)
    elif op == "pointwise":
        y, mean, var = ops.pointwise_conv2d(x, weight, measure)
    else:
        y, mean, var = ops.stem_conv2d(x, weight, conv.stride, padding, measure)
    if not measure:
        return Pending(y, *_frozen(bn, conv, y, act))
    mean, var = statistics(bn, y, mean, var, _parameter(conv, "bias"), measure)
    return Pending(y, mean, var, _parameter(bn, "weight"), _parameter(bn, "bias"), bn.eps, act)


def separable_bn_act(
    x: Tensor | Pending,
    conv_dw: nn.Module, bn1: nn.Module, act1: str, conv_pw: nn.Module, bn2: nn.Module, act2: str,
    same: bool = False, fused: bool = True,
) -> Pending:  # fmt: skip
    """conv_dw, bn1, act1, then conv_pw on x; bn2 and act2 pending. One op where no gradient can be asked for."""
    tensor = x.x if isinstance(x, Pending) else x
    if (
        fused
        and not torch.is_grad_enabled()
        and _separable(conv_dw, bn1, conv_pw, bn2, same)
        and not backends.wants_stock(tensor)
        and backends.together("depthwise_conv2d", "separable_conv2d", device=tensor.device.type)
    ):
        taps, weight = _parameter(conv_dw, "weight"), _parameter(conv_pw, "weight")
        norm, padding = _frozen(bn1, conv_dw, tensor, act1), "same" if same else conv_dw.padding
        y = ops.separable_conv2d(x, taps, norm, weight, conv_dw.stride, padding, conv_dw.dilation)
        return Pending(y, *_frozen(bn2, conv_pw, y, act2))
    x = conv_bn_act(x, conv_dw, bn1, act1, same, fused)
    return conv_bn_act(x, conv_pw, bn2, act2, fused=fused)


def separable_chain(module: nn.Sequential, x: Tensor | Pending) -> Pending | None:
    """chain(module, x) by one op, where its leaves are DepthwiseSeparable and no gradient can be asked for; or None."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(x, Pending):
        return None
    tensor, *norm, eps, act = x
    if backends.wants_stock(tensor) or torch.is_autocast_enabled(device := tensor.device.type):
        return None
    if not backends.together("separable_conv2d", "run_layers", device=device):
        return None
    unchanged, plan = _plans.get(module, (False, None))
    if not unchanged:
        if (plan := _plan(module, tensor)) is None:
            return None
        _plans[module] = Unchanged(module), plan
    if act != plan.act:
        return None
    (y,) = run_layers((tensor,), plan.layers.after_norm(*norm, eps, act), (plan.y,))
    return Pending(y, *_frozen(*plan.last, y, act))


class Plan(NamedTuple):
    """What `separable_chain` runs: `layers` give y, whose norm `last` stays pending; act is that of every norm."""

    layers: Layers
    y: int
    last: tuple[nn.Module, nn.Conv2d]
    act: str


# Of each nn.Sequential: whether it still is what its plan was made of, and the plan, which is longer made than run.
_plans: weakref.WeakKeyDictionary[nn.Sequential, tuple[Unchanged, Plan]] = weakref.WeakKeyDictionary()


def _plan(module: nn.Sequential, x: Tensor) -> Plan | None:
    """Of the modules alone, no value of theirs: or None, where they need more than separable convolutions."""
    layers, last, act = Layers(), None, None
    y = layers.norm(0)
    for block in _leaves(module):
        known = type(block) is DepthwiseSeparable and block.fused and not has_hooks(block)
        if not known or act not in (None, block.act):
            return None
        conv_dw, bn1, conv_pw, bn2 = block.conv_dw, block.bn1, block.conv_pw, block.bn2
        same = block.same or isinstance(conv_dw.padding, str)
        if same or not _separable(conv_dw, bn1, conv_pw, bn2, same):
            return None
        biased = ((bn1, conv_dw), (bn2, conv_pw))
        if any(type(bn) is not Folded and _parameter(conv, "bias") is not None for bn, conv in biased):
            return None  # it changes the mean
        height, width = conv_dw.padding
        act = block.act
        if last is not None:
            y = layers.norm(y, *_vectors(*last), act)
        y = layers.depthwise(
            y, _parameter(conv_dw, "weight"), conv_dw.stride, (height, height, width, width), conv_dw.dilation
        )
        y = layers.pointwise(layers.norm(y, *_vectors(bn1, conv_dw), act), _parameter(conv_pw, "weight"))
        last = bn2, conv_pw
    return Plan(layers, y, last, act) if last else None


def _vectors(bn: nn.Module, conv: nn.Conv2d) -> tuple:
    """mean, var, weight, bias and eps for `Layers.norm`, themselves: their values may change."""
    if type(bn) is Folded:
        return None, None, None, _parameter(conv, "bias"), 0.0
    return *_running(bn, None, conv.weight), _parameter(bn, "weight"), _parameter(bn, "bias"), bn.eps


def _separable(conv_dw: nn.Module, bn1: nn.Module, conv_pw: nn.Module, bn2: nn.Module, same: bool) -> bool:
    """Whether separable_conv2d computes the block: its convolutions are the ops', its norms are not the batch's."""
    known = _op_of(conv_dw, bn1, same) == "depthwise" and _op_of(conv_pw, bn2, False) == "pointwise"
    return known and not (_measures(bn1) or _measures(bn2))


def _leaves(module: nn.Sequential) -> Iterator[nn.Module]:
    """The modules of a Sequential and of those in it, in order; one with hooks is a leaf."""
    for child in module:
        if type(child) is nn.Sequential and not has_hooks(child):
            yield from _leaves(child)
        else:
            yield child


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """module.name, ten times as fast where it is a parameter."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def _measures(bn: nn.Module) -> bool:
    """Whether bn normalises with the statistics of the batch."""
    if type(bn) is Folded:
        return False
    if bn.training:
        return True
    buffers = bn._buffers
    return buffers["running_mean"] is None and buffers["running_var"] is None


def _running(bn: nn.Module, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """bn's running mean, without the bias of the convolution, which the ops leave out, and its variance."""
    mean, var = running_statistics(bn._buffers["running_mean"], bn._buffers["running_var"])
    return mean if bias is None else mean.to(wide(x)) - bias, var


def _frozen(bn: nn.Module, conv: nn.Conv2d, x: Tensor, act: str) -> tuple:
    """The norm of conv's output that does not depend on the batch, and act: what follows x in Pending."""
    bias = _parameter(conv, "bias")
    if type(bn) is Folded:
        bias = bias.to(wide(x))
        return -bias, torch.ones_like(bias), None, None, 0.0, act
    return *_running(bn, bias, x), _parameter(bn, "weight"), _parameter(bn, "bias"), bn.eps, act


def _op_of(conv: nn.Module, bn: nn.Module, same: bool) -> str | None:
    """Which op computes conv, or None if the stock modules must: subclasses may compute anything."""
    known = type(conv) is nn.Conv2d and type(bn) in NORMS
    if not known or has_hooks(conv) or has_hooks(bn):
        return None
    return served_by(conv, same)


def served_by(conv: nn.Conv2d, same: bool = False) -> str | None:
    """The op of conv's geometry: depthwise, pointwise, stem or None. same: as in conv_bn_act."""
    height, width = conv.kernel_size
    if height != width or conv.padding_mode != "zeros":
        return None
    if conv.groups == conv.in_channels == conv.out_channels:
        return "depthwise"
    if conv.groups != 1:
        return None
    if height == 1 and conv.stride == (1, 1) and (same or conv.padding in ((0, 0), "valid", "same")):
        return "pointwise"
    return "stem" if conv.dilation == (1, 1) and conv.in_channels <= FEW_CHANNELS else None


def _stock(x: Tensor, conv: nn.Module, bn: nn.Module, act: str, same: bool) -> Tensor:
    if same:
        x = pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
    x = bn(conv(x))
    if act in ("relu", "relu6"):  # in place, as users write it, where nothing else may hold on to x
        return getattr(F, act)(x, inplace=type(bn) in BATCH_NORMS and not has_hooks(bn))
    return x if act == "none" else getattr(F, act)(x)


@torch.fx.wrap  # sizes are not known to torch.fx
def pad_same(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """x (N, C, H, W) with the zeros around it that TensorFlow's SAME convolution sees."""
    top_bottom, left_right = (same_padding(*a) for a in zip(x.shape[2:], kernel_size, stride, dilation))
    return F.pad(x, (*left_right, *top_bottom))


def statistics(
    bn: nn.Module, y: Tensor, mean: Tensor, var: Tensor, bias: Tensor | None, measured: bool
) -> tuple[Tensor, Tensor]:
    """The mean and var that bn normalises y with, and its running statistics updated, by torch's rules.

    bias is the convolution's, which y lacks: it only shifts means, and (y + bias) - (mean + bias) = y - mean.
    """
    if not measured:
        return _running(bn, bias, y)
    count = y.numel() // y.shape[1]
    group = sync.group_of(bn)
    if group is None:
        refuse_single_value(count, y)
    else:
        mean, var, count = sync.synchronise(mean, var, count, group)
    running_mean, running_var = bn._buffers["running_mean"], bn._buffers["running_var"]
    if bn.training and bn.track_running_stats and running_mean is not None:
        momentum, batches = bn.momentum, bn._buffers["num_batches_tracked"]
        if batches is not None:
            batches.add_(1)
            if momentum is None:  # cumulative average; a tensor, so that nothing waits for its value
                momentum = batches.to(running_mean.dtype).reciprocal()
        shifted = mean if bias is None else mean + bias
        update_running(running_mean, running_var, shifted, var, count, momentum)
    # bias - bias: its gradient is zero, and there, for whoever waits for one (DDP)
    return mean if bias is None else mean + (bias - bias), var


class Block(nn.Module):
    """Base of the blocks: forward(Tensor) -> Tensor by way of chain(Tensor | Pending) -> Pending."""

    def __init__(self, act: str, padding: int | Sequence[int] | str | None, fused: bool) -> None:
        super().__init__()
        self.act = check_act(type(self).__name__, act)
        if isinstance(padding, str) and padding != "same":
            raise ValueError(f'{type(self).__name__}: padding must be ints, None or "same", got {padding!r}')
        self.same = padding == "same"
        self.fused = fused

    def chain(self, x: Tensor | Pending) -> Pending:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return ops.norm_act(self.chain(lazy.pending_of(x)))

    def extra_repr(self) -> str:
        return f"act={self.act!r}, same={self.same}, fused={self.fused}"

    def _depthwise(
        self, channels, kernel_size, stride, padding, dilation, bias, factory, multiplier=1
    ) -> nn.Conv2d:
        if padding is None:
            padding = dilation * (kernel_size // 2)
        sides, out = 0 if self.same else padding, channels * multiplier
        return nn.Conv2d(channels, out, kernel_size, stride, sides, dilation, channels, bias, **factory)


class DepthwiseConvBNAct(Block):
    """KxK depthwise convolution, BatchNorm, activation. Children: conv, bn.

    Args:
        channels: in and out.
        kernel_size: K; 3 is the tuned one.
        padding: int, (height, width), None (dilation * (K // 2)) or "same" (TensorFlow's SAME).
        bias: of the convolution; it only shifts the mean.
        act: none, relu, relu6, hardswish or silu.
        eps, momentum: of the BatchNorm.
        fused: False runs the children as stock modules.

    Shape: (N, C, H, W) -> (N, C, Ho, Wo), in x's memory format.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | Sequence[int] | str | None = None,
        dilation: int = 1,
        bias: bool = False,
        act: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(act, padding, fused)
        factory = {"device": device, "dtype": dtype}
        self.conv = self._depthwise(channels, kernel_size, stride, padding, dilation, bias, factory)
        self.bn = nn.BatchNorm2d(channels, eps, momentum, **factory)

    def chain(self, x: Tensor | Pending) -> Pending:
        return conv_bn_act(x, self.conv, self.bn, self.act, self.same, self.fused)


class PointwiseConvBNAct(Block):
    """1x1 convolution, BatchNorm, activation. Children: conv, bn. Arguments as DepthwiseConvBNAct.

    Shape: (N, C, H, W) -> (N, O, H, W), in x's memory format.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = False,
        act: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(act, None, fused)
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias, **factory)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, **factory)

    def chain(self, x: Tensor | Pending) -> Pending:
        return conv_bn_act(x, self.conv, self.bn, self.act, fused=self.fused)


class DepthwiseSeparable(Block):
    """The layer of MobileNet (arXiv:1704.04861, figure 3): depthwise, then 1x1, both with BatchNorm and act.

    Children, named as timm's: conv_dw, bn1, conv_pw, bn2. Arguments as DepthwiseConvBNAct, and

        depth_multiplier: outputs of the depthwise convolution for each of its inputs, as Keras names it.
            Above 1 that convolution is stock's.
        recompute: the depthwise output, half of what the block keeps for its backward, is computed again there
            in place of being kept. An attribute; it does nothing to a block that is compiled.

    Shape: (N, C, H, W) -> (N, O, Ho, Wo), in x's memory format.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | Sequence[int] | str | None = None,
        dilation: int = 1,
        act: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        depth_multiplier: int = 1,
        recompute: bool = False,
    ) -> None:
        super().__init__(act, padding, fused)
        self.recompute = recompute
        factory = {"device": device, "dtype": dtype}
        between = in_channels * depth_multiplier
        self.conv_dw = self._depthwise(
            in_channels, kernel_size, stride, padding, dilation, False, factory, depth_multiplier
        )
        self.bn1 = nn.BatchNorm2d(between, eps, momentum, **factory)
        self.conv_pw = nn.Conv2d(between, out_channels, 1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(out_channels, eps, momentum, **factory)

    def chain_depthwise(self, x: Tensor | Pending) -> Pending:
        """The first half of `chain`."""
        return conv_bn_act(x, self.conv_dw, self.bn1, self.act, self.same, self.fused)

    def chain_pointwise(self, x: Tensor | Pending) -> Pending:
        """The second half of `chain`."""
        return conv_bn_act(x, self.conv_pw, self.bn2, self.act, fused=self.fused)

    def chain(self, x: Tensor | Pending) -> Pending:
        if self.recompute and self.fused and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            conv = self.conv_dw
            tensor = x.x if isinstance(x, Pending) else x
            if _op_of(conv, self.bn1, self.same) == "depthwise" and not backends.wants_stock(tensor):
                geometry = conv.stride, "same" if self.same else conv.padding, conv.dilation
                return recomputed(x, self.chain_depthwise, self.chain_pointwise, conv.weight, geometry)
        return separable_bn_act(
            x, self.conv_dw, self.bn1, self.act, self.conv_pw, self.bn2, self.act, self.same, self.fused
        )
