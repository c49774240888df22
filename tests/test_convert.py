"""Checkpoints with the names and layouts of TF-slim, Keras and transformers, against a network in NumPy."""

import numpy as np
import pytest
import torch

import mnops
from mnops.models import STAGES, VARIANTS, convert

WIDTH = 0.25  # 8, 16, 32, 64, 128, 256 channels
EPS = 1e-3


# ---- an independent MobileNet: NumPy, (N, H, W, C), TensorFlow's padding ----


def same(size, kernel, stride):
    """Outputs and the padding before and after, by the rule in the documentation of tf.nn."""
    out = (size + stride - 1) // stride
    total = max(kernel - stride if size % stride == 0 else kernel - size % stride, 0)
    return out, (total // 2, total - total // 2)


def windows(x, kernel, stride):
    """(N, Ho, Wo, C, kernel, kernel)"""
    (_, rows), (_, columns) = (same(size, kernel, stride) for size in x.shape[1:3])
    x = np.pad(x, ((0, 0), rows, columns, (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (1, 2))[:, ::stride, ::stride]


def norm_relu6(x, gamma, beta, mean, var):
    return np.clip((x - mean) / np.sqrt(var + EPS) * gamma + beta, 0, 6)


def logits(layers, x):
    """layers: stem (kh, kw, in, out) and its norm; blocks (C, m, 3, 3), (in, out), norms; classifier."""
    weight, norm = layers["stem"]
    x = norm_relu6(np.einsum("nhwcij,ijco->nhwo", windows(x, 3, 2), weight), *norm)
    for stride, depthwise, norm1, pointwise, norm2 in layers["blocks"]:
        x = np.einsum("nhwcij,cmij->nhwcm", windows(x, 3, stride), depthwise)
        x = norm_relu6(x.reshape(*x.shape[:3], -1), *norm1)
        x = norm_relu6(x @ pointwise, *norm2)
    x = x.mean((1, 2))
    if layers["classifier"] is None:
        return x
    weight, bias = layers["classifier"]
    return x @ weight + bias


def drawn(stages=STAGES, multiplier=1, classes=7):
    rng = np.random.default_rng(0)

    def norm(channels):
        gamma, var = rng.uniform(0.5, 1.5, (2, channels))
        beta, mean = rng.normal(size=(2, channels))
        return gamma, beta, mean, var

    channels = int(32 * WIDTH)
    layers = {"stem": (rng.normal(size=(3, 3, 3, channels)) / 4, norm(channels)), "blocks": []}
    for width, stride in (row[:2] for stage in stages for row in stage):
        out, between = int(width * WIDTH), channels * multiplier
        depthwise = rng.normal(size=(channels, multiplier, 3, 3)) / 3
        pointwise = rng.normal(size=(between, out)) / np.sqrt(between)
        layers["blocks"].append((stride, depthwise, norm(between), pointwise, norm(out)))
        channels = out
    classifier = rng.normal(size=(channels, classes)), rng.normal(size=classes)
    layers["classifier"] = classifier if classes else None
    return layers


# ---- the same numbers under each implementation's names ----


def tf_slim(layers):
    state = {"global_step": np.int64(7)}

    def add(name, weight, norm):
        state[f"MobilenetV1/{name}"] = weight
        state[f"MobilenetV1/{name}/RMSProp_1"] = weight * 0
        state[f"MobilenetV1/{name}/ExponentialMovingAverage"] = weight * 2
        for vector, value in zip(("gamma", "beta", "moving_mean", "moving_variance"), norm):
            state[f"MobilenetV1/{name.rsplit('/', 1)[0]}/BatchNorm/{vector}"] = value

    add("Conv2d_0/weights", *layers["stem"])
    for i, (_, depthwise, norm1, pointwise, norm2) in enumerate(layers["blocks"], 1):
        add(f"Conv2d_{i}_depthwise/depthwise_weights", depthwise.transpose(2, 3, 0, 1), norm1)
        add(f"Conv2d_{i}_pointwise/weights", pointwise[None, None], norm2)
    if layers["classifier"]:
        weight, bias = layers["classifier"]
        state["MobilenetV1/Logits/Conv2d_1c_1x1/weights"] = weight[None, None]
        state["MobilenetV1/Logits/Conv2d_1c_1x1/biases"] = bias
    return state


def keras(layers, kernel="depthwise_kernel", path="{0}/{1}"):
    state = {}

    def add(name, weight, norm, kernel="kernel"):
        state[path.format(name, kernel)] = weight
        for vector, value in zip(("gamma", "beta", "moving_mean", "moving_variance"), norm):
            state[path.format(f"{name}_bn", vector)] = value

    add("conv1", *layers["stem"])
    for i, (_, depthwise, norm1, pointwise, norm2) in enumerate(layers["blocks"], 1):
        add(f"conv_dw_{i}", depthwise.transpose(2, 3, 0, 1), norm1, kernel)
        add(f"conv_pw_{i}", pointwise[None, None], norm2)
    if layers["classifier"]:
        weight, bias = layers["classifier"]
        state[path.format("conv_preds", "kernel")] = weight[None, None]
        state[path.format("conv_preds", "bias")] = bias
    return state


def hf(layers, prefix="mobilenet_v1."):
    state = {}

    def add(name, weight, norm):
        state[f"{prefix}{name}.convolution.weight"] = torch.tensor(weight)
        for vector, value in zip(("weight", "bias", "running_mean", "running_var"), norm):
            state[f"{prefix}{name}.normalization.{vector}"] = torch.tensor(value)
        state[f"{prefix}{name}.normalization.num_batches_tracked"] = torch.tensor(3)

    weight, norm = layers["stem"]
    add("conv_stem", weight.transpose(3, 2, 0, 1), norm)
    for i, (_, depthwise, norm1, pointwise, norm2) in enumerate(layers["blocks"]):
        add(f"layer.{2 * i}", depthwise.reshape(-1, 1, 3, 3), norm1)
        add(f"layer.{2 * i + 1}", pointwise.T[:, :, None, None], norm2)
    if layers["classifier"]:
        weight, bias = layers["classifier"]
        state["classifier.weight"], state["classifier.bias"] = torch.tensor(weight.T), torch.tensor(bias)
    return state


WRITERS = {
    "tf-slim": (tf_slim, "tf-slim"),
    "keras": (keras, "keras"),
    "keras 3": (lambda layers: keras(layers, "kernel"), "keras"),
    "keras .h5": (lambda layers: keras(layers, path="{0}/{0}/{1}:0"), "keras"),
    "keras whole .h5": (lambda layers: keras(layers, "kernel", "model_weights/{0}/{0}/{1}"), "keras"),
    "hf": (hf, "hf"),
    "hf without head": (lambda layers: hf(layers, ""), "hf"),
}


def assert_same_logits(layers, state, source, size, **options):
    stages = options.get("stages", STAGES)
    classes = len(layers["classifier"][1]) if layers["classifier"] else 0
    model = mnops.MobileNet(classes, WIDTH, padding="same", bn_eps=EPS, act="relu6", **options)
    model = model.double().eval()
    model.load_state_dict(convert(state, source, stages))
    x = np.random.default_rng(1).normal(size=(2, *size, 3))
    with torch.no_grad():
        found = model(torch.from_numpy(x).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found.numpy(), logits(layers, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("writer", "source"), WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("size", [(32, 32), (33, 46)], ids=str)
def test_logits(writer, source, size):
    layers = drawn()
    assert_same_logits(layers, writer(layers), source, size)


@pytest.mark.parametrize(("writer", "source"), WRITERS.values(), ids=WRITERS.keys())
def test_without_classifier(writer, source):
    layers = drawn(classes=0)
    assert_same_logits(layers, writer(layers), source, (32, 32))


@pytest.mark.parametrize(("writer", "source"), WRITERS.values(), ids=WRITERS.keys())
def test_shallow(writer, source):
    stages = VARIANTS["shallow"]
    layers = drawn(stages)
    assert_same_logits(layers, writer(layers), source, (32, 32), stages=stages)


@pytest.mark.parametrize(("writer", "source"), [WRITERS["tf-slim"], WRITERS["keras"]], ids=["slim", "keras"])
def test_depth_multiplier(writer, source):
    layers = drawn(STAGES[:2], multiplier=2)
    assert_same_logits(
        layers, writer(layers), source, (32, 32), stages=STAGES[:2], depth_multiplier=2
    )


def test_tensors_are_new():
    state = hf(drawn())
    converted = convert(state, "hf")
    converted["bn1.weight"].zero_()
    assert state["mobilenet_v1.conv_stem.normalization.weight"].all()
    assert all(t.is_contiguous() for t in converted.values())


def changed(writer, **changes):
    state = writer(drawn())
    for name, value in changes.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("state", "source", "message"),
    [
        ({}, "timm", "source must be one of tf-slim, keras, hf, got 'timm'"),
        ({}, "keras", "conv1/kernel is missing from the keras weights"),
        (changed(keras, **{"conv_dw_3_bn/gamma": None}), "keras", "conv_dw_3_bn/gamma is missing"),
        (changed(keras, **{"conv_preds/bias": None}), "keras", "conv_preds/bias is missing"),
        (changed(hf, **{"classifier.weight": None}), "hf", "classifier.weight is missing"),
        (changed(tf_slim, **{"MobilenetV1/more": 0}), "tf-slim", "MobilenetV1/more is not a tf-slim weight"),
        (keras(drawn(STAGES + (((1024, 1),),))), "keras", r"conv_dw_14/depthwise_kernel is not .* 9 others"),
        (
            changed(tf_slim, **{"MobilenetV1/Conv2d_2_depthwise/depthwise_weights": np.ones((3, 3, 1, 16))}),
            "tf-slim",
            r"depthwise_weights must be \(kh, kw, channels, multiplier\) = \(3, 3, 16, any\), got \(3, 3, 1, 16\)",
        ),
        (
            changed(keras, **{"conv_pw_1/kernel": np.ones((1, 1, 9, 16))}),
            "keras",
            r"conv_pw_1/kernel must be \(kh, kw, in, out\) = \(1, 1, 8, any\), got \(1, 1, 9, 16\)",
        ),
        (
            changed(keras, **{"conv1_bn/beta": np.ones(9)}),
            "keras",
            r"conv1_bn/beta must be \(channels,\) = \(8\), got \(9,\)",
        ),
        (changed(keras, **{"conv1/conv1/kernel": np.ones(1)}), "keras", "are the same keras weight"),
        (keras(drawn()), "tf-slim", "Conv2d_0/weights is missing from the tf-slim weights"),
    ],
)
def test_what_does_not_fit_is_told(state, source, message):
    with pytest.raises(ValueError, match=f"convert: .*{message}"):
        convert(state, source)


# ---- the implementations themselves, where they are installed ----


def test_transformers():
    import torchvision_support

    transformers = pytest.importorskip("transformers")
    torchvision_support.load()
    config = transformers.MobileNetV1Config(depth_multiplier=WIDTH, num_labels=7, image_size=64)
    theirs = transformers.MobileNetV1ForImageClassification(config)
    theirs.load_state_dict({name: v.float() for name, v in hf(drawn()).items()})
    theirs.eval()
    model = mnops.MobileNet(7, WIDTH, padding="same", bn_eps=EPS, act="relu6").eval()
    model.load_state_dict(convert(theirs.state_dict(), "hf"))
    x = torch.randn(2, 3, 65, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


def test_keras(monkeypatch):
    """Keras pads (0, 1) at stride 2, which is SAME on even sizes only."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    theirs = keras.applications.MobileNet(
        input_shape=(64, 64, 3), alpha=WIDTH, weights=None, classes=7, classifier_activation=None
    )
    rng = np.random.default_rng(0)
    kinds = {"gamma": (0.5, 1.5), "moving_variance": (0.5, 1.5), "kernel": (-0.5, 0.5)}
    theirs.set_weights(
        [rng.uniform(*kinds.get(w.path.rsplit("/")[-1], (-1, 1)), size=w.shape) for w in theirs.weights]
    )
    model = mnops.MobileNet(7, WIDTH, padding="same", bn_eps=EPS, act="relu6").eval()
    model.load_state_dict(convert({w.path: w.numpy() for w in theirs.weights}, "keras"))
    x = torch.randn(2, 64, 64, 3)
    with torch.no_grad():
        expected = torch.as_tensor(theirs(x, training=False).numpy())
        torch.testing.assert_close(model(x.permute(0, 3, 1, 2)), expected, rtol=1e-4, atol=1e-4)
