"""Descendants that are no plain ViT, saved and loaded: by learngene_hub, and by timm and transformers without it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from kinds import OURS, SHAPES, grown_from, model_of, pixels
from safetensors.torch import load_file
from timm.layers.attention import Attention
from timm.models._hub import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from transformers import AutoModelForImageClassification

from learngene_hub import factory
from learngene_hub._heads import HeadsShape
from learngene_hub.descendant import Descendant, wrap
from learngene_hub.errors import BudgetError, SettingsError
from learngene_hub.shape import IMAGENET, shape_of

everywhere = pytest.mark.parametrize("kind", SHAPES)


@everywhere
def test_a_saved_descendant_is_the_same_wherever_it_is_loaded(kind: str, tmp_path: Path) -> None:
    model, shape = model_of(kind), SHAPES[kind]
    wrapped = wrap(model, preprocessing=IMAGENET)
    assert wrapped.timm_model is model
    wrapped.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["architecture"] == shape.architecture and config["num_features"] == shape.width
    assert config["model_args"] == json.loads(json.dumps(shape.model_args())) and config["num_classes"] == 7
    with torch.no_grad():
        want = model(pixels())
        for loaded in (
            Descendant.from_pretrained(tmp_path / "saved"),
            AutoModelForImageClassification.from_pretrained(tmp_path / "saved"),
        ):
            assert torch.equal(loaded(pixels()).logits, want)
            assert type(loaded) is not Descendant or shape_of(loaded.timm_model) == shape
            for name, entry in loaded.timm_model.state_dict().items():
                assert torch.equal(entry, model.state_dict()[name]) and entry.dtype == model.state_dict()[name].dtype
        plain = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
        assert torch.equal(plain(pixels()), want)


STRANGER = """
import sys
sys.modules["learngene_hub"] = None  # as where it is not installed
import timm, torch
from transformers import AutoModelForImageClassification

folder, *ours = sys.argv[1:]
pixels = torch.load(folder + ".pixels", weights_only=True)
with torch.no_grad():
    plain = timm.create_model("local-dir:" + folder, pretrained=True).eval()(pixels)
    hugging = AutoModelForImageClassification.from_pretrained(folder)(pixel_values=pixels).logits
torch.save([plain, hugging], folder + ".logits")
for each in ours:
    for load in (lambda: timm.create_model("local-dir:" + each, pretrained=True),
                 lambda: AutoModelForImageClassification.from_pretrained(each)):
        try:
            load()
        except (RuntimeError, ImportError) as error:
            print(f"{type(error).__name__}: {error}")
"""


@everywhere
def test_a_model_that_timm_saves_after_tuning_is_loaded_again(kind: str, tmp_path: Path) -> None:
    """By timm's own ``save_for_hf``, which writes what the model was built with, as ``expand`` builds it."""
    model = model_of(kind)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    own = Descendant.from_pretrained(tmp_path).timm_model
    assert shape_of(read) == shape_of(own) == SHAPES[kind]
    with torch.no_grad():
        want = model(pixels())
        assert torch.equal(read(pixels()), want) and torch.equal(own(pixels()), want)


class Wide(Attention):
    """timm's own layer with the head_dim of ``SHAPES``."""

    def __init__(self, dim: int, **more: Any) -> None:
        super().__init__(dim, attn_head_dim=32, **more)


def test_heads_of_one_number_are_read_by_timm_alone_with_its_attention_layer(tmp_path: Path) -> None:
    """What ``_heads.py`` says of timm: an attention dimension is no argument of the model, but one of its layer."""
    shape = HeadsShape(width=64, heads=(4, 4), head_dim=32, patch=8, image_size=32, classes=7)
    model = shape.build().eval()
    wrap(model, preprocessing=IMAGENET).save_pretrained(tmp_path)
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 7,
    }
    plain = timm.create_model("vit_tiny_patch16_224", attn_layer=Wide, **sizes).eval()
    assert type(plain) is VisionTransformer
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(plain(pixels()), model(pixels()))
    assert not {"attn_dim", "attn_head_dim", "head_dim"} & set(inspect.signature(VisionTransformer).parameters)


def test_a_resnet_needs_no_learngene_hub_and_our_architectures_say_that_they_do(tmp_path: Path) -> None:
    for kind in ("resnet", *OURS):
        wrap(model_of(kind), preprocessing=IMAGENET).save_pretrained(tmp_path / kind)
    torch.save(pixels(), tmp_path / "resnet.pixels")
    folders = [str(tmp_path / kind) for kind in ("resnet", *OURS)]
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, *folders], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    with torch.no_grad():
        want = model_of("resnet")(pixels())
    assert all(torch.equal(found, want) for found in torch.load(tmp_path / "resnet.logits", weights_only=True))
    told = run.stdout.splitlines()
    assert len(told) == 2 * len(OURS)
    for kind, plain, hugging in zip(OURS, told[::2], told[1::2], strict=True):
        assert plain == f"RuntimeError: Unknown model ({SHAPES[kind].architecture})"
        assert f"'{SHAPES[kind].architecture}' is not supported in your version of timm" in hugging


def test_from_learngene_takes_heads_settings_and_a_budget(tmp_path: Path) -> None:
    path = grown_from("heads").save_pretrained(tmp_path / "gene")
    model = Descendant.from_learngene(path, heads=[1, 2, 4], num_labels=3, settings={"select": "even"})
    model.save_pretrained(tmp_path / "grown")
    config = json.loads((tmp_path / "grown/config.json").read_text())
    assert config["learngene"]["settings"] == {"select": "even"} and config["model_args"]["heads"] == [1, 2, 4]
    want = factory.expand(grown_from("heads"), heads=[1, 2, 4], num_labels=3, settings={"select": "even"})
    back = Descendant.from_pretrained(tmp_path / "grown").timm_model
    assert shape_of(back) == shape_of(want)
    assert all(torch.equal(entry, back.state_dict()[name]) for name, entry in want.state_dict().items())
    with pytest.raises(BudgetError, match="at most 1,000 parameters asked; the smallest in reach, 1x64"):
        Descendant.from_learngene(path, max_params=1000)
    with pytest.raises(SettingsError, match="slect"):
        Descendant.from_learngene(path, settings={"slect": "even"})
