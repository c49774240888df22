"""Statistics of a batch that lies on several processes: what SyncBatchNorm adds between two ops."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def group_of(bn: nn.Module) -> dist.ProcessGroup | None:
    """The process group whose batches bn normalises as one, as nn.SyncBatchNorm decides; None: alone."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training or not distributed():
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def synchronise(
    mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) of `count` values here -> those of all processes' values, and the count.

    With n_i, m_i, v_i of process i and N = sum n_i:

        mean = sum n_i m_i / N        var = sum n_i (v_i + (m_i - mean)^2) / N
    """
    return _Synchronise.apply(mean, var, count, group)


class _Synchronise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, var, count, group):
        mine = torch.cat([mean, var, mean.new_tensor([count])])
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, mine, group=group)
        every = torch.stack(every)
        means, variances, counts = every[:, : len(mean)], every[:, len(mean) : -1], every[:, -1:]
        share = counts / counts.sum()
        all_mean = (share * means).sum(0)
        all_var = (share * (variances + (means - all_mean) ** 2)).sum(0)
        ctx.group = group
        ctx.save_for_backward(mean - all_mean, share[dist.get_rank(group)])
        total = counts.sum()
        ctx.mark_non_differentiable(total)
        return all_mean, all_var, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_mean, g_var, _):
        """dm_i = n_i / N (g_mean + 2 (m_i - mean) g_var), dv_i = n_i / N g_var; g summed over processes."""
        away, share = ctx.saved_tensors
        g = torch.cat([g_mean, g_var])
        dist.all_reduce(g, group=ctx.group)
        g_mean, g_var = g.chunk(2)
        return share * (g_mean + 2 * away * g_var), share * g_var, None, None
