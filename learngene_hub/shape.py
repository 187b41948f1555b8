"""ViTShape: the numbers that fix a plain ViT, its exact cost, and the timm model that has them.

A ``Shape`` of another kind describes a network that is no plain ViT: blocks of different head counts (``_heads.py``),
stitched widths (``_stitched.py``), convolutions (``_conv.py``). ``shape_of`` reads any kind off a model, and
``shape_from_dict`` out of a file.

The only room that imports timm's model builders. Importing this file imports neither timm nor torch: the functions
that need them do.

A *plain* ViT is timm's ``VisionTransformer`` with pre-norm blocks, fused qkv with bias, GELU, learned position
embeddings that also cover the class token, LayerNorm (eps 1e-6) and one linear head, as DeiT and the original ViT have
them. ``ViTShape.of`` refuses the rest by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from learngene_hub import _building
from learngene_hub._check import floats, is_number, nearest, nearest_divisors, require_int, require_keys, shortest_ratio
from learngene_hub._kinds import Shape as Shape
from learngene_hub._kinds import shape_from_dict as shape_from_dict
from learngene_hub._kinds import shape_of as shape_of
from learngene_hub._reach import Reach as Reach
from learngene_hub.errors import SettingsError, ShapeError

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

ARCHITECTURE = "vit_tiny_patch16_224"  # timm's name for the plain ViT; every size is an argument beside it
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random")  # what timm accepts
POOLS = ("token", "avg")
_LAYERNORM_MACS = 5  # per element, in fvcore, the counter behind timm's published GMACs


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image in [0, 1] becomes the input of a model: resized, cropped, then ``(x - mean) / std`` per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"  # filter of the resize
    crop_pct: float = 0.9  # side of the centre crop over side of the resized image

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", floats("mean", self.mean))
        object.__setattr__(self, "std", floats("std", self.std))
        if len(self.mean) != len(self.std) or not self.mean:
            raise SettingsError(f"{len(self.mean)} means and {len(self.std)} stds asked; give one of each per channel")
        if min(self.std) <= 0:
            raise SettingsError(f"std {list(self.std)} asked; every std must be above 0")
        if self.interpolation not in INTERPOLATIONS:
            raise SettingsError(f"interpolation {self.interpolation!r} asked; there are {', '.join(INTERPOLATIONS)}")
        if not (is_number(self.crop_pct) and 0 < self.crop_pct <= 1):
            raise SettingsError(f"crop_pct {self.crop_pct!r} asked; it must be above 0 and at most 1")

    def for_channels(self, in_chans: int) -> Preprocessing:
        """The same for ``in_chans`` channels: one channel takes the averages, more take the given ones in turn."""
        if in_chans == len(self.mean):
            return self
        if in_chans == 1:
            mean, std = (math.fsum(numbers) / len(numbers) for numbers in (self.mean, self.std))
            return replace(self, mean=(mean,), std=(std,))
        turn = [i % len(self.mean) for i in range(in_chans)]
        return replace(self, mean=tuple(self.mean[i] for i in turn), std=tuple(self.std[i] for i in turn))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of ``to_dict``.

        Raises:
            SettingsError: a key is unknown or missing, or a value is out of its range.
        """
        require_keys(values, known=[f.name for f in fields(cls)], needed=["mean", "std"], error=SettingsError)
        return cls(**values)


IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class ViTShape:
    """The numbers of a plain ViT. Two shapes are equal exactly when they are the same network.

    Raises:
        ShapeError: no such ViT exists; the message names the nearest values that do.
    """

    kind: ClassVar[str] = "vit"

    depth: int  # blocks
    width: int  # numbers per token
    heads: int
    mlp_ratio: float = 4.0  # hidden units over width; kept as the shortest decimal that gives the same number of units
    head_dim: int = 0  # numbers per head; 0 means width / heads
    patch: int = 16  # side, pixels
    image_size: int = 224  # side, pixels
    in_chans: int = 3
    classes: int = 1000  # outputs of the head; 0: no head
    class_token: bool = True
    pool: str = "token"  # what the head sees: the class token, or the average of the patch tokens

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch", "image_size", "in_chans"):
            require_int(name, getattr(self, name), at_least=1)
        require_int("head_dim", self.head_dim, at_least=0)
        require_int("classes", self.classes, at_least=0)
        self._check_heads()
        if self.image_size % self.patch:
            near = nearest(self.image_size, lo=self.patch, step=self.patch)
            raise ShapeError(
                f"image size {self.image_size} asked; it must be a multiple of patch {self.patch}: {near} would work"
            )
        if not isinstance(self.class_token, bool):
            raise ShapeError(f"class_token {self.class_token!r} asked; it is True or False")
        if self.pool not in POOLS:
            raise ShapeError(f"pool {self.pool!r} asked; there are {', '.join(POOLS)}")
        if self.pool == "token" and not self.class_token:
            raise ShapeError("pool 'token' asked without a class token; class_token=True or pool='avg' would work")
        self._check_mlp_ratio()

    def _check_heads(self) -> None:
        """Fill head_dim in where it is 0, and refuse heads that do not tile the width."""
        if self.head_dim == 0:
            if self.width % self.heads:
                legal = nearest_divisors(self.width, self.heads)
                raise ShapeError(
                    f"{self.heads} heads asked; they do not divide width {self.width}: {legal} heads, "
                    f"or width {nearest(self.width, lo=self.heads, step=self.heads)}, would work"
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.heads * self.head_dim != self.width:
            near = nearest(self.width, lo=self.head_dim, step=self.head_dim)
            raise ShapeError(
                f"width {self.width} asked; {self.heads} heads of {self.head_dim} give {self.heads * self.head_dim}: "
                f"width {near} with width / {self.head_dim} heads would work"
            )

    def _check_mlp_ratio(self) -> None:
        if not (is_number(self.mlp_ratio) and self.mlp_ratio > 0 and int(self.width * self.mlp_ratio) >= 1):
            raise ShapeError(
                f"mlp_ratio {self.mlp_ratio!r} asked; it must be at least {1 / self.width:.4g} (one hidden unit)"
            )
        object.__setattr__(self, "mlp_ratio", shortest_ratio(self.width, int(self.width * self.mlp_ratio)))

    def __str__(self) -> str:
        return f"{self.depth}x{self.width}"

    @property
    def architecture(self) -> str:
        """timm's name for it."""
        return ARCHITECTURE

    @property
    def hidden(self) -> int:
        """Hidden units of the MLP of each block."""
        return int(self.width * self.mlp_ratio)

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of one image: its patches, and the class token where there is one."""
        return self.patches + int(self.class_token)

    def params(self) -> int:
        """Number of parameters, exactly."""
        width, hidden = self.width, self.hidden
        stem = width * (self.in_chans * self.patch**2 + 1) + width * (self.tokens + int(self.class_token))
        attention = width * 3 * width + 3 * width + width * width + width
        mlp = 2 * width * hidden + hidden + width
        block = attention + mlp + 4 * width  # two norms of two vectors
        return stem + self.depth * block + 2 * width + self._head_params()

    def _head_params(self) -> int:
        return (self.width + 1) * self.classes

    def flops(self) -> int:
        """Floating-point operations of one image's forward, two per multiply-add.

        Counted: the patch convolution, every linear layer, and the two products of attention. Not counted, as in
        ``torch.utils.flop_counter``, whose number this is: biases, norms, softmax, GELU, sums.
        """
        width, tokens = self.width, self.tokens
        stem = self.patches * width * self.in_chans * self.patch**2
        linear = tokens * (4 * width * width + 2 * width * self.hidden)
        attention = 2 * tokens * tokens * width
        return 2 * (stem + self.depth * (linear + attention) + width * self.classes)

    def macs(self) -> int:
        """Multiply-adds of one image's forward as timm publishes them: ``flops() / 2``, and 5 per number normed."""
        pooled = 1 if self.pool == "avg" else self.tokens  # average pooling comes before the last norm
        normed = (2 * self.depth * self.tokens + pooled) * self.width
        return self.flops() // 2 + _LAYERNORM_MACS * normed

    def bytes(self, dtype: torch.dtype | int = 4) -> int:
        """Bytes of the parameters in ``dtype``, or at that many bytes per number (4: float32)."""
        return self.params() * (dtype if isinstance(dtype, int) else dtype.itemsize)

    def require_budget(self, max_params: int, least: int = 1) -> None:
        """Nothing, where the model has at most ``max_params`` parameters.

        Raises:
            BudgetError: it has more; the message names a depth that fits, from ``least`` on.
        """

        def what_fits() -> str:
            empty = self.params() - self.depth * self._block_params()
            depth = (max_params - empty) // self._block_params()
            beyond = f"at width {self.width} even depth {least} has {replace(self, depth=least).params():,}"
            return f"depth {depth} would fit" if depth >= least else beyond

        _building.require_budget(self, max_params, what_fits)

    def _block_params(self) -> int:
        return replace(self, depth=2).params() - replace(self, depth=1).params()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTShape:
        """The inverse of ``to_dict``.

        Raises:
            ShapeError: a key is unknown or missing, or no such ViT exists.
        """
        needed = ["depth", "width", "heads"]
        require_keys(values, known=[f.name for f in fields(cls)], needed=needed, error=ShapeError)
        return cls(**values)

    def build(
        self,
        *,
        device: torch.device | str = "cpu",
        drop_path_rate: float = 0.0,
        preprocessing: Preprocessing = IMAGENET,
    ) -> VisionTransformer:
        """timm's model of this shape, with timm's own initialisation; on "meta" nothing is allocated.

        Its ``pretrained_cfg`` is complete, so that timm can save it. The global random state is left as it was.

        Raises:
            ShapeError: drop_path_rate is outside [0, 1).
        """
        return _building.build(self, device=device, drop_path_rate=drop_path_rate, preprocessing=preprocessing)  # type: ignore[return-value]

    def model_args(self) -> dict[str, Any]:
        """What ``timm.create_model(ARCHITECTURE, num_classes=...)`` needs beside to build this shape; JSON values."""
        return {
            "img_size": self.image_size,
            "patch_size": self.patch,
            "in_chans": self.in_chans,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "class_token": self.class_token,
            "global_pool": self.pool,
        }

    def pretrained_cfg(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """timm's description of the weights and their input; plain JSON values.

        ``first_conv`` stands only at 3 channels: at other numbers timm would convert the first layer while loading, or
        drop it.
        """
        facts = preprocessing.for_channels(self.in_chans)
        return {
            "architecture": ARCHITECTURE,
            "num_classes": self.classes,
            "input_size": [self.in_chans, self.image_size, self.image_size],
            "fixed_input_size": True,
            "pool_size": None,
            "mean": list(facts.mean),
            "std": list(facts.std),
            "interpolation": facts.interpolation,
            "crop_pct": facts.crop_pct,
            "crop_mode": "center",
            "first_conv": "patch_embed.proj" if self.in_chans == 3 else None,
            "classifier": "head",
        }

    @classmethod
    def of(cls, model: nn.Module) -> ViTShape:
        """The shape of a plain timm ViT: ``ViTShape.of(shape.build()) == shape``.

        Raises:
            ShapeError: the model is no plain ViT; the message names what it has beyond one.
        """
        from learngene_hub._plain import read_shape

        return read_shape(model)

    def keys(self) -> frozenset[str]:
        """The names of the built model's state dict."""
        return _building.keys(self)

    def fresh(self, name: str, size: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """timm's initialisation of one tensor of a ViT: truncated normal of 0.02 for weights, 0 for biases, 1 for
        norms."""
        import torch

        if name.endswith(".bias"):
            return torch.zeros(size)
        if len(size) == 1:
            return torch.ones(size)
        return torch.nn.init.trunc_normal_(torch.empty(size), std=0.02, generator=generator)
