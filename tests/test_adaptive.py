"""Adaptive-Learngene: what an increment adds, by hand and by other roads; projections; keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS, features, planted, variant
from taught import noise, randomised
from torch import Tensor

from learngene_hub import factory
from learngene_hub.errors import ArtefactError, DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _adaptive_key as key
from learngene_hub.methods import _adaptive_merge as merge
from learngene_hub.methods import get_method
from learngene_hub.methods.adaptive import Adaptive
from learngene_hub.methods.ldr import coefficients
from learngene_hub.shape import ViTShape
from learngene_hub.transforms import BLOCK_KEYS

SHAPE = ViTShape(depth=4, width=8, heads=2, patch=4, image_size=8, classes=4)
KINDS = ("net2net", "lsamd", "ldr", "tleg", "adaptive")


def anchor_of(kind: str) -> Learngene:
    """An anchor of random numbers, of four blocks."""
    if kind == "net2net":
        return factory.extract(kind, build_pico(SHAPE), {}, facts=FACTS)
    if kind == "lsamd":
        return planted(build_pico(SHAPE), kept=(0, 2, 3))
    names = ["base", "slope"] if kind == "tleg" else [f"component.{n}" for n in (1, 2, 3)]
    return randomised(kind, SHAPE, names, **({"phases": [3]} if kind == "ldr" else {}))


def increment_of(count: int, seed: int = 0, shape: ViTShape = SHAPE) -> dict[str, Tensor]:
    sizes = shape.build(device="meta").state_dict()
    return {
        f"{n}.{name}": noise(*sizes[f"blocks.0.{name}"].shape, seed=100 * seed + 12 * n + i)
        for n in range(1, count + 1)
        for i, name in enumerate(BLOCK_KEYS)
    }


def grown(anchor: Learngene, increment: dict[str, Tensor], table: Tensor, **sizes: Any) -> dict[str, Tensor]:
    merged = replace(anchor, tensors=merge.merged_tensors(anchor, increment, table))
    return factory.expand(merged, **sizes).state_dict()


# The sum --------------------------------------------------------------------------------------------------------------


def test_the_design_is_the_cosine_of_the_angle() -> None:
    found = merge.design(5, 4)
    for place in range(5):
        for order in range(4):
            assert found[place, order] == pytest.approx(math.cos(order * math.acos(place / 5)), abs=1e-12)


def test_an_increment_on_whole_blocks_is_a_constant_and_a_line_in_depth() -> None:
    anchor, increment = anchor_of("net2net"), increment_of(2)
    merged = merge.merged_tensors(anchor, increment, merge.table(anchor, "components", 2))
    for place in range(4):
        for name in BLOCK_KEYS:
            want = anchor.tensors[f"block.{place}.{name}"] + increment[f"1.{name}"] + place / 4 * increment[f"2.{name}"]
            torch.testing.assert_close(merged[f"block.{place}.{name}"], want)
    assert all(torch.equal(merged[name], anchor.tensors[name]) for name in merged if not name.startswith("block."))


def test_an_increment_on_components_changes_the_first_of_them() -> None:
    anchor, increment = anchor_of("ldr"), increment_of(2)
    merged = merge.merged_tensors(anchor, increment, merge.table(anchor, "components", 2))
    name = "mlp.fc1.weight"
    for n in (1, 2):
        assert torch.equal(
            merged[f"component.{n}.{name}"], anchor.tensors[f"component.{n}.{name}"] + increment[f"{n}.{name}"]
        )
    assert torch.equal(merged[f"component.3.{name}"], anchor.tensors[f"component.3.{name}"])


@pytest.mark.parametrize(
    "sizes", [{}, {"depth": 2}, {"depth": 7}, {"depth": 3, "width": 12}, {"width": 4, "image_size": 16}]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", merge.FORMS)
def test_merging_then_expanding_is_expanding_then_merging(kind: str, form: str, sizes: dict[str, int]) -> None:
    anchor = anchor_of(kind)
    table = merge.table(anchor, form, 2)
    parts, zero = [increment_of(table.shape[1], seed) for seed in (1, 2)], {}
    total: dict[str, Tensor] = {}
    for part, weight in zip(parts, (0.7, -0.4), strict=True):
        merge.add_scaled(total, part, weight)
    merge.add_scaled(zero, parts[0], 0.0)
    late = none = grown(anchor, zero, table, **sizes)
    for part, weight in zip(parts, (0.7, -0.4), strict=True):
        one = grown(anchor, part, table, **sizes)
        late = {name: late[name] + weight * (one[name] - none[name]) for name in late}
    early = grown(anchor, total, table, **sizes)
    plain = factory.expand(anchor, **sizes).state_dict()
    for name in early:
        torch.testing.assert_close(early[name], late[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(none[name], plain[name]), name  # nothing added is the anchor, to the last bit


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_increment_does_to_each_block_is_read_off_expand(kind: str) -> None:
    anchor = anchor_of(kind)
    if kind == "lsamd":  # what copies share: the next test
        anchor = replace(anchor, settings={**anchor.settings, "repeat": "copy"})
    found = merge.layers(anchor, merge.table(anchor, "components", 2))
    want = {
        "net2net": merge.design(4, 2),
        "lsamd": merge.design(4, 2)[[0, 2, 2, 3]],  # block 1 is nearer to 0 and 2 alike, and 0 goes first: see below
        "ldr": coefficients("chebyshev", 4, [1, 2]),
        "tleg": torch.tensor([[1, 0], [1, 0.25], [1, 0.5], [1, 0.75]], dtype=torch.float64),
        "adaptive": merge.design(4, 2),
    }[kind]
    if kind == "lsamd":
        want = merge.design(4, 2)[list(get_method("lsamd").positions(anchor, 4))]
    assert found.keys() == set(BLOCK_KEYS)
    for phi in found.values():
        torch.testing.assert_close(phi, want, rtol=0, atol=1e-7)


def test_where_copies_share_what_a_block_writes_so_do_increments() -> None:
    """Blocks 0 and 3 of four, each twice: what reads is as of its block, what writes half of it."""
    anchor = anchor_of("lsamd")
    settings = {**anchor.settings, "repeat": "share"}
    positions = get_method("lsamd", settings).positions(anchor, 4)
    found = merge.layers(replace(anchor, settings=settings), merge.table(anchor, "components", 2))
    want = merge.design(4, 2)[list(positions)]
    copies = torch.tensor([positions.count(position) for position in positions])
    assert copies.max() > 1
    torch.testing.assert_close(found["attn.qkv.weight"], want, rtol=0, atol=1e-7)
    torch.testing.assert_close(found["mlp.fc2.weight"], want / copies[:, None], rtol=0, atol=1e-7)


def test_learngenes_that_are_no_anchor_are_refused() -> None:
    front = factory.extract("front", build_pico(SHAPE), {}, facts=FACTS)
    with pytest.raises(SettingsError, match="front given as an anchor"):
        merge.places(front)
    with pytest.raises(SettingsError, match="increment given as an anchor"):
        merge.places(replace(anchor_of("adaptive"), settings={"anchor": "0" * 64}))
    with pytest.raises(SettingsError, match="5 components asked; this anchor allows 1 to 4"):
        merge.table(anchor_of("net2net"), "components", 5)
    with pytest.raises(SettingsError, match="entry 'rows'"):
        merge.table(anchor_of("net2net"), "rows", 1)


def test_parents_are_counted_through() -> None:
    """c stands on half of b and a third of a, b on a fifth of a: 2 c + 3 a is 2 c + 1 b + (3 + 2/3 + 1/5) a."""
    a, b, c = ("a" * 64, "b" * 64, "c" * 64)
    methods = {a: Adaptive(), b: Adaptive(parents={a: 0.2}), c: Adaptive(parents={b: 0.5, a: 1 / 3})}
    found = merge.flattened({c: 2.0, a: 3.0}, methods)
    assert found == pytest.approx({c: 2.0, b: 1.0, a: 3 + 2 / 3 + 0.2})
    assert merge.flattened({b: 0.0}, methods) == {}
    with pytest.raises(SettingsError, match="dddd"):
        merge.flattened({"d" * 64: 1.0}, methods)
    with pytest.raises(ArtefactError, match="not there before it"):
        merge.flattened({b: 1.0}, {b: methods[b], a: methods[a]})


# Projection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_ancestor_made_of_an_increment_is_found_again(kind: str) -> None:
    anchor, increment = anchor_of(kind), increment_of(2)
    table = merge.table(anchor, "components", 2)
    state = grown(anchor, increment, table)
    found, residual = merge.fitted(merge.changes(anchor, state), merge.layers(anchor, table))
    assert residual < 1e-4
    again = grown(anchor, found, table)
    for name in state:
        torch.testing.assert_close(again[name], state[name], rtol=1e-3, atol=1e-3)


def test_the_residual_is_the_share_that_lies_outside() -> None:
    """Of changes with 3 parts in the span of a constant and 4 parts beside it, 4/5 of the length are left."""
    phi = merge.design(4, 2)
    line, _ = torch.linalg.qr(torch.cat([phi, noise(4, 2, seed=3).double()], dim=1))
    inside, outside = line[:, 0], line[:, 2]
    change = (3 * inside + 4 * outside)[:, None] * torch.tensor([1.0, -2.0])
    found, residual = merge.fitted({"norm1.bias": change}, {"norm1.bias": phi})
    assert residual == pytest.approx(0.8, abs=1e-5)
    want = torch.linalg.lstsq(phi, change).solution
    got = torch.stack([found["1.norm1.bias"], found["2.norm1.bias"]])
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_an_ancestor_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match="ancestor of 3 blocks given; the anchor has 4"):
        merge.changes(anchor_of("net2net"), build_pico(replace(SHAPE, depth=3)).state_dict())
    with pytest.raises(ShapeError, match="finetuned, would work"):
        merge.changes(anchor_of("net2net"), build_pico(replace(SHAPE, width=16, heads=4, head_dim=4)).state_dict())


def test_an_anchor_of_as_many_components_as_blocks_is_the_ancestor() -> None:
    ancestor = build_pico(variant("token", depth=4))
    learngene = factory.extract("adaptive", ancestor, {}, settings={"components": 4}, facts=FACTS)
    x = noise(2, 3, 32, 32)
    torch.testing.assert_close(features(factory.expand(learngene), x), features(ancestor, x), rtol=1e-2, atol=1e-2)
    assert learngene.provenance["residual"] < 1e-3
    less = factory.extract("adaptive", ancestor, {}, settings={"components": 2}, facts=FACTS)
    assert 0.3 < less.provenance["residual"] < 1


@pytest.mark.parametrize(
    "settings",
    [
        *({"components": count} for count in (0, 5)),
        *({"anchor": text} for text in ("x", "0" * 64)),
        *({"parents": parents} for parents in ({"x": 1}, {"0" * 64: math.inf}, [1])),
        {"entry": "rows"},
        {"key_scale": 3.0},
        *({"key_features": count} for count in (0, 10**9)),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        factory.extract("adaptive", build_pico(SHAPE), {}, settings=settings, facts=FACTS)


def test_an_increment_alone_is_not_grown() -> None:
    with pytest.raises(ShapeError, match="grows only on its anchor 000000000000"):
        Adaptive(anchor="0" * 64).expand(anchor_of("adaptive"), SHAPE)


# Keys -----------------------------------------------------------------------------------------------------------------


def cloud(centre: int, count: int, spread: float = 0.3, width: int = 6) -> Tensor:
    """Points on the sphere around one of its axes."""
    points = noise(count, width, seed=centre + 50) * spread
    points[:, centre] += 1
    return torch.nn.functional.normalize(points, dim=1)


def test_features_approach_the_gaussian_kernel() -> None:
    space = key.Space(features=20_000, scale=0.8)
    z = cloud(0, 5, 1.0)
    psi = space.psi(z)
    torch.testing.assert_close(psi @ psi.T, (-torch.cdist(z, z).square() / (2 * 0.64)).exp(), rtol=0, atol=0.03)


def test_the_key_of_a_mixture_is_the_mixture_of_the_keys() -> None:
    space = key.Space(features=64, scale=0.8, seed=3)
    a, b = cloud(0, 40), cloud(1, 80)
    one, two, both = (key.key_of([part], space) for part in (a, b, torch.cat([a, b])))
    torch.testing.assert_close(both.mean, one.mean / 3 + two.mean * 2 / 3)
    torch.testing.assert_close(both.centre, torch.cat([a, b]).mean(0))
    torch.testing.assert_close(both.variance, torch.cat([a, b]).var(0, correction=0))
    split = key.key_of([a[:7], a[7:], b], space)
    torch.testing.assert_close(split.mean, both.mean)
    assert torch.equal(split.residuals, both.residuals) and (one.count, both.count) == (40, 120)


def test_the_scale_is_the_median_distance() -> None:
    z = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    assert key.scale_of(z, 0) == pytest.approx(math.sqrt(2), abs=1e-5)
    with pytest.raises(DataError, match="cannot tell apart"):
        key.scale_of(torch.ones(3, 2), 0)


def test_residuals_are_those_of_a_mean() -> None:
    """Of rows with variance s^2 in all, n others lie s sqrt(1/n + 1/N) from the mean of N, in the root of the mean."""
    rows = noise(1000, 40)
    found = key.residuals(rows, 1000, seed=0)
    for column, n in enumerate(key.COUNTS):
        want = math.sqrt(40 * (1 / n + 1 / 1000))
        assert float(found[0, column]) == pytest.approx(want, rel=0.04)
        assert want < float(found[1, column]) < 1.35 * want
    few = key.residuals(rows[:40], 40, seed=0)  # 100 images cannot be drawn from 40: 20 are, and scaled
    assert float(few[0, 2]) == pytest.approx(math.sqrt(40 * (1 / 100 + 1 / 40)), rel=0.06)
    with pytest.raises(DataError, match="19 images given; at least 20"):
        key.residuals(rows[:19], 19, seed=0)


def test_the_residual_between_and_beyond_the_counts() -> None:
    """Of a large data set it falls as 1 / sqrt(n), of a small one not below what its own key is off."""
    nothing = torch.zeros(1)
    table = torch.tensor([[1.0, 1.0, 1.0], [4.0, 2.0, 1.0]])
    large, small = (key.Key(nothing, nothing, nothing, table, count) for count in (10**9, 50))
    assert large.residual_at(0.95, 30) == pytest.approx(2.0) and small.residual_at(0.95, 30) == pytest.approx(2.0)
    assert large.residual_at(0.95, 1000) == pytest.approx(1 / math.sqrt(10))
    assert small.residual_at(0.95, 10**9) == pytest.approx(math.sqrt((1 / 50) / (1 / 100 + 1 / 50)))
    assert large.residual_at(0.95, 5) == pytest.approx(4 * math.sqrt(2))
    assert large.residual_at(0.95, round(math.sqrt(300))) == pytest.approx(math.sqrt(8), rel=0.02)
    assert large.residual_at(0.5, 40) == pytest.approx(1.0)
    again = key.Key.of(small.tensors())
    assert again.count == 50 and torch.equal(again.residuals, table)
