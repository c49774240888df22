"""The examples on small data in the formats of the real sets: what they learn, write and refuse."""

import csv
import math
import re
from pathlib import Path

import drawn
import numpy as np
import pytest
import torch
from torch import nn

import mnops
from mnops.examples import common, face_attributes, face_embeddings, fine_grained, geolocation
from mnops.examples.page import Page, _axis
from mnops.train import TrainError, checkpoint
from mnops.train.data import Images, Transform
from mnops.train.distill import embedding_loss

SMALL = """--device cpu --workers 0 --width 0.5 --size 32 --batch-size 24 --optimizer sgd --lr 0.02
    --bn-momentum 0.2"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(example, data, out, *more) -> int:
    """main() with options, each a word or words."""
    options = (word for part in (SMALL, *more) for word in str(part).split())
    return example.main(["--data", str(data), "--out", str(out), *options])


def refused(example, data, out, capsys, *more) -> str:
    """What a run that must not start says; it leaves nothing behind."""
    capsys.readouterr()
    assert run(example, data, out, *more) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and not out.exists()
    return error[0]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---- fine-grained ----


@pytest.fixture
def dogs(tmp_path):
    pytest.importorskip("scipy")
    drawn.draw_dogs(tmp_path / "dogs")
    return tmp_path / "dogs"


def test_fine_grained_learns_after_noisy_labels_and_leaves_frozen_layers(dogs, tmp_path, capsys):
    drawn.draw_folders(tmp_path / "web", 24, wrong=0.3)
    out = tmp_path / "out"
    options = "--noisy", tmp_path / "web", "--noisy-epochs", 10, "--freeze", 5, "--epochs", 15
    assert run(fine_grained, dogs, out, *options) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"top-1 ([\d.]+) % of 18 images", said)[1]) > 90
    before, after = (checkpoint.load(out / f"{name}.pt")["model"] for name in ("noisy", "model"))
    still = [k for k in after if re.match(r"conv_stem|bn1|blocks\.(0\.0|1\.[01]|2\.[01])\.", k)]
    assert len(still) == 6 + 5 * 12
    assert all(torch.equal(after[k], before[k]) for k in still)
    moved = [k for k in after if k not in still and not torch.equal(after[k], before[k])]
    assert "classifier.weight" in moved and "blocks.4.1.bn2.running_mean" in moved
    predictions = rows(out / "predictions.csv")
    assert len(predictions) == 18 and {row["breed"] for row in predictions} == set(drawn.TINTS)
    assert (out / "index.html").read_text().count("<figure>") >= 12
    again = "--evaluate", out / "model.pt"
    assert run(fine_grained, dogs, tmp_path / "again", *again) == 0
    assert rows(tmp_path / "again" / "predictions.csv") == predictions


def test_stanford_dogs_format(dogs):
    paths, labels, breeds = fine_grained.stanford_dogs(dogs, "test")
    assert breeds == list(drawn.TINTS) and paths[6] == dogs / "Images" / "n02-green" / "test_0.jpg"
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_stanford_dogs_malformed(dogs, tmp_path, capsys):
    out = tmp_path / "out"
    (dogs / "Images" / "n02-green" / "test_3.jpg").unlink()
    error = refused(fine_grained, dogs, out, capsys)
    assert re.search(r"test_list.mat: there is no image .*n02-green/test_3.jpg", error)
    (dogs / "test_list.mat").write_bytes(b"not MATLAB's")
    assert "test_list.mat: must be a MATLAB file of file_list" in refused(fine_grained, dogs, out, capsys)
    (dogs / "train_list.mat").unlink()
    assert "must hold train_list.mat, here or in lists/" in refused(fine_grained, dogs, out, capsys)


def test_a_broken_image_of_the_test_is_told_before_training(dogs, tmp_path, capsys):
    path = dogs / "Images" / "n02-green" / "test_3.jpg"
    path.write_bytes(path.read_bytes()[:400])
    error = refused(fine_grained, dogs, tmp_path / "out", capsys)
    assert f"{path}: is not a readable image" in error


# ---- geolocation ----


@pytest.fixture
def places(tmp_path):
    pytest.importorskip("s2cell")
    drawn.draw_places(tmp_path / "earth", "train", 72)
    drawn.draw_places(tmp_path / "earth", "test", 12, seed=1)
    return tmp_path / "earth"


def test_geolocation_learns_the_cities(places, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(geolocation, places, out, "--most", 30, "--least", 2, "--epochs", 15) == 0
    said = capsys.readouterr().out
    shares = {int(km): float(share) for km, share in re.findall(r"(\d+) km ([\d.]+) %", said)}
    assert shares[25] > 80 and list(shares) == [1, 25, 200, 750, 2500]
    assert sorted(shares.values()) == list(shares.values())
    found = rows(out / "places.csv")
    assert [float(row["km"]) <= 25 for row in found].count(True) == round(12 * shares[25] / 100)
    page = (out / "index.html").read_text()
    assert page.count("<circle") == 24 and page.count("<figure>") == 12
    with_its_cells = "--evaluate", out / "model.pt"  # of its settings, not of the defaults
    assert run(geolocation, places, tmp_path / "again", *with_its_cells) == 0
    assert rows(tmp_path / "again" / "places.csv") == found
    with_others = "--most", 1, "--least", 1, "--evaluate", out / "model.pt"
    assert "was made with cells" in refused(geolocation, places, tmp_path / "other", capsys, *with_others)
    net = mnops.MobileNet(num_classes=3, width_mult=0.5)  # as many as there are cells
    torch.save({"model": net.state_dict(), "settings": {}}, tmp_path / "net.pt")
    with_cells_of_its_own = "--most", 30, "--least", 2, "--evaluate", tmp_path / "net.pt"
    error = refused(geolocation, places, tmp_path / "other", capsys, *with_cells_of_its_own)
    assert "net.pt: must be of a run of this example, has no 'cells'" in error


def random_places(n: int, seed: int = 0) -> np.ndarray:
    """Dense around two cities, thin elsewhere, the poles and the date line among them."""
    rng = np.random.default_rng(seed)
    z = rng.uniform(-1, 1, n // 4)
    everywhere = np.stack([np.degrees(np.arcsin(z)), rng.uniform(-180, 180, len(z))], 1)
    dense = np.concatenate([rng.normal(city, 0.5, (n // 4, 2)) for city in drawn.CITIES[:2]])
    return np.concatenate([everywhere, dense, [[90, 0], [-90, 0], [0, 180], [0, -180], [10, 179.999]]])


def test_partition_is_fine_where_photos_are_dense():
    s2cell = pytest.importorskip("s2cell")
    points = random_places(800)
    partition = geolocation.Partition.of(points, most=40, least=1)
    found = partition.find(points)
    assert found.min() == 0 and np.bincount(found).max() <= 40 and np.bincount(found).min() >= 1
    levels = [s2cell.cell_id_to_level(int(cell)) for cell in partition.cells]
    for point, cell in zip(points[::29], partition.cells[found[::29]]):  # the library's own way up
        level = s2cell.cell_id_to_level(int(cell))
        assert s2cell.lat_lon_to_cell_id(*point, level) == cell
    assert min(levels) <= 2 and max(levels) >= 6  # adaptive
    for cell, level in zip(partition.cells.tolist(), levels):  # its parent had too many
        if level:
            parent = s2cell.cell_id_to_parent_cell_id(cell, level - 1)
            inside = [s2cell.cell_id_to_parent_cell_id(int(leaf), level - 1) == parent
                      for leaf in geolocation.leaf_cells(points)]  # fmt: skip
            assert sum(inside) > 40
            break


def test_partition_drops_sparse_cells_and_stands_for_the_photos_inside():
    pytest.importorskip("s2cell")
    points = random_places(800)
    every, some = (geolocation.Partition.of(points, 40, least) for least in (1, 20))
    assert len(some) < len(every)
    found = some.find(points)
    assert (found == -1).any() and np.bincount(found[found >= 0]).min() >= 20
    inside = points[found == 0]
    centre = geolocation.on_sphere(inside).mean(0)
    expected = geolocation.on_sphere(some.places[:1])[0]
    np.testing.assert_allclose(centre / np.linalg.norm(centre), expected, atol=1e-12)
    coarse = geolocation.Partition.of(np.repeat(points[:1], 100, 0), 10, 1, finest=3)
    assert len(coarse) == 1 and geolocation.kilometres(coarse.places, points[:1])[0] < 1e-6


def test_the_map_outlines_the_cells():
    pytest.importorskip("s2cell")
    partition = geolocation.Partition.of(random_places(800), 40, 1)
    for index, cell in enumerate(partition.cells.tolist()):
        around = geolocation.outline(cell)
        around = around[np.abs(around[:, 0]) < 90]  # along a pole it goes back all the way
        assert np.abs(np.diff(around[:, 1])).max() <= 180  # no jump at the date line
        around[:, 1] = (around[:, 1] + 180) % 360 - 180
        assert (partition.find(around) == index).all()  # the edge is inside, its width of 1 cm apart
        middle = geolocation.on_sphere(around).mean(0)
        assert middle @ geolocation.on_sphere(around)[0] > 0
    north = geolocation.outline((2 * 2 + 1) << 60)  # a face of the cube, the pole in its middle
    assert np.ptp(north[:, 1]) == pytest.approx(360) and north[:, 0].max() == 90 and north[:, 0].min() > 35


@pytest.mark.parametrize(("a", "b", "km"), [
    ((48.8566, 2.3522), (51.5074, -0.1278), 343.6),  # Paris to London
    ((0, 0), (0, 180), math.pi * geolocation.EARTH), ((90, 12), (90, -77), 0.0),
    ((0, 179.5), (0, -179.5), math.pi / 180 * geolocation.EARTH),
    ((10, 20), (10 + 1e-6, 20), 1e-6 * math.pi / 180 * geolocation.EARTH),
])  # fmt: skip
def test_great_circle_distance(a, b, km):
    assert geolocation.kilometres(np.array([a]), np.array([b]))[0] == pytest.approx(km, rel=1e-3, abs=1e-9)


MALFORMED_CSV = {
    r"test.csv: line 3: a latitude must be .* in \[-90, 90\], got '95.2'":
        (r"test1.jpg,.*,\S+,", 'test1.jpg,"",95.2,'),
    r"test.csv: line 2: a longitude must be .* got 'east'": (r",[\d.-]+\n", ",east\n"),
    r"test.csv: line 4: there is no image .*gone.jpg": ("test2.jpg", "gone.jpg"),
    r"must have a column for the latitude, lat or latitude, got img_id, author, breite": ("LAT", "Breite"),
    r"test.csv: line 3: a longitude must be .* got ''": (r"(test1.jpg,.*),\S+\n", r"\1\n"),
}


@pytest.mark.parametrize("told", MALFORMED_CSV)
def test_malformed_csv(places, tmp_path, capsys, told):
    path = places / "test.csv"
    path.write_text(re.sub(*MALFORMED_CSV[told], path.read_text(), count=1))
    assert re.search(told, refused(geolocation, places, tmp_path / "out", capsys))


def test_a_csv_that_is_none(places, tmp_path, capsys):
    (places / "test.csv").write_text('img_id,lat,lon\n"' + 200_000 * "x")
    error = refused(geolocation, places, tmp_path / "out", capsys)
    assert "test.csv: line 2 must be CSV (field larger than field limit" in error


# ---- face attributes ----


@pytest.fixture
def celeba(tmp_path):
    pytest.importorskip("sklearn")
    drawn.draw_celeba(tmp_path / "celeba")
    return tmp_path / "celeba"


def test_a_student_learns_attributes_from_its_teacher(celeba, tmp_path, capsys):
    out = tmp_path / "out"
    more = "--optimizer adamw --lr 0.004 --batch-size 12 --teacher-width 0.6 --teacher-epochs 10 --epochs 14"
    assert run(face_attributes, celeba, out, more) == 0
    found = rows(out / "attributes.csv")
    assert tuple(row["attribute"] for row in found) == drawn.ATTRIBUTES
    means = {name: np.mean([float(row[f"AP, {name}"]) for row in found]) for name in ("teacher", "student")}
    assert means["teacher"] > 0.85 and means["student"] > 0.8
    assert f"student {100 * means['student']:.2f} %" in capsys.readouterr().out
    teacher, student = (checkpoint.load(out / f"{name}.pt")["model"] for name in ("teacher", "model"))
    assert (len(teacher["bn1.weight"]), len(student["bn1.weight"])) == (24, 16)
    assert (out / "index.html").read_text().count("<figure>") == 12
    given = "--teacher", out / "teacher.pt", "--epochs", 1  # of another width than the student's
    assert run(face_attributes, celeba, tmp_path / "again", *given) == 0
    again = rows(tmp_path / "again" / "attributes.csv")
    assert [row["AP, teacher"] for row in again] == [row["AP, teacher"] for row in found]
    assert not (tmp_path / "again" / "teacher.pt").exists()


def test_celeba_format(celeba):
    files, attributes, names, parts = face_attributes.celeba(celeba)
    assert (files[0], len(files), names) == ("000001.jpg", 99, list(drawn.ATTRIBUTES))
    line = (celeba / "list_attr_celeba.txt").read_text().splitlines()[2].split()
    assert attributes[0].tolist() == [int(v == "1") for v in line[1:]]
    assert np.bincount(parts).tolist() == [72, 3, 24]


ATTR, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
MALFORMED_CELEBA = [
    (ATTR, "99", "98", "must have 98 images, as line 1 says, got 99"),
    (ATTR, "99\n", "", "line 1 must be the number of images, got 'Reddish Bright Striped '"),
    (ATTR, "000002.jpg", "000002.jpg  1", "line 4 must have 3 values, as line 2 has names, got 4"),
    (ATTR, " 1", " 0", "a value must be 1 or -1, got '0'"),
    (PARTITION, "03.jpg 0", "03.jpg 7", "line 3 must be FILE and 0, 1 or 2, got '000003.jpg 7'"),
    (PARTITION, "03.jpg", "99.jpg", "must have every image of list_attr_celeba.txt, 000003.jpg"),
]  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED_CELEBA, ids=lambda case: case[3][:30])
def test_malformed_celeba(celeba, tmp_path, capsys, case):
    file, old, new, told = case
    edit(celeba / file, old, new)
    error = refused(face_attributes, celeba, tmp_path / "out", capsys)
    assert f"{file}: " in error and told in error


# ---- face embeddings ----


@pytest.fixture
def faces(tmp_path):
    drawn.draw_folders(tmp_path / "faces", 16)
    drawn.draw_pairs(tmp_path / "faces" / "pairs.txt", 18, 16)
    return tmp_path / "faces"


@pytest.mark.parametrize("seed", range(2))
def test_a_student_learns_embeddings_from_its_teacher(faces, tmp_path, capsys, seed):
    out = tmp_path / "out"
    more = "--dim 8 --each 8 --lr 0.01 --teacher-width 0.6 --teacher-epochs 30 --epochs 30 --far 0.1"
    assert run(face_embeddings, faces, out, more, "--seed", seed) == 0
    pattern = r"at 0.1 false accepts: teacher ([\d.]+) %, student ([\d.]+) %"
    said = re.search(pattern, capsys.readouterr().out)
    assert float(said[1]) > 75 and float(said[2]) > 75
    losses = [float(row["loss"]) for row in rows(out / "model.csv")]  # squared distance to the teacher's
    assert np.mean(losses[-5:]) < 0.25 * losses[0]
    found = rows(out / "pairs.csv")
    assert len(found) == 36 and sum(row["same person"] == "1" for row in found) == 18
    distances = np.array([float(row["student"]) for row in found])
    same = np.array([row["same person"] == "1" for row in found])
    rate = face_embeddings.verification(distances, same, 0.1).rate
    assert rate == pytest.approx(float(said[2]) / 100, abs=1e-4)
    assert distances.min() >= 0 and distances.max() <= 4  # of embeddings of length 1
    ends = face_embeddings.curve(distances, same)
    assert ends[0] == (0, 0) and ends[-1] == (1, 1) and sorted(ends) == ends
    assert (out / "index.html").read_text().count("<polyline") == 4  # rates and losses of two networks
    other = "--dim", 9, "--evaluate", out / "model.pt"
    error = refused(face_embeddings, faces, tmp_path / "other", capsys, *other)
    assert "was made with dim = 8, got dim = 9" in error


def test_verification_rate_at_false_accepts():
    distances = np.array([0.1, 0.2, 0.3, 0.9, 0.15, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.1, 1.2, 1.3])
    same = np.arange(14) < 4
    none = face_embeddings.verification(distances, same, 0.0)
    assert none.rate == 0.25 and none.false_accepts == 0 and 0.1 <= none.threshold < 0.15
    one = face_embeddings.verification(distances, same, 0.1)
    assert one.rate == 0.75 and one.false_accepts == pytest.approx(0.1)
    assert face_embeddings.verification(distances, same, 0.19) == one
    assert face_embeddings.verification(distances, same, 1.0)[::2] == (1.0, 1.0)
    tied = face_embeddings.verification(np.array([0.2, 0.2, 0.2]), np.array([True, False, False]), 0.5)
    assert tied.false_accepts == 0 and tied.rate == 0  # accepting one accepts both


def test_lfw_pairs_format(faces):
    pairs = face_embeddings.lfw_pairs(faces / "pairs.txt", faces)
    first = (faces / "pairs.txt").read_text().splitlines()[1].split()
    ends = pairs.images[pairs.first[0]], pairs.images[pairs.second[0]]
    assert [end.name for end in ends] == [f"n01-red_{int(i):04d}.png" for i in first[1:]]
    people = [image.parent.name for image in pairs.images]
    for i, j, same in zip(pairs.first, pairs.second, pairs.same):
        assert (people[i] == people[j]) == same
    assert pairs.same.tolist() == [True] * 18 + [False] * 18


MALFORMED_PAIRS = [
    (r"\A1\t18", "ten", "line 1 must be the numbers of folds and of pairs, got 'ten'"),
    (r"\A1\t18", "1\t17", "must have 34 pairs, as line 1 says, got 36"),
    (r"\A1\t18", "1\t0", "line 1 must be the numbers of folds and of pairs, got '1\\t0'"),
    (r"\n(n01-red\t\d+)\t\d+", r"\n\1", "line 2 must be NAME I J or NAME I OTHER J, got 'n01-red"),
    (r"\nn01-red\t\d+", "\nn01-red\t77", "line 2: there is no image"),
]


@pytest.mark.parametrize("case", MALFORMED_PAIRS, ids=lambda case: case[2][:20])
def test_malformed_pairs(faces, tmp_path, capsys, case):
    (old, new, told), path = case, faces / "pairs.txt"
    path.write_text(re.sub(old, new, path.read_text(), count=1))
    error = refused(face_embeddings, faces, tmp_path / "out", capsys)
    assert "pairs.txt: " in error and told in error


def test_batches_hold_triplets():
    labels = np.array([0] * 9 + [1] * 2 + [2] * 5 + [3])
    batches = face_embeddings.PeopleBatches(labels, 9, 3, epochs=4, seed=0)
    assert len(batches) == len(list(batches)) == 4
    for step, keys in enumerate(batches):
        people = labels[[i for _, i in keys]].reshape(3, 3)
        assert (people == people[:, :1]).all() and len(set(people[:, 0])) == 3
        assert {epoch for epoch, _ in keys} == {step}
    assert list(batches) == list(batches)
    with pytest.raises(TrainError, match="two images of two people at least, got 3 for 3 of each"):
        face_embeddings.PeopleBatches(labels, 3, 3, 1, 0)


# ---- what they share ----


def test_weights_of_a_classifier_are_a_start(tmp_path, capsys):
    drawn.draw_celeba(tmp_path / "celeba")
    net = mnops.MobileNet(num_classes=11, width_mult=0.25)
    checkpoint.save(tmp_path / "net.pt", net.state_dict())
    command = common.Command("test", "")
    weights = str(tmp_path / "net.pt")
    s = command.parser.parse_args(["--data", ".", "--width", "0.25", "--weights", weights])
    s.__dict__ = command.defaults | s.__dict__
    model = common.network(s, 4, torch.device("cpu"))
    assert model.classifier.weight.shape == (4, 256)
    body = {k: v for k, v in model.state_dict().items() if "classifier" not in k}
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in body.items())
    s.width = 0.5
    with pytest.raises(TrainError, match=r"net.pt: conv_stem.weight must be \(16, 3, 3, 3\)"):
        common.network(s, 4, torch.device("cpu"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    command = common.Command("test", "", batch_size=2, workers=0, epochs=1)
    s = command.parser.parse_args(["--data", ".", "--out", str(tmp_path / "out")])
    s.__dict__ = command.defaults | s.__dict__
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 1))
    rng = np.random.default_rng(0)
    data = Images([drawn.noise(rng, (9, 9, 9)) for _ in range(4)], [0] * 4, Transform(8))
    with pytest.raises(TrainError, match="the loss is nan at step 1"):
        common.fit(model, lambda x, _: model(x).sum() * math.nan, data, s, torch.device("cpu"))
    assert not (tmp_path / "out" / "model.pt").exists()
    with pytest.raises(TrainError, match="at most the number of training images = 1, got 2"):
        short = Images(data.images[:1], [0], Transform(8))
        common.fit(model, lambda x, _: model(x).sum(), short, s, torch.device("cpu"))


def test_a_page_escapes_what_it_shows(tmp_path):
    page = Page("<a>")
    page.text("1 < 2")
    page.table(["<b>"], [["&", 0.123456]])
    page.picture('"<i>', np.zeros((4, 4, 3), np.uint8))
    page.chart({"<p>": [(0, 0), (3, 7)]}, "<u>", "<s>")
    page.write(tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    shown = "&lt;a&gt;", "1 &lt; 2", "&lt;b&gt;", "&amp;", "0.1235", "&lt;i&gt;", "&lt;p&gt;", "&lt;u&gt;", "&lt;s&gt;"
    assert [part for part in shown if part not in text] == []


def test_a_chart_has_round_ticks_and_every_step(tmp_path):
    assert _axis(1.0)[1] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert _axis(0.013)[1] == pytest.approx([0, 0.005, 0.01])
    for most in np.geomspace(1e-6, 1e9, 97):
        end, ticks = _axis(most)
        assert end == most and 2 <= len(ticks) - 1 <= 5 and ticks[-1] <= most * (1 + 1e-6)
    common.write_csv(tmp_path / "model.csv", ["step", "lr", "loss"], ((k, 0, 1 / k) for k in range(1, 1001)))
    page = Page("long")
    page.losses(tmp_path, "teacher", "model", most=50)
    points = re.search(r'points="([^"]+)', page.parts[-1])[1].split()
    assert len(points) == 50 and ">model<" in page.parts[-1] and ">teacher<" not in page.parts[-1]
    heights = [float(point.split(",")[1]) for point in points]
    assert sorted(heights) == heights  # downwards, as the loss
    parts = len(page.parts)
    page.losses(tmp_path, "noisy")
    assert len(page.parts) == parts


def test_weights_are_for_the_network_that_is_made_first(tmp_path):
    made = []

    def build(s):
        made.append((s.width, s.weights))
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))

    command = common.Command("test", "", teacher=None, teacher_width=1.0, teacher_epochs=1)
    command.teacher_options()
    rng = np.random.default_rng(0)
    data = Images([drawn.noise(rng, (9, 9, 9)) for _ in range(2)], [0, 0], Transform(8))

    def run(*more):
        made.clear()
        options = "--data . --weights w.pt --width 0.5 --epochs 1 --batch-size 2 --workers 0"
        s = command.parser.parse_args([*options.split(), "--out", str(tmp_path), *more])
        s.__dict__ = command.defaults | s.__dict__
        learn = lambda model, own: checkpoint.save(tmp_path / "t.pt", {"model": model.state_dict()})  # noqa: E731
        common.distilled(s, build, learn, embedding_loss, data, torch.device("cpu"))
        return made

    assert run() == [(1.0, "w.pt"), (0.5, None)]
    assert run("--teacher-width", "0.5") == [(0.5, "w.pt"), (0.5, "w.pt")]
    assert run("--teacher", str(tmp_path / "t.pt")) == [(0.5, None), (0.5, "w.pt")]


@pytest.mark.parametrize("example", [fine_grained, geolocation, face_attributes, face_embeddings])
def test_a_folder_that_is_not_there(example, tmp_path, capsys):
    name = example.__name__.rpartition(".")[2]
    error = refused(example, tmp_path / "none", tmp_path / "out", capsys)
    assert error == f"{name}: --data {tmp_path}/none: there is no such directory"
    assert example.command.parser.format_help().count("--") > 15


def test_results_that_cannot_be_written(dogs, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(fine_grained, dogs, tmp_path / "file" / "out") == 2
    assert "--out " in (error := capsys.readouterr().err) and "cannot be made a folder" in error


def test_a_missing_package_is_named(places, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s2cell", None)
    error = refused(geolocation, places, tmp_path / "out", capsys)
    assert "needs the package s2cell: pip install 'mnops[examples]'" in error
