"""Random changes to a batch of images, as tensor algebra on the device that holds it.

All random numbers come from a generator on the CPU, and only the few numbers per image are moved, so one seed gives the
same images on every device. Public name: `learngene_hub.data.Augment`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from learngene_hub.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes to a batch of pixels in [0, 1], each off by default; `mix` is the part that changes labels too."""

    flip: bool = False  # mirror left and right, half of the images
    crop_padding: int = 0  # pixels of reflected border, of which a random window of the old size is kept
    color: float = 0.0  # brightness, contrast and saturation each times a factor in [1 - color, 1 + color]
    erase: float = 0.0  # share of the images that lose a rectangle (2 to 33 % of the area) to their mean colour
    mixup: float = 0.0  # a of the Beta(a, a) that two images are blended by; 0.2 to 1
    cutmix: float = 0.0  # a of the Beta(a, a) that the pasted area is drawn from; with mixup too, one of them per batch

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or value < 0:
                raise SettingsError(f"{field.name} is a number of at least 0, not {value!r}")
        if self.color > 1 or self.erase > 1:
            raise SettingsError(f"color and erase go from 0 to 1; got {self.color} and {self.erase}")
        if self.crop_padding != int(self.crop_padding):
            raise SettingsError(f"crop_padding is a whole number of pixels, not {self.crop_padding}")

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Changed pixels (B, C, S, S); the input is left alone. `generator` is a CPU one, wherever the pixels are."""
        if self.flip:
            pixels = _flip(pixels, torch.rand(len(pixels), generator=generator) < 0.5)
        if self.crop_padding:
            if self.crop_padding >= pixels.shape[-1]:
                raise SettingsError(f"crop_padding {self.crop_padding} must be below the image size {pixels.shape[-1]}")
            offsets = torch.randint(2 * self.crop_padding + 1, (2, len(pixels)), generator=generator)
            pixels = _crop(pixels, self.crop_padding, offsets)
        if self.color:
            factors = 1 + self.color * (2 * torch.rand(3, len(pixels), generator=generator) - 1)
            pixels = _recolor(pixels, factors)
        if self.erase:
            pixels = _erase(pixels, _rectangles(len(pixels), pixels.shape[-1], self.erase, generator))
        return pixels

    def mix(self, pixels: Tensor, labels: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pixels and targets of mixup or cutmix. Targets are weights (B, classes), or just `labels` if both are off.

        Source: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899. One blend for the whole batch.
        """
        if not self.mixup and not self.cutmix:
            return pixels, labels
        cut = bool(self.cutmix) and (not self.mixup or bool(torch.rand((), generator=generator) < 0.5))
        share = _beta(self.cutmix if cut else self.mixup, generator)
        other = torch.randperm(len(pixels), generator=generator).to(pixels.device)
        if cut:
            pixels, share = _paste(pixels, pixels[other], share, generator)
        else:
            pixels = torch.lerp(pixels[other], pixels, share)
        targets = F.one_hot(labels, classes).to(pixels.dtype)
        return pixels, torch.lerp(targets[other], targets, share)


def _per_image(values: Tensor, pixels: Tensor) -> Tensor:
    """Numbers (B,) as (B, 1, 1, 1) on the pixels' device."""
    return values.to(pixels.device, non_blocking=True).view(-1, 1, 1, 1)


def _flip(pixels: Tensor, mirrored: Tensor) -> Tensor:
    return torch.where(_per_image(mirrored, pixels), pixels.flip(-1), pixels)


def _crop(pixels: Tensor, padding: int, offsets: Tensor) -> Tensor:
    """Window of the old size at offsets (2, B) (down, right) of the reflect-padded pixels."""
    window = torch.arange(pixels.shape[-1])
    rows, columns = (offsets[:, :, None] + window).to(pixels.device)  # each (B, S)
    padded = F.pad(pixels, [padding] * 4, mode="reflect")
    batch = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _recolor(pixels: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation by factors (3, B), clamped to [0, 1]."""
    brightness, contrast, saturation = (_per_image(factor, pixels) for factor in factors)
    pixels = pixels * brightness
    pixels = torch.lerp(pixels.mean((1, 2, 3), keepdim=True), pixels, contrast)
    pixels = torch.lerp(pixels.mean(1, keepdim=True), pixels, saturation)
    return pixels.clamp(0, 1)


def _rectangles(count: int, size: int, share: float, generator: torch.Generator) -> Tensor:
    """(4, count) rows top, bottom, left, right; empty (bottom = top) where an image is spared."""
    hit, area, aspect, down, right = torch.rand(5, count, generator=generator)
    aspect = torch.exp((2 * aspect - 1) * math.log(3.3))
    area = (0.02 + 0.31 * area) * size * size
    height = (area * aspect).sqrt().round().clamp(1, size) * (hit < share)
    width = (area / aspect).sqrt().round().clamp(1, size)
    top, left = (down * (size - height + 1)).floor(), (right * (size - width + 1)).floor()
    return torch.stack([top, top + height, left, left + width])


def _inside(rectangles: Tensor, size: int) -> Tensor:
    """(n, 1, size, size) True inside each of the rectangles (4, n)."""
    line = torch.arange(size, device=rectangles.device)
    top, bottom, left, right = rectangles[:, :, None]
    rows, columns = (line >= top) & (line < bottom), (line >= left) & (line < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _erase(pixels: Tensor, rectangles: Tensor) -> Tensor:
    inside = _inside(rectangles.to(pixels.device), pixels.shape[-1])
    return torch.where(inside, pixels.mean((2, 3), keepdim=True), pixels)


def _beta(a: float, generator: torch.Generator) -> float:
    """One draw of Beta(a, a)."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(a, a))


def _paste(pixels: Tensor, others: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """CutMix: a rectangle of about 1 - share of the area from `others`; returns the share that is really kept."""
    size = pixels.shape[-1]
    side = math.sqrt(1 - share) * size
    middle = torch.rand(2, generator=generator) * size
    low, high = (middle - side / 2).round().clamp(0, size), (middle + side / 2).round().clamp(0, size)
    rectangle = torch.stack([low[0], high[0], low[1], high[1]])[:, None]
    kept = 1 - float((high - low).prod()) / size**2
    return torch.where(_inside(rectangle.to(pixels.device), size), others, pixels), kept
