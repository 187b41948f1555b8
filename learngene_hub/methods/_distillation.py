"""The settings that lets, tleg, sws and ldr have in common: of an auxiliary that learns what a teacher says.

What is done with them stands in ``_lesson.py``. The shared recipe of the papers is AdamW with a warm-up and a cosine;
here the cosine ends at 0, theirs at 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from learngene_hub import transforms
from learngene_hub._check import is_number, require_int
from learngene_hub.data import Augment, Images
from learngene_hub.errors import SettingsError
from learngene_hub.methods._whole import require_choice
from learngene_hub.shape import ViTShape
from learngene_hub.training import Recipe

LAYOUTS = ("ancestor", "avg", "token")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The settings of the auxiliary and of its training; the learning rate is that of the whole step, whatever its
    size."""

    # The auxiliary; 0, or "ancestor": what the ancestor has, which is then a plain ViT.
    width: int = 0  # channels
    head_dim: int = 0  # channels per head
    mlp_ratio: float = 0.0  # 0: the ancestor's, or 4 where that is no plain ViT
    patch: int = 0  # pixels
    layout: str = "ancestor"  # a class "token", or the average ("avg") of the patch tokens without one
    start: str = "random"  # random, as published; or "ancestor": out of the weights of a plain ViT (addition)
    # Its training.
    epochs: int = 100  # passes over the images
    batch_size: int = 512  # images per update
    lr: float = 5e-4  # peak
    weight_decay: float = 0.05  # of tensors of two and more dimensions
    warmup: float = 0.05  # share of the updates in which the rate rises
    clip: float = 0.0  # largest norm of the whole gradient; 0: any
    drop_path: float = 0.0  # of the last block, rising from 0 at the first
    distil: float = 1.0  # weight of the distillation
    labels: float = 0.0  # weight of the labels; above 0 the data's classes are the teacher's
    temperature: float = 1.0  # tau
    label_smoothing: float = 0.1  # of the labels, where they count
    teacher: str = "once"  # the teacher sees each image once, as it is; or "live": each batch as the auxiliary sees it
    teacher_size: int = 0  # pixels at which it sees them; 0: its own image size
    flip: bool = True  # mirror images at random
    crop_padding: int = 4  # pixels by which a random crop moves
    color: float = 0.0  # largest change of brightness, contrast and saturation
    erase: float = 0.0  # share of the images that lose a rectangle
    mixup: float = 0.0  # a of the Beta(a, a) that two images are blended by
    cutmix: float = 0.0  # a of the Beta(a, a) that the pasted area is drawn from
    precision: str = "fp32"  # of the training: fp32, bf16, fp16
    seed: int = 0  # of every random draw

    def __post_init__(self) -> None:
        require_choice("layout", self.layout, LAYOUTS)
        require_choice("start", self.start, ("random", "ancestor"))
        require_choice("teacher", self.teacher, ("once", "live"))
        for name in ("width", "head_dim", "patch", "teacher_size"):
            require_int(name, getattr(self, name), at_least=0, error=SettingsError)
        for name in ("mlp_ratio", "distil", "labels", "clip"):
            if not (is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; 0 is the least that works")
        if not (is_number(self.drop_path) and 0 <= self.drop_path <= 0.999):
            raise SettingsError(f"drop_path {self.drop_path!r} asked; it is a number from 0 to 0.999")
        if not (is_number(self.temperature) and self.temperature > 0):
            raise SettingsError(f"temperature {self.temperature!r} asked; it must be above 0")
        if not self.distil and not self.labels:
            raise SettingsError("distil 0 and labels 0 asked; at least one of them is above 0")
        if self.teacher == "once" and (self.mixup or self.cutmix):
            raise SettingsError("mixup or cutmix asked with teacher 'once', which sees no mixed images: 'live' does")
        self.recipe()

    @property
    def blocks(self) -> int:
        """Blocks of the auxiliary; 0: the ancestor's."""
        return getattr(self, "depth", 0)

    def auxiliary(self, ancestor: nn.Module, images: Images) -> ViTShape:
        """The shape that would be trained on ``images``, with the classes of a classifier of its own left out.

        Raises:
            SettingsError, ShapeError: there is none.
        """
        from learngene_hub.methods._lesson import auxiliary_shape  # which looks at the settings of this file

        return replace(auxiliary_shape(self, ancestor, images, self.blocks), classes=0)

    def recipe(self, seed: int | None = None) -> Recipe:
        """The recipe of one training run.

        Raises:
            SettingsError: a setting is out of its range.
        """
        augment = Augment(
            flip=self.flip, crop_padding=self.crop_padding, color=self.color, erase=self.erase, mixup=self.mixup,
            cutmix=self.cutmix,
        )  # fmt: skip
        return Recipe(
            epochs=self.epochs, lr=self.lr, batch_size=self.batch_size, weight_decay=self.weight_decay,
            schedule="cosine", warmup=self.warmup, label_smoothing=self.label_smoothing, clip=self.clip or None,
            precision=self.precision, augment=augment, seed=self.seed if seed is None else seed,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ResizedDistillation(Distillation):
    """The same of a method that gets its widths from the shared width transform: tleg, sws and ldr."""

    # Growth.
    form: str = "copy"  # the width transform's form; the papers vary depth alone
    head: str = "fresh"  # the classifier; or "inherit": the auxiliary's, then stored, where there are as many classes

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("form", self.form, transforms.FORMS)
        require_choice("head", self.head, ("fresh", "inherit"))
