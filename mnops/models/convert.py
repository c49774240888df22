"""MobileNet v1 weights of other implementations: TF-slim, Keras, Hugging Face transformers."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnops.models.layers import STAGES


class Source(NamedTuple):
    """How an implementation names what it stores. {i} counts the separable layers from 1."""

    stem: str
    depthwise: Callable[[int], str]
    pointwise: Callable[[int], str]
    weights: tuple[str, str, str]  # of stem, depthwise and pointwise: added to their names
    norm: str  # added to a convolution's name; the four vectors come after it
    vectors: tuple[str, str, str, str]  # scale, shift, mean and variance
    classifier: tuple[str, str]  # weight and bias
    tensorflow: bool  # its layouts: (kh, kw, in, out), (kh, kw, C, multiplier), (1, 1, in, out); or torch's
    prefix: str  # pattern of what may stand before a name
    ignored: str  # pattern of names that are no weights


VECTORS = ("weight", "bias", "running_mean", "running_var")  # nn.BatchNorm2d's, in Source's order
TENSORFLOW = ("gamma", "beta", "moving_mean", "moving_variance")
SOURCES = {
    "tf-slim": Source(
        "Conv2d_0", "Conv2d_{}_depthwise".format, "Conv2d_{}_pointwise".format,
        ("/weights", "/depthwise_weights", "/weights"), "/BatchNorm/", TENSORFLOW,
        ("Logits/Conv2d_1c_1x1/weights", "Logits/Conv2d_1c_1x1/biases"), True, "(MobilenetV1/)?",
        r"global_step|.*/(RMSProp(_1)?|Momentum|ExponentialMovingAverage)",
    ),
    "keras": Source(
        "conv1", "conv_dw_{}".format, "conv_pw_{}".format,
        ("/kernel", "/depthwise_kernel", "/kernel"), "_bn/", TENSORFLOW,
        ("conv_preds/kernel", "conv_preds/bias"), True, r"(model_weights/)?(\w+/(?=\w+/))?", "(?!)",
    ),
    "hf": Source(
        "conv_stem", lambda i: f"layer.{2 * i - 2}", lambda i: f"layer.{2 * i - 1}",
        (".convolution.weight",) * 3, ".normalization.", VECTORS,
        ("classifier.weight", "classifier.bias"), False, r"(mobilenet_v1\.)?", r".*\.num_batches_tracked",
    ),
}  # fmt: skip


def convert(
    state: Mapping[str, Any], source: str, stages: Sequence[Sequence[tuple]] = STAGES
) -> dict[str, Tensor]:
    """Weights of another implementation as the state_dict of `mnops.MobileNet`.

        model = mnops.MobileNet(num_classes=1001, padding="same", bn_eps=1e-3, act="relu6")
        model.load_state_dict(convert(state, "tf-slim"))

    All three were trained with SAME padding, epsilon 1e-3 and ReLU6, on images scaled to [-1, 1]; Keras pads
    (0, 1) at stride 2, which is SAME on the even sizes of an image whose sides 32 divides. TF-slim's and
    transformers' weights have 1001 classes, of which 0 is the background, Keras' 1000.

    Args:
        state: {name: array}, NumPy arrays or Tensors.
            "tf-slim": of a checkpoint: r = tf.train.load_checkpoint(path),
                {n: r.get_tensor(n) for n in r.get_variable_to_shape_map()}. The optimizer's slots and the
                averages of the weights are left out.
            "keras": of keras.applications.MobileNet: {w.path: w.numpy() for w in model.weights}, or the data
                sets of its .h5 file by their paths.
            "hf": the state_dict of transformers' MobileNetV1Model or MobileNetV1ForImageClassification.
        source: whose names and layouts they are.
        stages: the layer table, as MobileNet's; the names only depend on how many layers a stage has.

    Returns:
        New tensors in the dtype of `state`, any width and depth multiplier. Without the names of a classifier
        there is none, as in MobileNet(num_classes=0).

    Raises:
        ValueError: a source that is not known; a name that is missing or not known; a shape that does not fit
            the layer before. The first is told, with what was expected.
    """
    if source not in SOURCES:
        raise ValueError(f"convert: source must be one of {', '.join(SOURCES)}, got {source!r}")
    names = SOURCES[source]
    arrays = _Arrays(state, source)
    converted: dict[str, Tensor] = {}

    def take(name: str, rule: str, *shape: int | None) -> Tensor:
        return arrays.take(name, rule, shape)

    def norm(target: str, conv: str, channels: int) -> None:
        for ours, theirs in zip(VECTORS, names.vectors):
            converted[f"{target}.{ours}"] = take(conv + names.norm + theirs, "(channels,)", channels)
        converted[f"{target}.num_batches_tracked"] = torch.tensor(0)

    def dense(target: str, name: str, kernel: int, channels: int | None) -> int:
        if names.tensorflow:
            weight = take(name, "(kh, kw, in, out)", kernel, kernel, channels, None).permute(3, 2, 0, 1)
        else:
            weight = take(name, "(out, in, kh, kw)", None, channels, kernel, kernel)
        converted[target] = weight.contiguous()
        return weight.shape[0]

    def depthwise(target: str, name: str, channels: int) -> int:
        if names.tensorflow:  # output c * multiplier + m is input c under filter m
            weight = take(name, "(kh, kw, channels, multiplier)", 3, 3, channels, None)
            weight = weight.permute(2, 3, 0, 1).reshape(-1, 1, 3, 3)
        else:
            weight = take(name, "(channels, 1, kh, kw)", channels, 1, 3, 3)
        converted[target] = weight.contiguous()
        return weight.shape[0]

    channels = dense("conv_stem.weight", names.stem + names.weights[0], 3, None)
    norm("bn1", names.stem, channels)
    blocks = (f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage)))
    for i, block in enumerate(blocks, start=1):
        conv = names.depthwise(i)
        channels = depthwise(f"{block}.conv_dw.weight", conv + names.weights[1], channels)
        norm(f"{block}.bn1", conv, channels)
        conv = names.pointwise(i)
        channels = dense(f"{block}.conv_pw.weight", conv + names.weights[2], 1, channels)
        norm(f"{block}.bn2", conv, channels)
    weight, bias = names.classifier
    if arrays.has(weight) or arrays.has(bias):
        if names.tensorflow:
            matrix = take(weight, "(1, 1, in, classes)", 1, 1, channels, None)[0, 0].T.contiguous()
        else:
            matrix = take(weight, "(classes, in)", None, channels)
        converted["classifier.weight"] = matrix
        converted["classifier.bias"] = take(bias, "(classes,)", matrix.shape[0])
    arrays.refuse_the_rest()
    return converted


class _Arrays:
    """The arrays of a checkpoint by their bare names, taken one by one."""

    def __init__(self, state: Mapping[str, Any], source: str) -> None:
        self.source, names = source, SOURCES[source]
        self.given: dict[str, str] = {}  # bare name: the name in state
        self.state = state
        for name in state:
            if not re.fullmatch(names.ignored, name):
                bare = re.sub(f"^{names.prefix}", "", name.removesuffix(":0"))
                if source == "keras":  # Keras 3 calls both kinds of kernel so
                    bare = re.sub(r"^(conv_dw_\d+)/kernel$", r"\1/depthwise_kernel", bare)
                if bare in self.given:
                    raise ValueError(f"convert: {name} and {self.given[bare]} are the same {source} weight")
                self.given[bare] = name

    def has(self, name: str) -> bool:
        return name in self.given

    def take(self, name: str, rule: str, shape: Sequence[int | None]) -> Tensor:
        """The array, which must have this shape; None: any size."""
        if name not in self.given:
            raise ValueError(f"convert: {name} is missing from the {self.source} weights")
        given = self.given.pop(name)
        value = self.state[given]
        if isinstance(value, Tensor):
            value = value.detach().clone(memory_format=torch.contiguous_format)
        else:
            value = torch.from_numpy(np.array(value, order="C"))
        if value.dim() != len(shape) or any(s not in (None, v) for s, v in zip(shape, value.shape)):
            wanted = ", ".join("any" if s is None else str(s) for s in shape)
            got = tuple(value.shape)
            raise ValueError(f"convert: {given} must be {rule} = ({wanted}), got {got}")
        return value

    def refuse_the_rest(self) -> None:
        if self.given:
            left = sorted(self.given.values())
            raise ValueError(
                f"convert: {left[0]} is not a {self.source} weight of a MobileNet v1 of these stages"
                + (f", nor are {len(left) - 1} others" if len(left) > 1 else "")
            )
