"""The network of ``HeadsShape``: timm's VisionTransformer whose blocks have their own numbers of heads.

timm ties heads times head_dim to the width everywhere but inside its ``Attention`` layer, and hands one number of heads
to all blocks. So the plain model is built first, and then gets attention layers of timm's own with ``attn_head_dim``.
Names of parameters, forward, features and export are the plain model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers.attention import Attention
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from learngene_hub import _plain
from learngene_hub._check import shortest_ratio
from learngene_hub._heads import HeadsShape
from learngene_hub.errors import ShapeError


class HeadsViT(VisionTransformer):
    """A plain ViT but for its attention: block i has ``heads[i]`` heads of ``head_dim`` numbers each.

    The width need not be their product: ``qkv`` is (3 heads head_dim, width), ``proj`` (width, heads head_dim), and the
    scale 1 / sqrt(head_dim). The other arguments are those of timm's VisionTransformer.
    """

    def __init__(
        self,
        *,
        heads: Sequence[int],
        head_dim: int,
        embed_dim: int,
        mlp_ratio: float = 4.0,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        class_token: bool = True,
        global_pool: Literal["", "avg", "token"] = "token",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Literal["skip", ""] = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, embed_dim=embed_dim, depth=len(heads), num_heads=1, mlp_ratio=mlp_ratio,
            class_token=class_token, drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate, weight_init=weight_init, device=device,
            dtype=dtype,
        )  # fmt: skip
        for block, count in zip(self.blocks, heads, strict=True):
            attention = Attention(
                embed_dim, num_heads=count, attn_head_dim=head_dim, qkv_bias=True, attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate, device=device, dtype=dtype,
            )  # fmt: skip
            if weight_init != "skip":
                for layer in (attention.qkv, attention.proj):  # as timm starts every Linear of a ViT
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                    nn.init.zeros_(layer.bias)
            block.attn = attention  # type: ignore[assignment]


def create(name: str, *, pretrained: bool, pretrained_cfg: Any, pretrained_cfg_overlay: Any, **model_args: Any) -> Any:
    """A HeadsViT for timm's registry; ``model_args`` are HeadsViT's, and what timm itself adds (``features_only``)."""
    out_indices = model_args.pop("out_indices", 3)
    return build_model_with_cfg(
        HeadsViT,
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **model_args,
    )


def read_shape(model: nn.Module) -> HeadsShape:
    """See ``HeadsShape.of``."""
    if type(model) is not HeadsViT:
        raise ShapeError(f"{type(model).__name__} given; a HeadsShape describes a HeadsViT, which it builds")
    first: Any = model.blocks[0] if len(model.blocks) else None
    if first is None or any(type(getattr(block, "attn", None)) is not Attention for block in model.blocks):
        raise ShapeError(
            "a HeadsViT without blocks, or with attention of another type, given; as it was built, it works"
        )
    if found := [feature for feature, there in _plain.features(model) if there]:
        raise ShapeError(f"a HeadsViT with {', '.join(found)} given; as it was built, it would work")
    grid = model.patch_embed.grid_size
    shape = HeadsShape(
        width=model.embed_dim,
        heads=tuple(block.attn.num_heads for block in model.blocks),  # type: ignore[union-attr]
        head_dim=first.attn.head_dim,
        mlp_ratio=shortest_ratio(model.embed_dim, first.mlp.fc1.out_features),
        patch=model.patch_embed.patch_size[0],
        image_size=grid[0] * model.patch_embed.patch_size[0],
        in_chans=model.patch_embed.proj.in_channels,
        classes=model.num_classes,
        class_token=model.cls_token is not None,
        pool=model.global_pool,
    )
    if any(block.attn.head_dim != shape.head_dim for block in model.blocks):  # type: ignore[union-attr]
        raise ShapeError("a HeadsViT with heads of several sizes given; as it was built, it would work")
    _plain.require_same_network(model, shape)
    return shape
