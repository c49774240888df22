"""mnops.graph: a step replayed is the step called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import OPS, unserved

import mnops
from mnops import backends

SERVING = [name for name in backends.BACKENDS if not any(unserved(name, op, "cuda") for op in OPS)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def training_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def batches(device):
    return [(torch.randn(8, 3, 32, 32).to(device), torch.randint(5, (8,)).to(device)) for _ in range(7)]


def test_on_the_cpu_it_calls_the_step():
    eager = mnops.MobileNet(num_classes=5, width_mult=0.25)
    other = copy.deepcopy(eager)
    step, graphed = training_step(eager), mnops.graph(training_step(other))
    for batch in batches("cpu"):
        assert torch.equal(graphed(*batch), step(*batch))


@needs_gpu
@pytest.mark.parametrize("name", SERVING)
def test_replays_are_steps(name):
    """Seven steps, four of them replayed, on new data each: the same losses, weights and running statistics.
    """
    with mnops.backend(name):
        eager = mnops.MobileNet(num_classes=5, width_mult=0.25).cuda()
        other = copy.deepcopy(eager)
        step, graphed = training_step(eager), mnops.graph(training_step(other))
        for batch in batches("cuda"):
            torch.testing.assert_close(graphed(*batch).clone(), step(*batch), rtol=1e-3, atol=1e-3)
        assert graphed.captured is not None
        torch.testing.assert_close(other.state_dict(), eager.state_dict(), rtol=1e-2, atol=1e-3)


@needs_gpu
def test_another_shape_is_refused():
    graphed = mnops.graph(lambda x: x + 1)
    graphed(torch.zeros(3, device="cuda"))
    with pytest.raises(ValueError, match=r"shapes, dtypes and device must be .*\(3,\).* got .*\(4,\)"):
        graphed(torch.zeros(4, device="cuda"))


def test_only_tensors():
    with pytest.raises(TypeError, match="a step is given tensors, got float as argument 1"):
        mnops.graph(lambda x, lr: x)(torch.zeros(3), 0.1)
