"""The parts of mnops.train one by one: optimiser, schedule, data, checkpoints, logs, meter, one step."""

import copy
import csv
import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import mnops
from mnops.train import TrainError, checkpoint, cli, data, log, loop, optim, schedule
from mnops.train.distributed import World

CPU = torch.device("cpu")


def tf_rmsprop(w, grads, lrs, decay, momentum, eps, weight_decay):
    """tf.train.RMSPropOptimizer written out in NumPy, fp64: the squared average starts at 1, epsilon is in
    the root, the learning rate inside the momentum; `weight_decay` is the gradient of the L2 term."""
    square, momentum_buffer = np.ones_like(w), np.zeros_like(w)
    for g, lr in zip(grads, lrs):
        g = g + weight_decay * w
        square = square + (1 - decay) * (g * g - square)
        momentum_buffer = momentum * momentum_buffer + lr * g / np.sqrt(square + eps)
        w = w - momentum_buffer
    return w


@given(decay=st.floats(0, 0.99), momentum=st.floats(0, 0.99), eps=st.floats(1e-8, 10),
       weight_decay=st.floats(0, 0.1), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_rmsprop_is_tensorflows(decay, momentum, eps, weight_decay, seed):
    rng = np.random.default_rng(seed)
    shapes, lrs = [(4, 3), (5,)], 0.1 * rng.random(8)
    weights = [rng.standard_normal(s) for s in shapes]
    params = [nn.Parameter(torch.tensor(w)) for w in weights]
    rule = dict(decay=decay, momentum=momentum, eps=eps, weight_decay=weight_decay)
    optimizer = optim.RMSpropTF(params, lr=1.0, **rule)
    grads = [[rng.standard_normal(s) for _ in lrs] for s in shapes]
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        for p, own in zip(params, grads):
            p.grad = torch.tensor(own[step])
        optimizer.step()
    for p, w, own in zip(params, weights, grads):
        expected = tf_rmsprop(w, own, lrs, **rule)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_rmsprop_skips_what_has_no_gradient_and_runs_closures():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = optim.RMSpropTF([used, unused])

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert (used < 1).all()
    assert (unused == 1).all()
    assert unused not in optimizer.state


@pytest.mark.parametrize("wrong", [dict(lr=-1), dict(decay=1), dict(momentum=1), dict(eps=0),
                                   dict(weight_decay=-1)])
def test_rmsprop_refuses(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is out of range"):
        optim.RMSpropTF([nn.Parameter(torch.ones(1))], **wrong)


def test_only_dense_weights_decay():
    model = mnops.MobileNet(num_classes=10, width_mult=0.25)
    decaying, kept = optim.param_groups(model, 1e-3)
    names = {p: name for name, p in model.named_parameters()}
    assert decaying["weight_decay"] == 1e-3
    assert kept["weight_decay"] == 0
    dense = ("conv_stem.weight", "classifier.weight", "conv_pw.weight")
    assert {names[p] for p in decaying["params"]} == {n for n in names.values() if n.endswith(dense)}
    assert len(decaying["params"]) + len(kept["params"]) == len(names)


def test_schedules():
    def at(step, kind, **more):
        return schedule.lr_factor(step, schedule=kind, total=100, **more)

    cosine = [at(t, "cosine", warmup=10) for t in range(100)]
    assert cosine[0] == 1 / 11
    assert np.all(np.diff(cosine[:11]) > 0)
    assert cosine[10] == 1
    assert cosine[55] == pytest.approx(0.5)
    assert np.all(np.diff(cosine[10:]) < 0)
    assert 0 < cosine[99] < 1e-3
    stairs = [at(t, "exponential", decay_steps=25, decay_rate=0.5) for t in range(100)]
    assert stairs == [1.0] * 25 + [0.5] * 25 + [0.25] * 25 + [0.125] * 25
    assert at(99, "constant") == 1
    with pytest.raises(TrainError, match="cosine, exponential, constant, got 'linear'"):
        at(0, "linear")


def test_digits_split_is_stratified_fixed_and_disjoint():
    first = data.digits(data.Transform(8), data.Transform(8, crop=1.0), seed=0)
    again = data.digits(data.Transform(8), data.Transform(8, crop=1.0), seed=7)
    assert (len(first.train), len(first.test), first.classes) == (1438, 359, [str(d) for d in range(10)])
    held_out = [first.test[0, i][0].tobytes() for i in range(len(first.test))]
    assert held_out == [again.test[0, i][0].tobytes() for i in range(len(again.test))]
    assert all(35 <= n <= 37 for n in np.bincount(first.test.labels))
    raw = [image.tobytes() for image in [*first.train.images, *first.test.images]]
    assert len(set(raw)) == 1797


def test_random_choices_depend_on_seed_epoch_and_index_alone():
    def pixels(seed, epoch, index):
        digits = data.digits(data.Transform(16, scale=(0.5, 1)), data.Transform(16), seed)
        return digits.train[epoch, index][0].tobytes()

    assert pixels(1, 2, 3) == pixels(1, 2, 3)
    assert len({pixels(*key) for key in [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0)]}) == 4


@given(width=st.integers(1, 90), height=st.integers(1, 90), low=st.floats(0.01, 1), high=st.floats(0.01, 1.5),
       pad=st.sampled_from([0, 0.125]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_transform_gives_its_size_whatever_the_image(width, height, low, high, pad, seed):
    transform = data.Transform(12, scale=(min(low, high), max(low, high)), pad=pad)
    image = Image.new("RGB", (width, height), (200, 100, 50))
    for rng in (None, np.random.default_rng(seed)):
        out = transform(image, rng)
        assert out.shape == (12, 12, 3)
        assert out.dtype == np.uint8
        if rng is None or not pad:
            assert (out == (200, 100, 50)).all()  # the crop never leaves the image


def test_transform_crops_centrally_and_mirrors():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3)).copy()
    image = Image.fromarray(ramp)
    assert data.Transform(32, crop=0.5)(image)[0, :, 0].tolist() == list(range(16, 48))
    mirrored = data.Transform(64, scale=(1, 1), ratio=(1, 1), flip=1)(image, np.random.default_rng(0))
    assert mirrored[0, :, 0].tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_decode_makes_rgb_of_every_mode(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode in ("CMYK", "LA") else "image.png")
    Image.new(mode, (5, 4)).save(path)
    image = data.decode(path)
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_sampler_covers_an_epoch_and_joins_up_after_a_stop():
    whole = list(data.StepSampler(20, 6, 0, 0, 9, 0, 1))
    assert len(whole) == 9
    for epoch in range(3):  # 3 steps an epoch; two images are left out of each
        steps = whole[3 * epoch:3 * epoch + 3]
        assert {e for keys in steps for e, _ in keys} == {epoch}
        assert len({i for keys in steps for _, i in keys}) == 18
    assert list(data.StepSampler(20, 6, 0, 4, 9, 0, 1)) == whole[4:]
    ranks = [list(data.StepSampler(20, 6, 0, 0, 9, rank, 3)) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*ranks)] == whole
    assert list(data.StepSampler(20, 6, 1, 0, 9, 0, 1)) != whole


