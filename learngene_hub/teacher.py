"""What a teacher says of images, computed once and kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learngene_hub.data import Images, normalise
from learngene_hub.shape import Preprocessing


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
    training, device = teacher.training, next(teacher.parameters()).device
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
                said.append(teacher(normalise(pixels, preprocessing)).float().cpu())
    finally:
        teacher.train(training)
    return torch.cat(said)
