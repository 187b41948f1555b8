"""Net2Net: the ancestor's function at larger sizes, on pico and on real weights; copies and shares by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from conftest import build_pico
from planted import FACTS, VARIANTS, features, variant
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import get_method
from learngene_hub.methods.net2net import Net2Net, _tilt
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.widening import Widening, widen

WRITES = ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def strong(kind: str = "token", **more: Any) -> nn.Module:
    """An ancestor whose blocks say something: deviations of 0.1 to 0.3, where timm's fresh ones are 0.02."""
    model = build_pico(variant(kind, **more))
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.add_(noise(*parameter.shape, seed=place), alpha=0.1)
    return model


def extract(ancestor: nn.Module, **settings: Any) -> Learngene:
    return factory.extract("net2net", ancestor, {}, settings=settings, facts=FACTS)


def state(ancestor: nn.Module, *, depth: int, width: int, **settings: Any) -> dict[str, Tensor]:
    return factory.expand(extract(ancestor, **settings), depth=depth, width=width).state_dict()


# The function is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("settings", [{}, {"form": "balanced"}, {"form": "exact"}, {"tilt": 0.5}], ids=str)
def test_at_integer_multiples_of_the_width_the_function_is_the_ancestors(kind: str, settings: dict[str, Any]) -> None:
    ancestor, x = strong(kind), noise(2, 3, 32, 32)
    want, native = features(ancestor, x), ViTShape.of(ancestor).width
    learngene = extract(ancestor, **settings)
    for times in (1, 2, 3):
        got = features(factory.expand(learngene, width=times * native), x)
        silent = torch.zeros_like(want)
        tiled = [want, *([silent if settings.get("form") == "exact" else want] * (times - 1))]
        torch.testing.assert_close(got, torch.cat(tiled, -1), rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("tilt", [0.0, 0.9])
def test_the_exact_form_keeps_the_function_at_every_width(kind: str, tilt: float) -> None:
    ancestor, x = strong(kind), noise(2, 3, 32, 32)
    want, native = features(ancestor, x), ViTShape.of(ancestor)
    learngene = extract(ancestor, form="exact", tilt=tilt)
    for width in range(native.width, 2 * native.width + 64, native.head_dim):
        got = features(factory.expand(learngene, width=width), x)
        torch.testing.assert_close(got[:, : native.width], want, rtol=0, atol=1e-4 * float(want.abs().max()))
        assert float(got[:, native.width :].abs().sum()) < 1e-4


def test_between_multiples_the_plain_copy_is_not_exact() -> None:
    """So the tests above could fail."""
    ancestor, x = strong(), noise(2, 3, 32, 32)
    want = features(ancestor, x)
    got = features(factory.expand(extract(ancestor), width=96), x)[:, :64]
    assert float((got - want).abs().max()) > 0.05 * float(want.abs().max())


def test_real_weights_keep_their_function_at_two_and_three_times_the_width() -> None:
    """The bundled learngene's blocks come from a trained model: large gains, deviations that differ by block."""
    ancestor = factory.expand(Learngene.from_pretrained("lsamd-base"), depth=6, num_labels=10, image_size=64)
    x = noise(2, 3, 64, 64)
    want = features(ancestor, x)
    for settings, widths in ({}, (384, 576)), ({"form": "exact"}, (256, 384, 448)):
        learngene = extract(ancestor, **settings)
        for width in widths:
            got = features(factory.expand(learngene, width=width), x)[:, :192]
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("width", [64, 128])
def test_inserted_identity_blocks_keep_the_function_at_every_depth(width: int) -> None:
    ancestor, x = strong(), noise(2, 3, 32, 32)
    want = torch.cat([features(ancestor, x)] * (width // 64), -1)
    learngene = extract(ancestor)
    assert learngene.settings["repeat"] == "identity"
    for depth in (4, 5, 6):
        got = features(factory.expand(learngene, depth=depth, width=width), x)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


# Which blocks, which units --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "depth", "positions"),
    [
        ({}, 1, (0,)),
        ({}, 6, (0, 2, 4, 7, 9, 11)),
        ({}, 7, (0, 2, 4, 6, 7, 9, 11)),  # 11/6 = 1.8, 3.7, 5.5 up, 7.3, 9.2
        ({"select": "first"}, 6, (0, 1, 2, 3, 4, 5)),
        ({}, 16, (0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11)),  # 11 j / 15, nearest
        ({"select": "first"}, 16, (0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11)),
        ({}, 24, tuple(min(range(12), key=lambda k: (abs(23 * k - 11 * j), k)) for j in range(24))),
    ],
)
def test_positions_of_twelve_blocks(settings: dict[str, Any], depth: int, positions: tuple[int, ...]) -> None:
    assert Net2Net(**settings).positions(12, depth) == positions


def test_a_smaller_depth_holds_the_ancestors_own_blocks() -> None:
    ancestor = build_pico(variant("token", depth=4))
    have = ancestor.state_dict()
    for settings, positions in ({}, (0, 2, 3)), ({"select": "first"}, (0, 1, 2)):
        grown = state(ancestor, depth=3, width=64, **settings)
        for place, position in enumerate(positions):
            for key in (k.removeprefix("blocks.0.") for k in have if k.startswith("blocks.0.")):
                assert torch.equal(grown[f"blocks.{place}.{key}"], have[f"blocks.{position}.{key}"])


def test_what_a_repeated_block_writes() -> None:
    """Depth 5 of 3: 2 j / 4 = 0, 0.5, 1, 1.5, 2, ties down: blocks 0, 0, 1, 1, 2."""
    ancestor = strong()
    have = ancestor.state_dict()
    for repeat, parts in ("copy", (1, 1)), ("share", (0.5, 0.5)), ("identity", (1, 0)):
        grown = state(ancestor, depth=5, width=64, repeat=repeat)
        for place, position in enumerate((0, 0, 1, 1, 2)):
            part = 1 if position == 2 else parts[place % 2]
            for key in (k.removeprefix("blocks.0.") for k in have if k.startswith("blocks.0.")):
                want = have[f"blocks.{position}.{key}"] * (part if key in WRITES else 1)
                torch.testing.assert_close(grown[f"blocks.{place}.{key}"], want, rtol=0, atol=0)


def test_copies_and_their_shares_by_a_loop() -> None:
    """Width 64 -> 160: 5 heads of 2 (3 copies and 2), 160 channels of 64 (3 copies of the first 32, else 2)."""
    ancestor = strong()
    old, new = ancestor.state_dict(), state(ancestor, depth=3, width=160)
    copies = [3 if i % 64 < 32 else 2 for i in range(160)]
    hidden = [3 if i % 256 < 128 else 2 for i in range(640)]
    unit = [(i // 32 % 2) * 32 + i % 32 for i in range(160)]  # head h is native head h mod 2
    for o, i in ((0, 0), (5, 70), (100, 159), (159, 33), (64, 64), (131, 96)):
        shares = [3, 2][unit[i] // 32]
        pairs = {
            "attn.qkv": ((160 + o, i), (64 + unit[o], i % 64), copies[i]),
            "attn.proj": ((o, i), (o % 64, unit[i]), shares),
            "mlp.fc1": ((4 * o, i), (4 * o % 256, i % 64), copies[i]),
            "mlp.fc2": ((o, 4 * i), (o % 64, 4 * i % 256), hidden[4 * i]),
        }
        for module, (there, native, count) in pairs.items():
            key = f"blocks.1.{module}.weight"
            assert new[key][there] == pytest.approx(float(old[key][native]) / count)
        assert new["pos_embed"][0, 3, i] == old["pos_embed"][0, 3, i % 64]
        assert new["norm.weight"][i] == old["norm.weight"][i % 64]


def test_below_the_native_width_the_leading_units_are_kept() -> None:
    ancestor = strong("odd")
    old, new = ancestor.state_dict(), state(ancestor, depth=3, width=64)
    for key, tensor in new.items():
        if key.startswith("head."):
            continue
        if "qkv" in key:
            want = torch.cat([old[key][96 * part : 96 * part + 64] for part in range(3)])
        else:
            want = old[key][: tensor.shape[0]]
        want = want[..., : tensor.shape[-1]] if tensor.dim() in (2, 3) else want
        assert torch.equal(tensor, want), key


def test_scores_of_a_width_stage_choose_other_units() -> None:
    ancestor = strong("odd")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(8, dtype=torch.long), ("0",), "noise")
    learngene = widen(extract(ancestor), {"noise": images}, Widening(score_images=8))
    best = torch.topk(learngene.tensors["width.stream"], 64).indices.sort().values
    assert best.tolist() != list(range(64))
    grown = factory.expand(learngene, width=64).state_dict()
    assert torch.equal(grown["norm.weight"], ancestor.state_dict()["norm.weight"][best])
    Net2Net().check({name: tuple(tensor.shape) for name, tensor in learngene.tensors.items()}, learngene.shape)


# Tilt -----------------------------------------------------------------------------------------------------------------


def test_tilted_shares_by_hand() -> None:
    """Two units, five copies: unit 0 three times (-1, 0, 1), unit 1 twice (-1, 1)."""
    torch.testing.assert_close(_tilt(2, 5, 0.25), torch.tensor([0.75, 0.75, 1.0, 1.25, 1.25]))
    assert torch.equal(_tilt(4, 4, 0.9), torch.ones(4))


def test_tilt_lets_two_copies_of_a_hidden_unit_learn_different_things() -> None:
    ancestor, x = strong(), noise(4, 3, 32, 32)
    apart = {}
    for tilt in (0.0, 0.5):
        model = factory.expand(extract(ancestor, tilt=tilt), width=128)
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        gradient = model.get_parameter("blocks.1.mlp.fc1.bias").grad
        assert gradient is not None
        apart[tilt] = float((gradient[:256] - gradient[256:]).abs().max() / gradient.abs().max())
    assert apart[0.0] < 1e-5 < 0.5 < apart[0.5]


# Extraction -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VARIANTS)
def test_without_data_the_learngene_is_the_ancestor_in_float32(kind: str) -> None:
    ancestor = build_pico(variant(kind)).half()
    learngene = factory.extract("net2net", ancestor, {}, facts=FACTS, preprocessing=IMAGENET)
    native = ViTShape.of(ancestor)
    assert {tensor.dtype for tensor in learngene.tensors.values()} == {torch.float32}
    assert learngene.params == native.params() - (native.width + 1) * native.classes
    grown = factory.expand(learngene).state_dict()
    for key, tensor in ancestor.state_dict().items():
        assert key.startswith("head.") or torch.equal(grown[key], tensor.float()), key
    facts = dict(learngene.provenance)
    assert 0 <= facts.pop("seconds") < 60
    assert facts == {"data": {}, "steps": 0, "images_seen": 0, "flops": 0}
    assert learngene.reach.to_dict() == {"depths": [1, 6], "widths": [32, 4 * native.width, 32]}


def test_a_descendant_takes_other_images() -> None:
    """One channel sums the ancestor's three; 64 px resample the positions."""
    ancestor = build_pico(variant("token"))
    model = factory.expand(extract(ancestor), image_size=64, in_chans=1, num_labels=7)
    assert ViTShape.of(model) == replace(variant("token"), image_size=64, in_chans=1, classes=7)
    kernel = ancestor.state_dict()["patch_embed.proj.weight"]
    torch.testing.assert_close(model.state_dict()["patch_embed.proj.weight"], kernel.sum(1, keepdim=True))
    assert model(noise(1, 1, 64, 64)).shape == (1, 7)


def test_an_ancestor_of_another_family_is_refused() -> None:
    with pytest.raises(ShapeError, match="ResNet"):
        extract(timm.create_model("resnet18", pretrained=False))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"form": "wide"}, "form 'wide' asked; there are copy, balanced, exact"),
        ({"select": "last"}, "select 'last' asked; there are even, first"),
        ({"repeat": "twice"}, "repeat 'twice' asked; there are copy, share, identity"),
        ({"tilt": 1}, "tilt 1 asked"),
        ({"tilt": "much"}, "tilt 'much' asked"),
        ({"depth": 3}, "it has form, select, repeat, tilt"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        get_method("net2net", settings)
    assert "\n" not in str(caught.value)


def test_a_file_without_one_whole_block_is_refused() -> None:
    learngene = extract(build_pico(variant("token")))
    shapes = {key: tuple(tensor.shape) for key, tensor in learngene.tensors.items() if not key.startswith("block.1.")}
    with pytest.raises(ArtefactError, match=r"blocks at positions \[0, 2\].*all 3"):
        Net2Net().check(shapes, learngene.shape)
    with pytest.raises(ArtefactError, match="unknown tensor search.alpha"):
        Net2Net().check(shapes | {"search.alpha": (2, 3, 2)}, learngene.shape)


def test_gradients_against_finite_differences() -> None:
    ancestor = build_pico(variant("token", depth=2))
    learngene = extract(ancestor, tilt=0.5, repeat="share")
    method, native = get_method("net2net", learngene.settings), learngene.shape
    shape = replace(native, depth=3, width=96, heads=3)
    key = "block.0.mlp.fc2.weight"
    tensors = {name: tensor.double() for name, tensor in learngene.tensors.items()}

    def total(weight: Tensor) -> Tensor:
        grown = method.expand(replace(learngene, tensors={**tensors, key: weight}), shape)
        return sum(
            ((t * torch.arange(t.numel()).reshape(t.shape).cos()).sum() for t in grown.values() if t is not None),
            torch.zeros(()),
        )

    weight = tensors[key].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(weight), weight)
    for row, column in (0, 0), (5, 100), (63, 255):
        step = torch.zeros_like(weight)
        step[row, column] = 1e-4
        slope = (total(weight.detach() + step) - total(weight.detach() - step)) / 2e-4
        assert float(slope) == pytest.approx(float(gradient[row, column]), abs=1e-6)
