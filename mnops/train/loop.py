"""The training run: steps, epochs, checkpoints, and the evaluation."""

import math
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from . import TrainError, checkpoint
from .data import Data, Images, StepSampler, batches, test_keys
from .distributed import World, broadcast_buffers, distributed_model
from .log import Log
from .optim import build_optimizer
from .schedule import lr_factor

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_input(images: Tensor, channels_last: bool) -> Tensor:
    """uint8 images to the network's input in [-1, 1]."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (images.float() / 127.5 - 1).contiguous(memory_format=layout)


def autocast(device: torch.device, amp: str):
    return torch.autocast(device.type, AMP[amp]) if AMP[amp] else nullcontext()


class Meter:
    """Sums of loss, right answers (first; among the first five), images. `read` adds them up over all ranks
    (a collective) and starts again. Sums, not means of means: ranks and last batches may differ in size."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        n, classes = logits.shape
        right = logits.topk(min(5, classes)).indices == labels[:, None]
        counts = [right[:, 0].sum(), right.sum(), torch.tensor(n, device=loss.device)]
        self._sums += torch.stack([loss.double() * n, *counts])

    def read(self) -> dict[str, float]:
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        loss, right, right5, n = self._sums.tolist()
        self._sums.zero_()
        return {"loss": loss / n, "accuracy": right / n, "top5": right5 / n, "images": n}


@torch.no_grad()
def evaluate(model: nn.Module, data: Images, s: Namespace, world: World) -> dict[str, float]:
    """Mean cross-entropy, accuracy and top-5 accuracy (shares of 1) over all images of all ranks."""
    training = model.training
    model.eval()
    meter = Meter(world.device)
    keys = test_keys(len(data), math.ceil(s.batch_size / world.size), world.rank, world.size)
    for images, labels in batches(data, keys, s.workers, world.device):
        with autocast(world.device, s.amp):
            logits = model(to_input(images, s.channels_last)).float()
        meter.update(F.cross_entropy(logits, labels), logits, labels)
    model.train(training)
    return meter.read()


