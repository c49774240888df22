"""mnops.MobileNet as models of timm: `import mnops.timm`, then timm.create_model("mnops_mobilenetv1_100").

    python -m mnops timm train.py --model mnops_mobilenetv1_100 ...

runs a script of timm's (or yours) with them registered; so does `torchrun ... -m mnops timm train.py ...`.
timm has no entry points for other packages, hence the import; `import mnops` alone does not import timm.
"""

import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import mnops
from mnops import ops
from mnops.nn import chain
from mnops.ops import Pending

try:
    from timm.layers import create_classifier
    from timm.models import (
        PretrainedCfg,
        build_model_with_cfg,
        generate_default_cfgs,
        get_pretrained_cfg,
        register_model,
    )
    from timm.models._features import feature_take_indices
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"mnops.timm needs timm 1.0 or later: pip install timm ({error})") from error

ACTS = {"hard_swish": "hardswish", "swish": "silu"}  # timm's other names


class MobileNet(mnops.MobileNet):
    """`mnops.MobileNet` with timm's arguments and methods; state_dict, logits and features as timm's.

    Args:
        num_classes, in_chans, output_stride: as mnops.MobileNet's.
        width_mult: 0.5 for mobilenetv1_050.
        act_layer: relu, relu6 (timm's), hardswish, silu or none.
        bn_eps, bn_momentum: of every BatchNorm.
        drop_rate: share of features dropped before the classifier.
        drop_path_rate: taken and without effect, as in timm: there is no residual path to drop.
        global_pool: avg, or another pooling of timm's, or "" for none.
    """

    pool_type = "avg"
    grad_checkpointing = False

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        width_mult: float = 1.0,
        output_stride: int = 32,
        act_layer: str = "relu6",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes=0, width_mult=width_mult, in_chans=in_chans, act=ACTS.get(act_layer, act_layer),
            bn_eps=bn_eps, bn_momentum=bn_momentum, dropout=drop_rate, output_stride=output_stride,
        )  # fmt: skip
        ends = [self.end_points[stage[-1][-1]] for stage in self._names]
        self.feature_info = [
            dict(num_chs=end.channels, reduction=end.stride, module=f"blocks.{i}", stage=i + 1)
            for i, end in enumerate(ends)
        ]
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    @property
    def drop_rate(self) -> float:
        return self.dropout

    @drop_rate.setter
    def drop_rate(self, rate: float) -> None:
        self.dropout = rate

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for num_classes classes (0: none), over another pooling if one is named."""
        if global_pool is not None:
            self.pool_type = global_pool
        super().reset_classifier(0)
        like = dict(device=self.conv_stem.weight.device, dtype=self.conv_stem.weight.dtype)
        head = create_classifier(self.num_features, num_classes, self.pool_type, **like)
        self.num_classes = num_classes
        self.global_pool, self.classifier = (module.train(self.training) for module in head)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if num_classes:
            nn.init.normal_(self.classifier.weight, 0, 0.01)
            nn.init.zeros_(self.classifier.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Stages keep their inputs only, and run again in the backward."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r"^conv_stem|^bn1", blocks=r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)")

    @property
    def _checkpoints(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()

    def _stage(self, stage: nn.Module, x: Pending) -> Pending:
        if self._checkpoints:
            return torch.utils.checkpoint.checkpoint(chain, stage, x, use_reentrant=False)
        return chain(stage, x)

    def _body(self, x: Tensor) -> Pending:
        if not self._checkpoints:
            return super()._body(x)
        x = self._stem(x)
        for stage in self.blocks:
            x = self._stage(stage, x)
        return x

    def _pool(self, x: Tensor | Pending) -> Tensor:
        return super()._pool(x) if self.pool_type == "avg" else self.global_pool(ops.norm_act(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of stages, made real while the chain goes on.

        Args:
            x: (N, in_chans, H, W).
            indices: which stages; an int: the last so many; None: all.
            norm: without effect: every map is after its norm.
            stop_early: no stage after the last of them runs.
            output_fmt: NCHW.
            intermediates_only: the maps alone, without the last one of the network.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"MobileNet: output_fmt must be NCHW, got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        x, found = self._stem(x), []
        for i, stage in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._stage(stage, x)
            if i in wanted:
                found.append(ops.norm_act(x))
        return found if intermediates_only else (ops.norm_act(x), found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Takes out the stages that these outputs do not need, and the classifier; returns their numbers."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        shortened = last + 1 < len(self.blocks)
        self.blocks, self._names = self.blocks[: last + 1], self._names[: last + 1]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return wanted


# ---- registration ----

WIDTHS = {"125": 1.25, "100": 1.0, "075": 0.75, "050": 0.5, "025": 0.25}
TRAINED = "ra4_e3600_r224_in1k"


def _cfg(width: str) -> tuple[str, PretrainedCfg]:
    """timm's own description of its weights, which are loaded as they are; the narrow networks have none."""
    trained = width in ("125", "100")
    cfg = get_pretrained_cfg(f"mobilenetv1_{width if trained else '100'}.{TRAINED}", allow_unregistered=False)
    name = f"mnops_mobilenetv1_{width}"
    return (f"{name}.{TRAINED}", cfg) if trained else (f"{name}.untrained", replace(cfg, hf_hub_id=None))


default_cfgs = generate_default_cfgs(dict(_cfg(width) for width in WIDTHS))


def _register(name: str, width_mult: float) -> None:
    def create(pretrained: bool = False, **kwargs) -> MobileNet:
        features = dict(feature_cls="getter", out_indices=tuple(range(5)))
        return build_model_with_cfg(
            MobileNet, name, pretrained, feature_cfg=features, width_mult=width_mult, **kwargs
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"MobileNet of width {width_mult}; its arguments are mnops.timm.MobileNet's."
    register_model(create)


for _width, _width_mult in WIDTHS.items():
    _register(f"mnops_mobilenetv1_{_width}", _width_mult)


def main(argv: list[str]) -> int:
    """Runs the script argv[0] with the rest of the arguments, the models registered."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m mnops timm SCRIPT ...\n\nmodels: " + ", ".join(default_cfgs))
        return 0 if argv else 2
    script, *_ = sys.argv = argv
    if not Path(script).is_file():
        print(f"mnops timm: there is no script {script}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
    return 0
