"""Distillation: the losses against their formulas written out; a student learns from its teacher alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnops
from mnops.train.distill import Distillation, attribute_loss, embedding_loss, triplet_loss


def test_attribute_loss_is_the_cross_entropy_of_every_attribute():
    student, teacher = torch.randn(5, 3, dtype=torch.double), torch.randn(5, 3, dtype=torch.double)
    student.requires_grad_()
    p, q = student.sigmoid().tolist(), teacher.sigmoid().tolist()
    terms = [b * math.log(a) + (1 - b) * math.log(1 - a) for x, y in zip(p, q) for a, b in zip(x, y)]
    loss = attribute_loss(student, teacher)
    assert loss.item() == pytest.approx(-sum(terms) / 15)
    loss.backward()
    torch.testing.assert_close(student.grad, (student.sigmoid() - teacher.sigmoid()).detach() / 15)


def test_attribute_loss_is_least_where_the_student_agrees():
    teacher = torch.randn(8, 4)
    least = attribute_loss(teacher, teacher)
    assert least > 0.1  # the teacher's own entropy
    for _ in range(5):
        assert attribute_loss(teacher + 0.3 * torch.randn(8, 4), teacher) > least


def test_embedding_loss_is_the_mean_squared_distance():
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert embedding_loss(student, torch.tensor([[1.0, 0.0], [3.0, 4.0]])).item() == (4 + 25) / 2


@pytest.mark.parametrize("loss", [attribute_loss, embedding_loss])
def test_only_the_student_gets_a_gradient(loss):
    student, teacher = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize("loss", [attribute_loss, embedding_loss])
@pytest.mark.parametrize("shapes", [((2, 3), (2, 1)), ((2, 3), (3,)), ((2, 3, 1), (2, 3, 1))], ids=str)
def test_shapes_that_would_broadcast_are_refused(loss, shapes):
    with pytest.raises(ValueError, match=r"both of one shape, got \(2, 3"):
        loss(*(torch.zeros(s) for s in shapes))


def triplets(points: list[list[float]], labels: list[int], margin: float) -> float:
    """The formula, a triplet at a time."""
    def distance(i, j):
        return sum((x - y) ** 2 for x, y in zip(points[i], points[j]))

    losses, n = [], range(len(points))
    for a in n:
        for p in n:
            if a == p or labels[a] != labels[p]:
                continue
            near = distance(a, p)
            others = [distance(a, j) for j in n if labels[j] != labels[a]]
            far = min((d for d in others if d > near), default=max(others))
            losses.append(max(0.0, near - far + margin))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(5))
def test_triplet_loss_is_facenets(seed):
    torch.manual_seed(seed)
    points, labels = torch.randn(12, 3, dtype=torch.double), torch.randint(0, 4, (12,))
    expected = triplets(points.tolist(), labels.tolist(), 0.7)
    assert expected > 0 and triplet_loss(points, labels, 0.7).item() == pytest.approx(expected)


def test_triplet_loss_takes_the_farthest_where_none_is_farther():
    points = torch.tensor([[0.0], [3.0], [1.0], [2.0]])  # the two of label 0 lie outside the two of label 1
    labels = torch.tensor([0, 0, 1, 1])
    expected = triplets(points.tolist(), [0, 0, 1, 1], 0.5)
    assert triplet_loss(points, labels, 0.5).item() == pytest.approx(expected)


def test_triplet_loss_pulls_apart_what_is_mixed():
    points, labels = nn.Parameter(torch.randn(20, 8)), torch.arange(20) % 4
    optimizer = torch.optim.Adam([points], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        triplet_loss(F.normalize(points), labels).backward()
        optimizer.step()
    ends = F.normalize(points.detach())
    distances = torch.cdist(ends, ends)
    same = labels[:, None] == labels
    assert distances[same].max() < distances[~same].min()


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]], ids=str)
def test_triplet_loss_needs_positives_and_negatives(labels):
    with pytest.raises(ValueError, match="must have a label twice and two labels, got"):
        triplet_loss(torch.randn(3, 2), torch.tensor(labels))
    with pytest.raises(ValueError, match=r"labels \(N,\), got \(3, 2\) and \(3, 1\)"):
        triplet_loss(torch.randn(3, 2), torch.zeros(3, 1))


@pytest.mark.parametrize("loss", [attribute_loss, embedding_loss])
def test_a_student_learns_from_any_teacher_without_labels(loss):
    """The teacher is no MobileNet; its dropout and running statistics must stand still."""
    teacher = nn.Sequential(
        nn.BatchNorm2d(3), nn.Dropout(0.9), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 4)
    )
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = mnops.MobileNet(num_classes=4, width_mult=0.25)
    teach, images = Distillation(teacher, loss), torch.randn(16, 3, 32, 32)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        value = teach(student, images)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    least = loss(teacher(images), teacher(images)).item()
    assert losses[-1] - least < 0.25 * (losses[0] - least)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_may_see_another_view():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    student = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    images, view = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 4, 4)
    value = Distillation(teacher, embedding_loss)(student, images, view)
    assert value.item() == pytest.approx((student(images) - teacher(view)).square().sum(1).mean().item())
