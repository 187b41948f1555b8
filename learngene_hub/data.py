"""Images, decoded once: load them, normalise them, augment them in batches on the device that holds them.

A data set is one uint8 tensor and one label tensor. That is small (10,000 images of 64 px take 123 MB), needs no worker
processes, and keeps a GPU busy, because augmentation (`_augment.py`) is tensor algebra on whole batches. Reading and
decoding stand in `_decode.py`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learngene_hub import _decode
from learngene_hub._augment import Augment as Augment
from learngene_hub.errors import DataError, SettingsError

if TYPE_CHECKING:
    from learngene_hub.shape import Preprocessing

SAMPLES = _decode.SAMPLES
SPLITS = re.compile(r"(train|training|test|val|valid|validation|dev|data)(-.*)?")  # files and folders so called


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images of one size, in memory.

    Raises:
        DataError: pixels are not uint8 (N, C, S, S), or labels are not N integers below the number of classes.
    """

    pixels: Tensor = field(repr=False)  # uint8 (N, C, S, S)
    labels: Tensor = field(repr=False)  # int64 (N,)
    classes: tuple[str, ...]  # name of each label
    name: str
    skipped: int = 0  # images of the source that could not be read and were left out when it was loaded

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise DataError(f"pixels are uint8 (N, C, S, S); got {self.pixels.dtype} {tuple(self.pixels.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise DataError(
                f"labels are int64 ({len(self.pixels)},); got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        if len(self.labels):
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0 or high >= len(self.classes):
                wrong = low if low < 0 else high
                raise DataError(
                    f"{self.name} has label {wrong}; {len(self.classes)} classes allow 0 to {len(self.classes) - 1}"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """The same images on another device."""
        return Images(self.pixels.to(device), self.labels.to(device), self.classes, self.name)

    def subset(self, indices: Tensor | Sequence[int]) -> Images:
        """The images at `indices`, in that order; the classes stay all of them."""
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.pixels.device)
        return Images(self.pixels[chosen], self.labels[chosen], self.classes, self.name)

    def numbered(self, classes: Sequence[str]) -> Images:
        """The same images with labels that count in `classes`, in which each of their own classes is.

        A split of class folders knows the classes of its own folders alone; this gives a test split the numbers that a
        training split, or a model, has for the same names.

        Raises:
            DataError: a class that is not in `classes`, or one that occurs twice.
        """
        names = tuple(classes)
        if self.classes == names:
            return self
        if odd := [name for name in self.classes if names.count(name) != 1]:
            raise DataError(
                f"{self.name} has the class {odd[0]!r}, which is not one of {_some(names)}; its classes: "
                f"{_some(self.classes)}"
            )
        places = torch.tensor([names.index(name) for name in self.classes], device=self.labels.device)
        return replace(self, labels=places[self.labels], classes=names)

    def split(self, fraction: float, generator: torch.Generator) -> tuple[Images, Images]:
        """(rest, held out): a random `fraction` of the images, at least one, is held out.

        Raises:
            SettingsError: `fraction` is not between 0 and 1, or leaves nothing on one side.
        """
        held = max(1, round(len(self) * fraction))
        if not 0 < fraction < 1 or held >= len(self):
            raise SettingsError(
                f"cannot hold out {fraction} of {len(self)} images; a fraction between 0 and 1 leaves both sides some"
            )
        order = torch.randperm(len(self), generator=generator)
        return self.subset(order[held:]), self.subset(order[:held])


def load_images(
    source: str | Path,
    *,
    split: str = "train",
    size: int = 64,
    in_chans: int = 3,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
    unlabelled: bool = False,
) -> Images:
    """Images of one split, decoded, shorter side resized to `size` pixels (bicubic) and centre cropped.

    `source` is tried in this order: the name of a bundled sample ("signdigits"); a parquet file (which is one split, so
    `split` says nothing about it); a folder with SPLIT.parquet or SPLIT-*.parquet, also under data/; a folder of class
    folders, under SPLIT/ or directly; a Hub data set id (needs the `datasets` library). `limit` keeps that many images,
    drawn with `seed`. `unlabelled` needs no labels, so that a folder of images will do too; all get the label 0.

    Raises:
        DataError: nothing there, no such split or column, an empty set, an unreadable image, labels out of range.
        SettingsError: `size`, `in_chans` or `limit` makes no sense.
    """
    for what, value in (("size", size), ("limit", 1 if limit is None else limit)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingsError(f"{what} is a number of at least 1, not {value!r}")
    if in_chans not in (1, 3):
        raise SettingsError(f"images are read with 1 (grey) or 3 (RGB) channels, not {in_chans!r}")
    place = _sample(str(source)) if str(source) in SAMPLES else source
    rows = _decode.read_source(place, split, image_column, label_column, unlabelled=unlabelled)
    if not len(rows.labels):
        raise DataError(f"{source}, split {split!r}, holds no images")
    labels, classes = _checked_labels(rows, str(source))
    chosen = _drawn(len(labels), limit, seed)
    pixels, kept = _decode.decode_rows(rows, chosen, size, in_chans, skip_unreadable)
    if not kept:
        raise DataError(f"{source}, split {split!r}: none of its {len(chosen)} images can be read")
    name = called(source)
    found = torch.tensor([labels[i] for i in kept])
    return Images(torch.from_numpy(pixels), found, classes, name, skipped=len(chosen) - len(kept))


def _some(names: Sequence[str], most: int = 8) -> str:
    """Names in a message, the first of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def called(source: str | Path) -> str:
    """What a data set is called: as its folder or file, or as the folder above "train.parquet" and the like."""
    path = Path(os.path.abspath(source)) if os.path.exists(source) else Path(source)
    names = [part.removesuffix(".parquet") for part in reversed(path.parts) if part != path.anchor]
    return next((name for name in names if not SPLITS.fullmatch(name)), names[0] if names else str(source))


def load_column(
    source: str | Path, column: str, *, split: str = "train", limit: int | None = None, seed: int = 0
) -> tuple[Any, ...]:
    """The values of another column, such as a domain, of the images that ``load_images`` gives with the same split,
    limit and seed; in their order.

    Raises:
        DataError: as ``load_images``; class folders have no columns.
    """
    place = _sample(str(source)) if str(source) in SAMPLES else source
    rows = _decode.read_source(place, split, None, column)
    return tuple(rows.labels[i] for i in _drawn(len(rows.labels), limit, seed))


def _drawn(count: int, limit: int | None, seed: int) -> Sequence[int]:
    """Which of ``count`` images are used, ascending."""
    if limit is None or limit >= count:
        return range(count)
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Float pixels ``(x - mean) / std``, of uint8 pixels (B, C, S, S) or of floats in [0, 1]."""
    facts = preprocessing.for_channels(pixels.shape[1])
    unit = 255.0 if pixels.dtype == torch.uint8 else 1.0
    scale = torch.tensor([1 / (unit * s) for s in facts.std], device=pixels.device).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(facts.mean, facts.std, strict=True)], device=pixels.device)
    return torch.addcmul(shift.view(-1, 1, 1), pixels.to(torch.float32), scale)


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words; different parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def shuffled_indices(
    count: int, batch: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1, accumulate: int = 1
) -> Iterator[Tensor]:
    """Indices (m,) of each micro-batch of one process in one epoch: m = batch / (world * accumulate).

    The order depends on (seed, epoch) alone, so `batch` images make the same update however many processes and
    micro-batches they are spread over. What is left of the last batch is dropped.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of("order", seed, epoch)))
    part = batch // (world * accumulate)
    for start in range(0, count - batch + 1, batch):
        for micro in range(accumulate):
            first = start + (micro * world + rank) * part
            yield order[first : first + part]


def ordered_batches(
    images: Images, batch_size: int, preprocessing: Preprocessing, device: torch.device | str | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised pixels and labels in stored order, every image once; the last batch may be smaller. For evaluation."""
    device = images.pixels.device if device is None else device
    for start in range(0, len(images), batch_size):
        window = slice(start, start + batch_size)
        yield normalise(images.pixels[window].to(device), preprocessing), images.labels[window].to(device)


def _sample(name: str) -> Path:
    """Folder of a bundled sample."""
    return Path(str(resources.files("learngene_hub"))) / "samples" / name


def _checked_labels(rows: _decode.Rows, source: str) -> tuple[list[int], tuple[str, ...]]:
    """Labels as integers, and the class names; numbers stand in where there are no names."""
    for i, label in enumerate(rows.labels):
        if isinstance(label, bool) or not isinstance(label, int):
            raise DataError(f"{rows.where(i)} has label {label!r}; labels are whole numbers from 0")
    labels: list[int] = list(rows.labels)
    classes = rows.classes or tuple(str(i) for i in range(max(labels) + 1))
    for i, label in enumerate(labels):
        if not 0 <= label < len(classes):
            raise DataError(
                f"{rows.where(i)} has label {label}; {source} has {len(classes)} classes, 0 to {len(classes) - 1}"
            )
    return labels, classes
