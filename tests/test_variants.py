"""MobileNet's variants: the layer table drives the network; fused equals stock for each; end points."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision_support
from torch import nn

import mnops
from mnops.models import STAGES, VARIANTS, mobilenet


def make(**options):
    torch.manual_seed(0)
    return mnops.MobileNet(**{"num_classes": 10, "width_mult": 0.25, **options})


def stock_of(model):
    stock = copy.deepcopy(model)
    stock.fused = False
    return stock


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def results(net, x, forward):
    """Outputs of two training steps and one in eval, gradients, buffers."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        net.zero_grad()
        out = forward(net.train(), x)
        sum(v.square().sum() for v in out.values()).backward()
    with torch.no_grad():
        evaluated = forward(net.eval(), x)
    return [out, evaluated, x.grad, [p.grad for p in net.parameters()], dict(net.named_buffers())]


def logits(net, x):
    return {"logits": net(x)}


# ---- fused equals stock ----

KINDS = [
    dict(stages=VARIANTS["conv"]),  # its first layers have few channels and run fused
    dict(stages=VARIANTS["shallow"]),
    dict(depth_multiplier=2),
    dict(output_stride=8),
    dict(output_stride=16, padding="same", act="relu6"),
    dict(stages=VARIANTS["conv"], output_stride=8, padding="same"),
    dict(rho=0.714, padding="same"),
    dict(width_mult=0.3, divisor=1, min_depth=12),
    dict(stages=[[(24, 2, "conv")], [(48, 1), (40, 2)]], width_mult=0.5),
]


@pytest.mark.parametrize("options", KINDS, ids=lambda o: " ".join(o))
def test_equals_stock(device, options):
    model = make(**options).double().to(device)
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64, device=device)
    pair = [results(net, x, logits) for net in (model, stock_of(model))]
    torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-9)


# ---- the layer table ----


def test_conv_mobilenet_has_a_dense_layer_for_every_separable_one():
    dense, separable = convolutions(make(stages=VARIANTS["conv"])), convolutions(make())
    assert len(dense) == 14
    assert all((c.kernel_size, c.groups) == ((3, 3), 1) for c in dense)
    assert [c.out_channels for c in dense[1:]] == [c.out_channels for c in separable[2::2]]
    assert [c.stride for c in dense[1:]] == [c.stride for c in separable[1::2]]


def test_shallow_mobilenet_lacks_the_five_14x14x512_layers():
    whole, shallow = make(width_mult=1.0), make(width_mult=1.0, stages=VARIANTS["shallow"])
    assert [len(stage) for stage in shallow.blocks] == [1, 2, 2, 1, 2]
    lost = list(whole.blocks[3][1:])
    assert len(lost) == 5
    assert all(b.conv_pw.weight.shape == (512, 512, 1, 1) for b in lost)
    own = sum(p.numel() for b in lost for p in b.parameters())
    count = [sum(p.numel() for p in m.parameters()) for m in (whole, shallow)]
    assert count == [count[1] + own, count[1]]


def test_depth_multiplier_is_outputs_per_input():
    """Output c * m + j is input c under filter j, as in TensorFlow's (kh, kw, C, m) and in Keras."""
    model = make(depth_multiplier=2)
    conv = model.blocks[1][0].conv_dw
    assert (conv.in_channels, conv.out_channels, conv.groups) == (16, 32, 16)
    x = torch.randn(1, 16, 5, 5)
    for c, j in ((0, 1), (7, 0)):
        alone = F.conv2d(x[:, c : c + 1], conv.weight[2 * c + j, None], stride=2, padding=1)
        torch.testing.assert_close(conv(x)[:, 2 * c + j], alone[:, 0])


