"""What a teacher says: naive loops over single images, and nothing of the teacher is changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import variant
from safetensors import safe_open
from torch import Tensor, nn

from learngene_hub import _teacher_cache
from learngene_hub._teacher_cache import Said, TeacherCache, teacher_digest
from learngene_hub.data import Images
from learngene_hub.errors import StoreError
from learngene_hub.shape import Preprocessing
from learngene_hub.teacher import Answers, Teacher, teacher_logits
from learngene_hub.training import images_digest

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


# What is kept on disk ------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Five logits of the mean colour, behind an activation that no weight tells."""

    def __init__(self, activation: nn.Module | None = None, shift: float = 0.0) -> None:
        super().__init__()
        self.activation, self.shift = activation or nn.ReLU(), nn.Parameter(torch.arange(5.0) + shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x.mean((1, 2, 3)))[:, None] + self.shift


def kept(folder: Path, **more: Any) -> TeacherCache:
    given: dict[str, Any] = {"teacher": Small(), "size": 8, "preprocessing": ODD, "precision": "fp32"} | more
    return TeacherCache(folder, given["teacher"], given["size"], given["preprocessing"], given["precision"])


SAID = Said(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), 1234)


def test_what_is_kept_comes_back_bit_for_bit_and_is_a_safetensors_file(tmp_path: Path) -> None:
    cache, images = kept(tmp_path / "new" / "folder"), noise(7, 8)
    assert cache.read(images) is None
    cache.write(images, SAID)
    found = cache.read(images)
    assert found is not None and torch.equal(found.logits, SAID.logits) and found.flops == 1234
    (path,) = cache.folder.iterdir()
    with safe_open(path, "pt") as file:  # by the library
        assert file.keys() == ["logits"] and torch.equal(file.get_tensor("logits"), SAID.logits)
        facts = json.loads(file.metadata()["teacher"])
    assert facts["images"] == images_digest(images) and facts["size"] == 8 and facts["flops"] == 1234
    assert len(path.stem) == 64 and path.stat().st_size % 4 == 0


@pytest.mark.parametrize(
    "other",
    [
        {"teacher": Small(shift=1e-6)},
        {"teacher": Small(nn.GELU())},
        {"size": 16},
        {"precision": "bf16"},
        {"preprocessing": replace(ODD, mean=(0.1, 0.2, 0.4))},
        {"preprocessing": replace(ODD, interpolation="bilinear")},
    ],
)
def test_what_was_asked_otherwise_is_not_taken(other: dict[str, Any], tmp_path: Path) -> None:
    images = noise(7, 8)
    kept(tmp_path).write(images, SAID)
    assert kept(tmp_path, **other).read(images) is None and kept(tmp_path).read(images) is not None


def test_what_was_said_of_other_images_is_not_taken(tmp_path: Path) -> None:
    images = noise(7, 8)
    kept(tmp_path).write(images, SAID)
    pixels = images.pixels.clone()
    pixels[3, 0, 0, 0] += 1
    other = Images(pixels, images.labels, images.classes, images.name)
    assert kept(tmp_path).read(other) is None and kept(tmp_path).read(images.subset([0, 1])) is None
    renamed = Images(images.pixels, images.labels, images.classes, "another name")
    assert kept(tmp_path).read(renamed) is not None


def _swapped(content: bytes) -> bytes:
    """Two numbers exchanged: the same length, finite, another order."""
    return content[:-8] + content[-4:] + content[-8:-4]


def _headed(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return changed


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one number short": lambda content: content[:-4],
    "longer": lambda content: content + b"0000",
    "a bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "swapped": _swapped,
    "text": lambda content: b"not a file of numbers at all, but long enough to have a length",
    "a huge header": lambda content: (2**63).to_bytes(8, "little") + content[8:],
    "no metadata": _headed(lambda header: header.pop("__metadata__")),
    "another dtype": _headed(lambda header: header["logits"].update(dtype="I32")),
    "another shape": _headed(lambda header: header["logits"].update(shape=[5, 7])),
    "a shape of words": _headed(lambda header: header["logits"].update(shape=["7", 5])),
    "no shape": _headed(lambda header: header["logits"].update(shape=7)),
    "a list": _headed(lambda header: header.update(logits=[])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(damage: str, tmp_path: Path) -> None:
    images, teacher = noise(7, 8), Teacher(Small(), cache=tmp_path)
    want = Answers(teacher, {"one": images}, preprocessing=ODD).of_all()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert path.read_bytes() != whole and kept(tmp_path).read(images) is None
    assert torch.equal(Answers(teacher, {"one": images}, preprocessing=ODD).of_all(), want)
    assert path.read_bytes() == whole


def test_a_file_of_another_question_under_this_name_is_made_anew(tmp_path: Path) -> None:
    images, other = noise(7, 8), kept(tmp_path, precision="bf16")
    other.write(images, SAID)
    (path,) = tmp_path.iterdir()
    cache = kept(tmp_path)
    cache.write(images, SAID)
    (own,) = set(tmp_path.iterdir()) - {path}
    own.write_bytes(path.read_bytes())
    assert cache.read(images) is None and other.read(images) is not None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, images = kept(tmp_path), noise(7, 8)
    cache.write(images, SAID)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_teacher_cache.os, "fsync", full)
    with pytest.raises(StoreError, match="cannot be written: No space left on device; another folder would work"):
        cache.write(images, Said(SAID.logits + 1, 1))
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [whole]


def test_a_folder_that_cannot_be_is_refused_before_the_teacher_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="cannot be made: .*; a folder of yours would work"):
            Answers(Teacher(Small(), cache=folder), {"one": noise(7, 8)}, preprocessing=ODD)
    if os.getuid():
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(StoreError, match="cannot be written; a folder of yours would work"):
            kept(tmp_path / "shut")


def test_a_digest_is_of_what_is_computed_and_not_of_where_it_lies() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.function: Any = lambda x: x

        def extra_repr(self) -> str:
            return repr(self.function)

    assert "0x" in repr(Odd()) and teacher_digest(Odd()) == teacher_digest(Odd())
    assert teacher_digest(Small()) != teacher_digest(Small(nn.Tanh()))
