"""What is recorded to run elsewhere is stock PyTorch, with the numbers of the fused network."""

import shutil

import pytest
import torch
from fused_models import NETWORKS, conv_norm_act
from fused_models import network as other_network
from small import images, network, randomise
from torch import nn

import mnops
from mnops import Pending, ops
from mnops.models import VARIANTS

FREE = torch.export.Dim.DYNAMIC


def called(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


def assert_stock(names: set[str]) -> None:
    assert names
    assert not [name for name in names if not name.startswith("aten.")]


# ---- torch.export ----


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "same", "bn_eps": 1e-3},
        {"stages": VARIANTS["conv"][:2], "act": "hardswish"},
        {"depth_multiplier": 2, "act": "silu"},
    ],
    ids=str,
)
def test_export_is_stock(options, strict):
    model, x = network(**options), images()
    program = torch.export.export(model, (x,), strict=strict)
    names = called(program)
    assert_stock(names)
    assert {"aten.conv2d.default", "aten.batch_norm.default"} <= names
    assert set(program.state_dict) == set(model.state_dict())
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["v2", "attributes", "shuffle"])
def test_fused_models_export_as_stock(name):
    model, x = NETWORKS[name]().eval(), images()
    model(x)  # LazyLinear
    expected = torch.export.export(randomise(model), (x,))
    program = torch.export.export(mnops.fuse(model), (x,))
    assert called(program) == called(expected)
    assert_stock({name for name in called(program) if "getitem" not in name})
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_batch_and_image_size_stay_free():
    model = network()
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: FREE, 2: FREE, 3: FREE},))
    x = images(3, 46)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_forced_backend_stays():
    model, x = network(), images()
    with mnops.backend("cpu"):
        program = torch.export.export(model, (x,))
    assert {"mnops.depthwise_conv2d.default", "mnops.pointwise_conv2d.default"} <= called(program)
    torch.testing.assert_close(program.module()(x), model(x))


def test_training_program():
    """Exported in training: logits and running statistics of the next step."""
    model, x = network().train().double(), images().double()
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x))
    buffers = dict(program.named_buffers())
    for name, expected in model.named_buffers():
        torch.testing.assert_close(buffers[name], expected)


class Direct(nn.Module):
    """The ops and functions themselves, and a block, where users call them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = mnops.nn.DepthwiseSeparable(4, 6, act="hardswish")
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)

    def forward(self, x):
        x, bn = self.block(x), self.bn
        norm = bn.weight, bn.bias, bn.running_mean, bn.running_var
        x = mnops.depthwise_conv_bn_act(x, self.conv.weight, *norm, training=False, act="silu")
        y, mean, var = ops.depthwise_conv2d(x, self.conv.weight, padding="same", measure=True)
        return ops.norm_act_pool(Pending(y, mean, var, bn.weight, bn.bias, bn.eps, "relu"))


def test_ops_are_exported_as_their_definition():
    model, x = randomise(Direct()).eval(), torch.randn(2, 4, 9, 9)
    program = torch.export.export(model, (x,))
    names = {name for name in called(program) if "getitem" not in name}
    assert_stock(names)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


# ---- recorded by others ----


def test_jit_trace():
    model, x = network(), images()
    traced = torch.jit.trace(model, x)
    assert "mnops::" not in str(traced.inlined_graph)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)


def test_fx():
    """torch.fx sees the stock modules by their names: feature extraction, quantization and surgery work."""
    model, x = network(), images()
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(model)
    modules = {n.target for n in traced.graph.nodes if n.op == "call_module"}
    assert modules == {
        name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    }
    torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)
    block = torch.fx.symbolic_trace(model.blocks[1])
    z = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(z), model.blocks[1](z), rtol=1e-5, atol=1e-5)


# ---- runtimes ----


def other():
    """A model given to mnops.fuse: stem and six layers, ReLU6."""
    layers = (conv_norm_act(8, 8, kernel, 1, 8 if kernel > 1 else 1) for kernel in (3, 1, 5, 1, 3, 1))
    model = other_network(*layers).eval()
    model(images())  # LazyLinear
    return mnops.fuse(randomise(model))


@pytest.mark.parametrize(
    ("make", "node"),
    [(lambda: network(act="relu"), "Relu"), (lambda: network(act="relu6"), "Clip"), (other, "Clip")],
    ids=["relu", "relu6", "fused"],
)
def test_onnx(make, node, tmp_path):
    """onnx's Conv (BatchNormalization folded into it by the exporter), activation, pool and Gemm."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
    runtime = pytest.importorskip("onnxruntime")
    model, x, file = make(), images(), tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, dynamic_shapes=({0: FREE},), verbose=False)
    import onnx

    graph = onnx.load(file).graph
    assert all(n.domain == "" for n in graph.node)
    types = [n.op_type for n in graph.node]
    assert set(types) <= {"Conv", "BatchNormalization", node, "ReduceMean", "GlobalAveragePool", "Reshape",
                          "Flatten", "Gemm", "Shape", "Concat", "Constant"}  # fmt: skip
    assert types.count("Conv") == types.count(node) == 7
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for x in (images(), images(3)):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [network, other])
def test_executorch(make):
    """XNNPACK takes the whole network."""
    pytest.importorskip("executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    model, x = make(), images()
    lowered = to_edge_transform_and_lower(
        torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()]
    )
    assert called(lowered.exported_program()) == {
        "executorch_call_delegate", "<built-in function getitem>"
    }  # fmt: skip
    program = Runtime.get().load_program(lowered.to_executorch().buffer)
    (found,) = program.load_method("forward").execute([x])
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor(tmp_path):
    """A whole fused network, its norms not folded; folded ones: tests/test_readme.py."""
    model, x = other(), images()
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=str(tmp_path / "model.pt2")
    )
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x).detach(), rtol=1e-5, atol=1e-5)