@pytest.mark.parametrize(
    ("stride", "strides", "dilations"),
    [  # timm's mobilenetv1_100 and TF-slim have these
        (8, [1, 2, 1, 2, 1, *[1] * 8], [1] * 6 + [2] * 6 + [4]),
        (16, [1, 2, 1, 2, 1, 2, *[1] * 7], [1] * 12 + [2]),
        (32, [1, 2, 1, 2, 1, 2, *[1] * 5, 2, 1], [1] * 13),
    ],
)
def test_output_stride(stride, strides, dilations):
    model = make(output_stride=stride).eval()
    depthwise = [c for c in convolutions(model) if c.groups > 1]
    assert [c.stride[0] for c in depthwise] == strides
    assert [c.dilation[0] for c in depthwise] == dilations
    assert model.forward_features(torch.zeros(1, 3, 96, 64)).shape[2:] == (96 // stride, 64 // stride)
    assert model.state_dict().keys() == make().state_dict().keys()


def test_dilated_features_are_the_strided_ones_in_between():
    """Atrous: every other value of the map at stride 16 is the one that stride 32 has."""
    model, dilated = make().eval(), make(output_stride=16).eval()
    x = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(dilated.forward_features(x)[..., ::2, ::2], model.forward_features(x))


@pytest.mark.parametrize("width", [1.0, 0.75, 0.5, 0.25])
def test_the_papers_widths_need_no_rounding(width):
    channels = [32, *(row[0] for stage in STAGES for row in stage)]
    for rule in (dict(divisor=8), dict(divisor=1)):
        assert [mobilenet.scaled(c, width, **rule) for c in channels] == [int(c * width) for c in channels]


def test_rounding():
    assert mobilenet.scaled(32, 0.3) == 16  # 9.6: 8 is less than 90 % of it
    assert mobilenet.scaled(32, 0.35) == 16  # 11.2
    assert mobilenet.scaled(32, 0.3, divisor=1) == 9  # int(9.6), TF-slim's and Keras'
    assert mobilenet.scaled(32, 0.01) == mobilenet.scaled(32, 0.01, divisor=1) == 8
    assert mobilenet.scaled(32, 0.01, divisor=1, min_depth=3) == 3
    assert mobilenet.scaled(32, 0.3, divisor=4) == 12  # 8 is less than 90 %
    assert mobilenet.scaled(32, 2.0) == 64
    assert convolutions(make(width_mult=0.1, divisor=4, min_depth=4))[0].out_channels == 4


def test_rho_resizes_the_image():
    model = make(rho=0.714).eval()
    x = torch.randn(1, 3, 224, 200)
    seen = []
    model.conv_stem.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    out = model(x)
    assert seen == [(1, 3, 160, 143)]
    model.rho = 1.0
    smaller = F.interpolate(x, (160, 143), mode="bilinear", antialias=True)
    torch.testing.assert_close(model(smaller), out)
    assert [round(rho * 224) for rho in (1, 0.857, 0.714, 0.571)] == [224, 192, 160, 128]


# ---- end points ----


def test_end_points_are_the_activations_of_every_convolution(device):
    """Against the network written out: convolution, BatchNorm and ReLU one after the other."""
    model = make(num_classes=7).double().to(device).eval()
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64, device=device)
    found = model.forward_end_points(x)
    z = F.relu(model.bn1(model.conv_stem(x)))
    expected = {"Conv2d_0": z}
    for i, block in enumerate((b for stage in model.blocks for b in stage), 1):
        z = expected[f"Conv2d_{i}_depthwise"] = F.relu(block.bn1(block.conv_dw(z)))
        z = expected[f"Conv2d_{i}_pointwise"] = F.relu(block.bn2(block.conv_pw(z)))
    expected["AvgPool_1a"] = z.mean((2, 3))
    expected["Logits"] = model.classifier(expected["AvgPool_1a"])
    expected["Predictions"] = expected["Logits"].softmax(1)
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected)
    shapes = {name: (point.channels, 64 // point.stride) for name, point in model.end_points.items()}
    assert shapes == {name: tuple(v.shape[1:3]) for name, v in found.items() if v.dim() == 4}
    torch.testing.assert_close(found["Logits"], model(x))


@pytest.mark.parametrize("options", [{}, dict(stages=VARIANTS["conv"]), dict(depth_multiplier=2)], ids=str)
def test_some_end_points_train_as_stocks(options):
    """Taps inside a stage, at its end, and none later than needed."""
    model = make(**options).double()
    names = [*model.end_points][1:12:4][::-1]
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)

    def forward(net, x):
        return net.forward_end_points(x, names)

    pair = [results(net, x, forward) for net in (model, stock_of(model))]
    torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-9)
    assert list(pair[0][0]) == [name for name in model.end_points if name in names]
    assert all(p.grad is None for p in model.blocks[4].parameters())


