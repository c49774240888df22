"""Images to train on: an image folder, or scikit-learn's handwritten digits. Decoding and resizing by Pillow.

Every random choice about an image is a function of (seed, epoch, index of the image), never of a generator's
history. So a resumed run, any number of worker processes and any number of ranks see the same pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from . import TrainError

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VERIFY_LIMIT = 10_000  # up to so many files are decoded once before training: about a minute


@dataclass(frozen=True)
class Transform:
    """PIL image to uint8 array (size, size, 3).

    With a generator: a black border of `pad` times each side, then a crop of random area (`scale`, as shares
    of the image without border), aspect ratio and place, mirrored in a share `flip` of the cases. The default
    is narrower than Inception's crops (area 0.05 to 1), as the paper asks without giving a number.
    Without a generator: the central square of `crop` times the shorter side.
    """
    size: int
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    pad: float = 0.0
    crop: float = 0.875

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
        if rng is None:
            box = self._central_box(*image.size)
        else:
            area = image.width * image.height
            if self.pad:
                border = round(self.pad * image.width), round(self.pad * image.height)
                image = ImageOps.expand(image, border)
            box = self._random_box(rng, *image.size, area)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if rng is not None and rng.random() < self.flip:
            image = ImageOps.mirror(image)
        return np.asarray(image)

    def _central_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        side = self.crop * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def _random_box(self, rng: np.random.Generator, width: int, height: int,
                    area: float) -> tuple[float, float, float, float]:
        for _ in range(10):
            target = area * rng.uniform(*self.scale)
            aspect = np.exp(rng.uniform(*np.log(self.ratio)))
            w, h = (target * aspect) ** 0.5, (target / aspect) ** 0.5
            if w <= width and h <= height:
                left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
                return left, top, min(left + w, width), min(top + h, height)
        return 0, 0, width, height  # an image so long that no such crop fits


class Images(Dataset):
    """Labelled images, held or on disk; item (epoch, index) is (array (size, size, 3) uint8, label). With a
    seed it is a random crop."""

    def __init__(self, images: Sequence[Path | Image.Image], labels: Sequence[int], transform: Transform,
                 seed: int | None = None) -> None:
        self.images, self.labels, self.transform, self.seed = images, np.asarray(labels), transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int]:
        epoch, index = key
        image = self.images[index]
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch, index])
        return self.transform(decode(image) if isinstance(image, Path) else image, rng), self.labels[index]


class Data(NamedTuple):
    train: Images
    test: Images
    classes: list[str]


def decode(path: Path) -> Image.Image:
    """The image as RGB, upright."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as e:  # a broken file surfaces as OSError, SyntaxError, ValueError, struct.error, ...
        raise TrainError(f"{path}: is not a readable image ({e})") from e


