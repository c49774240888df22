"""One process or many: what `torchrun` sets in the environment decides."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from . import TrainError


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device


@contextmanager
def world(device: str | None) -> Iterator[World]:
    """The process group of torchrun (NCCL on CUDA, else gloo), or a world of one. No device: CUDA or CPU.
    Inside another `world` it is that one's group, as a group cannot be set up twice."""
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(name)
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", local)
        torch.empty(0, device=target)
        if target.type == "cuda":
            torch.cuda.set_device(target)
    except (RuntimeError, AssertionError) as e:
        raise TrainError(f"--device {name}: {str(e).strip().partition(chr(10))[0]}") from e
    if size == 1:
        yield World(0, 1, target)
        return
    outermost = not dist.is_initialized()
    if outermost:
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, target)
        if outermost:
            # A rank that is done early must not close its connections under the others. Nor may its interpreter end
            # while a thread of gloo's, which outlive the group where DDP was used, still holds the last reference to a
            # tensor of Python's: the process would abort.
            dist.barrier()
    finally:
        if outermost:
            dist.destroy_process_group()


def distributed_model(model: nn.Module, world: World, sync_bn: bool) -> nn.Module:
    """The model for one rank of many: gradients are averaged in backward. `sync_bn` turns its BatchNorms into
    synchronised ones, in place and only then: DDP refuses them on the CPU, where the fused ones work."""
    devices = [world.device] if world.device.type == "cuda" else None
    model = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every rank the running statistics of rank 0, which are the ones that are saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
