"""Bugs of released code that no single part of a method answers for: flags without effect, paths, undefined names."""

from __future__ import annotations

import ast
import re
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS
from taught import TINY, pictures

import learngene_hub
from learngene_hub import factory
from learngene_hub.methods import BUILT_IN
from learngene_hub.methods._stitch_net import StitchNet, least_squares
from learngene_hub.methods._stitch_training import make_lesson, start_stitches
from learngene_hub.methods._stitching import one_way
from learngene_hub.methods.sn_net import SnNet
from learngene_hub.shape import IMAGENET
from learngene_hub.teacher import Teacher

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "crop_padding": 2, "lr": 1e-2}
PATH = re.compile(r"(/|~|\.{1,2}/)\w.*|.*\.pth?$")
SOURCES = sorted((Path(learngene_hub.__file__).parent / "methods").glob("*.py"))


@cache
def settings_read() -> frozenset[str]:
    """Every X of ``self.X``, ``settings.X`` and ``method.X`` in this package, and every name in a tuple that
    ``getattr`` may go through, but for the checks of X."""
    found: set[Any] = set()
    for path in sorted(Path(learngene_hub.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        checks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
        checked = {id(node) for check in checks for node in ast.walk(check)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Tuple) and id(node) not in checked:
                found |= {each.value for each in node.elts if isinstance(each, ast.Constant)}
            if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
                continue
            owner = ast.unparse(node.value)
            own = owner == "self" and id(node) in checked
            if owner.rpartition(".")[2] in ("self", "settings", "method", "stage", "asked", "given") and not own:
                found.add(node.attr)
    return frozenset(found)


@pytest.mark.parametrize("name", BUILT_IN)
def test_pitfall_no_setting_is_parsed_and_then_unused(name: str) -> None:
    """The released pool has flags of an averaged model, and of a drop-path rate, that nothing reads."""
    assert {field.name for field in fields(BUILT_IN[name])} <= settings_read()


def test_pitfall_no_method_knows_a_path_of_somebodys_machine() -> None:
    """The released pool loads checkpoints from where its authors had them; here a method sees what it is handed."""
    for path in SOURCES:
        texts = [
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        told = [text for text in texts if PATH.match(text)]
        assert not told, path.name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("learngene-pool", {"widths": [4, 8], "depth": 3, "first_epochs": 1, **QUICK}),
        ("auto", QUICK),
        ("cluster", {"psi_epochs": 1, "ffn_groups": [[0, 1]], "batch_size": 8}),
    ],
)
def test_pitfall_extraction_reads_and_leaves_no_file(
    name: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released code needs folders of its authors', and writes checkpoints beside them."""
    monkeypatch.chdir(tmp_path)
    ancestor = build_pico(replace(TINY, depth=4))
    learngene = factory.extract(name, ancestor, {"one": pictures()}, settings=settings, facts=FACTS)
    assert learngene.tensors and not list(tmp_path.iterdir())


def test_pitfall_least_squares_see_images_as_they_are() -> None:
    """The released SN-Net fits its layers on a training batch: mixed, cropped, flipped. Here each row is a token of one
    whole image, whatever the augmentation; the images are those that the seed draws."""
    settings = SnNet(seed=7, init_images=6, held_out=0.25, mixup=1.0, cutmix=1.0, crop_padding=2, distil=0.0)
    vits: dict[int, Any] = {n: build_pico(replace(TINY, width=4 * (n + 1), heads=n + 1), seed=n) for n in (0, 1)}
    own, data = replace(TINY, width=8), {"one": pictures()}
    lesson = make_lesson(settings, Teacher(vits[1]), data, own, IMAGENET, "sn-net")
    nets = [StitchNet(vits, one_way({0: 3, 1: 3}, nearest=True), seed=1) for _ in range(2)]
    start_stitches(settings, nets[0], lesson)
    known = {image.numpy().tobytes(): place for place, image in enumerate(lesson.images.pixels)}
    assert len(known) == 12  # of 16, a quarter held out
    order = torch.randperm(12, generator=torch.Generator().manual_seed(7))[:6]
    raw = lesson.images.pixels[order].float() / 255
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (IMAGENET.mean, IMAGENET.std))
    least_squares(nets[1], (raw - mean) / std)
    for name, tensor in nets[1].stitches.state_dict().items():
        torch.testing.assert_close(nets[0].stitches.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
