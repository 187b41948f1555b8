"""The kinds of shapes: what each of them can do, and the one table of those there are. Private to ``shape.py``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from learngene_hub.errors import ShapeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from learngene_hub.shape import Preprocessing

# Kind -> module and class. These are imported, and no name that stands in a file.
KINDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "vit": ("learngene_hub.shape", "ViTShape"),  # the one kind that a file does not name
        "heads": ("learngene_hub._heads", "HeadsShape"),
        "stitched": ("learngene_hub._stitched", "StitchedShape"),
        "conv": ("learngene_hub._conv", "ConvShape"),
    }
)
CNNS = ("ResNet", "VGG")  # timm's classes that a ConvShape describes, or nearly


class Shape(Protocol):
    """The numbers that fix a network: a frozen dataclass of plain values, equal where the networks are the same.

    Its file imports neither torch nor timm: the header of a learngene is read without them.
    """

    kind: ClassVar[str]

    @property
    def depth(self) -> int:
        """Blocks; of a CNN its convolutions."""
        ...

    @property
    def width(self) -> int:
        """Numbers per token, or channels, after the last block."""
        ...

    @property
    def classes(self) -> int:
        """Outputs of the head; 0: no head."""
        ...

    @property
    def image_size(self) -> int:
        """Side, pixels."""
        ...

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        ...

    @property
    def architecture(self) -> str:
        """The name under which ``timm.create_model(..., num_classes=classes, **model_args())`` builds it."""
        ...

    def params(self) -> int:
        """Number of parameters, exactly; buffers are none."""
        ...

    def flops(self) -> int:
        """Floating-point operations of one image's forward, as ``torch.utils.flop_counter`` counts them."""
        ...

    def bytes(self, dtype: torch.dtype | int = 4) -> int:
        """Bytes of the parameters in ``dtype``, or at that many bytes per number."""
        ...

    def require_budget(self, max_params: int, least: int = 1) -> None:
        """Nothing, where it has at most ``max_params`` parameters; else BudgetError, with no depth below ``least``."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the key ``kind`` for all but a plain ViT."""
        ...

    def build(
        self,
        *,
        device: torch.device | str = "cpu",
        drop_path_rate: float = 0.0,
        preprocessing: Preprocessing = ...,
    ) -> nn.Module:
        """timm's model of this shape; on "meta" nothing is allocated. The global random state is left as it was."""
        ...

    def model_args(self) -> dict[str, Any]:
        """JSON values for ``timm.create_model``."""
        ...

    def pretrained_cfg(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """timm's description of the weights and their input; JSON values."""
        ...

    def fresh(self, name: str, size: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """The initial value of an entry of the state dict that no learngene gives; drawn from ``generator`` alone."""
        ...

    def keys(self) -> frozenset[str]:
        """The names of the built model's state dict, parameters and buffers."""
        ...


class _Kind(Protocol):
    """What the class of a kind can do."""

    def of(self, model: nn.Module) -> Shape: ...

    def from_dict(self, values: Mapping[str, Any]) -> Shape: ...


def _class_of(kind: str) -> _Kind:
    module, name = KINDS[kind]
    return cast(_Kind, getattr(import_module(module), name))


def shape_from_dict(values: Mapping[str, Any]) -> Shape:
    """The shape, of any kind, whose ``to_dict`` this is.

    Raises:
        ShapeError: an unknown kind, a key that is unknown or missing, or numbers that no such network has.
    """
    kind = values.get("kind", "vit") if isinstance(values, Mapping) else "vit"
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(sorted(KINDS.keys() - {"vit"}))
        raise ShapeError(f"a shape of kind {ascii(kind):.40} given; there are {known}, and plain ViTs without a kind")
    return _class_of(kind).from_dict(values)


def shape_of(model: nn.Module) -> Shape:
    """The shape of a model that a shape of some kind builds.

    Raises:
        ShapeError: no kind describes it; the message names what it has beyond a plain ViT, or beyond a CNN.
    """
    refused: dict[str, ShapeError] = {}
    for kind in KINDS:
        try:
            return _class_of(kind).of(model)
        except ShapeError as error:
            refused[kind] = error
    raise refused["conv" if type(model).__name__ in CNNS else "vit"]
