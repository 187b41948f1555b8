"""The network of ``StitchedShape``: timm's VisionTransformer whose ``blocks`` change their width on the way.

The segments are built as plain ViTs; the blocks of all of them, with a Linear between two, become the blocks of the
first, which also gets the last one's norm and head. Forward, features and export are the plain model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from learngene_hub import _plain
from learngene_hub._check import shortest_ratio
from learngene_hub._stitched import StitchedShape
from learngene_hub.errors import ShapeError


class StitchedViT(VisionTransformer):
    """A plain ViT but for its blocks: ``depths[s]`` of them ``widths[s]`` wide, then a Linear to ``widths[s + 1]``.

    ``embed_dim`` and ``num_features`` are the width that the head sees. The other arguments are those of timm's
    VisionTransformer.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        heads: Sequence[int],
        mlp_ratios: Sequence[float],
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        class_token: bool = True,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def segment(place: int, make: Any) -> Any:
            first = place == 0  # the others' stems are thrown away: one patch
            return make(
                img_size=img_size if first else patch_size, patch_size=patch_size, in_chans=in_chans,
                num_classes=num_classes, global_pool=global_pool, embed_dim=widths[place], depth=depths[place],
                num_heads=heads[place], mlp_ratio=mlp_ratios[place], class_token=class_token, drop_rate=drop_rate,
                pos_drop_rate=pos_drop_rate, proj_drop_rate=proj_drop_rate, attn_drop_rate=attn_drop_rate,
                weight_init=weight_init, device=device, dtype=dtype,
            )  # fmt: skip

        segment(0, super().__init__)
        others = [segment(place, VisionTransformer) for place in range(1, len(widths))]
        layers = list(self.blocks)
        for (before, after), other in zip(pairwise(widths), others, strict=True):
            stitch = nn.Linear(before, after, device=device, dtype=dtype)
            if weight_init != "skip":  # as timm starts every Linear of a ViT
                nn.init.trunc_normal_(stitch.weight, std=0.02)
                nn.init.zeros_(stitch.bias)
            layers += [stitch, *other.blocks]
        last = others[-1]
        self.blocks = nn.Sequential(*layers)
        self.norm, self.fc_norm, self.head = last.norm, last.fc_norm, last.head
        self.num_features = self.head_hidden_size = self.embed_dim = widths[-1]
        reduction = self.feature_info[0]["reduction"]
        channels = [c for width, depth in zip(widths, depths, strict=True) for c in [width] * (depth + 1)][1:]
        self.feature_info = [
            {"module": f"blocks.{place}", "num_chs": count, "reduction": reduction}
            for place, count in enumerate(channels)
        ]
        _drop_paths(self.blocks, drop_path_rate)


def _drop_paths(layers: nn.Sequential, most: float) -> None:
    """Stochastic depth that rises evenly from 0 at the first block to ``most`` at the last, as timm's ViTs have it."""
    blocks: list[Any] = [layer for layer in layers if not isinstance(layer, nn.Linear)]
    for place, block in enumerate(blocks):
        rate = most * place / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))


def create(name: str, *, pretrained: bool, pretrained_cfg: Any, pretrained_cfg_overlay: Any, **model_args: Any) -> Any:
    """A StitchedViT for timm's registry; ``model_args`` are StitchedViT's, and what timm itself adds
    (``features_only``)."""
    out_indices = model_args.pop("out_indices", 3)
    return build_model_with_cfg(
        StitchedViT,
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **model_args,
    )


def read_shape(model: nn.Module) -> StitchedShape:
    """See ``StitchedShape.of``."""
    if type(model) is not StitchedViT:
        raise ShapeError(f"{type(model).__name__} given; a StitchedShape describes a StitchedViT, which it builds")
    segments: list[list[Any]] = [[]]
    for layer in model.blocks:
        if type(layer) is nn.Linear:
            segments.append([])
        else:
            segments[-1].append(layer)
    odd = sorted({type(block).__name__ for blocks in segments for block in blocks} - {"Block"})
    if odd or not all(segments):
        what = f"of type {', '.join(odd)}" if odd else "missing between two linear layers"
        raise ShapeError(f"a StitchedViT with blocks {what} given; as it was built, it would work")
    if type(model.patch_embed).__name__ != "PatchEmbed":
        raise ShapeError(f"a StitchedViT whose stem is a {type(model.patch_embed).__name__} given; it has a PatchEmbed")
    firsts = [blocks[0] for blocks in segments]
    widths = tuple(block.norm1.normalized_shape[0] for block in firsts)
    grid = model.patch_embed.grid_size
    shape = StitchedShape(
        depths=tuple(len(blocks) for blocks in segments),
        widths=widths,
        heads=tuple(block.attn.num_heads for block in firsts),
        mlp_ratios=tuple(shortest_ratio(w, b.mlp.fc1.out_features) for w, b in zip(widths, firsts, strict=True)),
        patch=model.patch_embed.patch_size[0],
        image_size=grid[0] * model.patch_embed.patch_size[0],
        in_chans=model.patch_embed.proj.in_channels,
        classes=model.num_classes,
        class_token=model.cls_token is not None,
        pool=model.global_pool,
    )
    heads = [block.attn.num_heads for blocks in segments for block in blocks]
    if heads != [n for n, depth in zip(shape.heads, shape.depths, strict=True) for _ in range(depth)]:
        raise ShapeError(f"a StitchedViT of {heads} heads given; the blocks of a segment have one number of heads")
    _plain.require_same_network(model, shape)
    return shape
