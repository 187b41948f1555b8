"""Where Auto-Learngene looks: the groups of an ancestor, and networks that hand out a feature after each of them.

A group of a ViT is some successive blocks (two, as published), and its feature what the patch tokens are after the last
of them, without the class token. A group of a CNN is a stage: the maps of a VGG just before each pooling, those of a
ResNet after each of its stages.

Source: Wang et al., "Learngene: Inheriting Condensed Knowledge from the Ancestry Model to Descendant Models" ("Auto-
Learngene"), arXiv:2305.02279; the features are those of the authors' released code.

Legend: B images, N patches, D width, C channels, H x W pixels of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def block_groups(depth: int, size: int) -> tuple[tuple[int, ...], ...]:
    """The positions of ``depth`` blocks in groups of ``size``; what is left over is a smaller last group."""
    return tuple(tuple(range(first, min(first + size, depth))) for first in range(0, depth, size))


class ViTFeatures(nn.Module):
    """timm's plain ViT: images -> (logits (B, classes), the patch tokens (B, N, D) after each block of ``ends``).

    Attention is computed as plain matrix products: the fused kernels have no second derivative.
    """

    model: Any  # timm's VisionTransformer

    def __init__(self, model: nn.Module, ends: Sequence[int]) -> None:
        super().__init__()
        self.model, self.ends = model, frozenset(ends)
        for block in self.model.blocks:
            block.attn.fused_attn = False

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        model, features = self.model, []
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for place, block in enumerate(model.blocks):
            tokens = block(tokens)
            if place in self.ends:
                features.append(tokens[:, model.num_prefix_tokens :])
        return model.forward_head(model.norm(tokens)), features


class VGGFeatures(nn.Module):
    """timm's VGG: images -> (logits (B, classes), the maps (B, C, H, W) just before each pooling)."""

    model: Any  # timm's VGG

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.model.features:
            if isinstance(layer, nn.MaxPool2d):
                features.append(x)
            x = layer(x)
        return self.model.forward_head(x), features


class ResNetFeatures(nn.Module):
    """timm's ResNet: images -> (logits (B, classes), the maps (B, C, H, W) after each of its stages)."""

    model: Any  # timm's ResNet

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        model, features = self.model, []
        x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = stage(x)
            features.append(x)
        return model.forward_head(x), features
