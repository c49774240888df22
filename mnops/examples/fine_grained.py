"""Fine-grained recognition (arXiv:1704.04861, section 4.2): dog breeds, after training on noisy labels.

    python -m mnops.examples.fine_grained --data DOGS --noisy WEB [--freeze 4]

DOGS is Stanford Dogs (vision.stanford.edu/aditya86/ImageNetDogs) as its archives unpack: Images/BREED/*.jpg
with train_list.mat and test_list.mat, here or in lists/. WEB is a folder of CLASS/*, such as the results of
an image search for each breed: many more images, whose labels are often wrong. The network is trained on WEB,
gets a new head, and is trained on DOGS, its first layers frozen where asked for.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnops import MobileNet
from mnops.train import TrainError
from mnops.train.cli import number
from mnops.train.data import Images, class_folders

from .common import Command, Page, existing, fit, network, predict, saved, transforms, write_csv


def stanford_dogs(root: Path, part: str) -> tuple[list[Path], np.ndarray, list[str]]:
    """Paths, labels from 0 and breeds of PART_list.mat: `file_list` names images below Images/, `labels`
    count from 1."""
    from scipy.io import loadmat

    places = root / f"{part}_list.mat", root / "lists" / f"{part}_list.mat"
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise TrainError(f"{root}: must hold {part}_list.mat, here or in lists/")
    try:
        table = loadmat(path)
        files = [str(row.item()) for row in table["file_list"].ravel()]
        labels = table["labels"].ravel().astype(np.int64)
    except (
        Exception
    ) as e:  # scipy raises by what is wrong with the file: ValueError, KeyError, TypeError, ...
        raise TrainError(f"{path}: must be a MATLAB file of file_list and labels ({e})") from e
    if len(files) != len(labels) or not files:
        counts = f"{len(files)} files and {len(labels)} labels"
        raise TrainError(f"{path}: must have a label for each file, got {counts}")
    breeds: dict[int, str] = {}
    for file, label in zip(files, labels):
        breed = Path(file).parent.name
        if label < 1 or breeds.setdefault(int(label), breed) != breed:
            raise TrainError(
                f"{path}: a label must be 1 or more and stand for one folder, got {label} for {file} "
                f"and for {breeds.get(int(label), 'none')}"
            )
    if sorted(breeds) != list(range(1, len(breeds) + 1)):
        missing = next(i for i in range(1, len(breeds) + 1) if i not in breeds)
        raise TrainError(f"{path}: labels must be 1 to {len(breeds)}, got none of {missing}")
    paths = [existing(root / "Images" / file, str(path)) for file in files]
    return paths, labels - 1, [breeds[i + 1] for i in range(len(breeds))]


def freeze(model: MobileNet, layers: int) -> list[nn.Module]:
    """Takes the first convolution and the first `layers` of the 13 layers out of training. Returns them; in
    eval mode their running statistics stand still too."""
    blocks = [block for stage in model.blocks for block in stage]
    frozen = [model.conv_stem, model.bn1, *blocks[:layers]] if layers else []
    for module in frozen:
        module.requires_grad_(False)
    return frozen


command = Command(
    "fine_grained",
    __doc__.partition("\n")[0],
    needs=["scipy"],
    noisy=None,
    freeze=0,
    noisy_epochs=20,
    epochs=20,
    lr=0.01,
    batch_size=64,
)
command.option("--noisy", "folder of CLASS/* to pre-train on", metavar="DIR")
command.option("--noisy-epochs", "times over the noisy images", type=number(int, 1))
command.option(
    "--freeze", "layers that fine-tuning leaves as they are, from the first", type=number(int, 0, 13)
)


def with_labels(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, labels: F.cross_entropy(model(x), labels)


@command
def main(s: Namespace, device: torch.device) -> None:
    root, out = Path(s.data), Path(s.out)
    train_view, test_view = transforms(s)
    paths, labels, breeds = stanford_dogs(root, "train")
    test_paths, test_labels, test_breeds = stanford_dogs(root, "test")
    if breeds != test_breeds:
        odd = sorted(set(breeds) ^ set(test_breeds)) or breeds
        raise TrainError(
            f"{root}: train_list.mat and test_list.mat must have the same breeds, not so {odd[0]!r}"
        )
    test = Images(test_paths, test_labels, test_view)
    if s.evaluate:
        model = saved(s, s.evaluate, lambda own: network(own, len(breeds), device), classes=breeds)
    else:
        if s.noisy:
            images, noisy_labels, noisy_classes = class_folders(Path(s.noisy))
            model = network(s, len(noisy_classes), device)
            settings = Namespace(**{**vars(s), "epochs": s.noisy_epochs})
            noisy = Images(images, noisy_labels, train_view, s.seed)
            fit(model, with_labels(model), noisy, settings, device, "noisy", classes=noisy_classes)
            model.reset_classifier(len(breeds))
        else:
            model = network(s, len(breeds), device)
        frozen = freeze(model, s.freeze)
        train = Images(paths, labels, train_view, s.seed)
        fit(model, with_labels(model), train, s, device, frozen=frozen, classes=breeds)
    report(predict(model, test, s, device), test, breeds, out)


def report(logits: Tensor, test: Images, breeds: list[str], out: Path) -> None:
    shares, found = logits.softmax(1).max(1)
    labels, found, shares = test.labels, found.numpy(), shares.numpy()
    right = found == labels
    write_csv(
        out / "predictions.csv",
        ["image", "breed", "predicted", "probability"],
        (
            (path, breeds[a], breeds[b], f"{p:.4f}")
            for path, a, b, p in zip(test.images, labels, found, shares)
        ),
    )
    counts = [
        (name, int((labels == i).sum()), float(right[labels == i].mean()) if (labels == i).any() else 0.0)
        for i, name in enumerate(breeds)
    ]
    page = Page("Fine-grained recognition")
    page.text(
        f"Top-1 {100 * right.mean():.2f} % of {len(labels)} test images of {len(breeds)} breeds. "
        "arXiv:1704.04861 has 83.3 % for MobileNet-1.0-224 on Stanford Dogs."
    )
    page.text("The most certain mistakes, then some that are right:")
    order = np.argsort(-shares, kind="stable")
    for i in [*order[~right[order]][:12], *order[right[order]][:12]]:
        page.picture(test.images[i], f"{breeds[labels[i]]}: taken for {breeds[found[i]]}, {shares[i]:.2f}")
    page.table(["breed", "test images", "top-1"], sorted(counts, key=lambda row: row[2]))
    page.write(out / "index.html")
    print(f"top-1 {100 * right.mean():.2f} % of {len(labels)} images; {out / 'index.html'}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
