"""mnops.timm: what timm's own mobilenetv1 does for whoever drives it."""

import pickle
import subprocess
import sys

import pytest
import torch
import torchvision_support
from small import images, randomise
from torch import nn

import mnops
from mnops.__main__ import main

torchvision_support.load()
timm = pytest.importorskip("timm")
import mnops.timm  # noqa: E402

NAME = "mnops_mobilenetv1_025"


def create(name=NAME, **options):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **options))


def pair(**options):
    """timm's network and mnops' with its weights."""
    theirs = create("mobilenetv1_100", **options).double()
    ours = create("mnops_mobilenetv1_100", **options).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


X = images(2, 64, dtype=torch.float64)


def test_registered():
    assert timm.list_models("mnops_*") == [
        f"mnops_mobilenetv1_{w}" for w in ("025", "050", "075", "100", "125")
    ]  # fmt: skip
    assert timm.list_models("mnops_*", pretrained=True) == [
        f"mnops_mobilenetv1_{w}.ra4_e3600_r224_in1k" for w in ("100", "125")
    ]  # fmt: skip
    assert timm.is_model("mnops_mobilenetv1_100")


def test_training_step_is_timms():
    ours, theirs = pair(num_classes=7)
    results = []
    for model in (ours, theirs):
        logits = model.train()(X)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters()), *model.buffers()])
    for mine, expected in zip(*results):
        mine, expected = mine.double(), expected.double()
        assert (mine - expected).norm() <= 1e-9 * expected.norm()
    torch.testing.assert_close(ours.eval()(X), theirs.eval()(X))


def test_width_125_is_timms():
    shapes = [
        [(k, v.shape) for k, v in timm.create_model(name).state_dict().items()]
        for name in ("mnops_mobilenetv1_125", "mobilenetv1_125")
    ]
    assert shapes[0] == shapes[1]


def test_config_is_timms():
    ours, theirs = (timm.create_model(f"{who}mobilenetv1_100").default_cfg for who in ("mnops_", ""))
    changed = {key for key in theirs if ours[key] != theirs[key]}
    assert changed == {"architecture"}
    assert ours["hf_hub_id"] == "timm/mobilenetv1_100.ra4_e3600_r224_in1k"
    assert "hf_hub_id" not in create().default_cfg
    config = timm.data.resolve_data_config({}, model=create())
    assert config["input_size"] == (3, 224, 224) and config["mean"] == (0.5, 0.5, 0.5)


def test_pretrained_weights_load(tmp_path):
    """Through timm's own loader, with another number of channels and classes."""
    theirs = create("mobilenetv1_100")
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")))
    ours = timm.create_model("mnops_mobilenetv1_100", **overlay)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    grey = timm.create_model("mnops_mobilenetv1_100", in_chans=1, num_classes=3, **overlay)
    torch.testing.assert_close(grey.conv_stem.weight, theirs.conv_stem.weight.sum(1, keepdim=True))
    assert grey.classifier.weight.shape == (3, 1024)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_pools_and_heads(pool):
    options = dict(num_classes=7 if pool else 0, global_pool=pool)
    ours, theirs = (model.eval() for model in pair(**options))
    features = ours.forward_features(X)
    torch.testing.assert_close(features, theirs.forward_features(X))
    for pre_logits in (True, False):
        torch.testing.assert_close(
            ours.forward_head(features, pre_logits), theirs.forward_head(features, pre_logits)
        )
    assert ours.head_hidden_size == theirs.head_hidden_size
    assert ours.num_features == theirs.num_features


def test_reset_classifier():
    model = create(num_classes=7, drop_rate=0.3).double()
    assert model.get_classifier() is model.classifier
    assert model.drop_rate == model.dropout == 0.3
    model.eval()
    for classes, pool, shape in ((3, None, (2, 3)), (5, "catavgmax", (2, 5)), (0, "avg", (2, 256))):
        model.reset_classifier(classes, pool)
        assert model(X).shape == shape
        assert model.num_classes == classes
        assert not model.classifier.training
    model.reset_classifier(0, "")
    assert model(X).shape == (2, 256, 2, 2)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3, 4), (2, 4), (1, 2), (-2,)], ids=str)
