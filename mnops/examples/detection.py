"""Object detection (arXiv:1704.04861, section 4.5): SSD 300 or Faster-RCNN, scored by COCO's mAP.

    python -m mnops.examples.detection --data COCO [--network faster_rcnn --size 600] [--weights MOBILENET]

COCO is laid out as the downloads of cocodataset.org unpack: annotations/instances_train*.json and
annotations/instances_val*.json (train2017, val2017), with the images of each in a folder of that name. Any
data set in that format will do.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset

from mnops.train import TrainError, checkpoint
from mnops.train.cli import ema_weights, number
from mnops.train.data import check, decode

from . import common
from .page import Page

# In COCOeval's order.
METRICS = "mAP", "mAP at IoU 0.5", "mAP at IoU 0.75", "mAP, small", "mAP, medium", "mAP, large"

# ---- data ----


class Coco(NamedTuple):
    """One part of a data set: `path` is its json, `images` the rows of its "images" with "path", "boxes"
    (n, 4) x1 y1 x2 y2 and "labels" (n,), from 1, the positions in `categories`, which are (id, name)."""

    path: Path
    folder: Path
    images: list[dict[str, Any]]
    categories: list[tuple[int, str]]


def coco(root: Path, part: str) -> Coco:
    """Reads and checks annotations/instances_PART*.json. Crowds, which are boxes around many, are left out of
    the boxes to learn; the evaluation reads the file itself and ignores what is found in them."""
    found = sorted((root / "annotations").glob(f"instances_{part}*.json"))
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise TrainError(f"{root / 'annotations'}: must hold one instances_{part}*.json, got {got}")
    path = found[0]
    folder = root / path.stem.removeprefix("instances_")
    try:
        content = json.loads(path.read_text())
    except ValueError as e:
        raise TrainError(f"{path}: must be JSON ({e})") from e
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise TrainError(f"{path}: must have a list {name!r}")
    categories = [(c["id"], c["name"]) for c in _rows(path, content, "categories", CATEGORY)]
    label_of = {id: i for i, (id, _) in enumerate(sorted(categories), 1)}
    images = {}
    for row in _rows(path, content, "images", IMAGE):
        file = common.existing(folder / row["file_name"], f"{path}: image {row['id']}")
        images[row["id"]] = row | {"path": file, "boxes": [], "labels": []}
    for row in _rows(path, content, "annotations", ANNOTATION):
        where = f"{path}: annotation {row['id']}"
        if row["image_id"] not in images:
            raise TrainError(f"{where}: image_id must be the id of an image, got {row['image_id']!r}")
        if row["category_id"] not in label_of:
            raise TrainError(f"{where}: category_id must be the id of a category, got {row['category_id']!r}")
        box = row["bbox"]
        if len(box) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
            raise TrainError(f"{where}: bbox must be four numbers, x y width height, got {box!r}")
        x, y, width, height = box
        if row.get("iscrowd") or width <= 0 or height <= 0:  # COCO has a few boxes of no width
            continue
        image = images[row["image_id"]]
        image["boxes"].append([x, y, x + width, y + height])
        image["labels"].append(label_of[row["category_id"]])
    return Coco(path, folder, list(images.values()), sorted(categories))


# What a row of a list has, and of which type.
CATEGORY = dict(id=int, name=str)
IMAGE = dict(id=int | str, file_name=str, height=int | float, width=int | float)
ANNOTATION = dict(id=int | str, image_id=int | str, category_id=int | str, bbox=list, area=int | float)
SAID = {int: "an integer", str: "a string", int | str: "an integer or a string", int | float: "a number",
        list: "a list"}  # fmt: skip


def _rows(path: Path, content: dict[str, list], name: str, keys: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a list, each with the keys and of their types, no id twice."""
    if not content[name]:
        raise TrainError(f"{path}: {name!r} must not be empty")
    ids = set()
    for i, row in enumerate(content[name]):
        for key, kind in keys.items():
            if not isinstance(row, dict) or key not in row:
                raise TrainError(f"{path}: {name}[{i}] must have {', '.join(keys)}, {key} is missing")
            if not isinstance(row[key], kind):
                raise TrainError(f"{path}: {name}[{i}]: {key} must be {SAID[kind]}, got {row[key]!r}")
        if row["id"] in ids:
            raise TrainError(f"{path}: {name}[{i}]: id must come once, got {row['id']!r} twice")
        ids.add(row["id"])
    return content[name]


