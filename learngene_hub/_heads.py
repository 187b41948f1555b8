"""HeadsShape: a ViT whose blocks have any number of heads each, whatever its width.

timm's plain VisionTransformer ties the number of heads to the width. What loosens that is an argument of its attention
layer (``attn_head_dim``), which no config can hold, so these models are of an architecture of our own,
``learngene_heads_vit`` (``_heads_vit.py``), which timm rebuilds from its config wherever learngene_hub is installed.
Elsewhere the weights of one with the same heads in every block load into timm's model with ``attn_layer`` a subclass of
``timm.layers.Attention`` that sets it; those of different heads per block into no model of timm's. Where heads times
head_dim is the width in every block, the network is a plain one, and its shape is a ``ViTShape``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from learngene_hub import _building
from learngene_hub._check import require_int
from learngene_hub.errors import ShapeError
from learngene_hub.shape import IMAGENET, Preprocessing, ViTShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ARCHITECTURE = "learngene_heads_vit"
MAX_DEPTH = 4096  # blocks, of a shape that a file describes


@dataclass(frozen=True, kw_only=True)
class HeadsShape:
    """The numbers of a ViT whose blocks have their own numbers of heads. Two shapes are equal exactly when they are the
    same network.

    Raises:
        ShapeError: no such ViT exists; or it is a plain one, which is a ``ViTShape``.
    """

    kind: ClassVar[str] = "heads"

    width: int  # numbers per token
    heads: tuple[int, ...]  # of each block, the first first
    head_dim: int  # numbers per head; heads times head_dim need not be the width
    mlp_ratio: float = 4.0  # hidden units over width; kept as the shortest decimal that gives the same number of units
    patch: int = 16  # side, pixels
    image_size: int = 224  # side, pixels
    in_chans: int = 3
    classes: int = 1000  # outputs of the head; 0: no head
    class_token: bool = True
    pool: str = "token"  # what the head sees: the class token, or the average of the patch tokens

    def __post_init__(self) -> None:
        if not isinstance(self.heads, (list, tuple)) or not 1 <= len(self.heads) <= MAX_DEPTH:
            raise ShapeError(f"heads {self.heads!r:.60} asked; it is a list of one number per block, such as [3, 3, 6]")
        for count in self.heads:
            require_int("heads", count, at_least=1)
        require_int("head_dim", self.head_dim, at_least=1)
        require_int("width", self.width, at_least=1)
        object.__setattr__(self, "heads", tuple(self.heads))
        if all(count * self.head_dim == self.width for count in self.heads):
            raise ShapeError(
                f"{self.heads[0]} heads of {self.head_dim} asked at width {self.width} in every block; that is a plain "
                f"ViT: a ViTShape would work"
            )
        object.__setattr__(self, "mlp_ratio", self.frame.mlp_ratio)

    def __str__(self) -> str:
        numbers = ",".join(map(str, self.heads if len(set(self.heads)) > 1 else self.heads[:1]))
        return f"{self.depth}x{self.width} of {numbers} head{'' if numbers == '1' else 's'}"

    @property
    def architecture(self) -> str:
        """Its name in timm's registry, where ``architectures.py`` puts it."""
        return ARCHITECTURE

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.heads)

    @property
    def hidden(self) -> int:
        """Hidden units of the MLP of each block."""
        return self.frame.hidden

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.frame.tokens

    @property
    def frame(self) -> ViTShape:
        """The same with one head of the whole width in every block: all that attention does not touch."""
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("heads", "head_dim")}
        return ViTShape(depth=len(self.heads), heads=1, head_dim=self.width, **rest)

    def _params(self, heads: Sequence[int]) -> int:
        """Parameters with these heads: the plain model's, and rows of qkv with their biases and columns of proj."""
        more = self.head_dim * sum(heads) - self.width * len(heads)
        return replace(self.frame, depth=len(heads)).params() + more * (4 * self.width + 3)

    def params(self) -> int:
        """Number of parameters, exactly."""
        return self._params(self.heads)

    def flops(self) -> int:
        """Floating-point operations of one image's forward, counted as ``ViTShape.flops`` counts them."""
        more = self.head_dim * sum(self.heads) - self.width * self.depth
        return self.frame.flops() + 2 * more * (4 * self.tokens * self.width + 2 * self.tokens**2)

    def bytes(self, dtype: torch.dtype | int = 4) -> int:
        """Bytes of the parameters in ``dtype``, or at that many bytes per number (4: float32)."""
        return self.params() * (dtype if isinstance(dtype, int) else dtype.itemsize)

    def require_budget(self, max_params: int, least: int = 1) -> None:
        """Nothing, where the model has at most ``max_params`` parameters.

        Raises:
            BudgetError: it has more; the message names a depth that fits, from ``least`` on.
        """

        def what_fits() -> str:
            fit = [n for n in range(least, self.depth) if self._params(self.heads[:n]) <= max_params]
            first = "block alone has" if least == 1 else f"{least} blocks alone have"
            beyond = f"even its first {first} {self._params(self.heads[:least]):,}"
            return f"its first {fit[-1]} blocks would fit" if fit else beyond

        _building.require_budget(self, max_params, what_fits)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "heads": list(self.heads), "kind": self.kind}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadsShape:
        """The inverse of ``to_dict``.

        Raises:
            ShapeError: a key is unknown or missing, or no such ViT exists.
        """
        return cls(**_building.own_fields(cls, values, needed=["width", "heads", "head_dim"]))

    def build(
        self,
        *,
        device: torch.device | str = "cpu",
        drop_path_rate: float = 0.0,
        preprocessing: Preprocessing = IMAGENET,
    ) -> nn.Module:
        """The model of this shape, with timm's own initialisation; on "meta" nothing is allocated.

        Its ``pretrained_cfg`` is complete, so that timm can save it. The global random state is left as it was.

        Raises:
            ShapeError: drop_path_rate is outside [0, 1).
        """
        return _building.build(self, device=device, drop_path_rate=drop_path_rate, preprocessing=preprocessing)

    def model_args(self) -> dict[str, Any]:
        """What ``timm.create_model(ARCHITECTURE, num_classes=...)`` needs beside to build this shape; JSON values."""
        arguments = self.frame.model_args()
        for name in ("depth", "num_heads"):
            del arguments[name]
        return {**arguments, "heads": list(self.heads), "head_dim": self.head_dim}

    def pretrained_cfg(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """timm's description of the weights and their input; plain JSON values."""
        return self.frame.pretrained_cfg(preprocessing) | {"architecture": ARCHITECTURE}

    @classmethod
    def of(cls, model: nn.Module) -> HeadsShape:
        """The shape of a built model: ``HeadsShape.of(shape.build()) == shape``.

        Raises:
            ShapeError: the model is of another kind, or was changed after it was built.
        """
        from learngene_hub._heads_vit import read_shape

        return read_shape(model)

    def fresh(self, name: str, size: torch.Size, generator: torch.Generator) -> Tensor:
        """The initial value of a tensor that no learngene gives, as a plain ViT's."""
        return self.frame.fresh(name, size, generator)

    def keys(self) -> frozenset[str]:
        """The names of the built model's state dict, which are those of a plain ViT."""
        return self.frame.keys()
