"""Geolocation (arXiv:1704.04861, section 4.3): where a photo was taken, as PlaNet (arXiv:1602.05314).

    python -m mnops.examples.geolocation --data DIR [--most 10000 --least 50]

DIR has train.csv, test.csv and the photos. A csv names its columns in line 1, as lists of YFCC100M, MP-16 and
im2gps do: the photo (image, img_id, photo_id, file, filename or path, relative to DIR or DIR/images), its
latitude (lat, latitude) and longitude (lon, lng, long, longitude) in degrees; other columns are ignored.

The earth is cut into S2 cells, finer where photos are dense; the network says which cell. It is scored by the
share of photos that are placed within 1, 25, 200, 750 and 2500 km.
"""

import csv
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mnops.train import TrainError
from mnops.train.cli import number
from mnops.train.data import Images, check

from . import common
from .page import Page

EARTH = 6371.0088  # km, the mean radius
WITHIN = {"street": 1, "city": 25, "region": 200, "country": 750, "continent": 2500}  # km, im2gps' words
COLUMNS = {
    "the photo": ("image", "img_id", "image_id", "photo_id", "id", "file", "filename", "path"),
    "the latitude": ("lat", "latitude"),
    "the longitude": ("lon", "lng", "long", "longitude"),
}
LEAVES = 30  # the finest level of S2


def photos(path: Path) -> tuple[list[Path], np.ndarray]:
    """The photos of a csv and their places (N, 2): latitude and longitude in degrees."""
    rows = csv.DictReader(common.text_lines(path))
    try:
        lines = [(rows.line_num, row) for row in rows]
    except csv.Error as e:
        raise TrainError(f"{path}: line {rows.line_num + 1} must be CSV ({e})") from e
    known = {name.strip().lower(): name for name in rows.fieldnames or []}
    columns = []
    for what, names in COLUMNS.items():
        column = next((known[name] for name in names if name in known), None)
        if column is None:
            must = f"must have a column for {what}, {' or '.join(names)}"
            raise TrainError(f"{path}: {must}, got {', '.join(known)}")
        columns.append(column)
    root, images, places = path.parent, [], []
    for at, row in lines:
        told_by = f"{path}: line {at}"
        name, *degrees = (row[column] or "" for column in columns)
        for what, text, limit in zip(("latitude", "longitude"), degrees, (90, 180)):
            try:
                fits = -limit <= float(text) <= limit
            except ValueError:
                fits = False
            if not fits:
                must = f"must be a number of degrees in [-{limit}, {limit}]"
                raise TrainError(f"{told_by}: a {what} {must}, got {text!r}")
        beside = root / name
        images.append(beside if beside.is_file() else common.existing(root / "images" / name, told_by))
        places.append([float(text) for text in degrees])
    if not images:
        raise TrainError(f"{path}: must have a photo, got none")
    return images, np.array(places)


def on_sphere(places: np.ndarray) -> np.ndarray:
    """Degrees (N, 2) of latitude and longitude to points (N, 3) of length 1."""
    lat, lon = np.radians(places).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)


