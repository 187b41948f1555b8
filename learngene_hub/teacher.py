"""What a teacher says of images: asked for each batch, or once about every image and kept, in memory or on disk.

A teacher is any module that maps images to logits: a ViT, a CNN, a transformers model. It is copied before it is asked,
so that its mode, its device and its gradients stay as they were. What is kept on disk stands in ``_teacher_cache.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from learngene_hub import transforms
from learngene_hub._teacher_cache import Said, TeacherCache
from learngene_hub.data import Images, normalise
from learngene_hub.errors import DataError, SettingsError, ShapeError
from learngene_hub.shape import Preprocessing, ViTShape
from learngene_hub.training import StateDir, logits_of


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model whose predictions an auxiliary learns, where that is not the ancestor as it is."""

    model: nn.Module  # images -> logits
    preprocessing: Preprocessing | None = None  # what it expects of pixels; None: as the ancestor does
    name: str = ""
    cache: str | Path | None = None  # a folder that keeps what it says; extractions that share it ask it once


@torch.no_grad()
def teacher_logits(
    teacher: nn.Module,
    images: Images,
    *,
    size: int,
    preprocessing: Preprocessing,
    batch_size: int = 64,
    precision: str = "fp32",
) -> Tensor:
    """The teacher's logits (N, classes), float32 on the CPU, for ``images`` resized to ``size`` pixels (bicubic).

    The teacher is put into eval mode for this and back afterwards.
    """
    training, device = teacher.training, place_of(teacher)
    teacher.eval()
    said = []
    try:
        for start in range(0, len(images), batch_size):
            pixels = images.pixels[start : start + batch_size].to(device).float() / 255
            if pixels.shape[-1] != size:
                pixels = nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(
                    0, 1
                )
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                said.append(logits_of(teacher(normalise(pixels, preprocessing))).cpu())
    finally:
        teacher.train(training)
    return torch.cat(said)


def place_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU, where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def plain_shape(model: nn.Module) -> ViTShape | None:
    """The shape of a plain timm ViT, None of anything else."""
    try:
        return ViTShape.of(model)
    except ShapeError:
        return None


