"""One small shape of each kind, a model of each, and learngenes that grow into them without any training."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from conftest import build_pico
from planted import FACTS, variant
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub._conv import ConvShape
from learngene_hub._heads import HeadsShape
from learngene_hub._stitched import StitchedShape
from learngene_hub.data import Images
from learngene_hub.learngene import Learngene
from learngene_hub.shape import Shape, ViTShape

RESNET = ConvShape(family="resnet", stages=((4,), (6,), (8,), (10, 10)), image_size=32, classes=6)
SHAPES: dict[str, Shape] = {
    "vit": ViTShape(depth=2, width=64, heads=2, patch=8, image_size=32, classes=7),
    "heads": HeadsShape(width=64, heads=(2, 5), head_dim=32, patch=8, image_size=32, classes=7),
    "stitched": StitchedShape(
        depths=(2, 1), widths=(32, 64), heads=(1, 2), mlp_ratios=(4.0, 2.0), patch=8, image_size=32, classes=7
    ),
    "resnet": replace(RESNET, classes=7),
    "vgg": ConvShape(
        family="vgg", stages=((8,), (16,), (16,)), head_hidden=12, head_kernel=2, image_size=32, classes=7
    ),
}
OURS = ("heads", "stitched", "vgg")  # built by an architecture that timm has not


@cache
def model_of(kind: str) -> nn.Module:
    """Random in every entry, running statistics too. Read only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = SHAPES[kind].build()
        with torch.no_grad():
            for entry in model.state_dict().values():
                if entry.is_floating_point():
                    entry.add_(0.1 * torch.rand_like(entry))
                else:
                    entry.fill_(5)
    return model.eval()


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def noise(count: int = 24, side: int = 32) -> Images:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return Images(drawn, torch.arange(count) % 6, tuple("abcdef"), "noise")


@cache
def grown_from(kind: str) -> Learngene:
    """A heuristic learngene of a ResNet, or a cluster learngene of a ViT, made without training. Read only."""
    if kind == "resnet":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            ancestor = RESNET.build().eval()
        settings: dict[str, Any] = {"last_k": 2, "front": [3, 5, 7]}
        return factory.extract("heuristic", ancestor, {"one": noise()}, settings=settings, facts=FACTS)
    still = {"psi_epochs": 0, "ffn_groups": "none"}
    ancestor = build_pico(variant("token"))
    return factory.extract("cluster", ancestor, {"one": noise()}, settings=still, facts=FACTS)
