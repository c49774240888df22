"""Whether modules still are what a plan was made of: asked in C, ten times as fast as making the plan anew."""

import weakref
from operator import is_

from torch import nn

# Of what every module has a forward depends on these; of hooks there are to be none.
MEMBERS = ("_parameters", "_buffers", "_modules")
NOT_ASKED = nn.Module().__dict__.keys() - {"training", *MEMBERS}
BEFORE = {"forward", "weight", "bias"}  # what may come to stand before parameters
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unchanged:
    """True as long as `module` and what is below it, there without hooks now, keep types, attributes and tensors.

    Of tensors the values do not count, of lists and dicts the length does. It holds on to the modules below, but not
    to `module`, whose forward may be its plan's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._own = {name: module.__dict__[name] for name in module.__dict__.keys() - NOT_ASKED - {"forward"}}
        _, *self._modules = module.modules()
        self._types = list(map(type, self._modules))
        self._hooks = [getattr(m, name) for m in self._modules for name in HOOKS]
        own = [(m.__dict__, name) for m in self._modules for name in m.__dict__.keys() - NOT_ASKED | BEFORE]
        members = [getattr(m, name) for m in (module, *self._modules) for name in MEMBERS]
        self._dicts, self._names = zip(*own, *((d, name) for d in members for name in d))
        self._values = list(map(dict.get, self._dicts, self._names))
        values = (*self._own.values(), *self._values, *(m.__dict__ for m in self._modules))
        self._sized = [value for value in values if isinstance(value, (dict, list, set))]
        self._sizes = list(map(len, self._sized))
        self._size = len(module.__dict__)

    def __bool__(self) -> bool:
        return (
            all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and not any(self._hooks)
            and list(map(len, self._sized)) == self._sizes
            and all(map(is_, map(type, self._modules), self._types))
            and (module := self._module()) is not None
            and len(module.__dict__) == self._size
            and all(map(is_, map(module.__dict__.get, self._own), self._own.values()))
        )