class Answers:
    """What a teacher says of the images of some data sets.

    ``classes`` are its outputs, ``size`` the pixels at which it sees images, ``flops`` those of one forward of one
    image (``ViTShape.flops`` of a plain ViT, else counted by ``torch.utils.flop_counter``).

    Raises:
        SettingsError: it gives no logits, or takes no images of this size.
        DataError: it takes images of other channels.
        StoreError: the folder of its cache cannot be made.
    """

    def __init__(
        self,
        teacher: Teacher,
        data: Mapping[str, Images],
        *,
        size: int = 0,  # 0: its own
        preprocessing: Preprocessing,  # of the batches; and its own, where it has none
        precision: str = "fp32",
        role: str = "teacher",  # what errors call it
    ) -> None:
        self.data, self.seen_as, self.precision, self.role = data, preprocessing, precision, role
        self.a_role = f"a{'n' if role == 'ancestor' else ''} {role}"
        self.preprocessing = teacher.preprocessing or preprocessing
        images = next(iter(data.values()))
        shape = plain_shape(teacher.model)
        self.size = size or _own_size(teacher.model, shape, images.pixels.shape[-1])
        self._hint = "0, its own, may work" if size else f"{images.pixels.shape[-1]}, that of the images, may work"
        if getattr(teacher.model, "num_classes", None) == 0:
            raise SettingsError(
                f"{self.a_role} without a classifier given; the auxiliary learns from its logits: one that has it, "
                f"or a teacher that has it, would work"
            )
        if shape is not None and images.pixels.shape[1] != shape.in_chans:
            raise DataError(f"images of {images.pixels.shape[1]} channels asked; the {role} takes {shape.in_chans}")
        self.model = _copied(teacher.model, shape, self.size)
        self._cache = None
        if teacher.cache is not None:
            self._cache = TeacherCache(Path(teacher.cache), teacher.model, self.size, self.preprocessing, precision)
        self._kept: dict[str, Said] = {}
        for name, each in data.items() if self._cache else ():
            if (found := self._cache.read(each)) is not None:  # type: ignore[union-attr]
                self._kept[name] = found
        if shape is not None:
            self.classes, self.flops = shape.classes, replace(shape, image_size=self.size).flops()
        elif self._kept:
            said = next(iter(self._kept.values()))
            self.classes, self.flops = said.logits.shape[1], said.flops
        else:
            self.classes, self.flops = self._probe(images)

    @torch.no_grad()
    def of_batch(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, S, S) as the auxiliary sees them."""
        x = _as_seen_by(self.preprocessing, self.seen_as, x)
        if x.shape[-1] != self.size:
            x = nn.functional.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True)
        if place_of(self.model) != x.device:
            self.model.to(x.device)
        return logits_of(self.model(x))

    def of_all(self, state: StateDir | None = None) -> Tensor:
        """Logits (N, classes) of all images of all data sets, in their order, float32 on the CPU.

        They are read from the cache, where there is one; else from ``state``, in a run that goes on.
        """
        if self._cache is not None:
            return torch.cat([self._cached(name) for name in self.data])

        def say() -> Tensor:
            return torch.cat([self._say(images) for images in self.data.values()])

        return say() if state is None else state.once("teacher", say)

    def _cached(self, name: str) -> Tensor:
        assert self._cache is not None
        if name not in self._kept:
            self._kept[name] = Said(self._say(self.data[name]), self.flops)
            self._cache.write(self.data[name], self._kept[name])
        return self._kept[name].logits

    def _say(self, images: Images) -> Tensor:
        return teacher_logits(
            self.model, images, size=self.size, preprocessing=self.preprocessing, precision=self.precision
        )

    @torch.no_grad()
    def _probe(self, images: Images) -> tuple[int, int]:
        """(classes, FLOPs of one image), from one forward of the first image."""
        device, size = place_of(self.model), self.size
        x = normalise(images.pixels[:1].to(device), self.seen_as)
        try:
            with FlopCounterMode(display=False) as counter:
                logits = self.of_batch(x)
        except Exception as error:  # whatever a stranger's model raises
            told = " ".join(str(error).split())[:120]
            raise SettingsError(
                f"the {self.role} fails on an image of {size} px and {x.shape[1]} channels: {told}; "
                f"teacher_size={self._hint}"
            ) from error
        if logits.ndim != 2:
            raise SettingsError(
                f"the {self.role} gives {list(logits.shape)} for one image; logits, [1, classes], are needed"
            )
        return logits.shape[1], counter.get_total_flops()


def _own_size(model: nn.Module, shape: ViTShape | None, side: int) -> int:
    """The pixels at which a model sees images: of a plain ViT its own, else what timm says of it, else theirs."""
    if shape is not None:
        return shape.image_size
    inner = getattr(model, "timm_model", model)
    named = (getattr(inner, "pretrained_cfg", None) or {}).get("input_size") or (side,)
    return named[-1]


def _copied(model: nn.Module, shape: ViTShape | None, size: int) -> nn.Module:
    """A copy in eval mode, without gradients; a plain ViT's for images of ``size`` pixels."""
    if shape is None or shape.image_size == size:
        return copy.deepcopy(model).eval().requires_grad_(False)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    wanted = replace(shape, image_size=size)
    side = wanted.image_size // wanted.patch
    state["pos_embed"] = transforms.resample_positions(state["pos_embed"], side, int(shape.class_token))
    copied = wanted.build()
    copied.load_state_dict(state)
    return copied.to(state["pos_embed"].device).eval().requires_grad_(False)


def _as_seen_by(teacher: Preprocessing, auxiliary: Preprocessing, x: Tensor) -> Tensor:
    """Normalised pixels (B, C, S, S) of the auxiliary's as the teacher expects them."""
    ours, theirs = (facts.for_channels(x.shape[1]) for facts in (auxiliary, teacher))
    if (ours.mean, ours.std) == (theirs.mean, theirs.std):
        return x
    mean, std, wanted_mean, wanted_std = (
        torch.tensor(numbers, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        for numbers in (ours.mean, ours.std, theirs.mean, theirs.std)
    )
    return (x * std + mean - wanted_mean) / wanted_std
