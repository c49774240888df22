"""The tolerance policy of all tests: an error at most twice stock PyTorch's at the same dtype and input."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import geometric_mean

import torch
from torch import Tensor

Results = dict[str, Tensor]
TINY = 1e-12  # nothing: the tensors in the tests are of size 1


def enough(channels: int) -> range:
    """Draws of the inputs over which the errors of `channels` sums are no matter of luck."""
    return range(max(4, 32 // channels))


def _rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def _jittered(t: Tensor) -> Tensor:
    """t in fp64, every value moved by up to one eps of t's dtype."""
    return t.double() * (1 + torch.finfo(t.dtype).eps * torch.empty(t.shape).uniform_(-1, 1).to(t.device))


def assert_as_exact(
    ours: Callable[..., Results],
    other: Callable[..., Results],
    exact: Callable[..., Results],
    draws: Sequence[Sequence[Tensor]],
    what: object,
) -> None:
    """|ours - exact| <= 2 * |other - exact| + floor for every result of these functions of the inputs.

    |.| is the root mean square over a tensor. The rule is put to the geometric mean, over several draws of
    the inputs, of error / allowed error: by luck either of two equally good roundings may be off by more than
    twice the other's error, in a single sum, or where a value falls on the other side of ReLU's kink.

    exact is evaluated in fp64. The floor is what one rounding of the inputs does to the exact result, and one
    rounding of the result itself: where the other side is better than that (one product, a power of two),
    twice its error is no bound. fp64 is its own measure; there the floor leaves it four digits.
    """
    rows = defaultdict(list)
    for inputs in draws:
        results, others = ours(*inputs), other(*inputs)
        exacts, nearby = exact(*(t.double() for t in inputs)), exact(*map(_jittered, inputs))
        for name, value in results.items():
            true = exacts[name]
            assert value.shape == true.shape, f"{what}: {name} has shape {value.shape}, not {true.shape}"
            assert torch.isfinite(value).all(), f"{what}: {name} is not finite"
            eps = torch.finfo(value.dtype).eps * (1e4 if value.dtype == torch.float64 else 1)
            floor = _rms(nearby[name] - true) + eps * _rms(true) + TINY
            rows[name].append((_rms(value.double() - true), _rms(others[name].double() - true), floor))
    for name, errors in rows.items():
        ratio = geometric_mean(max(error, TINY) / (2 * others + floor) for error, others, floor in errors)
        assert ratio <= 1, f"{what}: {name} has {ratio:.3g} times the allowed error; {errors}"
