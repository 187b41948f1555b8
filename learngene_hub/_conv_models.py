"""The network of our own VGGs, and the shape of a CNN of timm's (``ConvShape.of``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers.classifier import ClassifierHead
from timm.models import build_model_with_cfg
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vgg import VGG, ConvMlp
from torch import nn

from learngene_hub._conv import ConvShape
from learngene_hub.errors import ShapeError

_NARROW = 1 / 4096  # of timm's head, which is built and thrown away: one unit


class LearngeneVGG(VGG):
    """timm's VGG with batch norm and another head: ``head_hidden`` units that see ``head_kernel`` pixels a side."""

    def __init__(
        self,
        cfg: Sequence[int | str],
        num_classes: int = 1000,
        in_chans: int = 3,
        head_hidden: int = 0,
        head_kernel: int = 0,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            list(cfg), num_classes=0, in_chans=in_chans, mlp_ratio=_NARROW, norm_layer=nn.BatchNorm2d, device=device,
            dtype=dtype,
        )  # fmt: skip
        features = head_hidden or self.num_features
        self.pre_logits = nn.Identity()
        if head_hidden:
            self.pre_logits = ConvMlp(
                self.num_features, head_hidden, head_kernel, drop_rate=drop_rate, device=device, dtype=dtype
            )
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.head = ClassifierHead(features, num_classes, drop_rate=drop_rate, device=device, dtype=dtype)
        self.head_hidden_size = features
        self._initialize_weights()


def vgg(
    pretrained: bool = False,
    pretrained_cfg: dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    *,
    global_pool: str = "avg",
    stages: Sequence[Sequence[int]] = ((64,), (128,), (256,), (512, 512, 512, 512)),
    head_hidden: int = 1024,
    head_kernel: int = 2,
    num_classes: int | None = None,
    in_chans: int | None = None,
    drop_rate: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """What ``timm.create_model("learngene_vgg")`` calls; the defaults are heuristic learngene's individual at 32 px.

    ``num_classes`` and ``in_chans`` None: as ``pretrained_cfg`` says, else 1000 and 3.

    Raises:
        ShapeError: ``global_pool``, which timm writes beside a model that it saves, is another than the one there is.
    """
    if global_pool != "avg":
        raise ShapeError(f"pool {global_pool!r} asked of a learngene_vgg; 'avg' would work")
    plan = [channels for stage in stages for channels in (*stage, "M")]
    given: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    return build_model_with_cfg(
        LearngeneVGG,
        "learngene_vgg",
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        feature_cfg={"flatten_sequential": True, "out_indices": tuple(range(len(stages) + 1))},
        cfg=plan,
        head_hidden=head_hidden,
        head_kernel=head_kernel,
        drop_rate=drop_rate,
        device=device,
        dtype=dtype,
        **{name: value for name, value in given.items() if value is not None},  # timm fills in what is left out
    )


def read_shape(model: nn.Module) -> ConvShape:
    """See ``ConvShape.of``."""
    if isinstance(model, VGG):
        shape = _read_vgg(model)
    elif type(model) is ResNet:
        shape = _read_resnet(model)
    else:
        raise ShapeError(
            f"{type(model).__name__} given; a ConvShape describes timm's vgg*_bn and its ResNets of basic blocks"
        )
    built = shape.build(device="meta")
    for what, have, plain in (("layer", _layers(model), _layers(built)), ("tensor", _sizes(model), _sizes(built))):
        if have != plain:
            name = min(n for n in have.keys() | plain.keys() if have.get(n) != plain.get(n))
            raise ShapeError(f"{what} {name} is {have.get(name)}; in a plain {shape} it is {plain.get(name)}")
    return shape


def _read_vgg(model: VGG) -> ConvShape:
    if not model.use_norm:
        raise ShapeError("a VGG without batch norm given; vgg11_bn, vgg13_bn, vgg16_bn and vgg19_bn would work")
    stages: list[list[int]] = [[]]
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            stages[-1].append(layer.out_channels)
        elif isinstance(layer, nn.MaxPool2d):
            stages.append([])
    if stages.pop():
        raise ShapeError("a VGG whose last stage has no max-pool given; timm's vgg*_bn would work")
    head: Any = model.pre_logits
    hidden: Any = 0
    kernel: Any = 0
    if type(head) is ConvMlp:
        hidden, kernel = cast(nn.Conv2d, head.fc2).out_channels, head.input_kernel_size
    if model.head.global_pool.pool_type != "avg":
        raise ShapeError(f"a VGG with pool {model.head.global_pool.pool_type!r} given; 'avg' would work")
    return ConvShape(
        family="vgg",
        stages=tuple(tuple(stage) for stage in stages),
        head_hidden=hidden,
        head_kernel=kernel,
        image_size=_image_size(model),
        in_chans=model.features[0].in_channels,  # type: ignore[arg-type]
        classes=model.num_classes,
    )


def _read_resnet(model: ResNet) -> ConvShape:
    stages: list[tuple[int, ...]] = []
    layers: list[Any] = [model.layer1, model.layer2, model.layer3, model.layer4]
    for stage in layers:
        odd = sorted({type(block).__name__ for block in stage if type(block) is not BasicBlock})
        if odd:
            raise ShapeError(f"a ResNet with blocks of type {', '.join(odd)} given; resnet18 and resnet34 would work")
        stages.append(tuple(block.conv2.out_channels for block in stage))
    if not isinstance(model.conv1, nn.Conv2d):
        raise ShapeError("a ResNet with a deep stem given; resnet18 and resnet34 would work")
    if model.global_pool.pool_type != "avg":
        raise ShapeError(f"a ResNet with pool {model.global_pool.pool_type!r} given; 'avg' would work")
    return ConvShape(
        family="resnet",
        stages=tuple(stages),
        image_size=_image_size(model),
        in_chans=model.conv1.in_channels,
        classes=model.num_classes,
    )


def _image_size(model: Any) -> int:
    """The side of the model's images, by its ``pretrained_cfg``; 224 where that does not say.

    Raises:
        ShapeError: what it says is no size.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    said = cfg.get("input_size") if isinstance(cfg, Mapping) else None
    if said is None:
        return 224
    whole = isinstance(said, (list, tuple)) and all(type(number) is int and number > 0 for number in said)
    if not whole or len(said) != 3:
        raise ShapeError(f"input_size {said!r:.60} of a model's pretrained_cfg given; [3, 224, 224] would work")
    return said[-1]


def _layers(model: nn.Module) -> dict[str, str]:
    """Name -> type and geometry of every module inside that computes something when not training."""
    skipped = {"Identity", "Dropout", "DropPath"}
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if name and kind not in skipped:
            geometry = {f: getattr(module, f) for f in ("kernel_size", "stride", "padding", "dilation", "groups", "eps")
                        if isinstance(getattr(module, f, None), (int, float, tuple))}  # fmt: skip
            found[name] = f"{kind} {geometry}" if geometry else kind
    return found


def _sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
