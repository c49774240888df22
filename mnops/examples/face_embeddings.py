"""Face embeddings (arXiv:1704.04861, section 4.6): a small network learns a large one's embeddings.

    python -m mnops.examples.face_embeddings --data FACES --pairs pairs.txt --pairs-images LFW

FACES is a folder of PERSON/* to train on. pairs.txt is that of Labeled Faces in the Wild
(vis-www.cs.umass.edu/lfw), its images LFW/PERSON/PERSON_0001.jpg. The teacher, a wider MobileNet, learns from
triplets as FaceNet does, unless one is given; the student learns the teacher's embeddings by squared
differences, without labels. The result is the verification rate: the share of pairs of one person that are
accepted, at the distance at which a given share of pairs of two people is.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler

from mnops.train import TrainError
from mnops.train.cli import number
from mnops.train.data import EXTENSIONS, Images, check, class_folders
from mnops.train.distill import embedding_loss, triplet_loss

from . import common
from .page import Page


class Pairs(NamedTuple):
    """Pairs of images: `first` and `second` index `images`; `same` says whether they show one person."""

    images: list[Path]
    first: np.ndarray
    second: np.ndarray
    same: np.ndarray


def lfw_pairs(path: Path, folder: Path) -> Pairs:
    """pairs.txt of LFW: line 1 has the folds and the pairs of each kind in one, then a pair a line: NAME I J
    for one person, NAME I OTHER J for two; image I of NAME is NAME/NAME_000I.* in the folder."""
    lines = common.text_lines(path)
    head = lines[0].split() if lines else []
    if len(head) not in (1, 2) or not all(word.isdigit() and int(word) for word in head):
        got = "".join(lines[:1])
        raise TrainError(f"{path}: line 1 must be the numbers of folds and of pairs, got {got!r}")
    numbers: dict[Path, int] = {}
    pairs = []
    for at, line in enumerate(lines[1:], 2):
        match line.split():
            case []:
                continue
            case [name, i, j] if i.isdigit() and j.isdigit():
                ends = (name, i), (name, j)
            case [name, i, other, j] if i.isdigit() and j.isdigit():
                ends = (name, i), (other, j)
            case _:
                raise TrainError(f"{path}: line {at} must be NAME I J or NAME I OTHER J, got {line!r}")
        found = [_image(folder, name, int(i), f"{path}: line {at}") for name, i in ends]
        pairs.append((*(numbers.setdefault(image, len(numbers)) for image in found), len(line.split()) == 3))
    wanted = 2 * int(np.prod([int(word) for word in head]))
    if len(pairs) != wanted:
        raise TrainError(f"{path}: must have {wanted} pairs, as line 1 says, got {len(pairs)}")
    first, second, same = (np.array(column) for column in zip(*pairs))
    if same.all() or not same.any():
        got = f"{same.sum()} of {len(same)} of one"
        raise TrainError(f"{path}: must have pairs of one person and of two, got {got}")
    return Pairs(list(numbers), first, second, same)


def _image(folder: Path, name: str, i: int, told_by: str) -> Path:
    stem = folder / name / f"{name}_{i:04d}"
    for ending in (".jpg", *sorted(EXTENSIONS)):
        if (path := stem.with_suffix(ending)).is_file():
            return path
    raise TrainError(f"{told_by}: there is no image {stem}.jpg")


class PeopleBatches(Sampler[list[tuple[int, int]]]):
    """Batches of `each` images of every one of batch / each people, so that there are triplets in it. An
    epoch is as many as the images fill; who has fewer images than `each` comes with some of them twice."""

    def __init__(self, labels: np.ndarray, batch: int, each: int, epochs: int, seed: int) -> None:
        self.own = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.people, self.each, self.seed = min(batch // each, len(self.own)), each, seed
        if self.people < 2 or each < 2:
            got = f"{batch} for {each} of each and {len(self.own)} people"
            raise TrainError(f"--batch-size: must hold two images of two people at least, got {got}")
        self.steps = epochs * max(1, len(labels) // (self.people * each))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            rng = np.random.default_rng([self.seed, step])
            people = rng.choice(len(self.own), self.people, replace=False)
            yield [(step, int(i)) for p in people for i in self._some(rng, self.own[p])]

    def _some(self, rng: np.random.Generator, own: np.ndarray) -> np.ndarray:
        return rng.choice(own, self.each, replace=len(own) < self.each)


class Verification(NamedTuple):
    rate: float  # share of pairs of one person that are accepted
    threshold: float  # distance up to which a pair is accepted
    false_accepts: float  # the share that the threshold really gives: the greatest not above the wanted one


def verification(distances: np.ndarray, same: np.ndarray, far: float) -> Verification:
    """VAL at FAR (arXiv:1503.03832, section 4): the greatest threshold that accepts at most a share `far` of
    the pairs of two people."""
    others = np.sort(distances[~same])
    allowed = int(np.floor(far * len(others) + 1e-9))
    # Below the first distance that must not be accepted; none: everything is.
    threshold = np.inf if allowed >= len(others) else np.nextafter(others[allowed], -np.inf)
    accepted = distances <= threshold
    return Verification(float(accepted[same].mean()), float(threshold), float(accepted[~same].mean()))


class Embedder(nn.Module):
    """A MobileNet whose last layer gives an embedding of length 1. Shape: (N, 3, H, W) -> (N, D).

    A BatchNorm before the length is taken removes what all embeddings have in common. Without it that part
    may outgrow the rest: then all are alike, and the longer they are, the less their directions learn.
    """

    def __init__(self, net: nn.Module, momentum: float) -> None:
        super().__init__()
        self.net = net
        self.norm = nn.BatchNorm1d(net.classifier.out_features, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.norm(self.net(x)))


command = common.Command(
    "face_embeddings", __doc__, pairs=None, pairs_images=None, far=1e-3, dim=128,
    teacher=None, teacher_width=1.0, teacher_epochs=20, epochs=20, width=0.5, size=160, lr=0.02,
    batch_size=120, each=6, margin=0.2, weight_decay=0.0, crop_scale=[0.7, 1.0], crop=1.0,
)  # fmt: skip
command.option("--pairs", "pairs.txt of LFW [DATA/pairs.txt]", metavar="FILE")
command.option("--pairs-images", "its folder of PERSON/* [--data]", metavar="DIR")
command.option("--far", "share of false accepts to report at", type=number(float, 0, 1))
command.option("--dim", "length of the embedding", type=number(int, 1))
command.teacher_options()
command.option("--each", "images of a person in a batch of triplets", type=number(int, 2))
command.option("--margin", "of the triplet loss", type=number(float, 0))


@command
def main(s: Namespace, device: torch.device) -> None:
    out, train_view, test_view = Path(s.out), *common.transforms(s)
    pairs = lfw_pairs(Path(s.pairs or Path(s.data) / "pairs.txt"), Path(s.pairs_images or s.data))
    test = Images(pairs.images, [0] * len(pairs.images), test_view)
    check(pairs.images, s.verify)

    def build(own: Namespace) -> nn.Module:
        return Embedder(common.network(own, s.dim, device), s.bn_momentum).to(device)

    def learn(teacher: nn.Module, own: Namespace) -> None:
        keys = PeopleBatches(people.labels, s.batch_size, s.each, own.epochs, s.seed)
        loss = common.with_labels(teacher, partial(triplet_loss, margin=s.margin))
        common.fit(teacher, loss, people, own, device, "teacher", keys=keys, dim=s.dim)

    if s.evaluate:
        models = {"student": common.saved(s, s.evaluate, build, dim=s.dim)}
    else:
        images, labels, _ = class_folders(Path(s.data))
        check(images, s.verify)
        people = Images(images, labels, train_view, s.seed)
        models = common.distilled(s, build, learn, embedding_loss, people, device, dim=s.dim)
    distances = {}
    for name, model in models.items():
        found = common.predict(model, test, s, device, name).double().numpy()
        distances[name] = np.square(found[pairs.first] - found[pairs.second]).sum(1)
    report(distances, pairs, s.far, out)


def report(distances: dict[str, np.ndarray], pairs: Pairs, far: float, out: Path) -> None:
    results = {name: verification(found, pairs.same, far) for name, found in distances.items()}
    ends = [(pairs.images[i], pairs.images[j]) for i, j in zip(pairs.first, pairs.second)]
    common.write_csv(
        out / "pairs.csv",
        ["first", "second", "same person", *distances],
        ((*end, int(same), *row) for end, same, *row in zip(ends, pairs.same, *distances.values())),
    )
    kinds = pairs.same.sum(), (~pairs.same).sum()
    page = Page("Face embeddings")
    page.text(
        f"Of {kinds[0]} pairs of one person, the share that is accepted where {100 * far:g} % of {kinds[1]} pairs "
        "of two people may be. arXiv:1704.04861 has 79.4 % for MobileNet-1.0-160 at 0.01 %, on a set of its own."
    )
    page.table(
        ["network", "accepted of one person, %", "of two people, %", "squared distance up to which"],
        [(name, 100 * r.rate, 100 * r.false_accepts, r.threshold) for name, r in results.items()],
    )
    page.chart({name: curve(d, pairs.same) for name, d in distances.items()},
               "share of pairs of two people that are accepted", "and of pairs of one person")  # fmt: skip
    found, threshold = distances["student"], results["student"].threshold
    wrong = (found <= threshold) != pairs.same
    page.text(f"The student's mistakes, {wrong.sum()} of {len(wrong)} pairs; up to twelve:")
    for k in np.flatnonzero(wrong)[:12]:
        told = "one person, not accepted" if pairs.same[k] else "two people, accepted"
        page.picture(f"{told}: squared distance {found[k]:.3f}", *ends[k], side=128)
    page.losses(out, "teacher", "model")
    said = ", ".join(f"{name} {100 * result.rate:.2f} %" for name, result in results.items())
    page.write(out / "index.html", f"verification rate at {far:g} false accepts: {said}")


def curve(distances: np.ndarray, same: np.ndarray) -> list[tuple[float, float]]:
    """Shares of pairs of two people and of one that are accepted, at 200 thresholds from none to all."""
    steps = np.quantile(distances, np.linspace(0, 1, 200))
    return [(0.0, 0.0), *((float((distances[~same] <= d).mean()), float((distances[same] <= d).mean())) for d in steps)]


if __name__ == "__main__":
    raise SystemExit(main())
