"""Distillation: a small network learns what a large one says of images, without labels (arXiv:1704.04861,
sections 4.4 and 4.6, after Hinton et al., arXiv:1503.02531).

    teach = Distillation(teacher, attribute_loss)    # any nn.Module that has learnt the task
    teach(student, images).backward()
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Distillation", "attribute_loss", "embedding_loss", "triplet_loss"]


def attribute_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's yes-or-no attributes under the teacher's (arXiv:1704.04861, 4.4):

        L = 1/(N A) sum over images i and attributes a of -(q log p + (1 - q) log(1 - p))
        p = sigmoid(student[i, a]),  q = sigmoid(teacher[i, a])

    Its least value, where p = q, is the mean entropy of q, not 0; its gradient is (p - q) / (N A).

    Args:
        student, teacher: logits (N, A). Only the student's get a gradient.
    """
    _check("attribute_loss", student, teacher)
    return F.binary_cross_entropy_with_logits(student, teacher.detach().sigmoid())


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared differences of embeddings (arXiv:1704.04861, section 4.6): 1/N sum over i of |s_i - t_i|^2.

    Args:
        student, teacher: embeddings (N, D). Only the student's get a gradient.
    """
    _check("embedding_loss", student, teacher)
    return (student - teacher.detach()).square().sum(1).mean()


def triplet_loss(embeddings: Tensor, labels: Tensor, margin: float = 0.2) -> Tensor:
    """The triplet loss of FaceNet (arXiv:1503.03832, equation 3) over a batch, with semi-hard negatives:

        L = mean over anchors a and positives p of max(0, |a - p|^2 - |a - n|^2 + margin)

    n, of another label, is the negative nearest to a among those farther from it than p is (section 3.2
    there); where none is farther, the farthest. FaceNet's margin is 0.2, on embeddings of length 1.

    Args:
        embeddings: (N, D).
        labels: (N,). Some label must come twice, and there must be two of them, else ValueError.
    """
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError("triplet_loss: embeddings must be (N, D) and labels (N,), "
                         f"got {tuple(embeddings.shape)} and {tuple(labels.shape)}")
    same = labels[:, None] == labels
    anchors, positives = same.clone().fill_diagonal_(False).nonzero(as_tuple=True)
    if not len(anchors) or bool(same.all()):
        raise ValueError("triplet_loss: a batch must have a label twice and two labels, "
                         f"got {labels.tolist()[:16]}")
    distances = (embeddings[:, None] - embeddings).square().sum(2)
    near, to_others, other = distances[anchors, positives], distances[anchors], ~same[anchors]
    farther = other & (to_others > near[:, None])
    semi_hard = to_others.masked_fill(~farther, torch.inf).amin(1)
    farthest = to_others.masked_fill(~other, -torch.inf).amax(1)
    far = torch.where(farther.any(1), semi_hard, farthest)
    return F.relu(near - far + margin).mean()


class Distillation:
    """The loss of a student that is to say what the teacher says.

    Args:
        teacher: maps what the student sees, or another view of it, to a tensor of the student's shape. It is
            put into eval mode; its weights get no gradient.
        loss: of (student's output, teacher's output), as `attribute_loss` and `embedding_loss`.
    """

    def __init__(self, teacher: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.teacher, self.loss = teacher.eval(), loss

    def __call__(self, student: nn.Module, x: Tensor, view: Tensor | None = None) -> Tensor:
        """view: what the teacher sees in place of x, such as the images at its own size."""
        with torch.no_grad():
            target = self.teacher(x if view is None else view)
        return self.loss(student(x), target)


def _check(owner: str, student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(f"{owner}: the outputs of student and teacher must be (N, C), both of one shape, "
                         f"got {tuple(student.shape)} and {tuple(teacher.shape)}")
