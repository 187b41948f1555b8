"""StitchedShape: a ViT whose width changes on the way, where a linear map leads from one run of blocks to the next.

It begins with the stem of its first segment and ends with the last norm and the head of its last one; between two
segments every token goes through one ``nn.Linear``. As one timm VisionTransformer it has ``blocks`` that are narrow
blocks, the linear layer, wide blocks, and so on, numbered through. timm's config has no place for that, so these
models are of an architecture of our own, ``learngene_stitched_vit`` (``_stitched_vit.py``), which timm rebuilds from
its config wherever learngene_hub is installed. A ViT of one width is a ``ViTShape``.

Source of the network: Pan, Cai, Zhuang, "Stitchable Neural Networks", CVPR 2023, arXiv:2302.06586, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from learngene_hub import _building
from learngene_hub.errors import ShapeError
from learngene_hub.shape import IMAGENET, Preprocessing, ViTShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ARCHITECTURE = "learngene_stitched_vit"
PER_SEGMENT = ("depths", "widths", "heads", "mlp_ratios")
MAX_SEGMENTS = 64


@dataclass(frozen=True, kw_only=True)
class StitchedShape:
    """The numbers of a stitched ViT, those of its segments in lists of one length, the first segment first. Two shapes
    are equal exactly when they are the same network.

    Raises:
        ShapeError: no such ViT exists; or two neighbouring segments have one width, and are one segment.
    """

    kind: ClassVar[str] = "stitched"

    depths: tuple[int, ...]  # blocks
    widths: tuple[int, ...]  # numbers per token
    heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...]  # hidden units over width; each kept as ViTShape keeps it
    patch: int = 16  # side, pixels
    image_size: int = 224  # side, pixels
    in_chans: int = 3
    classes: int = 1000  # outputs of the head; 0: no head
    class_token: bool = True
    pool: str = "token"  # what the head sees: the class token, or the average of the patch tokens

    def __post_init__(self) -> None:
        lengths = set()
        for name in PER_SEGMENT:
            numbers = getattr(self, name)
            if not isinstance(numbers, (list, tuple)) or not 2 <= len(numbers) <= MAX_SEGMENTS:
                raise ShapeError(
                    f"{name} {numbers!r:.60} asked; it is a list of one number per segment, such as [3, 9]"
                )
            lengths.add(len(numbers))
            object.__setattr__(self, name, tuple(numbers))
        if len(lengths) > 1:
            raise ShapeError(f"{', '.join(PER_SEGMENT)} of {sorted(lengths)} segments asked; they have one length")
        for narrow, wide in pairwise(self.widths):
            if narrow == wide:
                raise ShapeError(f"widths {list(self.widths)} asked; two neighbours of one width are one segment")
        object.__setattr__(self, "mlp_ratios", tuple(part.mlp_ratio for part in self.segments))

    def __str__(self) -> str:
        return "+".join(f"{depth}x{width}" for depth, width in zip(self.depths, self.widths, strict=True))

    @classmethod
    def join(cls, segments: tuple[ViTShape, ...]) -> StitchedShape | ViTShape:
        """The shape of these segments in this order; what they share besides is the last one's. Of one it is itself."""
        if len(segments) == 1:
            return segments[0]
        last = segments[-1]
        return cls(
            depths=tuple(part.depth for part in segments),
            widths=tuple(part.width for part in segments),
            heads=tuple(part.heads for part in segments),
            mlp_ratios=tuple(part.mlp_ratio for part in segments),
            patch=last.patch, image_size=last.image_size, in_chans=last.in_chans, classes=last.classes,
            class_token=last.class_token, pool=last.pool,
        )  # fmt: skip

    @property
    def segments(self) -> tuple[ViTShape, ...]:
        """Each segment as a whole ViT: the stem of the first and the head of the last are this shape's."""
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in PER_SEGMENT}
        rows = zip(self.depths, self.widths, self.heads, self.mlp_ratios, strict=True)
        return tuple(ViTShape(depth=d, width=w, heads=h, mlp_ratio=ratio, **rest) for d, w, h, ratio in rows)

    @property
    def architecture(self) -> str:
        """timm's name for it, once ``learngene_hub.architectures`` is imported."""
        return ARCHITECTURE

    @property
    def depth(self) -> int:
        """Blocks; the linear layers are not counted."""
        return sum(self.depths)

    @property
    def width(self) -> int:
        """Numbers per token after the last block."""
        return self.widths[-1]

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.segments[0].tokens

    def params(self) -> int:
        """Number of parameters, exactly."""
        parts = self.segments
        stem = parts[0].params() - parts[0].depth * _block(parts[0], "params") - _tail(parts[0])
        blocks = sum(part.depth * _block(part, "params") for part in parts)
        stitches = sum((before + 1) * after for before, after in pairwise(self.widths))
        return stem + blocks + stitches + _tail(parts[-1])

    def flops(self) -> int:
        """Floating-point operations of one image's forward, counted as ``ViTShape.flops`` counts them."""
        parts = self.segments
        stem = 2 * parts[0].patches * self.widths[0] * self.in_chans * self.patch**2
        blocks = sum(part.depth * _block(part, "flops") for part in parts)
        stitches = sum(2 * self.tokens * before * after for before, after in pairwise(self.widths))
        return stem + blocks + stitches + 2 * self.width * self.classes

    def bytes(self, dtype: torch.dtype | int = 4) -> int:
        """Bytes of the parameters in ``dtype``, or at that many bytes per number (4: float32)."""
        return self.params() * (dtype if isinstance(dtype, int) else dtype.itemsize)

    def require_budget(self, max_params: int, least: int = 1) -> None:
        """Nothing, where the model has at most ``max_params`` parameters.

        Raises:
            BudgetError: it has more; no depth is named.
        """
        del least
        _building.require_budget(self, max_params, lambda: "fewer blocks of its wide segment would fit")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), **{name: list(getattr(self, name)) for name in PER_SEGMENT}, "kind": self.kind}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StitchedShape:
        """The inverse of ``to_dict``.

        Raises:
            ShapeError: a key is unknown or missing, or no such ViT exists.
        """
        return cls(**_building.own_fields(cls, values, needed=PER_SEGMENT))

    def build(
        self,
        *,
        device: torch.device | str = "cpu",
        drop_path_rate: float = 0.0,
        preprocessing: Preprocessing = IMAGENET,
    ) -> nn.Module:
        """The model of this shape, with timm's own initialisation; on "meta" nothing is allocated.

        ``drop_path_rate`` rises evenly over the blocks of all segments. The ``pretrained_cfg`` is complete, so that
        timm can save the model. The global random state is left as it was.

        Raises:
            ShapeError: drop_path_rate is outside [0, 1).
        """
        return _building.build(self, device=device, drop_path_rate=drop_path_rate, preprocessing=preprocessing)

    def model_args(self) -> dict[str, Any]:
        """What ``timm.create_model(ARCHITECTURE, num_classes=...)`` needs beside to build this shape; JSON values."""
        arguments = self.segments[0].model_args()
        for name in ("embed_dim", "depth", "num_heads", "mlp_ratio"):
            del arguments[name]
        return arguments | {name: list(getattr(self, name)) for name in PER_SEGMENT}

    def pretrained_cfg(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """timm's description of the weights and their input; plain JSON values."""
        return self.segments[0].pretrained_cfg(preprocessing) | {"architecture": ARCHITECTURE}

    @classmethod
    def of(cls, model: nn.Module) -> StitchedShape:
        """The shape of a built model: ``StitchedShape.of(shape.build()) == shape``.

        Raises:
            ShapeError: the model is of another kind, or was changed after it was built.
        """
        from learngene_hub._stitched_vit import read_shape

        return read_shape(model)

    def fresh(self, name: str, size: torch.Size, generator: torch.Generator) -> Tensor:
        """The initial value of a tensor that no learngene gives, as a plain ViT's; a linear layer's as any other's."""
        return self.segments[0].fresh(name, size, generator)

    def keys(self) -> frozenset[str]:
        """The names of the built model's state dict."""
        return _building.keys(self)


def _block(part: ViTShape, count: str) -> int:
    """Parameters or FLOPs of one block."""
    one, two = (replace(part, depth=depth) for depth in (1, 2))
    return getattr(two, count)() - getattr(one, count)()


def _tail(part: ViTShape) -> int:
    """Parameters of the last norm and the head."""
    return 2 * part.width + (part.width + 1) * part.classes
