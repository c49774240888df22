"""The README's Python, run as it is written."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision_support
from small import images, network
from test_export import other
from torch import nn

import mnops

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def block(title: str) -> str:
    """The first Python under a heading."""
    return re.search(rf"^#+ {title}\n.*?^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)[1]


def test_first():
    names = {"criterion": F.cross_entropy, "images": images(2, 64), "labels": torch.tensor([1, 2])}
    exec(block("mnops"), names)
    assert all(p.grad is not None for p in names["model"].parameters())


def test_what_it_computes():
    def vectors(channels):
        return [f(channels) for f in (torch.randn, torch.randn, torch.zeros, torch.ones)]

    x, w1, w2, eps = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1), 1e-5
    norms = vectors(8), vectors(4)
    (gamma1, beta1, *running), (gamma2, beta2, *_) = norms
    names = {
        "F": F, "mnops": mnops, "x": x, "w": w1, "w1": w1, "w2": w2, "eps": eps, "gamma": gamma1, "beta": beta1,
        "gamma1": gamma1, "beta1": beta1, "gamma2": gamma2, "beta2": beta2,
        "running_mean": running[0].clone(), "running_var": running[1].clone(),
    }  # fmt: skip
    exec(block("What it computes"), names)
    y = mnops.depthwise_conv_bn_act(x, w1, gamma1, beta1, *running)
    torch.testing.assert_close(y, names["y"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(running, [names["running_mean"], names["running_var"]])
    z2 = F.relu(F.batch_norm(F.conv2d(names["y"], w2), None, None, gamma2, beta2, True))
    torch.testing.assert_close(names["z2"], z2, rtol=1e-4, atol=1e-5)


def test_networks_you_already_have(capsys):
    names = {"torchvision": torchvision_support.load(), "torch": torch, "mnops": mnops, "images": images(2, 64)}
    exec(block("Networks you already have"), names)
    assert "52 of 52 convolutions fused" in capsys.readouterr().out
    assert {type(m) for m in names["model"].modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}


@pytest.fixture(params=[network, other], ids=["MobileNet", "fused"])
def names(request, tmp_path, monkeypatch):
    """What the recipes start from, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    found = {"torch": torch, "mnops": mnops, "model": request.param()}
    exec(recipe("deployed"), found)
    return found


def recipe(start: str) -> str:
    """The part of the recipes that starts so."""
    return next(part for part in re.split(r"\n(?=# )", block("Deploy")) if part.startswith(start))


def assert_as_model(names, logits):
    expected = names["model"](names["image"]).detach()
    torch.testing.assert_close(torch.as_tensor(logits), expected, rtol=1e-4, atol=1e-4)


def test_onnx(names):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    exec(recipe("# ONNX"), names)
    assert_as_model(names, names["logits"])


def test_executorch(names):
    pytest.importorskip("executorch")
    from executorch.runtime import Runtime

    exec(recipe("# ExecuTorch"), names)
    program = Runtime.get().load_program(Path("model.pte").read_bytes())
    assert_as_model(names, program.load_method("forward").execute([names["image"]])[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor(names):
    exec(recipe("# AOTInductor"), names)
    assert_as_model(names, names["logits"])
