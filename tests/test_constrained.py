"""LDR's second way of tuning: components are trained instead of blocks, and end as a plain ViT."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from planted import FACTS
from taught import QUICK, TINY, ancestor_of, noise, pictures, randomised
from torch import nn
from typer.testing import CliRunner

from learngene_hub import Descendant, cli, factory
from learngene_hub.errors import SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _auxiliary
from learngene_hub.methods.ldr import Ldr
from learngene_hub.shape import ViTShape
from learngene_hub.training import Recipe


@cache
def extracted() -> Learngene:
    """Read only."""
    settings = QUICK | {"phases": [1, 2, 4], "epochs": 1, "labels": 0.5}
    return factory.extract("ldr", ancestor_of(), {"one": pictures()}, settings=settings, facts=FACTS)


def random_learngene(count: int, **settings: Any) -> Learngene:
    return randomised("ldr", TINY, [f"component.{n}" for n in range(1, count + 1)], phases=[count], **settings)


def constrained(learngene: Learngene, shape: ViTShape, *, seed: int = 0) -> Any:
    return Ldr(**learngene.settings).constrained(learngene, shape, seed=seed)


@pytest.mark.parametrize("k", [1, 3])
def test_constrained_tuning_trains_components_and_ends_as_a_plain_vit(k: int) -> None:
    learngene, x = random_learngene(4, components=k), noise(2, 3, 8, 8)
    shape = replace(TINY, depth=5, classes=7)
    tuned, free = constrained(learngene, shape, seed=3), factory.expand(learngene, depth=5, num_labels=7, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(tuned(x), free(x), atol=1e-4, rtol=1e-4)
    block = sum(tensor.numel() for tensor in learngene.group("component.1").values())
    held = sum(parameter.numel() for parameter in tuned.parameters())
    assert held == replace(shape, depth=1).params() + (k - 1) * block  # k blocks, however deep it is
    recipe = Recipe(epochs=2, lr=1e-2, batch_size=8)
    assert len(list(factory.finetune(tuned, pictures(7), recipe=recipe))) == 4
    model = tuned.materialise()
    assert ViTShape.of(model) == shape
    with torch.no_grad():
        torch.testing.assert_close(model(x), tuned(x), atol=1e-4, rtol=1e-4)
    kept, table = tuned.found(), Ldr(phases=(4,)).table(5, range(1, k + 1)).float()
    components = torch.stack([kept[f"component.{n}.mlp.fc1.bias"] for n in range(1, k + 1)])
    torch.testing.assert_close(model.state_dict()["blocks.3.mlp.fc1.bias"], table[3] @ components)
    assert not torch.equal(kept["component.1.mlp.fc1.bias"], learngene.tensors["component.1.mlp.fc1.bias"])
    assert factory.evaluate(tuned, pictures(7)).count == 16


def test_constrained_tuning_takes_the_stem_of_its_phase_and_knows_its_limits() -> None:
    learngene = extracted()
    chosen = replace(learngene, settings={**learngene.settings, "components": 2})
    tuned = constrained(chosen, TINY)
    assert torch.equal(tuned.found()["stem.pos_embed"], learngene.tensors["phase.2.stem.pos_embed"])
    assert _auxiliary.numbers_of(tuned.found(), "component") == [1, 2]
    with pytest.raises(ShapeError, match="depth 7 asked"):
        constrained(learngene, replace(TINY, depth=7))
    with pytest.raises(ShapeError, match="patch 8 asked"):
        constrained(learngene, replace(TINY, patch=8))
    with pytest.raises(SettingsError, match="a learngene of sws given; constrained tuning is for ldr"):
        factory.constrain(replace(learngene, method="sws", settings={}))


def test_the_verb_constrains_what_expand_grows() -> None:
    """The same function at the same sizes, and components chosen for this call."""
    learngene, x = extracted(), noise(2, 3, 8, 8)
    for asked in ({}, {"components": 2}):
        sizes: dict[str, Any] = {"depth": 5, "num_labels": 7, "seed": 3, "settings": asked}
        tuned: Any = factory.constrain(learngene, **sizes)
        count = asked.get("components", 4)
        names = {name.split(".")[1] for name, _ in tuned.named_parameters() if name.startswith("component.")}
        assert names == {str(n) for n in range(1, count + 1)}
        with torch.no_grad():
            torch.testing.assert_close(tuned(x), factory.expand(learngene, **sizes)(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(SettingsError, match="components 5 asked"):
        factory.constrain(learngene, settings={"components": 5})
    with pytest.raises(ShapeError, match="depth 7 asked"):
        factory.constrain(learngene, depth=7)


def test_a_saved_model_of_constrained_tuning_says_what_the_trained_one_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command: the parameters trained are those of k components, stem, norm and head; the folder is a plain ViT
    whose every block is the sum of them, and whose logits are those of the module that was trained."""
    monkeypatch.chdir(tmp_path)
    extracted().save_pretrained("gene")
    folder = tmp_path / "photos" / "train"
    for shade, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (80 * shade, 60 * i, 90)).save(folder / name / f"{i}.png")
    kept: list[Any] = []
    constrain = factory.constrain

    def watched(*args: Any, **more: Any) -> nn.Module:
        kept.append(constrain(*args, **more))
        return kept[-1]

    monkeypatch.setattr(factory, "constrain", watched)
    asked = ["finetune", "gene", "--depth", "5", "--set", "components=2", "--constrained", "--data", "photos"]
    asked += ["--image-size", "8", "--test-split", "", "--epochs", "2", "--batch-size", "4", "--lr", "1e-2"]
    done = CliRunner().invoke(cli.app, [*asked, "--out", "tuned", "--json"])
    assert done.exit_code == 0, done.stderr
    (tuned,) = kept
    block = sum(tensor.numel() for tensor in extracted().group("component.1").values())
    shape = replace(TINY, depth=5, classes=3)
    trained = replace(shape, depth=1).params() + block
    assert json.loads(done.stdout)["trained_params"] == trained and json.loads(done.stdout)["params"] == shape.params()
    x, model = noise(3, 3, 8, 8), Descendant.from_pretrained("tuned")
    assert ViTShape.of(model.timm_model) == shape
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, tuned.eval()(x), atol=1e-5, rtol=1e-5)
        start = constrain(extracted(), depth=5, num_labels=3, settings={"components": 2})
        assert not torch.allclose(model(x).logits, start(x), atol=1e-3)
    found, table = tuned.found(), Ldr(phases=(4,)).table(5, (1, 2)).float()
    weights = torch.stack([found[f"component.{n}.mlp.fc2.weight"].flatten() for n in (1, 2)])
    for place in range(5):
        got = model.state_dict()[f"timm_model.blocks.{place}.mlp.fc2.weight"].flatten()
        torch.testing.assert_close(got, table[place] @ weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("lsamd-base", "a learngene of lsamd given; constrained tuning is for ldr"),
        ("grown", "--constrained asked; grown is grown already"),
    ],
)
def test_what_has_no_components_is_refused_before_an_image_is_read(
    model: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extracted().save_pretrained("gene")
    Descendant.from_learngene("gene", num_labels=3).save_pretrained("grown")
    said = CliRunner().invoke(cli.app, ["finetune", model, "--constrained", "--data", "nowhere", "--out", "x"])
    assert said.exit_code == 1 and line in said.stderr and len(said.stderr.splitlines()) == 1


def test_a_finished_finetune_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    extracted().save_pretrained("gene")
    Descendant.from_learngene("gene", num_labels=3).save_pretrained("tuned")
    before = Path("tuned/model.safetensors").read_bytes()
    said = CliRunner().invoke(cli.app, ["finetune", "gene", "--data", "nowhere", "--out", "tuned", "--resume"])
    assert said.exit_code == 0 and "tuned is finished already; nothing is left to resume" in said.stderr
    assert Path("tuned/model.safetensors").read_bytes() == before
