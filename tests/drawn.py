"""Small data sets that tests draw, in the formats of the real ones."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"disc": "#d22", "square": "#27c", "triangle": "#2a4"}
CATEGORIES = [{"id": 3 * i + 1, "name": name} for i, name in enumerate(COLOURS)]  # ids with gaps, as COCO's


def draw_coco(root: Path, part: str, images: int, seed: int = 0, side: int = 120) -> None:
    """Scenes of one to three shapes on noise, with annotations/instances_PART.json."""
    rng = np.random.default_rng(seed)
    (root / part).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rows, boxes = [], []
    for i in range(images):
        width = side + 20 * (i % 2)
        image = Image.fromarray(rng.integers(190, 230, (side, width, 3), dtype=np.uint8))
        draw, places = ImageDraw.Draw(image), []
        for k in range(1 + i % 3):
            size = int(rng.integers(30, 55))
            for _ in range(100):
                x, y = int(rng.integers(0, width - size)), int(rng.integers(0, side - size))
                if all(abs(x - u) > (size + v) * 0.6 or abs(y - w) > (size + v) * 0.6 for u, w, v in places):
                    break
            else:
                continue
            places.append((x, y, size))
            category = CATEGORIES[(i + k) % 3]
            corners, fill = (x, y, x + size - 1, y + size - 1), COLOURS[category["name"]]
            if category["name"] == "disc":
                draw.ellipse(corners, fill)
            elif category["name"] == "square":
                draw.rectangle(corners, fill)
            else:
                draw.polygon([(x, y + size - 1), (x + size - 1, y + size - 1), (x + size // 2, y)], fill)
            boxes.append({"id": len(boxes) + 1, "image_id": 10 + i, "category_id": category["id"],
                          "bbox": [x, y, size, size], "area": size * size, "iscrowd": 0})  # fmt: skip
        name = f"scene{i}.png"
        image.save(root / part / name)
        rows.append({"id": 10 + i, "file_name": name, "width": width, "height": side})
    content = {"images": rows, "annotations": boxes, "categories": CATEGORIES}
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def noise(rng: np.random.Generator, tint: tuple[int, int, int], side: int = 32) -> Image.Image:
    """Noise around a colour."""
    return Image.fromarray((rng.integers(-40, 40, (side, side, 3)) + tint).clip(0, 255).astype(np.uint8))


TINTS = {"n01-red": (200, 60, 60), "n02-green": (60, 190, 60), "n03-blue": (60, 60, 200)}


def draw_dogs(root: Path, train: int = 16, test: int = 6) -> None:
    """Stanford Dogs: Images/BREED/*.jpg and {train,test}_list.mat."""
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        files, labels = [], []
        for label, (breed, tint) in enumerate(TINTS.items(), 1):
            (root / "Images" / breed).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                files.append(f"{breed}/{part}_{i}.jpg")
                noise(rng, tint).save(root / "Images" / files[-1])
                labels.append(label)
        cells = np.empty((len(files), 1), object)
        cells[:, 0] = files
        savemat(root / f"{part}_list.mat", {"file_list": cells, "labels": np.array(labels)[:, None]})


def draw_folders(root: Path, count: int, wrong: float = 0.0) -> None:
    """CLASS/*.png, of which a share `wrong` shows another class."""
    rng = np.random.default_rng(1)
    for name in TINTS:
        (root / name).mkdir(parents=True)
        for i in range(count):
            shown = rng.choice(list(TINTS)) if rng.random() < wrong else name
            noise(rng, TINTS[shown]).save(root / name / f"{name}_{i + 1:04d}.png")


CITIES = [(48.86, 2.35), (-33.87, 151.21), (40.71, -74.01)]


def draw_places(root: Path, part: str, count: int, seed: int = 0) -> None:
    """PART.csv of photos around three cities, a colour each, 10 km wide, in images/."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    lines = ["IMG_ID,AUTHOR,LAT,LON"]
    for i in range(count):
        lat, lon = np.array(CITIES[i % 3]) + rng.normal(0, 0.05, 2)
        noise(rng, list(TINTS.values())[i % 3]).save(root / "images" / f"{part}{i}.jpg")
        lines.append(f'{part}{i}.jpg,"Somebody, 2017",{lat:.6f},{lon:.6f}')
    (root / f"{part}.csv").write_text("\n".join(lines) + "\n")


ATTRIBUTES = ("Reddish", "Bright", "Striped")


def draw_celeba(root: Path, counts: tuple[int, int, int] = (72, 3, 24)) -> None:
    """CelebA: list_attr_celeba.txt, list_eval_partition.txt, img_align_celeba/*.jpg."""
    rng = np.random.default_rng(2)
    (root / "img_align_celeba").mkdir(parents=True)
    rows, parts = [], []
    for part, count in enumerate(counts):
        for _ in range(count):
            name, has = f"{len(rows) + 1:06d}.jpg", rng.random(3) < 0.5
            base = 150 if has[1] else 60
            tint = base + 60 * has[0], base, base + 60 * (not has[0])
            pixels = np.array(noise(rng, tint, 36)).astype(int)
            if has[2]:
                pixels[::6] -= 50
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "img_align_celeba" / name)
            rows.append(f"{name} " + " ".join(" 1" if h else "-1" for h in has))
            parts.append(f"{name} {part}")
    text = [str(len(rows)), " ".join(ATTRIBUTES) + " ", *rows]
    (root / "list_attr_celeba.txt").write_text("\n".join(text) + "\n")
    (root / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")


def draw_pairs(path: Path, count: int, images: int) -> None:
    """pairs.txt of LFW over the folders of `draw_folders`: one fold of `count` pairs of each kind."""
    rng, names = np.random.default_rng(3), list(TINTS)
    lines = [f"1\t{count}"]
    for i in range(count):
        a, b = rng.choice(images, 2, replace=False) + 1
        lines.append(f"{names[i % 3]}\t{a}\t{b}")
    for i in range(count):
        a, b = rng.choice(images, 2) + 1
        lines.append(f"{names[i % 3]}\t{a}\t{names[(i + 1 + i % 2) % 3]}\t{b}")
    path.write_text("\n".join(lines) + "\n")