def test_every_test_image_once_over_the_ranks():
    keys = [key for rank in range(3) for batch in data.test_keys(10, 2, rank, 3) for key in batch]
    assert sorted(keys) == [(0, i) for i in range(10)]


def test_batches_are_channels_last():
    digits = data.digits(data.Transform(16), data.Transform(16), 0)
    images, labels = next(data.batches(digits.test, [[(0, i) for i in range(5)]], 0, CPU))
    assert (images.shape, images.dtype, labels.dtype) == ((5, 3, 16, 16), torch.uint8, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert loop.to_input(images, True).is_contiguous(memory_format=torch.channels_last)
    assert loop.to_input(images, False).is_contiguous()
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    assert loop.to_input(ends, True).flatten().tolist() == [-1, 1]


def test_save_replaces_whole_files_only(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"w": torch.ones(3)}, "step": 1})

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("a kill while it writes")

    with pytest.raises(RuntimeError, match="while it writes"):
        checkpoint.save(path, {"model": {"w": torch.zeros(1000)}, "step": Unpicklable()})
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("a kill before the rename")))
        with pytest.raises(OSError, match="before the rename"):
            checkpoint.save(path, {"model": {"w": torch.zeros(3)}, "step": 2})
    assert os.listdir(tmp_path) == ["last.pt"]
    state = checkpoint.load(path)
    assert state["step"] == 1
    assert (state["model"]["w"] == 1).all()


