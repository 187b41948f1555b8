"""LeTs at a handful of units, with random numbers everywhere, and a quick extraction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from planted import FACTS
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub.data import Images
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _lets_training as training
from learngene_hub.methods import get_method
from learngene_hub.methods._auxiliary import Auxiliary
from learngene_hub.methods._lets_maps import tensor_shapes
from learngene_hub.methods.lets import Lets
from learngene_hub.shape import IMAGENET, Reach, ViTShape

# Eight layers of 4 heads of 2 around four layers of 2 heads: two groups of four, two rows of coefficients each.
NATIVE = ViTShape(
    depth=8, width=8, heads=4, mlp_ratio=2.0, patch=2, image_size=4, classes=3, class_token=False, pool="avg"
)
SMALL = replace(NATIVE, depth=4, width=4, heads=2)
WIDE = replace(NATIVE, width=12, heads=6)  # 8 extra channels, 4 extra heads, 16 extra hidden units
TOKEN = {"class_token": True, "pool": "token"}
QUICK: dict[str, Any] = {
    "depth": 4, "width": 64, "head_dim": 32, "patch": 8, "learngene_depth": 2, "learngene_width": 32, "epochs": 2,
    "batch_size": 6, "crop_padding": 2, "drop_path": 0.1, "lr": 1e-3,
}  # fmt: skip


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def made(
    native: ViTShape = NATIVE, small: ViTShape = SMALL, *, dtype: torch.dtype = torch.float32, **settings: Any
) -> Learngene:
    """A learngene whose every number is random."""
    tensors = {
        name: noise(*shape, seed=place).to(dtype)
        for place, (name, shape) in enumerate(sorted(tensor_shapes(native, small).items()))
    }
    return wrapped(tensors, native, small, **settings)


def wrapped(tensors: dict[str, Tensor], native: ViTShape, small: ViTShape, **settings: Any) -> Learngene:
    reach = Reach(depths=(small.depth // 2, native.depth), widths=(small.width, native.width, native.head_dim))
    return Learngene(
        tensors=tensors, method="lets", settings=settings, shape=native, reach=reach, ancestor=dict(FACTS),
        preprocessing=IMAGENET, license="apache-2.0", provenance={},
    )  # fmt: skip


def at(shape: ViTShape, *, depth: int | None = None, width: int | None = None, **more: Any) -> ViTShape:
    width = shape.width if width is None else width
    depth = shape.depth if depth is None else depth
    return replace(shape, depth=depth, width=width, heads=width // shape.head_dim, **more)


def grow(learngene: Learngene, shape: ViTShape, **settings: Any) -> dict[str, Tensor]:
    method = get_method("lets", dict(learngene.settings) | settings)
    return {name: tensor for name, tensor in method.expand(learngene, shape).items() if tensor is not None}


def images_of(count: int = 12, *, size: int = 16, classes: int = 3, name: str = "one", seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % classes, tuple(str(i) for i in range(classes)), name)


class Convnet(nn.Module):
    """A teacher of another family, which must be in eval mode to say the same twice."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layer, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(self.layer(x).relu(), 0.5, self.training).mean((2, 3)))


def extract(teacher: nn.Module | None = None, data: dict[str, Images] | None = None, **settings: Any) -> Learngene:
    sets = {"one": images_of()} if data is None else data
    return factory.extract("lets", teacher or Convnet(), sets, settings=QUICK | settings, facts=FACTS)


def auxiliary(learngene: Learngene, **settings: Any) -> Auxiliary:
    method = Lets(drop_path=0.0, **settings)
    auxiliary = training.auxiliary(method, learngene.shape, learngene.tensors, IMAGENET)
    auxiliary.eval()
    return auxiliary
