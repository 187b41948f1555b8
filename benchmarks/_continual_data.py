"""The images of continual.py: corpora of a few superclasses, tasks of few images, mixtures, noise.

Whatever is drawn depends on the settings and the seed alone. A corpus is a number of images per class of a split, the
same for whoever asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from learngene_hub.data import Augment, Images, load_images, seed_of
from learngene_hub.errors import DataError
from learngene_hub.training import Recipe


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a worker finds what it needs."""

    data: Path  # holds one folder per data set
    ancestor: Path
    work: Path  # where learngenes and the pool are kept
    config: Path
    out: Path  # the rows of the descendants; the other results stand beside it

    def read(self) -> dict[str, Any]:
        """The settings."""
        return yaml.safe_load(self.config.read_text())

    def beside(self, what: str) -> Path:
        """Another file of results: ``continual_growing.csv`` and so on."""
        return self.out.with_name(f"{self.out.stem}_{what}.csv")


def recipe(stage: dict[str, Any], *, precision: str, seed: int) -> Recipe:
    """How a stage of the settings trains."""
    return Recipe(
        epochs=stage["epochs"],
        lr=stage["lr"],
        batch_size=stage["batch_size"],
        precision=precision,
        augment=Augment(flip=stage.get("flip", True), crop_padding=stage.get("crop_padding", 4)),
        seed=seed,
    )


@lru_cache(maxsize=24)
def images_of(folder: Path, split: str, size: int, limit: int) -> Images:
    """``limit`` images of a split (0: all), drawn with seed 0, decoded once per process."""
    return load_images(folder, split=split, size=size, limit=limit or None)


def per_class(images: Images, count: int, seed: int) -> Images:
    """``count`` images of each class, drawn with ``seed``, class by class.

    Raises:
        DataError: a class has fewer.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_of("few", seed)))
    labels = images.labels[order]
    chosen = [order[labels == label][:count] for label in range(len(images.classes))]
    if short := [name for name, rows in zip(images.classes, chosen, strict=True) if len(rows) < count]:
        raise DataError(f"{images.name} has fewer than {count} images of {', '.join(short[:5])}")
    return images.subset(torch.cat(chosen))


def of_classes(images: Images, names: Sequence[str], called: str) -> Images:
    """The images of these classes alone, relabelled in this order.

    Raises:
        DataError: no such class.
    """
    if unknown := set(names) - set(images.classes):
        raise DataError(f"{images.name} has no class {', '.join(sorted(unknown))}")
    number = torch.full((len(images.classes),), -1)
    number[[images.classes.index(name) for name in names]] = torch.arange(len(names))
    kept = (number[images.labels] >= 0).nonzero()[:, 0]
    return Images(images.pixels[kept], number[images.labels[kept]], tuple(names), called)


def corpus(sources: Sources, name: str, split: str) -> Images:
    """A corpus: the settings' number of images of each of its classes."""
    return _corpus(sources.data, sources.config.read_text(), name, split)


@lru_cache(maxsize=16)
def _corpus(data: Path, settings: str, name: str, split: str) -> Images:
    config = yaml.safe_load(settings)
    count, classes = config["corpus"][split], classes_of(config, name)
    # Three times as many as are needed, were they spread evenly: decoding all 50,000 would take a minute.
    drawn = images_of(data / config["corpus"]["data"], split, config["image_size"], 300 * count)
    return per_class(of_classes(drawn, classes, name), count, 0)


def classes_of(config: dict[str, Any], name: str) -> list[str]:
    """The classes of a corpus."""
    return [label for coarse in config["corpora"][name] for label in config["superclasses"][coarse]]


def joined(parts: Sequence[Images], called: str) -> Images:
    """Several sets one after the other, their classes too."""
    first = torch.tensor([0, *(len(part.classes) for part in parts)]).cumsum(0)
    labels = [part.labels + int(before) for part, before in zip(parts, first, strict=False)]
    classes = tuple(f"{part.name}/{label}" for part in parts for label in part.classes)
    return Images(torch.cat([part.pixels for part in parts]), torch.cat(labels), classes, called)


def task(sources: Sources, name: str, seed: int) -> tuple[Images, Images]:
    """(few images of each class drawn with ``seed``, test images) of a data set that no pool has seen."""
    config = sources.read()
    size, limits = config["image_size"], config["sets"][name]
    train = images_of(sources.data / name, "train", size, limits["train"])
    return per_class(train, config["few"], seed), images_of(sources.data / name, "test", size, limits["test"])


def drawn(images: Images, count: int, seed: int) -> Tensor:
    """(count, C, S, S) pixels of images drawn without replacement."""
    generator = torch.Generator().manual_seed(seed_of("drawn", seed))
    return images.pixels[torch.randperm(len(images), generator=generator)[:count]]


def noise(count: int, size: int, seed: int) -> Tensor:
    """(count, 3, size, size) pixels of uniform noise, each its own."""
    generator = torch.Generator().manual_seed(seed_of("noise", seed))
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