def test_load_refuses_what_is_no_checkpoint(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(TrainError, match=r"x\.pt: there is no such file"):
        checkpoint.load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(TrainError, match=r"is not a readable checkpoint \(it must hold tensors and plain"):
        checkpoint.load(path)
    torch.save({"model": {"w": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(TrainError, match="is not a readable checkpoint"):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(TrainError, match="must hold a state_dict"):
        checkpoint.load(path)
    torch.save({"model": {}, "code": os.system}, path)  # a pickle that would import os
    with pytest.raises(TrainError, match="is not a readable checkpoint"):
        checkpoint.load(path)


def test_load_weights_checks_everything_first(tmp_path):
    model, path = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)), tmp_path / "x.pt"
    before = copy.deepcopy(model.state_dict())
    good = {k: v + 1 for k, v in before.items()}
    for weights, message in [
            ({**good, "1.weight": torch.ones(4, 2)}, r"1\.weight must be \(3, 2\) .* got \(4, 2\)"),
            ({k: v for k, v in good.items() if k != "1.bias"}, r"1\.bias is missing"),
            ({**good, "2.bias": torch.ones(1)}, r"2\.bias is not a tensor of this model")]:
        with pytest.raises(TrainError, match=message):
            checkpoint.load_weights(model, weights, path)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    checkpoint.load_weights(model, good, path)
    assert all(torch.equal(v, good[k]) for k, v in model.state_dict().items())


def test_csv_drops_rows_that_come_again(tmp_path):
    path = tmp_path / "steps.csv"
    first = log.Csv(path, ["step", "loss"], 0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": step / 3, "not a field": 0})
    first.close()
    path.write_text(path.read_text() + "4,0.12")  # killed in the middle of a row is a row past the checkpoint
    second = log.Csv(path, ["step", "loss"], 2)
    second.write({"step": 3, "loss": 7.0})
    second.close()
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(int(r["step"]), float(r["loss"])) for r in rows] == [(1, 1 / 3), (2, 2 / 3), (3, 7.0)]


def test_meter_is_exact_over_uneven_batches():
    meter, rng = loop.Meter(CPU), torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=rng), torch.randint(7, (50,), generator=rng)
    for part in (slice(0, 31), slice(31, 50)):
        meter.update(nn.functional.cross_entropy(logits[part], labels[part]), logits[part], labels[part])
    got = meter.read()
    order = logits.argsort(1, descending=True)
    assert got["images"] == 50
    assert got["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert got["accuracy"] == (order[:, 0] == labels).sum().item() / 50
    assert got["top5"] == (order[:, :5] == labels[:, None]).any(1).sum().item() / 50
    meter.update(torch.tensor(1.0), logits[:1, :3], labels[:1])  # started again; fewer than five classes
    assert meter.read()["images"] == 1


def test_mixup_mixes_images_and_labels_by_one_share():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    labels = torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    x, y = loop.mixup(images, labels, 3, 0.4)
    share = 1 - x[0, 0, 0, 0].item() / 3
    assert 0 < share < 1
    torch.testing.assert_close(x, share * images + (1 - share) * images.flip(0))
    hot = nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(y, share * hot + (1 - share) * hot.flip(0))


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_accumulation_gives_the_step_of_the_whole_batch(amp):
    images = torch.randint(0, 256, (8, 3, 2, 2), dtype=torch.uint8)
    labels = torch.randint(0, 4, (8,))
    start = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    results, losses = [], []
    for accumulate in (1, 4):
        model = copy.deepcopy(start)
        s = Namespace(accumulate=accumulate, channels_last=True, mixup=0, smoothing=0.1, amp=amp)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=amp == "fp16")
        loop.train_step(model, optimizer, scaler, images, labels, s, 4,
                        lambda loss, *_: losses.append(loss.item()))
        results.append(model[1].weight)
    tolerance = dict(rtol=1e-5, atol=1e-7) if amp == "off" else dict(rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(*results, **tolerance)
    assert losses[0] == pytest.approx(np.mean(losses[1:]), rel=1e-5 if amp == "off" else 1e-2)
    assert not torch.equal(results[0], start[1].weight)


def test_the_average_of_weights_is_tensorflows():
    """decay = min(limit, (1 + n) / (10 + n)), n the steps before; it starts as the weights."""
    nets = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(4)]
    digits = data.digits(data.Transform(8), data.Transform(8), 0)
    s = Namespace(batch_size=64, epochs=1, optimizer="sgd", lr=0.1, momentum=0, weight_decay=0, amp="off",
                  ema=0.15)
    trainer = loop.Trainer(nets[0], digits, s, World(0, 1, CPU), None)
    expected = None
    for n, net in enumerate(nets):
        trainer.step = n
        trainer.ema.update_parameters(net)
        own, decay = net[0].weight.detach(), min(0.15, (1 + n) / (10 + n))
        expected = own if expected is None else decay * expected + (1 - decay) * own
    torch.testing.assert_close(trainer.judged[0].weight.detach(), expected)


def test_tf_slims_start_is_a_truncated_normal():
    """Deviation 0.09, cut at two deviations, as its truncated_normal_initializer: 0.88 of it is left."""
    s = Namespace(**{**cli.DEFAULTS, **cli.PRESETS["tf-slim"], "variant": "shallow"})
    model = cli.build_model(s, 10, CPU)
    assert [len(stage) for stage in model.blocks] == [1, 2, 2, 1, 2]
    for module in (model.blocks[4][1].conv_pw, model.blocks[4][1].conv_dw, model.classifier):
        weight = module.weight.detach()
        assert weight.abs().max() <= 0.18
        assert weight.std().item() == pytest.approx(0.88 * 0.09, rel=0.03)
    assert (model.classifier.bias == 0).all()
    he = cli.build_model(Namespace(**cli.DEFAULTS), 10, CPU)
    assert he.blocks[4][1].conv_pw.weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.01)


def test_tf_slims_recipe():
    """Every number of its mobilenet_v1 and train_image_classifier."""
    s = Namespace(**{**cli.DEFAULTS, **cli.PRESETS["tf-slim"]})
    model = cli.build_model(s, 10, CPU)
    optimizer = optim.build_optimizer(s, model)
    assert isinstance(optimizer, optim.RMSpropTF)
    names = "lr", "decay", "momentum", "eps", "weight_decay"
    rules = [tuple(group[name] for name in names) for group in optimizer.param_groups]
    assert rules == [(0.045, 0.9, 0.9, 1.0, 4e-5), (0.045, 0.9, 0.9, 1.0, 0.0)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, round(1 - m.momentum, 6)) for m in norms} == {(1e-3, 0.9997)}
    assert (model.act, model.same, model.dropout) == ("relu6", True, 0.001)
    assert (s.schedule, s.decay_rate, s.decay_epochs) == ("exponential", 0.94, 2.5)
    assert s.smoothing == s.mixup == 0
    assert s.crop_scale[0] > 0.05  # narrower than Inception's, as the paper asks
