"""Less memory for a little time: a block keeps how to make its depthwise output again in place of the tensor.

The depthwise convolution is a small part of a block's arithmetic and half of what the block keeps for its backward.
Autograd's saved-tensor hooks hold everything that the block's two ops save; what is the depthwise output
among it is dropped when the forward is done, and made again when the backward asks for it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mnops import ops
from mnops.ops import Pending


class Recipe:
    """A tensor that is made when it is asked for, once, by `make()` from `inputs`, which must not change."""

    def __init__(self, make: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
        self.make, self.inputs, self.made = make, inputs, None
        self.versions = [t._version for t in inputs]
        device = inputs[0].device.type
        self.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )

    def __call__(self) -> Tensor:
        if self.made is None:
            if [t._version for t in self.inputs] != self.versions:
                raise RuntimeError(
                    "recompute: the input, the weight and the norm of a block must stay as they were in the "
                    "forward until the backward, but one was modified in place"
                )
            with torch.no_grad(), self.autocast:
                self.made = self.make()
        return self.made


class Kept:
    """What autograd holds in place of a saved tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.get: Callable[[], Tensor] = lambda: tensor
        self.address = tensor.data_ptr()


def recomputed(
    x: Tensor | Pending,
    depthwise: Callable[[Tensor | Pending], Pending],
    rest: Callable[[Pending], Pending],
    weight: Tensor,
    geometry: tuple,
) -> Pending:
    """rest(depthwise(x)), whose depthwise output, that of ops.depthwise_conv2d(x, weight, *geometry), is not kept."""
    kept: list[Kept] = []

    def pack(tensor: Tensor) -> Kept:
        kept.append(Kept(tensor))
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda k: k.get()):
        between = depthwise(x)
        y = rest(between)
    given = Pending(x) if isinstance(x, Tensor) else x
    frozen = Pending(*(v.detach() if isinstance(v, Tensor) else v for v in given))
    weight = weight.detach()
    recipe = Recipe(
        lambda: ops.depthwise_conv2d(frozen, weight, *geometry)[0],
        [v for v in (*frozen, weight) if isinstance(v, Tensor)],
    )
    for k in kept:
        if k.address == between.x.data_ptr():
            k.get = recipe
    return y
