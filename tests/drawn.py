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