def mixup(images: Tensor, labels: Tensor, classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixes each image and its one-hot label with those of the reversed batch, by one share drawn from
    Beta(alpha, alpha) (arXiv:1710.09412)."""
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    targets = F.one_hot(labels, classes).to(images.dtype)
    return torch.lerp(images.flip(0), images, share), torch.lerp(targets.flip(0), targets, share)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               images: Tensor, labels: Tensor, s: Namespace, classes: int,
               on_piece: Callable[[Tensor, Tensor, Tensor], None] | None = None) -> None:
    """One optimiser step on uint8 images, in `s.accumulate` pieces of equal size; calls
    on_piece(loss, logits, labels) for each."""
    optimizer.zero_grad(set_to_none=True)
    for k, (some, own) in enumerate(zip(images.chunk(s.accumulate), labels.chunk(s.accumulate))):
        x, target = to_input(some, s.channels_last), own
        if s.mixup:
            x, target = mixup(x, own, classes, s.mixup)
        wait = k < s.accumulate - 1 and isinstance(model, DistributedDataParallel)  # average once a step
        with model.no_sync() if wait else nullcontext():
            with autocast(images.device, s.amp):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), target, label_smoothing=s.smoothing)
            scaler.scale(loss / s.accumulate).backward()
        if on_piece:
            on_piece(loss.detach(), logits.detach(), own)
    scaler.step(optimizer)
    scaler.update()


class Trainer:
    """A run: everything that changes with its steps. Random numbers inside a step (dropout, mixup) come from
    torch's generator, seeded by (seed, step, rank): the step is all the random state there is to save."""

    def __init__(self, model: nn.Module, data: Data, settings: Namespace, world: World, out: Path) -> None:
        self.model, self.data, self.settings, self.world, self.out = model, data, settings, world, out
        self.steps_per_epoch = len(data.train) // settings.batch_size
        self.total = settings.epochs * self.steps_per_epoch
        self.optimizer = build_optimizer(settings, model)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.amp == "fp16")
        self.ema = None
        if settings.ema:
            self.ema = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)
        self.step = 0
        self.best = -1.0
        self.seconds = 0.0
        self.sums = {"loss": 0.0, "accuracy": 0.0, "images": 0.0}  # of the epoch so far

    @property
    def judged(self) -> nn.Module:
        """The model that is tested: the average of the weights where one is kept."""
        return self.ema.module if self.ema else self.model

    def state_dict(self) -> dict:
        return {
            **self._made_with(), "model": self.model.state_dict(), "ema": self.ema and self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "step": self.step, "best": self.best, "seconds": self.seconds, "sums": self.sums,
        }

    def load_state_dict(self, state: dict, path: Path) -> None:
        if state.get("images") != len(self.data.train) or "optimizer" not in state:
            raise TrainError(f"checkpoint {path}: must be the last of a run on {len(self.data.train)} images "
                             f"as here, got one on {state.get('images', 'unknown')}")
        checkpoint.load_weights(self.model, state["model"], path)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
        self.seconds, self.sums = state["seconds"], state["sums"]

    def fit(self) -> dict[str, float]:
        """Trains from the current step to the end; returns the evaluation after the last epoch."""
        s, world = self.settings, self.world
        if self.step == self.total:
            return evaluate(self.judged, self.data.test, s, world)
        log = Log(self.out, self.step, s.tensorboard) if world.rank == 0 else None
        bar = tqdm(total=self.total * s.batch_size, initial=self.step * s.batch_size, unit="img",
                   unit_scale=True, disable=world.rank > 0, dynamic_ncols=True, smoothing=0.05)
        model = distributed_model(self.model, world, s.sync_bn) if world.size > 1 else self.model
        model.train()
        keys = StepSampler(len(self.data.train), s.batch_size, s.seed, self.step, self.total, *world[:2])
        meter = Meter(world.device)
        began = window_began = time.perf_counter()
        test: dict[str, float] = {}
        try:
            for images, labels in batches(self.data.train, keys, s.workers, world.device):
                epoch = self.step // self.steps_per_epoch + 1
                lr = self._set_lr()
                torch.manual_seed(step_seed(s.seed, self.step, world.rank))
                train_step(model, self.optimizer, self.scaler, images, labels, s, len(self.data.classes),
                           meter.update)
                if self.ema:
                    self.ema.update_parameters(self.model)
                self.step += 1
                bar.update(s.batch_size)
                ends = self.step % self.steps_per_epoch == 0
                saves = ends or (s.checkpoint_steps and self.step % s.checkpoint_steps == 0)
                if saves or self.step % s.log_steps == 0:
                    row = self._window(meter, epoch, lr, time.perf_counter() - window_began)
                    bar.set_description(f"epoch {epoch}/{s.epochs}", refresh=False)
                    bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "accuracy")}, refresh=False)
                    if log:
                        log.step(row)
                    if ends:
                        test = self._end_epoch(epoch, lr, log, self.seconds + time.perf_counter() - began)
                    if saves:
                        self.seconds += time.perf_counter() - began
                        began = time.perf_counter()
                        self._save("last.pt", self.state_dict())
                    window_began = time.perf_counter()
        finally:
            bar.close()
            if log:
                log.close()
        return test

    def sample(self) -> tuple[Tensor, Tensor]:
        """The images and labels of the first step."""
        keys = StepSampler(len(self.data.train), self.settings.batch_size, self.settings.seed, 0, 1, 0, 1)
        return next(batches(self.data.train, keys, 0, self.world.device))

    def _average(self, averaged: list[Tensor], current: list[Tensor], n: Tensor) -> None:
        """TensorFlow's moving average: the first steps, which were hardly trained, are forgotten faster."""
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(averaged, current, n)

    def _set_lr(self) -> float:
        s = self.settings
        lr = s.lr * lr_factor(self.step, schedule=s.schedule, total=self.total,
                              warmup=round(s.warmup_epochs * self.steps_per_epoch),
                              decay_steps=max(1, round(s.decay_epochs * self.steps_per_epoch)),
                              decay_rate=s.decay_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _window(self, meter: Meter, epoch: int, lr: float, seconds: float) -> dict[str, float]:
        """The row of steps.csv for the steps since the last one."""
        row = meter.read()
        if not math.isfinite(row["loss"]):
            raise TrainError(f"the loss is {row['loss']} at step {self.step} (epoch {epoch}): try a smaller "
                             "--lr, more --warmup-epochs or --amp off; the checkpoints are from before")
        n = row["images"]
        self.sums["images"] += n
        for name in ("loss", "accuracy"):
            self.sums[name] += n * row[name]
        return {"step": self.step, "epoch": epoch, "lr": lr, "loss": row["loss"], "accuracy": row["accuracy"],
                "images_per_second": round(n / seconds, 1)}

    def _end_epoch(self, epoch: int, lr: float, log: Log | None, seconds: float) -> dict[str, float]:
        broadcast_buffers(self.model)
        if self.ema:
            broadcast_buffers(self.ema)
        test = evaluate(self.judged, self.data.test, self.settings, self.world)
        n = self.sums["images"]
        row = {"step": self.step, "epoch": epoch, "lr": lr, "loss": self.sums["loss"] / n,
               "accuracy": self.sums["accuracy"] / n, "test_loss": test["loss"],
               "test_accuracy": test["accuracy"], "test_top5": test["top5"], "seconds": round(seconds, 2)}
        self.sums = dict.fromkeys(self.sums, 0.0)
        if log:
            log.epoch(row)
            tqdm.write(f"epoch {epoch}/{self.settings.epochs}  loss {row['loss']:.4f}  "
                       f"accuracy {row['accuracy']:.4f}  test loss {test['loss']:.4f}  "
                       f"test accuracy {test['accuracy']:.4f}")
        if test["accuracy"] > self.best:
            self.best = test["accuracy"]
            self._save("best.pt", {**self._made_with(), "model": self.judged.state_dict(), "step": self.step,
                                   "test_accuracy": self.best})
        return test

    def _made_with(self) -> dict:
        return {"settings": vars(self.settings), "classes": self.data.classes,
                "images": len(self.data.train)}

    def _save(self, name: str, state: dict) -> None:
        if self.world.rank == 0:
            checkpoint.save(self.out / name, state)


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