def test_features_only(indices):
    ours = create(features_only=True, out_indices=indices).double().eval()
    theirs = timm.create_model("mobilenetv1_100", features_only=True)
    whole = create(num_classes=0).double().eval()
    whole.load_state_dict(ours.model.state_dict(), strict=False)
    found = ours(X)
    expected = list(whole.forward_end_points(X, [stage[-1][-1] for stage in whole._names]).values())
    wanted = [i % 5 for i in indices]
    torch.testing.assert_close(found, [expected[i] for i in wanted])
    assert ours.feature_info.channels() == [f.shape[1] for f in found]
    assert ours.feature_info.reduction() == [theirs.feature_info[i]["reduction"] for i in wanted]
    assert len(ours.model.blocks) == max(wanted) + 1


def test_intermediates_are_timms():
    ours, theirs = (model.eval() for model in pair(num_classes=7))
    for options in ({}, {"indices": 2}, {"indices": [0, 3], "stop_early": True, "intermediates_only": True}):
        torch.testing.assert_close(
            ours.forward_intermediates(X, **options), theirs.forward_intermediates(X, **options)
        )
    assert [i["module"] for i in ours.feature_info] == [i["module"] for i in theirs.feature_info]


def test_output_stride():
    model = create(output_stride=8, num_classes=0, global_pool="")
    assert model(images(2, 64)).shape == (2, 256, 8, 8)
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 8, 8]


def test_gradient_checkpointing():
    """The gradients of the network without, and stage inputs kept in place of every tensor."""
    gradients, kept = [], []
    for enable in (False, True):
        model = create(num_classes=7).double().train()
        model.set_grad_checkpointing(enable)
        saved = {}

        def pack(t, saved=saved):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(X).square().sum()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(storage.nbytes() for storage in saved.values()))
    torch.testing.assert_close(*gradients)
    assert kept[1] < kept[0]


def test_parameter_groups():
    """Layer decay and weight decay of timm's optimizer factory."""
    from timm.optim import create_optimizer_v2

    model = create()
    optimizer = create_optimizer_v2(model, "rmsproptf", lr=0.1, weight_decay=1e-5, layer_decay=0.8)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) > 10


def test_ema_and_pickle():
    from timm.utils import ModelEmaV3

    model, x = create().eval(), images()
    ema = ModelEmaV3(model, decay=0.5)
    ema.update(model)
    torch.testing.assert_close(ema.module(x), model(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x), rtol=0, atol=0)


def test_it_runs_fused():
    model = create(num_classes=7)
    assert all(block.fused for stage in model.blocks for block in stage)
    torch.testing.assert_close(mnops.deploy(model)(images()), model.eval()(images()), rtol=1e-4, atol=1e-4)
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(model).bn1, nn.SyncBatchNorm)


def test_bad_arguments():
    with pytest.raises(ValueError, match="act must be one of .* got 'gelu'"):
        create(act_layer="gelu")
    with pytest.raises(ValueError, match="output_fmt must be NCHW, got 'NHWC'"):
        create().forward_intermediates(images(), output_fmt="NHWC")


# ---- the command ----


def test_command(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.write_text("import sys, timm; print(sys.argv[1:], timm.create_model(sys.argv[2]).num_features)")
    monkeypatch.setattr(sys, "argv", []), monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["timm", str(script), "--model", NAME]) == 0
    assert capsys.readouterr().out == f"['--model', '{NAME}'] 256\n"
    assert main(["timm", str(tmp_path / "none.py")]) == 2
    assert "there is no script" in capsys.readouterr().err


def test_without_timm():
    code = "import sys; sys.modules['timm'] = None; import mnops; import mnops.timm"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError: mnops.timm needs timm 1.0 or later: pip install timm" in result.stderr
