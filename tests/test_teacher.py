"""What a teacher says: naive loops over single images, and nothing of the teacher is changed."""

from __future__ import annotations

import pytest
import torch
from conftest import build_pico
from planted import variant
from torch import Tensor, nn

from learngene_hub.data import Images
from learngene_hub.shape import Preprocessing
from learngene_hub.teacher import teacher_logits

ODD = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))


def noise(count: int, size: int) -> Images:
    pixels = torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Images(pixels, torch.zeros(count, dtype=torch.int64), ("any",), "noise")


@pytest.fixture
def teacher() -> nn.Module:
    """A pico ViT that drops half of its logits while it trains, and is training."""
    return nn.Sequential(build_pico(variant("token")), nn.Dropout(0.5)).train()


def naive(teacher: nn.Module, images: Images, size: int) -> Tensor:
    """One image after the other, each step spelled out."""
    vit, rows = teacher[0].eval(), []  # type: ignore[index]
    for pixels in images.pixels:
        x = pixels[None].float() / 255
        if x.shape[-1] != size:
            x = nn.functional.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
            x = x.clamp(0, 1)  # bicubic overshoots
        for channel in range(3):
            x[:, channel] = (x[:, channel] - ODD.mean[channel]) / ODD.std[channel]
        with torch.no_grad():
            rows.append(vit(x)[0])
    teacher.train()
    return torch.stack(rows)


@pytest.mark.parametrize("size", [32, 24, 48])  # as they are, enlarged, made smaller
@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_logits_are_those_of_each_image_alone(teacher: nn.Module, size: int, batch_size: int) -> None:
    images = noise(7, size)
    said = teacher_logits(teacher, images, size=32, preprocessing=ODD, batch_size=batch_size)
    assert said.shape == (7, 10) and said.dtype == torch.float32 and not said.requires_grad
    torch.testing.assert_close(said, naive(teacher, images, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_as_it_was(teacher: nn.Module, training: bool) -> None:
    teacher.train(training)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher_logits(teacher, noise(2, 32), size=32, preprocessing=ODD)
    assert all(module.training is training for module in teacher.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_bf16_is_near_and_comes_back_as_float32(teacher: nn.Module) -> None:
    images = noise(4, 32)
    said = teacher_logits(teacher, images, size=32, preprocessing=ODD, precision="bf16")
    full = naive(teacher, images, 32)
    assert said.dtype == torch.float32 and 0 < float((said - full).abs().max()) < 0.05 * float(full.abs().max()) + 0.01


def test_a_teacher_that_fails_is_as_it_was(teacher: nn.Module) -> None:
    with pytest.raises(AssertionError):  # timm's refusal of another size
        teacher_logits(teacher, noise(2, 32), size=40, preprocessing=ODD)
    assert teacher.training
