"""Whether modules still are what a plan was made of: asked in C, ten times as fast as making the plan anew."""

from operator import is_

from torch import nn

# What a forward depends on beside tensors and children, and what may come to stand before those.
ATTRIBUTES = {
    "training", "_parameters", "_buffers", "_modules", "eps", "act", "same", "fused",
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
}  # fmt: skip
BEFORE = {"forward", "weight", "bias"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unchanged:
    """True as long as what is below `module`, without hooks now, keeps its types, attributes, children and tensors.

    The values of the tensors do not count. It holds on to the modules, but not to `module`.
    """

    def __init__(self, module: nn.Module) -> None:
        _, *self._modules = module.modules()
        self._types = list(map(type, self._modules))
        self._hooks = [getattr(m, name) for m in self._modules for name in HOOKS]
        members = [d for m in self._modules for d in (m._parameters, m._buffers, m._modules)]
        self._members = [module._modules, *members]
        self._sizes = list(map(len, self._members))
        own = [(m.__dict__, name) for m in self._modules for name in ATTRIBUTES & m.__dict__.keys() | BEFORE]
        self._dicts, self._names = zip(*own, *((d, name) for d in self._members for name in d))
        self._values = list(map(dict.get, self._dicts, self._names))

    def __bool__(self) -> bool:
        return (
            all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and not any(self._hooks)
            and list(map(len, self._members)) == self._sizes
            and all(map(is_, map(type, self._modules), self._types))
        )
