"""The optimisers, and which weights decay."""

from argparse import Namespace
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from . import TrainError


class RMSpropTF(torch.optim.Optimizer):
    """RMSprop as TensorFlow computes it, which is how MobileNet was trained (`tf.train.RMSPropOptimizer`):

        s <- decay s + (1 - decay) g^2             starting at 1
        m <- momentum m + lr g / sqrt(s + eps)     starting at 0
        w <- w - m

    `torch.optim.RMSprop` starts s at 0, adds eps outside the root, and multiplies by lr after the momentum.
    With TF-slim's eps = 1 the two are far apart. `weight_decay` is L2: it is added to the gradient.
    """

    def __init__(self, params: Iterable, lr: float = 0.045, decay: float = 0.9, momentum: float = 0.9,
                 eps: float = 1.0, weight_decay: float = 0.0) -> None:
        for name, value, ok in [("lr", lr, lr >= 0), ("decay", decay, 0 <= decay < 1), ("eps", eps, eps > 0),
                                ("momentum", momentum, 0 <= momentum < 1),
                                ("weight_decay", weight_decay, weight_decay >= 0)]:
            if not ok:
                raise ValueError(f"RMSpropTF: {name} is out of range, got {value}")
        defaults = dict(lr=lr, decay=decay, momentum=momentum, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"square_avg": torch.ones_like(p), "momentum_buffer": torch.zeros_like(p)}
            square_avgs = [self.state[p]["square_avg"] for p in params]
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            grads = [p.grad for p in params]
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_mul_(square_avgs, group["decay"])
            torch._foreach_addcmul_(square_avgs, grads, grads, value=1 - group["decay"])
            roots = torch._foreach_add(square_avgs, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_addcdiv_(buffers, grads, roots, value=group["lr"])
            torch._foreach_sub_(params, buffers)
        return loss


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: the weights of dense convolutions and linear layers decay; depthwise filters (the
    paper: they have so few parameters), norms and biases do not."""
    decay, keep = [], []
    for module in model.modules():
        dense = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                (decay if dense and name == "weight" else keep).append(p)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(s: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """rmsprop (TensorFlow's rule), sgd (Nesterov's momentum) or adamw over `param_groups(model)`."""
    groups = param_groups(model, s.weight_decay)
    if s.optimizer == "rmsprop":
        return RMSpropTF(groups, lr=s.lr, decay=s.decay, momentum=s.momentum, eps=s.eps)
    if s.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=s.lr, momentum=s.momentum, nesterov=s.momentum > 0, foreach=True)
    if s.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=s.lr, foreach=True)
    raise TrainError(f"the optimizer must be rmsprop, sgd or adamw, got {s.optimizer!r}")
