"""The fused training step beside the stock one: same weights, same images, interleaved in one process."""

import copy
import statistics
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .loop import train_step
from .optim import build_optimizer


def compare_steps(model: nn.Module, images: Tensor, labels: Tensor, settings: Namespace, classes: int) -> str:
    """One line: the median times of the fused and the stock training step (forward, loss, backward, update at
    learning rate 0), and the median and quartiles of their ratio per round, over `settings.compare` seconds.
    Stock runs in channels_last and in NCHW; the faster of the two counts."""
    def variant(fused: bool, channels_last: bool) -> Callable[[], float]:
        s = Namespace(**{**vars(settings), "channels_last": channels_last, "accumulate": 1, "lr": 0.0})
        layout = torch.channels_last if channels_last and not fused else torch.contiguous_format
        own = copy.deepcopy(model).to(memory_format=layout).train()
        own.fused = fused
        optimizer = build_optimizer(s, own)
        scaler = torch.amp.GradScaler(images.device.type, enabled=s.amp == "fp16")

        def step() -> float:
            began = time.perf_counter()
            train_step(own, optimizer, scaler, images, labels, s, classes)
            if images.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began
        return step

    steps = {"fused": variant(True, True), "channels_last": variant(False, True),
             "NCHW": variant(False, False)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # warm-up
        for _ in range(3):
            step()
    rounds, until = 0, time.perf_counter() + settings.compare
    while time.perf_counter() < until or rounds < 5:
        for name in sorted(steps, reverse=rounds % 2 == 1):
            times[name].append(steps[name]())
        rounds += 1
    fused, *stock = (statistics.median(t) for t in times.values())
    layout, best = min(zip(["channels_last", "NCHW"], stock), key=lambda pair: pair[1])
    low, middle, high = statistics.quantiles([s / f for s, f in zip(times[layout], times["fused"])], n=4)
    shape = "x".join(map(str, images.shape))
    return (f"fused step {1e3 * fused:.2f} ms, stock step {1e3 * best:.2f} ms ({layout}): {middle:.2f} times "
            f"as fast (quartiles {low:.2f} to {high:.2f} of {rounds} interleaved rounds; batch {shape}, "
            f"amp {settings.amp}, {torch.get_num_threads()} threads)")
