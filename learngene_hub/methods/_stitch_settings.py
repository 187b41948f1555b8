"""The settings that sn-net and learngene-pool share, and what both do with a pool once it is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from learngene_hub._check import is_number, require_int
from learngene_hub.data import Augment, Images
from learngene_hub.errors import SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _stitch_growth, _stitch_measure
from learngene_hub.methods._stitch_net import INITS
from learngene_hub.methods._whole import require_choice
from learngene_hub.shape import Shape
from learngene_hub.training import Recipe

REDUCTIONS = ("batchmean", "published")


@dataclass(frozen=True, kw_only=True)
class Stitching:
    """The settings that the two methods have in common, and how they grow. The second stage, of the whole pool, has the
    plain names."""

    growth: ClassVar[frozenset[str]] = frozenset({"route", "head"})
    nearest: ClassVar[bool]  # neighbours alone are stitched
    unlabelled: ClassVar[str] = "labels=0"  # the settings with which no label counts

    epochs: int = 50  # passes over the images
    batch_size: int = 256  # of both stages
    lr: float = 1e-4  # peak
    first_epochs: int = 100  # of each instance, before the pool
    first_lr: float = 2.5e-4  # peak
    weight_decay: float = 0.05  # of tensors of two and more dimensions
    warmup: float = 0.1  # share of the updates in which the rate rises
    labels: float = 0.5  # weight of the labels; above 0 the data's classes are the ancestor's
    distil: float = 0.5  # weight of what the teacher says
    soft: bool = True  # KL(teacher || student); False: the class that the teacher names
    temperature: float = 1.0  # of both in the KL
    reduction: str = "batchmean"  # of a soft loss: per image; "published": divided by the classes as well
    label_smoothing: float = 0.0  # of the labels
    teacher_size: int = 0  # pixels at which the teacher sees the images; 0: its own
    init: str = "least-squares"  # of the linear layers
    init_images: int = 100  # that least squares are taken over
    sampling: str = "uniform"  # one route of all; "flops": a group of like cost, then a route in it
    flops_gap: float = 1e9  # multiply-adds above the cheapest of a group at which the next one opens
    tune: str = "all"  # the parameters that learn with the pool; "stitches": the linear layers and the class tokens
    drop_path: float = 0.0  # of the last block, rising from 0 at the first
    flip: bool = True  # mirror images at random
    crop_padding: int = 4  # pixels by which a random crop moves
    color: float = 0.0  # largest change of brightness, contrast and saturation
    erase: float = 0.25  # share of the images that lose a rectangle
    mixup: float = 0.8  # a of the Beta(a, a) that two images are blended by
    cutmix: float = 1.0  # a of the Beta(a, a) that the pasted area is drawn from
    held_out: float = 0.05  # share of the images that nothing learns from, for the table; 0: measured on all of them
    precision: str = "fp32"  # of the training: fp32, bf16, fp16
    seed: int = 0  # of every random draw
    # Growth.
    route: int = -1  # the number of the route that is grown; -1: by depth, width and parameters
    head: str = "inherit"  # the instance's, where the classes are as many; or "fresh"

    def __post_init__(self) -> None:
        require_choice("reduction", self.reduction, REDUCTIONS)
        require_choice("init", self.init, INITS)
        require_choice("sampling", self.sampling, ("uniform", "flops"))
        require_choice("tune", self.tune, ("all", "stitches"))
        require_choice("head", self.head, ("inherit", "fresh"))
        require_int("route", self.route, at_least=-1, error=SettingsError)
        require_int("init_images", self.init_images, at_least=1, error=SettingsError)
        require_int("teacher_size", self.teacher_size, at_least=0, error=SettingsError)
        for name in ("labels", "distil"):
            if not (is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; 0 is the least that works")
        for name in ("temperature", "flops_gap"):
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; it must be above 0")
        for name in ("held_out", "drop_path"):
            if not (is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; it is a share, at least 0 and below 1")
        if not self.labels and not self.distil:
            raise SettingsError("distil 0 and labels 0 asked; at least one of them is above 0")
        for first in (True, False):
            self.recipe(first=first)

    @property
    def labelled(self) -> bool:
        """Whether the labels of the data count."""
        return self.labels > 0

    def recipe(self, *, first: bool) -> Recipe:
        """The recipe of the first stage, or of the second.

        Raises:
            SettingsError: a setting is out of its range.
        """
        augment = Augment(
            flip=self.flip, crop_padding=self.crop_padding, color=self.color, erase=self.erase, mixup=self.mixup,
            cutmix=self.cutmix,
        )  # fmt: skip
        return Recipe(
            epochs=self.first_epochs if first else self.epochs, lr=self.first_lr if first else self.lr,
            batch_size=self.batch_size, weight_decay=self.weight_decay, schedule="cosine", warmup=self.warmup,
            label_smoothing=self.label_smoothing, precision=self.precision, augment=augment, seed=self.seed,
        )  # fmt: skip

    def plan(
        self,
        learngene: Learngene,
        *,
        depth: int | None,
        width: int | None,
        heads: int | tuple[int, ...] | None,
        num_labels: int | None,
        image_size: int | None,
        in_chans: int,
    ) -> Shape:
        """The most accurate route of these sizes, by the learngene's own table, else the largest.

        ``width`` is that of the last block. With the setting ``route`` it is that route; with nothing asked it is the
        native shape, the largest instance. A route inside one instance is a plain ViT.

        Raises:
            ShapeError: no route has these sizes; the message names the nearest.
        """
        return _stitch_growth.choose(
            learngene, nearest=self.nearest, route=self.route, depth=depth, width=width, heads=heads,
            num_labels=num_labels, image_size=image_size, in_chans=in_chans,
        )  # fmt: skip

    def descendants(self, learngene: Learngene) -> list[tuple[dict[str, Any], float | None]]:
        """Each route, or the one that the setting ``route`` names, and its accuracy in the learngene's own table."""
        _, routes = _stitch_growth.routes_in(learngene, nearest=self.nearest)
        known = _stitch_growth.accuracies(learngene)
        numbers = [self.route] if self.route >= 0 else [route.id for route in routes]
        return [({"route": number}, known.get(number)) for number in numbers]

    def expand(self, learngene: Learngene, shape: Any) -> dict[str, Tensor | None]:
        """Every parameter of the route of ``shape``, as it was trained; the head is fresh (None) where the classes are
        not as many as the pool's, or ``head`` says so.

        Raises:
            ShapeError: no route has this shape.
        """
        return _stitch_growth.expand(learngene, shape, nearest=self.nearest, head=self.head)

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: Any) -> None:
        """Refuse tensors that no pool with this largest instance has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        _stitch_growth.check(shapes, native, nearest=self.nearest)

    def measured(self, learngene: Learngene, images: Images, *, device: torch.device | str = "cpu") -> Learngene:
        """The same learngene with the accuracy of every route on labelled ``images`` in its table, by which routes are
        chosen from then on.

        Raises:
            DataError: images of another size or number of classes than the pool's, or none.
        """
        return _stitch_measure.measured(learngene, images, nearest=self.nearest, device=device)
