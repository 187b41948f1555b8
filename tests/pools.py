"""Small pools: anchors of random numbers, data sets that look different, entries that were trained for a moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import build_pico
from planted import FACTS
from taught import randomised

from learngene_hub import factory
from learngene_hub.data import Images
from learngene_hub.learngene import Learngene
from learngene_hub.pool import Pool
from learngene_hub.shape import ViTShape
from learngene_hub.training import Recipe

TINY = ViTShape(depth=3, width=16, heads=2, patch=4, image_size=16, classes=4)
ONCE = Recipe(epochs=2, batch_size=8, lr=1e-2, schedule="constant", warmup=0.0)


def anchor_of(kind: str = "net2net") -> Learngene:
    """Read only."""
    return _anchor_of(kind)


@cache
def _anchor_of(kind: str) -> Learngene:
    if kind == "net2net":
        return factory.extract(kind, build_pico(TINY), {}, facts=FACTS)
    return randomised(kind, TINY, [f"component.{n}" for n in (1, 2, 3)], **({"phases": [3]} if kind == "ldr" else {}))


def look(kind: int, count: int = 24, *, classes: int = 2, seed: int = 0, size: int = 16) -> Images:
    """Images of one of many looks: a colour of its own in stripes of a width of its own, and some noise."""
    generator = torch.Generator().manual_seed(1000 * kind + seed)
    paint = torch.Generator().manual_seed(kind)
    colours = torch.rand(2, 3, 1, 1, generator=paint) * 255
    stripes = ((torch.arange(size) // (1 + kind % 4)) % 2).bool()
    flat = torch.where(stripes[None, :, None] if kind % 2 else stripes[None, None, :], colours[0], colours[1])
    pixels = flat.expand(count, 3, size, size) + 25 * torch.randn(count, 3, size, size, generator=generator)
    labels = torch.arange(count) % classes
    pixels[:, :, :4, :4] += (labels * 90.0)[:, None, None, None]  # what tells the classes apart
    return Images(pixels.clamp(0, 255).to(torch.uint8), labels, tuple(map(str, range(classes))), f"look-{kind}")


def noise_images(count: int, *, size: int = 16, channels: int = 3, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 2, ("0", "1"), "noise")


def pool_of(
    folder: Path,
    looks: Sequence[int] = (),
    *,
    kind: str = "net2net",
    count: int = 24,
    recipe: Recipe = ONCE,
    license: str | None = None,
    **more: Any,
) -> Pool:
    """A pool with an entry for each of these looks."""
    anchor = anchor_of(kind) if license is None else replace(anchor_of(kind), license=license)
    pool = Pool.create(folder, anchor, **({"features": 256} | more))
    for number in looks:
        pool = pool.add(look(number, count), recipe=recipe)
    return pool


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a pool but the manifest, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "pool.json"
    }
