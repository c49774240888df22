"""A fused model with SyncBatchNorm on two gloo processes equals the stock one on one process, whole batch."""

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fused_models import InvertedResidual, conv_norm_act, network
from torch import nn

import mnops
from mnops.fuse import SyncBatchNorm

SHARES = (5, 3)  # images of each process


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(SHARES), 3, 16, 16, generator=generator, dtype=torch.float64)


def made():
    torch.manual_seed(0)
    model = network(
        InvertedResidual(8, 8), InvertedResidual(8, 12, 5, 2, nn.Hardswish), conv_norm_act(12, 12, bias=True)
    )
    model = model.double().eval()
    with torch.no_grad():
        model(images())
    return model.train()


def step(model, x):
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]


def one_process(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=len(SHARES))
    start = sum(SHARES[:rank])
    found = []
    for order in ("before", "after"):
        model = made()
        if order == "before":
            model = mnops.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(model))
        else:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(mnops.fuse(model))
        grads, buffers = step(model, images()[start : start + SHARES[rank]])
        assert sum(type(m) is SyncBatchNorm for m in model.modules()) == 8
        for grad in grads:
            dist.all_reduce(grad)
        found.append((grads, buffers))
    torch.save(found, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    expected = step(made(), images())
    mp.spawn(one_process, (str(tmp_path),), nprocs=len(SHARES))
    for rank in range(len(SHARES)):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_alone_it_is_batch_norm():
    expected = step(made(), images())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(mnops.fuse(made()))
    torch.testing.assert_close(step(model, images()), expected)
    assert type(mnops.unfuse(copy.deepcopy(model))[0][1]) is nn.SyncBatchNorm
