"""Fine-grained recognition (arXiv:1704.04861, section 4.2): dog breeds, after training on noisy labels.

    python -m mnops.examples.fine_grained --data DOGS --noisy WEB [--freeze 4]

DOGS is Stanford Dogs (vision.stanford.edu/aditya86/ImageNetDogs) as its archives unpack: Images/BREED/*.jpg
with train_list.mat and test_list.mat, here or in lists/. WEB is a folder of CLASS/*, such as the results of
an image search for each breed: many more images, whose labels are often wrong. The network is trained on WEB,
gets a new head, and is trained on DOGS, its first layers frozen where asked for.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnops import MobileNet
from mnops.train import TrainError
from mnops.train.cli import number
from mnops.train.data import Images, check, class_folders

from . import common
from .page import Page


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
    except Exception as e:  # by what is wrong with the file scipy raises ValueError, KeyError, TypeError, ...
        raise TrainError(f"{path}: must be a MATLAB file of file_list and labels ({e})") from e
    if len(files) != len(labels) or not files:
        counts = f"{len(files)} files and {len(labels)} labels"
        raise TrainError(f"{path}: must have a label for each file, got {counts}")
    breeds: dict[int, str] = {}
    for file, label in zip(files, labels):
        breed = Path(file).parent.name
        if label < 1 or breeds.setdefault(int(label), breed) != breed:
            got = f"{label} for {file} and for {breeds.get(int(label), 'none')}"
            raise TrainError(f"{path}: a label must be 1 or more and stand for one folder, got {got}")
    if sorted(breeds) != list(range(1, len(breeds) + 1)):
        missing = next(i for i in range(1, len(breeds) + 1) if i not in breeds)
        raise TrainError(f"{path}: labels must be 1 to {len(breeds)}, got none of {missing}")
    paths = [common.existing(root / "Images" / file, str(path)) for file in files]
    return paths, labels - 1, [breeds[i + 1] for i in range(len(breeds))]


def freeze(model: MobileNet, layers: int) -> list[nn.Module]:
    """Takes the first convolution and the first `layers` of the 13 layers out of training. Returns them; in
    eval mode their running statistics stand still too."""
    blocks = [block for stage in model.blocks for block in stage]
    frozen = [model.conv_stem, model.bn1, *blocks[:layers]] if layers else []
    for module in frozen:
        module.requires_grad_(False)
    return frozen


command = common.Command(
    "fine_grained", __doc__, ["scipy"], noisy=None, freeze=0, noisy_epochs=20, epochs=20, lr=0.01,
    batch_size=64,
)  # fmt: skip
command.option("--noisy", "folder of CLASS/* to pre-train on", metavar="DIR")
command.option("--noisy-epochs", "times over the noisy images", type=number(int, 1))
layers = "layers that fine-tuning leaves as they are, from the first"
command.option("--freeze", layers, type=number(int, 0, 13))


@command
def main(s: Namespace, device: torch.device) -> None:
    root, out = Path(s.data), Path(s.out)
    train_view, test_view = common.transforms(s)
    paths, labels, breeds = stanford_dogs(root, "train")
    test_paths, test_labels, test_breeds = stanford_dogs(root, "test")
    if breeds != test_breeds:
        odd = sorted(set(breeds) ^ set(test_breeds)) or breeds
        both = "train_list.mat and test_list.mat"
        raise TrainError(f"{root}: {both} must have the same breeds, not so {odd[0]!r}")
    test = Images(test_paths, test_labels, test_view)
    check(test_paths, s.verify)
    model_of = partial(common.network, outputs=len(breeds), device=device)
    if s.evaluate:
        model = common.saved(s, s.evaluate, model_of, classes=breeds)
    else:
        train = Images(paths, labels, train_view, s.seed)
        check(paths, s.verify)
        if s.noisy:
            images, noisy_labels, classes = class_folders(Path(s.noisy))
            check(images, s.verify)
            noisy = Images(images, noisy_labels, train_view, s.seed)
            model = common.network(s, len(classes), device)
            own, loss = common.changed(s, epochs=s.noisy_epochs), common.with_labels(model, F.cross_entropy)
            common.fit(model, loss, noisy, own, device, "noisy", classes=classes)
            model.reset_classifier(len(breeds))
        else:
            model = model_of(s)
        frozen, loss = freeze(model, s.freeze), common.with_labels(model, F.cross_entropy)
        common.fit(model, loss, train, s, device, frozen=frozen, classes=breeds)
    report(common.predict(model, test, s, device), test, breeds, out)


def report(logits: Tensor, test: Images, breeds: list[str], out: Path) -> None:
    shares, found = logits.softmax(1).max(1)
    labels, found, shares = test.labels, found.numpy(), shares.numpy()
    right = found == labels
    rows = zip(test.images, labels, found, shares)
    common.write_csv(
        out / "predictions.csv",
        ["image", "breed", "predicted", "probability"],
        ((path, breeds[a], breeds[b], f"{share:.4f}") for path, a, b, share in rows),
    )
    counts = [
        (name, int((labels == i).sum()), float(100 * right[labels == i].mean()) if (labels == i).any() else 0.0)
        for i, name in enumerate(breeds)
    ]
    page = Page("Fine-grained recognition")
    page.text(
        f"Top-1 {100 * right.mean():.2f} % of {len(labels)} test images of {len(breeds)} breeds. "
        "arXiv:1704.04861 has 83.3 % for MobileNet-1.0-224 on Stanford Dogs."
    )
    order = np.argsort(-shares, kind="stable")
    for title, some in [("The most certain mistakes:", ~right), ("Some that are right:", right)]:
        page.text(title if some.any() else f"{title} none")
        for i in order[some[order]][:12]:
            taken = "" if right[i] else f", taken for {breeds[found[i]]}"
            page.picture(f"{breeds[labels[i]]}{taken}: {shares[i]:.2f}", test.images[i])
    page.table(["breed", "test images", "top-1, %"], sorted(counts, key=lambda row: row[2]))
    page.losses(out, "noisy", "model")
    page.write(out / "index.html", f"top-1 {100 * right.mean():.2f} % of {len(labels)} images")


if __name__ == "__main__":
    raise SystemExit(main())
