"""run_layers: layers of a network in one call, for inference."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from mnops import reference
from mnops.ops import _contract as c
from mnops.ops import _register as r
from mnops.ops.depthwise_conv2d import check as check_depthwise
from mnops.ops.pointwise_conv2d import check as check_pointwise
from mnops.ops.stem_conv2d import check as check_stem
from mnops.reference import ACTS, GATES, LAYER_INTS, LAYER_KINDS

NAME = "run_layers"


class Layers:
    """What `run_layers` runs: written down layer by layer, each giving the number of the value that it makes.

    Values 0 and on are the inputs, (N, C, H, W). A convolution gives its raw output; `norm` leaves a norm and an
    activation pending on a value, which whoever reads it applies.
    """

    def __init__(self, inputs: int = 1) -> None:
        self.inputs = inputs
        self.tensors: list[Tensor] = []
        self.eps: list[float] = []
        self.ints: list[int] = []

    def _add(self, kind: str, x: int, rest: Sequence[int] = (), eps: float = 0.0) -> int:
        self.ints += (LAYER_KINDS.index(kind), x, *rest, *(0,) * (LAYER_INTS - 2 - len(rest)))
        self.eps.append(eps)
        return self.inputs + len(self.eps) - 1

    def _index(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def after_norm(self, mean, var, weight, bias, eps: float, act: str) -> "Layers":
        """A copy whose first layer, a norm of input 0, is this one."""
        other = copy.copy(self)
        other.tensors, other.eps = self.tensors.copy(), [eps, *self.eps[1:]]
        vectors = (other._index(t) for t in (mean, var, weight, bias))
        other.ints = [*self.ints[:2], *vectors, ACTS.index(act), *self.ints[7:]]
        return other

    def packed(self) -> "Layers":
        """A copy whose pointwise weights are packed as they are now."""
        other = copy.copy(self)
        other.tensors, other.ints = self.tensors.copy(), self.ints.copy()
        for at in range(0, len(self.ints), LAYER_INTS):
            if LAYER_KINDS[self.ints[at]] == "pointwise":
                other.ints[at + 5] = other._index(torch.ops.mnops.pack_pointwise(self.tensors[self.ints[at + 2]]))
        return other

    def stem(self, x: int, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> int:
        """stride (height, width), padding (top, bottom, left, right)."""
        return self._add("stem", x, (self._index(weight), *stride, *padding))

    def depthwise(
        self, x: int, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> int:  # fmt: skip
        return self._add("depthwise", x, (self._index(weight), *stride, *padding, *dilation))

    def pointwise(
        self, x: int, weight: Tensor, gate: int = -1, gating: str = "sigmoid", packed: Tensor | None = None
    ) -> int:  # fmt: skip
        """gate: a value (N, C, 1, 1), of which sigmoid or hardsigmoid are factors for x's channels.

        packed: what `torch.ops.mnops.pack_pointwise` made of the weight, to be packed no more; in x's dtype.
        """
        rest = gate, list(GATES).index(gating), self._index(packed)
        return self._add("pointwise", x, (self._index(weight), *rest))

    def norm(
        self, x: int, mean: Tensor | None = None, var: Tensor | None = None, weight: Tensor | None = None,
        bias: Tensor | None = None, eps: float = 0.0, act: str = "none",
    ) -> int:  # fmt: skip
        """As in `Pending`; of a bias alone: act(x + bias)."""
        if act not in ACTS:
            raise ValueError(f"{NAME}: act must be one of {', '.join(ACTS)}, got {act!r}")
        if (mean is None) != (var is None) or (mean is None and weight is not None):
            raise ValueError(f"{NAME}: mean and var must be given together, and with weight of the norm")
        vectors = (self._index(t) for t in (mean, var, weight, bias))
        return self._add("norm", x, (*vectors, ACTS.index(act)), eps)

    def sum(self, x: int, other: int) -> int:
        """Of two values of one shape."""
        return self._add("sum", x, (other,))

    def pool(self, x: int) -> int:
        """The mean over H and W, (N, C, 1, 1)."""
        return self._add("pool", x)


def run_layers(values: Sequence[Tensor], layers: Layers, results: Sequence[int]) -> list[Tensor]:
    """Runs layers without a step of Python between them: on a small image a call takes longer than its kernel.

    A depthwise convolution, its norm and the 1x1 convolution behind it are `separable_conv2d`.

    Args:
        values: the inputs, (N, C, H, W), in the dtype of the weights, or half with float32 weights.
        layers: what is done with them.
        results: numbers of the values that are wanted.

    Returns:
        Those, with what was pending on them applied; channels_last.

    Raises:
        ValueError, TypeError: with the rule and the value received.
        RuntimeError: if a gradient is asked for.
    """
    if r.needs_grad((*values, *layers.tensors)):
        rule = "it is for inference, under torch.no_grad(), got a tensor that requires grad"
        raise RuntimeError(f"{NAME}: {rule}")
    if len(values) != layers.inputs:
        raise ValueError(f"{NAME}: these layers have {layers.inputs} inputs, got {len(values)} values")
    x, *others = values
    return r.run(NAME, (x, others, layers.tensors, layers.eps, layers.ints, list(results)), check)


CONVOLUTIONS = dict(stem=check_stem, depthwise=check_depthwise, pointwise=check_pointwise)


def check(x, others, tensors, eps, layers, results) -> list[tuple[int, ...]]:
    """The contract; returns the shapes of the results."""
    values, norms = [x, *others], [reference.NO_NORM] * (1 + len(others))
    for kind, source, args in reference.of_each_layer(len(values), tensors, eps, layers):
        x, norm = values[source], norms[source]
        after = reference.NO_NORM
        if kind in CONVOLUTIONS:
            weight, *geometry = args
            if kind == "pointwise" and geometry:
                gate, geometry = values[geometry[0]].shape, ()
                if tuple(gate) != (*x.shape[:2], 1, 1):
                    raise ValueError(f"{NAME}: a gate must be (N, C, 1, 1) with x {tuple(x.shape)}, got {tuple(gate)}")
            x = x.new_empty(CONVOLUTIONS[kind](x, weight, *norm, *geometry, False))
        elif kind == "norm":
            mean, var, weight, bias, *rest = args
            if mean is None and var is None and weight is None and bias is not None:
                mean, var, weight, bias = bias, bias, None, None
            after = *c.norm_args(x, mean, var, weight, bias, *rest),
            c.check_pending(NAME, x, *after)
        elif kind == "sum":
            one, other = ((tuple(v.shape), v.dtype, v.device) for v in (x, values[args[0]]))
            if one != other:
                rule = "the values of a sum must have one shape, dtype and device"
                raise ValueError(f"{NAME}: {rule}, got {one} and {other}")
        else:
            x = x.new_empty((*x.shape[:2], 1, 1))
        values.append(x), norms.append(after)
    for i in results:
        reference.refuse_unknown(i, len(values))
    return [tuple(values[i].shape) for i in results]


def fake(x, *args):
    return [
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for shape in check(x, *args)
    ]


def flops(x_shape, other_shapes, tensor_shapes, eps, layers, results, **kwargs) -> int:
    shapes, total = [list(x_shape), *map(list, other_shapes)], 0
    for kind, source, args in reference.of_each_layer(len(shapes), tensor_shapes, eps, layers):
        n, channels, *size = shapes[source]
        if kind in CONVOLUTIONS:
            (channels, per_group, *kernel), *geometry = args
            geometry = () if kind == "pointwise" else geometry
            stride, padding, dilation = (*geometry, *DEFAULTS[len(geometry) :])
            for i in range(2):
                room = size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1
                size[i] = room // stride[i] + 1
            total += 2 * n * channels * per_group * kernel[0] * kernel[1] * size[0] * size[1]
        elif kind == "pool":
            size = [1, 1]
        shapes.append([n, channels, *size])
    return total


DEFAULTS = ((1, 1), (0, 0, 0, 0), (1, 1))  # stride, padding, dilation

r.register_inference(NAME, fake, flops)