def test_features_only():
    whole, model = make().eval(), make(features_only=True).eval()
    names = [f"Conv2d_{i}_pointwise" for i in (1, 3, 5, 11, 13)]
    assert model.feature_names == names
    assert [model.end_points[name].stride for name in names] == [2, 4, 8, 16, 32]
    assert not any("classifier" in key for key in model.state_dict())
    model.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 96)
    found = model(x)
    torch.testing.assert_close(found, whole.forward_end_points(x, names))
    assert [found[n].shape[1] for n in names] == [model.end_points[n].channels for n in names]
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in found.values())


def test_features_only_has_no_layer_that_is_not_needed():
    model = make(features_only=True, end_points=["Conv2d_11_pointwise", "Conv2d_3_depthwise"])
    assert [len(stage) for stage in model.blocks] == [1, 2, 2, 6]
    assert list(model.end_points)[-1] == "Conv2d_11_pointwise"
    found = model(torch.randn(2, 3, 64, 64))
    assert list(found) == ["Conv2d_3_depthwise", "Conv2d_11_pointwise"]
    sum(v.sum() for v in found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert list(make(features_only=True, end_points={"Conv2d_0"}).blocks) == []


def test_features_compile_to_one_graph():
    model = make(features_only=True, stages=STAGES[:2]).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(output_stride=4), "output_stride must be 8, 16 or 32, got 4"),
        (dict(rho=0), "rho must be positive, got 0"),
        (dict(depth_multiplier=0), "depth_multiplier must be a positive int, got 0"),
        (dict(depth_multiplier=1.5), r"depth_multiplier must be a positive int, got 1\.5"),
        (dict(divisor=0), "divisor must be a positive int, got 0"),
        (dict(min_depth=-8), "min_depth must be a positive int, got -8"),
        (dict(stages=[[(64, 3)]]), r"a layer must be .* got \(64, 3, 'separable'\)"),
        (dict(stages=[[(64, 1, "full")]]), r"a layer must be .* got \(64, 1, 'full'\)"),
        (dict(stages=[[(64, 1)], []]), "a stage must have a layer, got an empty one"),
        (dict(end_points=["Conv2d_0"]), "end_points are of features_only=True"),
        (dict(features_only=True, end_points=[]), r"end points must be some of Conv2d_0, .* got \[\]"),
        (dict(features_only=True, end_points="Conv2d_0"), "end points must be some of .* got 'Conv2d_0'"),
        (dict(features_only=True, end_points=["Conv2d_14"]), r"end points must be .* got \['Conv2d_14'\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_end_points():
    model, x = make(num_classes=0), torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"end points must be some of .*AvgPool_1a, got \['Logits'\]"):
        model.forward_end_points(x, ["Logits"])


# ---- as a backbone of torchvision's ----


def test_features_are_a_backbone():
    torchvision = torchvision_support.load()
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator

    model = make().eval()
    backbone, x = model.features, torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone(x), model.forward_features(x))
    assert backbone.out_channels == model.out_channels == 256
    assert backbone.network.conv_stem.weight is model.conv_stem.weight
    assert sum(1 for _ in backbone.parameters()) == sum(1 for _ in model.parameters()) - 2
    assert isinstance(model.classifier, torch.nn.Linear)
    pooler = torchvision.ops.MultiScaleRoIAlign(["0"], 7, 2)
    detector = FasterRCNN(
        backbone, 3, min_size=64, max_size=64, rpn_anchor_generator=AnchorGenerator(((32,),)),
        box_roi_pool=pooler, rpn_post_nms_top_n_test=4,
    )  # fmt: skip
    with torch.no_grad():
        assert {"boxes", "labels", "scores"} == set(detector.eval()([x[0]])[0])