def digits(train: Transform, test: Transform, seed: int) -> Data:
    """The 1797 handwritten digits of scikit-learn (UCI; 8x8, 10 classes), a fixed fifth of each held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(p).convert("RGB") for p in pixels]
    classes = [str(name) for name in bunch.target_names]
    return _split(images, bunch.target, classes, 0.2, train, test, seed)


def image_folder(root: Path, train: Transform, test: Transform, seed: int, val_fraction: float,
                 verify: bool | None) -> Data:
    """`root`/train/CLASS/* and `root`/val/CLASS/* (or validation, test); or `root`/CLASS/*, of which
    `val_fraction` of each class, always the same images, is held out. `verify`: see `check`."""
    if not root.is_dir():
        raise TrainError(f"--data {root}: there is no such directory")
    if (root / "train").is_dir():
        held_out = next((d for name in ("val", "validation", "test") if (d := root / name).is_dir()), None)
        if held_out is None:
            raise TrainError(f"--data {root}: beside train there must be a folder val, validation or test")
        images, labels, classes = class_folders(root / "train")
        test_images, test_labels, test_classes = class_folders(held_out)
        if classes != test_classes:
            name = sorted(set(classes) ^ set(test_classes))[0]
            raise TrainError(f"--data {root}: class {name!r} is in only one of train and {held_out.name}")
        data = Data(Images(images, labels, train, seed), Images(test_images, test_labels, test), classes)
    else:
        data = _split(*class_folders(root), val_fraction, train, test, seed)
    check([*data.train.images, *data.test.images], verify)
    return data


def check(files: Sequence[Path], verify: bool | None) -> None:
    """Decodes every file once, so that a broken one is told before anything starts; verify=None: if there are
    at most VERIFY_LIMIT."""
    if verify or (verify is None and len(files) <= VERIFY_LIMIT):
        for path in tqdm(files, "check", unit="img", delay=2, leave=False, dynamic_ncols=True):
            decode(path)


def class_folders(root: Path) -> tuple[list[Path], list[int], list[str]]:
    """The images of `root`/CLASS/*, their labels, and the names of the classes, in order."""
    if not root.is_dir():
        raise TrainError(f"{root}: there is no such directory")
    folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if len(folders) < 2:
        raise TrainError(f"{root}: must hold one folder a class, two at least, got {len(folders)}")
    images, labels = [], []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not files:
            raise TrainError(f"{folder}: the class folder has no image in it "
                             f"(looked for {' '.join(sorted(EXTENSIONS))})")
        for path in files:
            if path.stat().st_size == 0:
                raise TrainError(f"{path}: the image file is empty")
        images += files
        labels += [label] * len(files)
    return images, labels, [d.name for d in folders]


def _split(images: Sequence, labels: Sequence[int], classes: list[str], fraction: float, train: Transform,
           test: Transform, seed: int) -> Data:
    """Holds `fraction` of each class out, at least one image, always the same ones."""
    labels = np.asarray(labels)
    held_out = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        own = rng.permutation(np.flatnonzero(labels == label))
        if len(own) < 2:
            raise TrainError(f"class {name!r}: needs two images at least to hold one out, got {len(own)}")
        held_out[own[:min(max(1, round(fraction * len(own))), len(own) - 1)]] = True
    inside, outside = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    return Data(Images([images[i] for i in inside], labels[inside], train, seed),
                Images([images[i] for i in outside], labels[outside], test), classes)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) keys of this rank's share of the batch of each step from `start` to `stop`. An epoch
    is an order of the images, a function of (seed, epoch); a last batch that is not full is left out."""

    def __init__(self, images: int, batch: int, seed: int, start: int, stop: int, rank: int,
                 world: int) -> None:
        self.images, self.batch, self.seed, self.start, self.stop = images, batch, seed, start, stop
        self.share = slice(rank * batch // world, (rank + 1) * batch // world)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch, at = self.images // self.batch, None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != at:
                at, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.images)
            yield [(epoch, int(i)) for i in order[position * self.batch:][:self.batch][self.share]]


def test_keys(images: int, batch: int, rank: int, world: int) -> list[list[tuple[int, int]]]:
    """Every image once over all ranks together: the ranks' numbers of batches may differ."""
    own = range(rank, images, world)
    return [[(0, i) for i in own[k:k + batch]] for k in range(0, len(own), batch)]


def collate(samples: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, size, size), channels_last, and int64 labels (N,), or (N, A) where one has many."""
    images, labels = zip(*samples)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels))


def batches(data: Dataset, keys: Iterable[list[tuple[int, int]]], workers: int, device: torch.device,
            collate: Callable[[list], Any] = collate) -> Iterator[Any]:
    """What `collate` makes of the samples of each list of keys, its tensors on the device."""
    loader = DataLoader(data, batch_sampler=keys, num_workers=workers, collate_fn=collate,
                        pin_memory=device.type == "cuda")
    try:
        for batch in loader:
            yield tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
    except TrainError as e:  # from a worker process the sentence comes after that process's traceback
        raise TrainError(str(e).strip().rpartition("TrainError: ")[2]) from e