def kilometres(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Great-circle distances (N,) of places (N, 2) in degrees, by half the chord, exact for near ones too."""
    chord = np.linalg.norm(on_sphere(a) - on_sphere(b), axis=1)
    return 2 * EARTH * np.arcsin(np.minimum(1, chord / 2))


class Partition:
    """S2 cells that hold no more than a given number of photos, and the place that each stands for.

    An S2 cell is a part of one face of a cube around the earth. Level 0 is a face, level k + 1 a quarter of a
    cell of level k. The number of a cell has the path to it in its high bits, so the cells inside it are a
    range around it.

    Attributes:
        cells: their S2 numbers (K,) uint64, ascending.
        places: (K, 2) degrees, the centre of the photos that each was made from.
    """

    def __init__(self, cells: np.ndarray, places: np.ndarray) -> None:
        self.cells, self.places = cells, places
        half = (cells & -cells) - 1  # the bits below the last that is set: the cells inside differ in them
        self._low, self._high = cells - half, cells + half

    @classmethod
    def of(cls, places: np.ndarray, most: int, least: int, finest: int = 16) -> "Partition":
        """Splits cells with more than `most` photos, down to level `finest` (16: sides of about 150 m), and
        drops cells with fewer than `least`, as PlaNet does (10,000 and 50 there)."""
        order = np.argsort(leaves := leaf_cells(places), kind="stable")
        leaves, points = leaves[order], on_sphere(places)[order]
        cells, centres = [], []
        pending = [(2 * face + 1 << 60, 0) for face in range(6)]
        while pending:
            cell, level = pending.pop()
            last = cell & -cell  # the bit that ends the path
            low = np.searchsorted(leaves, np.uint64(cell - last + 1))
            high = np.searchsorted(leaves, np.uint64(cell + last - 1), "right")
            if high - low > most and level < finest:
                pending += [(cell - last + k * (last >> 2), level + 1) for k in (1, 3, 5, 7)]
            elif high - low >= max(1, least):
                cells.append(cell)
                centres.append(points[low:high].sum(0))
        order = np.argsort(np.array(cells, np.uint64))
        x, y, z = np.array(centres).reshape(-1, 3)[order].T
        centres = np.degrees(np.stack([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)], 1))
        return cls(np.array(cells, np.uint64)[order], centres)

    def __len__(self) -> int:
        return len(self.cells)

    def find(self, places: np.ndarray) -> np.ndarray:
        """The index (N,) of the cell of each place; -1 where it is in none."""
        leaves = leaf_cells(places)
        at = np.searchsorted(self._low, leaves, "right") - 1
        return np.where((at >= 0) & (leaves <= self._high[at]), at, -1)


def leaf_cells(places: np.ndarray) -> np.ndarray:
    """Numbers (N,) uint64 of the S2 cells of the finest level, of places (N, 2) in degrees."""
    import s2cell

    return np.array([s2cell.lat_lon_to_cell_id(lat, lon, LEAVES) for lat, lon in places.tolist()], np.uint64)


command = common.Command(
    "geolocation", __doc__, ["s2cell"], most=10_000, least=50, finest=16, epochs=20, lr=0.045, batch_size=128,
)  # fmt: skip
command.option("--most", "photos that a cell may hold before it is split", type=number(int, 1))
command.option("--least", "photos below which a cell is dropped, and they with it", type=number(int, 1))
command.option("--finest", "level of S2 at which cells are split no more", type=number(int, 0, LEAVES))


@command
def main(s: Namespace, device: torch.device) -> None:
    root, out = Path(s.data), Path(s.out)
    train_view, test_view = common.transforms(s)
    test_images, truth = photos(root / "test.csv")
    test = Images(test_images, [0] * len(test_images), test_view)
    check(test_images, s.verify)
    images, places = photos(root / "train.csv")
    partition = Partition.of(places, s.most, s.least, s.finest)
    if len(partition) < 2:
        got = f"{len(partition)} from {len(images)} photos with --most {s.most} and --least {s.least}"
        raise TrainError(f"{root / 'train.csv'}: must make two cells at least, got {got}")
    cells = [f"{cell:016x}" for cell in partition.cells.tolist()]
    model_of = partial(common.network, outputs=len(partition), device=device)
    if s.evaluate:
        model = common.saved(s, s.evaluate, model_of, cells=cells)
    else:
        labels = partition.find(places)
        kept = np.flatnonzero(labels >= 0)
        check([images[i] for i in kept], s.verify)
        lost = f"{len(images) - len(kept)} of {len(images)} photos are in none"
        print(f"{len(partition)} cells; {lost}", flush=True)
        model = model_of(s)
        train = Images([images[i] for i in kept], labels[kept], train_view, s.seed)
        common.fit(model, common.with_labels(model, F.cross_entropy), train, s, device, cells=cells)
    report(common.predict(model, test, s, device), test_images, truth, partition, out)


def report(
    logits: torch.Tensor, images: list[Path], truth: np.ndarray, partition: Partition, out: Path
) -> None:
    found = partition.places[logits.argmax(1).numpy()]
    far = kilometres(found, truth)
    columns = ["image", "latitude", "longitude", "predicted latitude", "predicted longitude", "km"]
    lines = zip(images, truth, found, far)
    lines = ((path, *a, f"{b[0]:.5f}", f"{b[1]:.5f}", f"{d:.3f}") for path, a, b, d in lines)
    common.write_csv(out / "places.csv", columns, lines)
    rows = [(name, km, float(100 * (far <= km).mean())) for name, km in WITHIN.items()]
    page = Page("Geolocation")
    page.text(
        f"{len(far)} test photos, {len(partition)} cells; half of them are within {_km(np.median(far))}."
    )
    page.table(["", "within km", "% of photos"], rows)
    page.text("Cells (blue), photos (green) and where they were placed (red):")
    page.drawing(1080, 540, _map(partition.cells, truth, found))
    page.text("The nearest and the farthest:")
    order = np.argsort(far, kind="stable")
    for i in dict.fromkeys([*order[:8], *order[-8:]]):
        page.picture(f"{truth[i, 0]:.2f}, {truth[i, 1]:.2f}: {_km(far[i])} off", images[i])
    page.losses(out, "model")
    said = ", ".join(f"{km} km {share:.1f} %" for _, km, share in rows)
    page.write(out / "index.html", f"within {said}")


def _km(distance: float) -> str:
    return f"{distance:,.0f} km" if distance >= 100 else f"{distance:.3g} km"


def outline(cell: int) -> np.ndarray:
    """Places (N, 2) in degrees around an S2 cell; longitudes go on past 180 where it lies across."""
    import s2cell

    level = s2cell.cell_id_to_level(cell)
    face, *low = s2cell.s2_cell_id_to_face_ij(cell)
    side = 1 << LEAVES - level  # in cells of the finest level
    i, j = (k & -side for k in low)
    steps = max(1, 16 >> level)  # large cells have curved edges
    along = [k * (side - 1) // steps for k in range(steps)]
    last = side - 1
    edges = [(a, 0) for a in along] + [(last, a) for a in along]
    edges += [(last - a, last) for a in along] + [(0, last - a) for a in along]
    corners = (s2cell.s2_face_ij_to_cell_id(face, i + a, j + b, LEAVES) for a, b in edges)
    places = np.array([s2cell.cell_id_to_lat_lon(corner) for corner in corners])
    places[:, 1] = np.unwrap(places[:, 1], period=360)
    first, end = places[0], places[-1]
    if abs(end[1] - first[1]) > 180:  # around a pole: over the map's edge
        pole = np.copysign(90, first[0])
        places = np.concatenate([places, [[first[0], first[1] + np.copysign(360, end[1] - first[1])]]])
        places = np.concatenate([places, [[pole, places[-1, 1]], [pole, first[1]]]])
    return places


def _map(cells: np.ndarray, truth: np.ndarray, found: np.ndarray, limit: int = 2000) -> Iterator[str]:
    """Plate carree, three pixels a degree; at most `limit` photos."""

    def at(place, turn: int = 0) -> str:
        return f"{3 * (place[1] + 180 + turn):.1f} {3 * (90 - place[0]):.1f}"

    yield '<rect width="1080" height="540" fill="#f4f4f4"/>'
    for lon in range(-150, 180, 30):
        x = 3 * (lon + 180)
        yield f'<path d="M{x} 0V540" stroke="#ddd"/><text x="{x + 3}" y="536" fill="#888">{lon}</text>'
    for lat in range(-60, 90, 30):
        y = 3 * (90 - lat)
        yield f'<path d="M0 {y}H1080" stroke="#ddd"/><text x="3" y="{y - 3}" fill="#888">{lat}</text>'
    for cell in cells.tolist():
        places = outline(cell)
        for turn in (-360, 0, 360):
            if places[:, 1].max() + turn > -180 and places[:, 1].min() + turn < 180:
                around = "L".join(at(place, turn) for place in places)
                yield f'<path d="M{around}Z" fill="#57f" fill-opacity=".15" stroke="#57f"/>'
    for a, b in list(zip(truth, found))[:limit]:
        (x, y), (u, v) = at(a).split(), at(b).split()
        yield f'<path d="M{x} {y}L{u} {v}" stroke="#aaa" stroke-width=".5"/>'
        yield f'<circle cx="{x}" cy="{y}" r="2" fill="#080"/><circle cx="{u}" cy="{v}" r="2" fill="#c00"/>'


if __name__ == "__main__":
    raise SystemExit(main())
