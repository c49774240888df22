"""SyncBatchNorm on two gloo processes equals one process with the whole batch."""

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import mnops

SHARES = (5, 3)  # images of each process: the shares differ, and so must their weights


def network():
    torch.manual_seed(0)
    return mnops.MobileNet(num_classes=3, width_mult=0.25).double()


def images():
    return torch.randn(
        sum(SHARES), 3, 40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def state_after(model, x):
    loss = model(x).square().sum()
    loss.backward()
    return [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]


def one_process(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=len(SHARES))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    start = sum(SHARES[:rank])
    grads, buffers = state_after(model, images()[start : start + SHARES[rank]])
    for grad in grads:
        dist.all_reduce(grad)
    torch.save((grads, buffers), f"{path}/{rank}.pt")
    with torch.no_grad():
        model.eval()(images()[:1])
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    expected = state_after(network(), images())
    mp.spawn(one_process, (str(tmp_path),), nprocs=len(SHARES))
    for rank in range(len(SHARES)):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-6, atol=1e-9)


def test_alone_it_is_batch_norm():
    model = network()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    torch.testing.assert_close(state_after(synced, images()), state_after(model, images()))
