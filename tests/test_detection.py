"""SSD and Faster-RCNN: the counts, what they learn on drawn scenes, the figures, malformed data."""

import csv
import json
import sys
from functools import partial
from types import SimpleNamespace

import drawn
import numpy as np
import pytest
import torch
import torchvision_support
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mnops
from mnops.examples import detection
from mnops.models.mobilenet import STAGES


@pytest.fixture
def vision():
    torchvision_support.load()
    from mnops.models import detection as models

    return models


@pytest.fixture(autouse=True)
def malformed_data_needs_no_packages(monkeypatch):
    monkeypatch.setattr(detection.command, "needs", ())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def mult_adds(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


# ---- counts ----


def test_ssd_has_the_papers_counts(vision):
    with FakeTensorMode():
        model, image = vision.ssd300().eval(), torch.empty(1, 3, 300, 300)
        maps = list(model.backbone(image).values())
        assert [tuple(m.shape[2:]) for m in maps] == [(n, n) for n in (19, 10, 5, 3, 2, 1)]
        scores = model.head(maps)
        assert scores["cls_logits"].shape == (1, 1917, 91) and scores["bbox_regression"].shape == (1, 1917, 4)
        assert weights(model) == 6_791_360
        assert mult_adds(lambda: model.head(list(model.backbone(image).values()))) == 1_237_129_408


@pytest.mark.parametrize(("side", "billions"), [(300, "25.2"), (600, "30.5")])
def test_faster_rcnn_has_the_papers_counts(vision, side, billions):
    with FakeTensorMode():
        model, image = vision.faster_rcnn().eval(), torch.empty(1, 3, side, side)
        features = model.backbone(image)["0"]
        assert features.shape[1:] == (512, -(-side // 16), -(-side // 16))
        assert model.rpn.anchor_generator.num_anchors_per_location() == [12]
        assert model.rpn.post_nms_top_n() == 300
        assert model.roi_heads.box_roi_pool.output_size == (14, 14)
        image_adds = mult_adds(lambda: model.rpn.head([model.backbone(image)["0"]]))
        crop, heads = torch.empty(1, 512, 14, 14), model.roi_heads
        crop_adds = mult_adds(lambda: heads.box_predictor(heads.box_head(crop)))
        assert f"{(image_adds + 300 * crop_adds) / 1e9:.1f}" == billions
        assert 6.0e6 < weights(model) < 6.15e6


def test_default_boxes(vision):
    """Places and sizes of the anchors of the first and the last map, in pixels of a 300 x 300 image."""
    model = vision.ssd300(num_classes=3, width_mult=0.25).eval()
    images = SimpleNamespace(tensors=torch.empty(1, 3, 300, 300), image_sizes=[(300, 300)])
    maps = [torch.empty(1, 1, n, n) for n in (19, 10, 5, 3, 2, 1)]
    boxes = model.anchor_generator(images, maps)[0]
    assert boxes.shape == (1917, 4)
    sizes, centres = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    root = 2**0.5
    expected = torch.tensor([[30, 30], [60 * root, 60 / root], [60 / root, 60 * root]])
    torch.testing.assert_close(sizes[:3], expected)
    torch.testing.assert_close(centres[:3], torch.full((3, 2), 150 / 19))
    torch.testing.assert_close(centres[3], torch.tensor([3 * 150 / 19, 150 / 19]))  # to the right first
    torch.testing.assert_close(centres[-6:], torch.full((6, 2), 150.0))
    torch.testing.assert_close(sizes[-6], torch.tensor([285.0, 285.0]))  # 0.95


def test_a_detector_starts_from_a_classifier(vision):
    net = mnops.MobileNet(num_classes=7, width_mult=0.25)
    for build in (vision.ssd300, vision.faster_rcnn):
        model = build(num_classes=3, width_mult=0.25)
        vision.load_backbone(model, net.state_dict())
        body = model.backbone.body
        assert torch.equal(body.blocks[3][5].conv_pw.weight, net.blocks[3][5].conv_pw.weight)
    head = model.roi_heads.box_head.layers  # Faster-RCNN's crops pass the last stage
    x = torch.randn(2, 128, 14, 14)
    torch.testing.assert_close(head.eval()(x), net.eval().blocks[len(STAGES) - 1](x))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = mnops.MobileNet(width_mult=0.5).state_dict()
    with pytest.raises(ValueError, match=r"conv_stem.weight must be \(8, 3, 3, 3\), got \(16, 3, 3, 3\)"):
        vision.load_backbone(model, other)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- the command ----


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    drawn.draw_coco(root, "train", 4)
    drawn.draw_coco(root, "val", 4)  # the same: what is tested is that it can learn at all
    return root


def run(scenes, out, *more) -> int:
    small = "--augment none --workers 0 --device cpu --width 0.25 --batch-size 4 --optimizer adamw --seed 1"
    return detection.main(["--data", str(scenes), "--out", str(out), *small.split(), *map(str, more)])


def metrics(out) -> dict[str, float]:
    with open(out / "metrics.csv", newline="") as file:
        return {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}


def test_ssd_overfits_and_shows_what_it_found(vision, scenes, tmp_path, capsys):
    pytest.importorskip("pycocotools")
    out = tmp_path / "run"
    assert run(scenes, out, "--epochs", 40, "--lr", 0.004, "--bn-momentum", 0.3) == 0
    learnt = metrics(out)
    assert learnt["mAP"] > 0.9
    assert f"mAP {learnt['mAP']:.4f}" in capsys.readouterr().out
    picture = np.asarray(Image.open(out / "pictures" / "scene0.png")).astype(int)
    plain = np.asarray(Image.open(scenes / "val" / "scene0.png")).astype(int)
    truth = json.loads((scenes / "annotations" / "instances_val.json").read_text())["annotations"][0]["bbox"]
    y, x = np.nonzero(np.abs(picture - plain).sum(2))
    found = np.array([x.min(), x.max(), y.max()])  # the name stands at the upper edge
    assert np.abs(found - [truth[0], truth[0] + truth[2], truth[1] + truth[3]]).max() < 6
    assert (out / "index.html").read_text().count("data:image/jpeg") == 4
    assert (out / "model.csv").read_text().count("\n") == 41
    assert run(scenes, tmp_path / "again", "--evaluate", out / "model.pt") == 0
    assert metrics(tmp_path / "again") == pytest.approx(learnt, nan_ok=True)
    assert run(scenes, out) == 2 and "--overwrite replaces it" in capsys.readouterr().err
    wrong = "--network", "faster_rcnn", "--evaluate", out / "model.pt"
    assert run(scenes, tmp_path / "again", *wrong) == 2
    assert "was made with network = ssd, got network = faster_rcnn" in capsys.readouterr().err


def test_faster_rcnn_learns_and_shows_what_it_found(vision, scenes, tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    few = dict(rpn_pre_nms_top_n_train=60, rpn_pre_nms_top_n_test=60, rpn_post_nms_top_n_train=30,
               rpn_post_nms_top_n_test=30, box_batch_size_per_image=16)  # fmt: skip
    monkeypatch.setattr(vision, "faster_rcnn", partial(vision.faster_rcnn, **few))
    out = tmp_path / "run"
    network = "--network", "faster_rcnn", "--size", 192
    assert run(scenes, out, *network, "--epochs", 40, "--lr", 0.003, "--bn-momentum", 0.3) == 0
    assert metrics(out)["mAP at IoU 0.5"] > 0.5
    assert len(list((out / "pictures").iterdir())) == 4


# ---- COCO's figures ----


def results(data, shift=0.0, keep=1.0):
    """The truth as detections, moved to the right by a share of the width; the first of each image."""
    found = []
    for image in data.images:
        boxes = torch.tensor(image["boxes"], dtype=torch.float32)
        boxes[:, [0, 2]] += shift * (boxes[:, 2:3] - boxes[:, :1])
        n = max(1, round(keep * len(boxes)))
        labels = torch.tensor(image["labels"])
        found.append({"boxes": boxes[:n], "labels": labels[:n], "scores": torch.ones(n)})
    return found


def test_coco_figures(scenes):
    pytest.importorskip("pycocotools")
    data = detection.coco(scenes, "val")
    assert [c[0] for c in data.categories] == [1, 4, 7]
    right, rows = detection.coco_map(data, results(data))
    assert right["mAP"] == pytest.approx(1) and np.isnan(right["mAP, large"])
    assert {row["category_id"] for row in rows} == {1, 4, 7}  # the file's, not positions
    # a shift by a fifth leaves an IoU of 0.8 / 1.2 = 0.667: right at 0.5, 0.55, 0.6, 0.65 of ten thresholds
    shifted, _ = detection.coco_map(data, results(data, 0.2))
    assert shifted["mAP"] == pytest.approx(0.4)
    assert shifted["mAP at IoU 0.5"] == pytest.approx(1) and shifted["mAP at IoU 0.75"] == 0
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0), "scores": torch.empty(0)}
    assert detection.coco_map(data, [nothing] * len(data.images))[0]["mAP"] == 0


# ---- data ----


@pytest.mark.parametrize("kind", ["flip", "crop"])
def test_boxes_follow_the_augmented_pixels(vision, tmp_path, kind):
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[20:40, 50:75] = 255
    Image.fromarray(pixels).save(tmp_path / "one.png")
    rows = [{"path": tmp_path / "one.png", "boxes": [[50, 20, 75, 40]], "labels": [2]}]
    scenes = detection.Scenes(rows, detection.augmentation(kind), seed=3)
    places = set()
    for epoch in range(20):
        image, target = scenes[epoch, 0]
        y, x = (image[0] == 255).nonzero(as_tuple=True)
        seen = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
        assert (seen - target["boxes"][0]).abs().max() <= 1 and target["labels"].tolist() == [2]
        assert torch.equal(image, scenes[epoch, 0][0])
        places.add(tuple(seen.tolist()))
    assert len(places) == 2 if kind == "flip" else len(places) > 5


def change(root, edit):
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


NAN = float("nan")  # json writes and reads it
MALFORMED = {
    "four numbers": lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
    "category_id must be the id of a category, got 99": lambda c: c["annotations"][0].update(category_id=99),
    "image_id must be the id of an image, got -5": lambda c: c["annotations"][0].update(image_id=-5),
    "there is no image": lambda c: c["images"][1].update(file_name="gone.png"),
    "must have a list 'categories'": lambda c: c.pop("categories"),
    "bbox is missing": lambda c: c["annotations"][1].pop("bbox"),
    "'images' must not be empty": lambda c: c["images"].clear(),
    "'annotations' must not be empty": lambda c: c["annotations"].clear(),
    "images[0]: file_name must be a string, got 3": lambda c: c["images"][0].update(file_name=3),
    "images[1]: id must be an integer or a string, got [1]": lambda c: c["images"][1].update(id=[1]),
    "categories[0]: id must be an integer, got 'a'": lambda c: c["categories"][0].update(id="a"),
    "annotations[0]: area must be a number, got 'big'": lambda c: c["annotations"][0].update(area="big"),
    "annotations[1]: id must come once, got 1 twice": lambda c: c["annotations"][1].update(id=1),
    "four numbers, x y width height, got [nan, 0": lambda c: c["annotations"][0].update(bbox=[NAN, 0, 1, 1]),
}


@pytest.mark.parametrize("told", MALFORMED)
def test_malformed_data_is_told(tmp_path, capsys, told):
    drawn.draw_coco(tmp_path, "val", 2)
    change(tmp_path, MALFORMED[told])
    assert run(tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "instances_val.json: " in error and told in error and not (tmp_path / "out").exists()


def test_missing_data_is_told(tmp_path, capsys):
    assert run(tmp_path / "none", tmp_path / "out") == 2
    assert "none: there is no such directory" in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "out") == 2
    assert "must hold one instances_val*.json, got none" in capsys.readouterr().err
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text("{")
    assert run(tmp_path, tmp_path / "out") == 2
    assert "must be JSON" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_broken_image_is_told_before_training(tmp_path, capsys, monkeypatch, part):
    for own in ("train", "val"):
        drawn.draw_coco(tmp_path, own, 2)
    path = tmp_path / part / "scene1.png"
    path.write_bytes(path.read_bytes()[:2000])
    monkeypatch.setattr(detection, "detector", lambda *args, **more: nn.Identity())  # torchvision's
    assert run(tmp_path, tmp_path / "out") == 2
    assert f"{path}: is not a readable image" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["torchvision", "pycocotools"])
def test_missing_packages_are_told_first(scenes, tmp_path, capsys, monkeypatch, package):
    monkeypatch.undo()
    assert set(detection.command.needs) == {"torchvision", "pycocotools"}
    monkeypatch.setattr(detection.command, "needs", [package])
    monkeypatch.setitem(sys.modules, package, None)
    assert run(scenes, tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        f"detection: needs the package {package}: pip install 'mnops[examples]'\n"
    )


def test_a_torchvision_for_another_torch_is_told(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    monkeypatch.delitem(sys.modules, "mnops.models.detection", raising=False)
    assert run(scenes, tmp_path / "out") == 2
    assert "mnops.models.detection needs a torchvision made for this torch" in capsys.readouterr().err


def test_frozen_batch_norms_keep_the_statistics_of_the_weights(vision, scenes, tmp_path):
    pytest.importorskip("pycocotools")
    net = mnops.MobileNet(num_classes=7, width_mult=0.25, act="relu6", padding="same", bn_eps=1e-3)
    made_with = dict(act="relu6", padding="same", bn_eps=1e-3, width=0.25)
    torch.save({"model": net.state_dict(), "settings": made_with}, tmp_path / "net.pt")
    out, more = tmp_path / "out", ("--weights", tmp_path / "net.pt", "--freeze-bn", "--epochs", 1)
    assert run(scenes, out, *more) == 0
    state, settings = (torch.load(out / "model.pt")[name] for name in ("model", "settings"))
    assert {name: settings[name] for name in made_with} == made_with
    assert torch.equal(state["backbone.body.blocks.4.1.bn2.running_var"], net.blocks[4][1].bn2.running_var)
    assert not torch.equal(state["backbone.body.blocks.4.1.bn2.weight"], net.blocks[4][1].bn2.weight)
    assert state["backbone.extra.0.0.bn.running_mean"].abs().sum() > 0  # new: it must find its own


def test_crowds_and_boxes_of_no_size_are_not_learnt(tmp_path):
    drawn.draw_coco(tmp_path, "val", 2)
    before = sum(len(image["boxes"]) for image in detection.coco(tmp_path, "val").images)
    change(tmp_path, lambda c: (c["annotations"][0].update(iscrowd=1),
                                c["annotations"][1].update(bbox=[1, 2, 0, 3])))  # fmt: skip
    assert sum(len(image["boxes"]) for image in detection.coco(tmp_path, "val").images) == before - 2