class Scenes(Dataset):
    """Images with boxes: item (epoch, index) is (uint8 (3, H, W), {"boxes", "labels"}), augmented the same
    way for a (seed, epoch, index) in whatever process."""

    def __init__(self, images: list[dict[str, Any]], augment: Callable | None = None, seed: int = 0) -> None:
        self.images, self.augment, self.seed = images, augment, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        row = self.images[key[1]]
        image = torch.from_numpy(np.array(decode(row["path"]))).permute(2, 0, 1)
        boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
        target = {"boxes": boxes, "labels": torch.tensor(row["labels"], dtype=torch.int64)}
        if self.augment is None:
            return image, target
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, *key]).generate_state(1)[0]))
            return self.augment(image, target)


def augmentation(kind: str) -> Callable | None:
    """none; flip: mirrored half the time, as for Faster-RCNN; crop: and SSD's random crops that keep objects
    (arXiv:1512.02325, section 2.2). Of torchvision."""
    if kind == "none":
        return None
    from torchvision.transforms import v2
    from torchvision.tv_tensors import BoundingBoxes

    crops = [v2.RandomZoomOut(p=0.3), v2.RandomIoUCrop()] if kind == "crop" else []
    steps = v2.Compose([*crops, v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes(min_size=1)])

    def augment(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
        image, target = steps(image, target | {"boxes": boxes})
        return image, {"boxes": target["boxes"].as_subclass(Tensor), "labels": target["labels"]}

    return augment


def collate(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = zip(*samples)
    return list(images), list(targets)


# ---- the network ----


def detector(s: Namespace, categories: int, device: torch.device) -> nn.Module:
    try:
        from mnops.models.detection import faster_rcnn, load_backbone, ssd300
    except ImportError as e:
        raise TrainError(str(e)) from e
    options = dict(act=s.act, padding=s.padding, bn_eps=s.bn_eps, bn_momentum=s.bn_momentum)
    build = ssd300 if s.network == "ssd" else partial(faster_rcnn, size=s.size)
    model = build(categories + 1, width_mult=s.width, options=options)
    if s.weights:
        path = Path(s.weights)
        try:
            load_backbone(model, ema_weights(checkpoint.load(path)))
        except ValueError as e:
            raise TrainError(f"checkpoint {path}: {e}") from e
    return model.to(device)


def started(model: nn.Module) -> list[nn.Module]:
    """The BatchNorms that --weights has statistics for."""
    parts = [model.backbone.body, *([model.roi_heads.box_head] if hasattr(model, "roi_heads") else [])]
    return [m for part in parts for m in part.modules() if isinstance(m, nn.BatchNorm2d)]


def losses(model: nn.Module) -> Callable[[list[Tensor], list[dict[str, Tensor]]], Tensor]:
    return lambda images, targets: sum(model(images, targets).values())


def detect(model: nn.Module, scenes: Scenes, s: Namespace, device: torch.device) -> list[dict[str, Tensor]]:
    """What is found in each image, in their order, on the CPU: boxes, labels and scores."""
    return [
        {name: value.float().cpu() for name, value in result.items()}
        for results in common.outputs(model, scenes, s, device, collate=collate) for result in results
    ]  # fmt: skip


# ---- the result ----


def each_box(result: dict[str, Tensor]) -> Iterator[tuple[list[float], int, float]]:
    """Box, label and score of what is found in an image."""
    boxes, labels, scores = (result[name].tolist() for name in ("boxes", "labels", "scores"))
    return zip(boxes, map(int, labels), scores)


def coco_map(data: Coco, found: list[dict[str, Tensor]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """COCO's figures, shares of 1 (NaN where there is nothing to find), by pycocotools, and the rows of its
    results format."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows = []
    for image, result in zip(data.images, found):
        for (x1, y1, x2, y2), label, score in each_box(result):
            rows.append({
                "image_id": image["id"], "category_id": data.categories[label - 1][0],
                "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)], "score": round(score, 5),
            })  # fmt: skip
    if not rows:
        return dict.fromkeys(METRICS, 0.0), rows
    with redirect_stdout(StringIO()):  # it prints as it goes
        truth = COCO(data.path)
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [float(v) if v >= 0 else float("nan") for v in evaluation.stats]  # -1: nothing of that size
    return dict(zip(METRICS, values)), rows


def drawn(image: Image.Image, result: dict[str, Tensor], names: list[str], least: float) -> Image.Image:
    """The image with the boxes that are scored `least` or more, a colour a class."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for box, label, score in each_box(result):
        if score >= least:
            name, colour = names[label - 1], f"hsl({label * 137 % 360},100%,40%)"
            draw.rectangle(box, outline=colour, width=max(1, round(min(image.size) / 150)))
            text = f"{name} {score:.2f}"
            corner = box[0], max(0, box[1] - draw.textbbox((0, 0), text)[3])  # above the box where there is room
            draw.rectangle(draw.textbbox(corner, text), fill=colour)
            draw.text(corner, text, fill="white")
    return image


command = common.Command(
    "detection", __doc__, ["torchvision", "pycocotools"], network="ssd", augment=None, freeze_bn=False,
    show=0.5, pictures=24, size=300, epochs=60, lr=0.004, batch_size=24, warmup_epochs=1.0,
    optimizer="rmsprop",
)  # fmt: skip
command.option("--network", "ssd is SSD 300, whatever --size", choices=["ssd", "faster_rcnn"])
command.option("--augment", "[crop for ssd, flip for faster_rcnn]", choices=["none", "flip", "crop"])
command.option("--freeze-bn", "BatchNorms keep the statistics of --weights", action="store_true")
command.option("--show", "score from which a box is drawn", type=number(float, 0, 1))
command.option("--pictures", "images to draw the boxes on", type=number(int, 0))


@command
def main(s: Namespace, device: torch.device) -> None:
    root, out = Path(s.data), Path(s.out)
    test = coco(root, "val")
    check([image["path"] for image in test.images], s.verify)
    model_of = partial(detector, categories=len(test.categories), device=device)
    made_with = dict(network=s.network, categories=[list(c) for c in test.categories])
    if s.evaluate:
        model = common.saved(s, s.evaluate, model_of, **made_with)
    else:
        data = coco(root, "train")
        if data.categories != test.categories:
            raise TrainError(f"{data.path} and {test.path} must have the same categories")
        model = model_of(s)
        augment = augmentation(s.augment or ("crop" if s.network == "ssd" else "flip"))
        images = [image for image in data.images if image["boxes"]]
        check([image["path"] for image in images], s.verify)
        scenes, frozen = Scenes(images, augment, s.seed), started(model) if s.freeze_bn else []
        common.fit(model, losses(model), scenes, s, device, frozen=frozen, collate=collate, **made_with)
    report(detect(model, Scenes(test.images), s, device), test, s, out)


def report(found: list[dict[str, Tensor]], test: Coco, s: Namespace, out: Path) -> None:
    metrics, rows = coco_map(test, found)
    common.write_csv(out / "metrics.csv", ["metric", "value"], metrics.items())
    checkpoint.write_atomically(out / "results.json", lambda file: file.write(json.dumps(rows).encode()))
    page = Page("Object detection")
    page.text(
        f"{len(test.images)} test images, {len(test.categories)} categories. arXiv:1704.04861 has mAP 0.193 "
        "for SSD 300, 0.164 and 0.198 for Faster-RCNN at 300 and 600, on COCO."
    )
    page.table(["metric", "value"], metrics.items())
    checkpoint.make_folder(pictures := out / "pictures")
    names = [name for _, name in test.categories]
    for image, result in list(zip(test.images, found))[: s.pictures]:
        picture = drawn(decode(image["path"]), result, names, s.show)
        picture.save(pictures / f"{Path(image['file_name']).stem}.png")
        page.picture(image["file_name"], picture, side=320)
    page.losses(out, "model")
    said = f"mAP {metrics['mAP']:.4f}, at IoU 0.5 {metrics['mAP at IoU 0.5']:.4f}"
    page.write(out / "index.html")
    print(f"{said}, on {len(test.images)} images; {out / 'index.html'} and {pictures}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
