"""A small ViT, VGG and ResNet, pictures for them, and the heuristic learngenes extracted from them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from conftest import build_pico
from planted import FACTS, variant
from torch import nn

from learngene_hub import factory
from learngene_hub._conv import ConvShape
from learngene_hub.data import Images
from learngene_hub.learngene import Learngene

VGG16 = ConvShape(
    family="vgg", stages=((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3), head_hidden=4096, head_kernel=7
)
VGG = ConvShape(family="vgg", stages=((4,), (6, 5), (8, 8, 8)), head_hidden=16, head_kernel=4, image_size=32, classes=6)
RESNET = ConvShape(family="resnet", stages=((4,), (6,), (8, 8), (10, 10, 10)), image_size=32, classes=6)
CNNS = {"vgg": VGG, "resnet": RESNET}


def pictures(classes: int = 6, each: int = 6, channels: int = 3, side: int = 32, seed: int = 0) -> Images:
    """Noise with a bright corner that says the class, so that there is something to learn."""
    labels = torch.arange(classes).repeat_interleave(each)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(60, (len(labels), channels, side, side), generator=generator, dtype=torch.uint8)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[:, 4 * label : 4 * label + 4, :8] = 255
    return Images(pixels, labels, tuple(f"c{i}" for i in range(classes)), "pictures")


@cache
def ancestor_of(kind: str) -> nn.Module:
    """Read only. Every number of it, of running statistics too, is its own."""
    if kind == "vit":
        return build_pico(variant("token", depth=4, classes=6))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CNNS[kind].build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand_like(buffer), alpha=0.1)
                else:
                    buffer.fill_(3)
    return model.eval()


@cache
def extracted(kind: str, **settings: Any) -> Learngene:
    """Read only."""
    asked = {"head_hidden": 12, "front": (3, 5)} if kind == "vgg" else {"front": (3, 5, 7)}
    chosen = {**asked, "last_k": 2, "batch_size": 9, "classes_per_task": 3, "crop_padding": 2, **settings}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}
    return factory.extract("heuristic", ancestor_of(kind), {"one": pictures()}, settings=plain, facts=FACTS)
