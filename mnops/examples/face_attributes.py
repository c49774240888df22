"""Face attributes (arXiv:1704.04861, section 4.4): a small network learns from a large one, not from labels.

    python -m mnops.examples.face_attributes --data CELEBA --width 0.25 [--teacher CHECKPOINT]

CELEBA is CelebA (mmlab.ie.cuhk.edu.hk/projects/CelebA.html): list_attr_celeba.txt, list_eval_partition.txt
and the images in img_align_celeba/. The teacher, a wider MobileNet, is trained on the labels first, unless
one is given; the student then sees no label, and needs no weight decay, as the paper finds.
"""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnops.train import TrainError
from mnops.train.data import Images, Transform, check
from mnops.train.distill import attribute_loss

from . import common
from .page import Page

TRAIN, TEST = 0, 2  # of list_eval_partition.txt; 1 is validation


def celeba(root: Path) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """File names, attributes (N, A) of 0 and 1, the attributes' names, the partition (N,) of 0, 1, 2."""
    path = root / "list_attr_celeba.txt"
    lines = common.text_lines(path)
    if len(lines) < 3 or not lines[0].strip().isdigit():
        raise TrainError(f"{path}: line 1 must be the number of images, got {lines[0] if lines else ''!r}")
    names, files, rows = lines[1].split(), [], []
    for at, line in enumerate(lines[2:], 3):
        if not line.strip():
            continue
        file, *values = line.split()
        if len(values) != len(names):
            must = f"must have {len(names)} values, as line 2 has names"
            raise TrainError(f"{path}: line {at} {must}, got {len(values)}")
        wrong = next((v for v in values if v not in ("1", "-1")), None)
        if wrong is not None:
            raise TrainError(f"{path}: line {at}: a value must be 1 or -1, got {wrong!r}")
        files.append(file)
        rows.append([v == "1" for v in values])
    if len(files) != int(lines[0]):
        raise TrainError(f"{path}: must have {int(lines[0])} images, as line 1 says, got {len(files)}")
    path = root / "list_eval_partition.txt"
    parts: dict[str, int] = {}
    for at, line in enumerate(common.text_lines(path), 1):
        if line.strip():
            file, _, value = line.strip().rpartition(" ")
            if value not in ("0", "1", "2"):
                raise TrainError(f"{path}: line {at} must be FILE and 0, 1 or 2, got {line!r}")
            parts[file.strip()] = int(value)
    missing = next((file for file in files if file not in parts), None)
    if missing is not None:
        raise TrainError(f"{path}: must have every image of list_attr_celeba.txt, {missing} is not there")
    return files, np.array(rows, np.int64), names, np.array([parts[file] for file in files])


def part_of(root: Path, part: int, view: Transform, seed: int | None = None) -> tuple[Images, list[str]]:
    """The images of one partition with their attributes, and the attributes' names."""
    files, attributes, names, parts = celeba(root)
    own = np.flatnonzero(parts == part)
    if not len(own):
        path = root / "list_eval_partition.txt"
        raise TrainError(f"{path}: must have images of partition {part}, got none")
    folder = root / "img_align_celeba"
    paths = [common.existing(folder / files[i], str(root / "list_attr_celeba.txt")) for i in own]
    return Images(paths, attributes[own], view, seed), names


def average_precisions(scores: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """Average precision (A,) of each attribute: scores and attributes (N, A); NaN where all are alike."""
    from sklearn.metrics import average_precision_score

    columns = zip(scores.T, attributes.T)
    return np.array([average_precision_score(y, x) if 0 < y.sum() < len(y) else np.nan for x, y in columns])


command = common.Command(
    "face_attributes", __doc__, ["sklearn"], teacher=None, teacher_width=1.0, teacher_epochs=10, epochs=10,
    width=0.5, size=128, lr=0.02, batch_size=128, weight_decay=0.0, crop_scale=[0.7, 1.0], crop=1.0,
)  # fmt: skip
command.teacher_options()


def attributes_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.float())


@command
def main(s: Namespace, device: torch.device) -> None:
    root, out = Path(s.data), Path(s.out)
    train_view, test_view = common.transforms(s)
    train, names = part_of(root, TRAIN, train_view, s.seed)
    test, _ = part_of(root, TEST, test_view)
    for part in (test, train):
        check(part.images, s.verify)

    def build(own: Namespace) -> nn.Module:
        return common.network(own, len(names), device)

    def learn(teacher: nn.Module, own: Namespace) -> None:
        own, loss = common.changed(own, weight_decay=4e-5), common.with_labels(teacher, attributes_loss)
        common.fit(teacher, loss, train, own, device, "teacher", classes=names)

    if s.evaluate:
        models = {"student": common.saved(s, s.evaluate, build, classes=names)}
    else:
        models = common.distilled(s, build, learn, attribute_loss, train, device, classes=names)
    found = {n: common.predict(model, test, s, device, n).sigmoid().numpy() for n, model in models.items()}
    report(found, test, names, out)


def report(found: dict[str, np.ndarray], test: Images, names: list[str], out: Path) -> None:
    precisions = {model: average_precisions(scores, test.labels) for model, scores in found.items()}
    means = {model: float(np.nanmean(values)) for model, values in precisions.items()}
    columns = ["attribute", "share of images", *(f"AP, {model}" for model in precisions)]
    rows = [
        (name, float(share), *(float(v) for v in values))
        for name, share, *values in zip(names, test.labels.mean(0), *precisions.values())
    ]
    common.write_csv(out / "attributes.csv", columns, rows)
    said = ", ".join(f"{model} {100 * mean:.2f} %" for model, mean in means.items())
    page = Page("Face attributes")
    page.text(
        f"Mean average precision of {len(names)} attributes on {len(test)} images: {said}. "
        "An attribute that all or none of them has counts for nothing."
    )
    for path, scores, truth in list(zip(test.images, found["student"], test.labels))[:12]:
        top = np.argsort(-scores)[:5]
        page.picture(", ".join(f"{names[i]} {scores[i]:.2f}{'' if truth[i] else ' (no)'}" for i in top), path)
    page.table(columns, rows)
    page.losses(out, "teacher", "model")
    page.write(out / "index.html", f"mean AP: {said}")


if __name__ == "__main__":
    raise SystemExit(main())
