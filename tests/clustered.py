"""Small ancestors whose heads differ, their learngenes of cluster, and what those are compared with."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from conftest import build_pico
from planted import FACTS
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub.data import Images
from learngene_hub.learngene import Learngene
from learngene_hub.shape import ViTShape

SMALL = ViTShape(depth=4, width=192, heads=3, head_dim=64, patch=8, image_size=16, classes=5)  # of DeiT-Tiny's width
STILL: dict[str, Any] = {"psi_epochs": 0, "ffn_groups": "none"}


def noise(count: int = 12, size: int = 16, seed: int = 0, channels: int = 3) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.zeros(count, dtype=torch.int64), ("any",), f"noise-{seed}")


@cache
def ancestor_of(shape: ViTShape = SMALL, spread: float = 1.0) -> nn.Module:
    """Heads that attend differently far: their q and k are large enough to choose. Read only."""
    model = build_pico(shape)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(spread * 6)  # type: ignore[union-attr, operator]
    return model


@cache
def extracted(shape: ViTShape = SMALL, **settings: Any) -> Learngene:
    """Read only."""
    return factory.extract("cluster", ancestor_of(shape), {"one": noise(size=shape.image_size)}, settings=settings,
                           facts=FACTS)  # fmt: skip


def pixels(shape: ViTShape = SMALL, count: int = 3) -> Tensor:
    size = (count, shape.in_chans, shape.image_size, shape.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def with_head(model: nn.Module, ancestor: nn.Module) -> nn.Module:
    """The descendant with the ancestor's classifier, so that the two can be compared."""
    model.head.load_state_dict(ancestor.head.state_dict())  # type: ignore[union-attr]
    return model


def by_hand(model: nn.Module, images: Tensor, side: int, patch: int) -> list[list[float]]:
    """Sums over every image, query and key of what timm's own attention computes, one number after the other."""
    seen: list[Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, given, _out: seen.append(given[0]))
    with torch.no_grad():
        model(images)
    count, found = side * side, []
    for weights in seen:
        skipped, layer = weights.shape[-1] - count, []
        for head in range(weights.shape[1]):
            total = 0.0
            for image in range(len(images)):
                for q in range(count):
                    for k in range(count):
                        far = patch * math.hypot(q // side - k // side, q % side - k % side)
                        total += far * float(weights[image, head, skipped + q, skipped + k])
            layer.append(total / (len(images) * count))
        found.append(layer)
    return found


def head(state: dict[str, Tensor], place: int, number: int, d: int = 64) -> list[Tensor]:
    """q, k, v rows, their biases and the projection's columns of one head."""
    qkv, bias = state[f"blocks.{place}.attn.qkv.weight"], state[f"blocks.{place}.attn.qkv.bias"]
    third = len(bias) // 3
    rows = [slice(part * third + number * d, part * third + (number + 1) * d) for part in range(3)]
    columns = state[f"blocks.{place}.attn.proj.weight"][:, number * d : (number + 1) * d]
    return [*(qkv[each] for each in rows), *(bias[each] for each in rows), columns]
