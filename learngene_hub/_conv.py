"""ConvShape: the numbers that fix a VGG with batch norm or a ResNet of basic blocks, and the timm model that has them.

Two families, in timm's layout and with timm's names:

    vgg     stages of 3x3 convolutions with bias, each followed by BatchNorm and ReLU, a max-pool of 2 after each stage.
            The head is timm's: a ``head_kernel`` x ``head_kernel`` convolution to ``head_hidden`` units, a 1x1 one of
            as many, average pooling, a linear classifier. At features of ``head_kernel`` pixels a side the two are
            fully connected layers: ``vgg16_bn`` has 4096 units and kernel 7; the published individual of heuristic
            learngene, at 32 px, has 1024 units and kernel 2, its "FC 2048-1024-1024-C". Smaller features are averaged
            up to the kernel's size, as timm does. ``head_hidden`` 0: average pooling and the classifier alone.
    resnet  timm's ResNet: a 7x7 stem of 64 channels and a max-pool, four stages of basic blocks (two 3x3 convolutions
            and a shortcut), average pooling, a linear classifier. ``resnet18`` and ``resnet34`` are two of these.

VGGs of other sizes than timm's own are built by ``learngene_vgg`` (``architectures.py``), ResNets by timm's
``resnet18``, of which the layers and channels are arguments. Importing this file imports neither timm nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from learngene_hub import _building
from learngene_hub._check import require_int
from learngene_hub.errors import ShapeError
from learngene_hub.shape import IMAGENET, Preprocessing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FAMILIES = ("vgg", "resnet")
STEM = 64  # channels of a ResNet's stem, which timm fixes
MAX_CONVS = 1000  # of one network; a stranger's file may ask for any number
TIMM_VGGS: Mapping[tuple[int, ...], str] = {  # convolutions per stage of 64, 128, 256, 512, 512 channels
    (1, 1, 2, 2, 2): "vgg11_bn",
    (2, 2, 2, 2, 2): "vgg13_bn",
    (2, 2, 3, 3, 3): "vgg16_bn",
    (2, 2, 4, 4, 4): "vgg19_bn",
}
_VGG_WIDTHS = (64, 128, 256, 512, 512)


@dataclass(frozen=True, kw_only=True)
class Conv:
    """One convolution and the BatchNorm behind it, by their names in timm's model."""

    name: str
    norm: str
    inputs: int  # channels
    outputs: int  # channels
    kernel: int  # side
    stride: int
    bias: bool
    side: int  # of what comes out, pixels
    stage: int  # from 0; -1: a ResNet's stem
    block: int  # within the stage, from 0: the convolution of a VGG, the residual block of a ResNet
    shortcut: bool = False  # a ResNet's downsampling shortcut, which no unit counts as a convolution of its own

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Size of each parameter and running statistic, by its name in the model; not ``num_batches_tracked``."""
        weight = {f"{self.name}.weight": (self.outputs, self.inputs, self.kernel, self.kernel)}
        bias = {f"{self.name}.bias": (self.outputs,)} if self.bias else {}
        kinds = ("weight", "bias", "running_mean", "running_var")
        return weight | bias | {f"{self.norm}.{kind}": (self.outputs,) for kind in kinds}

    def params(self) -> int:
        """Parameters of the convolution and its BatchNorm; running statistics are none."""
        return self.outputs * (self.inputs * self.kernel**2 + int(self.bias) + 2)

    def flops(self) -> int:
        """Two per multiply-add, of one image; BatchNorm not counted."""
        return 2 * self.side**2 * self.outputs * self.inputs * self.kernel**2


@dataclass(frozen=True, kw_only=True)
class ConvShape:
    """The numbers of a VGG with batch norm or of a ResNet of basic blocks.

    Raises:
        ShapeError: no such network exists; the message says what would.
    """

    kind: ClassVar[str] = "conv"

    family: str  # one of FAMILIES
    # Channels, stage by stage, of each convolution (vgg) or residual block (resnet; equal within a stage).
    stages: tuple[tuple[int, ...], ...]
    head_hidden: int = 0  # units of the two hidden layers of a VGG's head; 0: none
    head_kernel: int = 0  # side, pixels, of the features that the first of them sees at once; 0: no hidden layers
    image_size: int = 224  # side, pixels
    in_chans: int = 3
    classes: int = 1000  # outputs of the head; 0: no classifier

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ShapeError(f"family {self.family!r:.40} asked; there are {', '.join(FAMILIES)}")
        object.__setattr__(self, "stages", _stages(self.stages))
        for name in ("image_size", "in_chans"):
            require_int(name, getattr(self, name), at_least=1)
        for name in ("head_hidden", "head_kernel", "classes"):
            require_int(name, getattr(self, name), at_least=0)
        if bool(self.head_hidden) != bool(self.head_kernel):
            raise ShapeError(
                f"head_hidden {self.head_hidden} and head_kernel {self.head_kernel} asked; both are above 0, or both 0"
            )
        self._check_vgg() if self.family == "vgg" else self._check_resnet()

    def _check_vgg(self) -> None:
        least = 2 ** len(self.stages)
        if self.image_size < least:
            raise ShapeError(
                f"image size {self.image_size} asked; {len(self.stages)} stages halve it as often: {least} would work"
            )

    def _check_resnet(self) -> None:
        if len(self.stages) != 4:
            raise ShapeError(f"a ResNet of {len(self.stages)} stages asked; timm's have 4")
        for place, stage in enumerate(self.stages):
            if len(set(stage)) > 1:
                raise ShapeError(f"stage {place} of {list(stage)} channels asked; a ResNet's blocks of a stage agree")
        if self.head_hidden:
            raise ShapeError(f"head_hidden {self.head_hidden} asked of a ResNet; 0 would work")

    def __str__(self) -> str:
        return f"{self.family} {'-'.join(','.join(map(str, stage)) for stage in self.stages)}"

    @property
    def depth(self) -> int:
        """Convolutions of a VGG, residual blocks of a ResNet."""
        return sum(len(stage) for stage in self.stages)

    @property
    def width(self) -> int:
        """Channels of the last stage's output."""
        return self.stages[-1][-1]

    @property
    def side(self) -> int:
        """Pixels a side of the last features."""
        if self.family == "vgg":
            return self.image_size >> len(self.stages)
        return _halved(self.image_size, 5)

    @property
    def architecture(self) -> str:
        """timm's name of the architecture, or that of ours."""
        if self.family == "resnet":
            return "resnet18"
        return self._timm_vgg() or "learngene_vgg"

    def _timm_vgg(self) -> str | None:
        """The name under which timm itself has this VGG."""
        published = tuple((width,) * len(stage) for width, stage in zip(_VGG_WIDTHS, self.stages, strict=False))
        if (self.head_hidden, self.head_kernel) != (4096, 7) or published != self.stages:
            return None
        return TIMM_VGGS.get(tuple(len(stage) for stage in self.stages))

    def convs(self) -> tuple[Conv, ...]:
        """Every convolution with a BatchNorm, in the order of the state dict."""
        return _vgg_convs(self) if self.family == "vgg" else _resnet_convs(self)

    def params(self) -> int:
        """Number of parameters, exactly; running statistics are none."""
        return sum(conv.params() for conv in self.convs()) + self._head_params()

    def _head_params(self) -> int:
        hidden, features = self.head_hidden, self.head_hidden or self.width
        before = hidden * (self.width * self.head_kernel**2 + 1) + hidden * (hidden + 1) if hidden else 0
        return before + self.classes * (features + 1)

    def flops(self) -> int:
        """Floating-point operations of one image's forward, two per multiply-add, of convolutions and linear layers.

        As ``torch.utils.flop_counter`` counts, whose number this is: no biases, norms, ReLU, pooling or sums.
        """
        hidden, features = self.head_hidden, self.head_hidden or self.width
        places = max(self.side - self.head_kernel + 1, 1) ** 2
        before = 2 * places * hidden * (self.width * self.head_kernel**2 + hidden) if hidden else 0
        return sum(conv.flops() for conv in self.convs()) + before + 2 * features * self.classes

    def bytes(self, dtype: torch.dtype | int = 4) -> int:
        """Bytes of the parameters in ``dtype``, or at that many bytes per number (4: float32)."""
        return self.params() * (dtype if isinstance(dtype, int) else dtype.itemsize)

    def require_budget(self, max_params: int, least: int = 1) -> None:
        """Nothing, where the model has at most ``max_params`` parameters.

        Raises:
            BudgetError: it has more; no depth is named.
        """
        del least
        empty = replace(self, head_hidden=0, head_kernel=0).params()
        hint = f"without hidden layers in its head it has {empty:,}; " if self.head_hidden else ""
        _building.require_budget(self, max_params, lambda: f"{hint}fewer or narrower stages would fit")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": self.kind} | asdict(self) | {"stages": [list(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConvShape:
        """The inverse of ``to_dict``.

        Raises:
            ShapeError: a key is unknown or missing, or no such network exists.
        """
        return cls(**_building.own_fields(cls, values, needed=["kind", "family", "stages"]))

    def build(
        self,
        *,
        device: torch.device | str = "cpu",
        drop_path_rate: float = 0.0,
        preprocessing: Preprocessing = IMAGENET,
    ) -> nn.Module:
        """timm's model of this shape, with timm's own initialisation; on "meta" nothing is allocated.

        Its ``pretrained_cfg`` is complete, so that timm can save it. The global random state is left as it was.

        Raises:
            ShapeError: drop_path_rate is outside [0, 1), or is asked of a VGG, which has no residual paths.
        """
        if drop_path_rate and self.family == "vgg":
            raise ShapeError(
                f"drop_path_rate {drop_path_rate!r} asked; a VGG has no residual paths to drop: 0 would work"
            )
        return _building.build(
            self, device=device, drop_path_rate=drop_path_rate, preprocessing=preprocessing, on_meta={}
        )

    def model_args(self) -> dict[str, Any]:
        """What ``timm.create_model(architecture, num_classes=...)`` needs beside to build this shape; JSON values."""
        if self.family == "resnet":
            layers, channels = [len(stage) for stage in self.stages], [stage[0] for stage in self.stages]
            return {"layers": layers, "channels": channels, "in_chans": self.in_chans}
        if self._timm_vgg():
            return {"in_chans": self.in_chans}
        return {
            "stages": [list(stage) for stage in self.stages],
            "head_hidden": self.head_hidden,
            "head_kernel": self.head_kernel,
            "in_chans": self.in_chans,
        }

    def pretrained_cfg(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """timm's description of the weights and their input; plain JSON values.

        ``first_conv`` stands only at 3 channels: at other numbers timm would convert the first layer while loading, or
        drop it.
        """
        facts = preprocessing.for_channels(self.in_chans)
        first, classifier = ("features.0", "head.fc") if self.family == "vgg" else ("conv1", "fc")
        return {
            "architecture": self.architecture,
            "num_classes": self.classes,
            "input_size": [self.in_chans, self.image_size, self.image_size],
            "fixed_input_size": False,
            "pool_size": [self.side, self.side],
            "mean": list(facts.mean),
            "std": list(facts.std),
            "interpolation": facts.interpolation,
            "crop_pct": facts.crop_pct,
            "crop_mode": "center",
            "first_conv": first if self.in_chans == 3 else None,
            "classifier": classifier,
        }

    @classmethod
    def of(cls, model: nn.Module) -> ConvShape:
        """The shape of a timm ``vgg*_bn``, a ``learngene_vgg``, or a timm ResNet of basic blocks.

        ``ConvShape.of(shape.build()) == shape``. The image size is that of the model's ``pretrained_cfg``.

        Raises:
            ShapeError: the model is another one; the message names what it has.
        """
        from learngene_hub._conv_models import read_shape

        return read_shape(model)

    def fresh(self, name: str, size: Sequence[int], generator: torch.Generator) -> Tensor:
        """timm's initialisation of one entry of the state dict, drawn from ``generator``.

        Convolutions: normal of deviation sqrt(2 / fan-out), biases 0. BatchNorm: 1, 0, running mean 0 and variance 1,
        no batches tracked; the last one of a residual branch starts at weight 0, so that a fresh block passes its
        input on. Classifier: a VGG's normal of 0.01 and bias 0, a ResNet's uniform to 1 / sqrt(width), bias too.
        """
        import torch

        module, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            return torch.zeros(tuple(size), dtype=torch.long)
        if self.family == "resnet" and module == "fc":
            return (torch.rand(tuple(size), generator=generator) * 2 - 1) / self.width**0.5
        if kind in ("bias", "running_mean") or (kind == "weight" and module.endswith(".bn2") and len(size) == 1):
            return torch.zeros(tuple(size))
        if len(size) == 1:
            return torch.ones(tuple(size))
        deviation = (2 / (size[0] * size[2] * size[3])) ** 0.5 if len(size) == 4 else 0.01
        return torch.empty(tuple(size)).normal_(0, deviation, generator=generator)

    def keys(self) -> frozenset[str]:
        """The names of the built model's state dict, buffers too."""
        return _building.keys(self)


def _stages(stages: object) -> tuple[tuple[int, ...], ...]:
    """Checked: a list of lists of channels, none of them empty."""
    given = f"stages {stages!r:.60} asked"
    if not isinstance(stages, (list, tuple)) or not stages:
        raise ShapeError(f"{given}; they are lists of channels, such as [[64], [128, 128]]")
    for stage in stages:
        if not isinstance(stage, (list, tuple)) or not stage:
            raise ShapeError(f"{given}; each of them is a list of channels, such as [128, 128]")
        for channels in stage:
            require_int("channels", channels, at_least=1)
    if sum(len(stage) for stage in stages) > MAX_CONVS:
        raise ShapeError(f"{sum(len(stage) for stage in stages)} layers asked; {MAX_CONVS} are the most")
    return tuple(tuple(stage) for stage in stages)


def _halved(side: int, times: int) -> int:
    """The side after so many strides of 2 with padding, each rounding up."""
    for _ in range(times):
        side = (side + 1) // 2
    return side


@lru_cache(maxsize=256)
def _vgg_convs(shape: ConvShape) -> tuple[Conv, ...]:
    convs, place, inputs, side = [], 0, shape.in_chans, shape.image_size
    for number, stage in enumerate(shape.stages):
        for block, outputs in enumerate(stage):
            conv = Conv(
                name=f"features.{place}", norm=f"features.{place + 1}", inputs=inputs, outputs=outputs, kernel=3,
                stride=1, bias=True, side=side, stage=number, block=block,
            )  # fmt: skip
            convs.append(conv)
            place, inputs = place + 3, outputs  # a convolution, its norm, a ReLU
        place, side = place + 1, side // 2  # a max-pool
    return tuple(convs)


@lru_cache(maxsize=256)
def _resnet_convs(shape: ConvShape) -> tuple[Conv, ...]:
    side = _halved(shape.image_size, 1)
    stem = Conv(
        name="conv1", norm="bn1", inputs=shape.in_chans, outputs=STEM, kernel=7, stride=2, bias=False, side=side,
        stage=-1, block=0,
    )  # fmt: skip
    convs, inputs, side = [stem], STEM, _halved(side, 1)
    for number, stage in enumerate(shape.stages):
        side = side if number == 0 else _halved(side, 1)
        for block, outputs in enumerate(stage):
            first = block == 0 and number > 0
            root = f"layer{number + 1}.{block}"
            one = Conv(
                name=f"{root}.conv1", norm=f"{root}.bn1", inputs=inputs, outputs=outputs, kernel=3,
                stride=2 if first else 1, bias=False, side=side, stage=number, block=block,
            )  # fmt: skip
            two = replace(one, name=f"{root}.conv2", norm=f"{root}.bn2", inputs=outputs, stride=1)
            names = {"name": f"{root}.downsample.0", "norm": f"{root}.downsample.1"}
            beside = replace(one, **names, kernel=1, shortcut=True)
            convs += [one, two, *([beside] if block == 0 and (first or inputs != outputs) else [])]
            inputs = outputs
    return tuple(convs)
