"""HeadsShape: exact costs, the network number by number, models that timm and transformers rebuild from a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from planted import variant
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from learngene_hub._heads import ARCHITECTURE, HeadsShape
from learngene_hub.descendant import Descendant, wrap
from learngene_hub.errors import BudgetError, ShapeError
from learngene_hub.shape import IMAGENET, ViTShape, shape_from_dict, shape_of

SMALL: dict[str, Any] = {"width": 12, "head_dim": 5, "patch": 4, "image_size": 8, "classes": 3}
SHAPES = [
    HeadsShape(heads=(1, 4, 2), **SMALL),
    HeadsShape(heads=(2,), **SMALL | {"class_token": False, "pool": "avg", "mlp_ratio": 2.0}),
    HeadsShape(heads=(3, 3), **SMALL | {"pool": "avg", "classes": 0, "in_chans": 1}),
    HeadsShape(
        heads=(8, 4), **SMALL | {"width": 16, "head_dim": 4, "image_size": 20}
    ),  # the second block alone is plain
]
every = pytest.mark.parametrize("shape", SHAPES, ids=str)


def randomised(shape: HeadsShape, seed: int = 0) -> nn.Module:
    """No bias is 0 and no gain is 1."""
    model = shape.build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def pixels(shape: HeadsShape, count: int = 2) -> Tensor:
    size = (count, shape.in_chans, shape.image_size, shape.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


@every
def test_costs_are_those_of_the_built_model(shape: HeadsShape) -> None:
    model = shape.build()
    assert shape.params() == sum(parameter.numel() for parameter in model.parameters())
    assert shape.bytes(2) == 2 * shape.params()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels(shape, 1))
    assert shape.flops() == counter.get_total_flops()
    assert shape.keys() == set(model.state_dict())


@every
def test_a_shape_is_read_off_its_model_and_out_of_json(shape: HeadsShape) -> None:
    assert shape_of(shape.build()) == HeadsShape.of(shape.build(device="meta")) == shape
    values = json.loads(json.dumps(shape.to_dict()))
    assert values["kind"] == "heads" and shape_from_dict(values) == HeadsShape.from_dict(values) == shape


def test_with_the_heads_of_a_plain_vit_the_costs_are_its_costs_plus_one_head() -> None:
    """From 2 to 3 heads of 32 at width 64: 3 x 32 rows of qkv with bias, 32 columns of proj."""
    plain = variant("token")
    args = {name: getattr(plain, name) for name in ("width", "head_dim", "patch", "image_size", "classes")}
    one_more = HeadsShape(heads=(2, 2, 3), **args)
    assert one_more.params() - plain.params() == 3 * 32 * 64 + 3 * 32 + 64 * 32
    tokens = 17
    assert one_more.flops() - plain.flops() == 2 * (tokens * 4 * 32 * 64 + 2 * tokens * tokens * 32)


def norm(x: Tensor, part: dict[str, Tensor], name: str) -> Tensor:
    spread = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return spread * part[f"{name}.weight"] + part[f"{name}.bias"]


def attend(x: Tensor, part: dict[str, Tensor], heads: int, d: int) -> Tensor:
    """Attention of one image (N, D), one head after the other, as the formula says."""
    inner = heads * d
    qkv = x @ part["attn.qkv.weight"].T + part["attn.qkv.bias"]
    out = part["attn.proj.bias"].expand(len(x), -1).clone()
    for h in range(heads):
        q, k, v = (qkv[:, third * inner + h * d : third * inner + (h + 1) * d] for third in range(3))
        scores = q @ k.T / d**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out = out + weights @ v @ part["attn.proj.weight"][:, h * d : (h + 1) * d].T
    return out


@every
def test_each_block_is_its_formula_with_its_own_heads(shape: HeadsShape) -> None:
    model: Any = randomised(shape).double()
    x = torch.randn(2, shape.tokens, shape.width, generator=torch.Generator().manual_seed(2)).double()
    for block, heads in zip(model.blocks, shape.heads, strict=True):
        part = block.state_dict()
        with torch.no_grad():
            got = block(x)
        for image, wanted in zip(x, got, strict=True):
            h = image + attend(norm(image, part, "norm1"), part, heads, shape.head_dim)
            hidden = nn.functional.gelu(norm(h, part, "norm2") @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"])
            h = h + hidden @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"]
            torch.testing.assert_close(h, wanted, rtol=1e-9, atol=1e-9)


@every
def test_timm_rebuilds_it_from_its_arguments(shape: HeadsShape) -> None:
    arguments = json.loads(json.dumps(shape.model_args()))
    model, x = randomised(shape), pixels(shape)
    again = timm.create_model(shape.architecture, num_classes=shape.classes, **arguments).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert shape_of(again) == shape


def test_a_folder_is_read_by_timm_and_transformers_with_the_same_logits(tmp_path: Path) -> None:
    shape = SHAPES[0]
    model, x = randomised(shape), pixels(shape)
    wrap(model, preprocessing=IMAGENET, num_labels=3).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architecture"] == ARCHITECTURE and config["model_args"]["heads"] == [1, 4, 2]
    read = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    own = Descendant.from_pretrained(tmp_path / "saved").eval()
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        want = model(x)
        assert torch.equal(read(x), want)
        assert torch.equal(own(x).logits, want) and torch.equal(plain(x).logits, want)
    assert shape_of(read) == shape_of(own.timm_model) == shape


def test_features_are_those_of_a_plain_vit() -> None:
    shape = SHAPES[0]
    model: Any = randomised(shape)
    x, arguments = pixels(shape), shape.model_args()
    features = timm.create_model(ARCHITECTURE, features_only=True, num_classes=3, out_indices=(0, 2), **arguments)
    inner = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    features.eval().load_state_dict({name: inner[name] for name in features.state_dict()})
    stream: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _given, out: stream.append(out))
    with torch.no_grad():
        model(x)
        for got, place in zip(features(x), (0, 2), strict=True):
            assert torch.equal(got, stream[place][:, 1:].transpose(1, 2).reshape(2, 12, 2, 2))


@pytest.mark.slow
def test_it_can_be_exported() -> None:
    model, x = randomised(SHAPES[0]), pixels(SHAPES[0])
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x))


def test_a_fresh_model_starts_as_timm_starts_a_vit_and_draws_from_nobodys_numbers() -> None:
    state = torch.get_rng_state()
    model: Any = HeadsShape(width=64, heads=(3, 5), head_dim=32, patch=8, image_size=16, classes=2).build()
    assert torch.equal(torch.get_rng_state(), state)
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj):
            assert 0.018 < float(layer.weight.detach().std()) < 0.022 and not bool(layer.bias.any())
    meta: Any = SHAPES[0].build(device="meta", drop_path_rate=0.2)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert meta.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert [block.attn.scale for block in meta.blocks] == [pytest.approx(5**-0.5)] * 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"heads": ()}, "one number per block"),
        ({"heads": 3}, "one number per block"),
        ({"heads": (2, 0)}, "heads 0 asked; 1 is the least"),
        ({"heads": (2, True)}, "heads True asked"),
        ({"head_dim": 0}, "head_dim 0 asked"),
        ({"width": 10, "heads": (2, 2)}, "2 heads of 5 asked at width 10 .* a ViTShape would work"),
        ({"image_size": 10}, "multiple of patch 4: 8 or 12 would work"),
        ({"pool": "token", "class_token": False}, "without a class token"),
        ({"mlp_ratio": 0}, "mlp_ratio 0 asked"),
    ],
)
def test_what_is_no_such_network_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        HeadsShape(**{"heads": (1, 3), **SMALL, **wrong})


def test_a_file_may_not_say_more_or_less() -> None:
    values = SHAPES[0].to_dict()
    for wrong in (values | {"depth": 3}, values | {"kind": "vit"}, values | {"heads": "11"}, {"kind": "heads"}):
        with pytest.raises(ShapeError):
            HeadsShape.from_dict(wrong)


def test_a_model_that_was_changed_is_not_read_as_what_it_was() -> None:
    with pytest.raises(ShapeError, match="VisionTransformer given; a HeadsShape describes a HeadsViT"):
        HeadsShape.of(variant("token").build(device="meta"))
    with pytest.raises(ShapeError, match="only timm's plain VisionTransformer"):
        ViTShape.of(SHAPES[0].build(device="meta"))
    changes = {
        "fewer heads": lambda m: setattr(m.blocks[1].attn, "head_dim", 10),
        "no attention": lambda m: setattr(m.blocks[0], "attn", nn.Identity()),
        "layer scale": lambda m: setattr(m.blocks[0], "ls1", nn.Linear(1, 1)),
        "another norm": lambda m: setattr(m, "norm", nn.LayerNorm(12, eps=1e-5)),
        "another activation": lambda m: setattr(m.blocks[2].mlp, "act", nn.ReLU()),
    }
    for change in changes.values():
        model = SHAPES[0].build(device="meta")
        change(model)
        with pytest.raises(ShapeError):
            HeadsShape.of(model)


def test_the_budget_says_what_would_fit() -> None:
    shape = HeadsShape(heads=(1, 4, 2, 8), **SMALL)
    two = HeadsShape(heads=(1, 4), **SMALL).params()
    shape.require_budget(shape.params())
    with pytest.raises(BudgetError, match=f"4x12 .* asked: {shape.params():,} .*: its first 2 blocks would fit"):
        shape.require_budget(two)
    with pytest.raises(BudgetError, match="even its first block alone has"):
        shape.require_budget(10)


def test_equal_numbers_are_equal_shapes() -> None:
    one = HeadsShape(heads=(1, 2), **SMALL | {"mlp_ratio": 2.5})
    assert one == HeadsShape(heads=[1, 2], **SMALL | {"mlp_ratio": 2.5000001})  # type: ignore[arg-type]
    assert hash(one) == hash(replace(one)) and one != replace(one, heads=(2, 1))
    assert str(one) == "2x12 of 1,2 heads" and str(replace(one, heads=(1, 1))) == "2x12 of 1 head"
