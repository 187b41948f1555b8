"""Cluster: what is stored, and growth by mathematical identities."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from clustered import SMALL, STILL, ancestor_of, extracted, head, noise, pixels, with_head
from conftest import build_pico
from planted import FACTS

from learngene_hub import factory
from learngene_hub._heads import HeadsShape
from learngene_hub.errors import ShapeError
from learngene_hub.methods._cluster_parts import stored_groups, stored_shapes
from learngene_hub.methods.cluster import Cluster
from learngene_hub.shape import ViTShape

# The centroids that the released code has for each layer.
CENTROIDS = {
    768: "1,5,4,2,8 2,6,11 6,3,5,7 3,7,5,9,1,2 5,2,1,8,10 6,7,10,11 0,1,5,3 10,6,4,11 0,3,7,9 3 3,4 5",
    384: "1,2,3 0,1,3 4,2,3 1,3 4,1,3,5 4,0,1 2,0,1,3,5 4 5,1,2 5 2 3",
    192: "0,1,2 0,2 0,2 0,1,2 0,1,2 1,0 0,1,2 2,0 0,1,2 1,0 1 0",
}
# What is stored -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "heads", "ffns", "millions"), [(768, 43, 9, 51.75), (384, 30, 10, 15.17), (192, 27, 10, 4.49)]
)
def test_the_sizes_with_the_published_lists(width: int, heads: int, ffns: int, millions: float) -> None:
    """DeiT-B 51.75M of 85.80M, S 15.17M of 21.67M, Ti 4.49M of 5.52M; and, part by part, the same by hand."""
    from learngene_hub.methods._cluster_groups import fixed_groups

    counts = [len(layer.split(",")) for layer in CENTROIDS[width].split()]
    native = ViTShape(depth=12, width=width, heads=width // 64, classes=0)
    groups = fixed_groups("published", native)
    assert groups is not None and len(groups) == ffns and sum(counts) == heads
    got = sum(math.prod(shape) for shape in stored_shapes(native, counts, groups).values())
    attention = heads * (4 * 64 * width + 3 * 64) + 12 * width
    mlps = ffns * (8 * width**2 + 5 * width)
    outer = 769 * width + 198 * width + 2 * width + 12 * 4 * width
    assert got == attention + mlps + outer and round(got / 1e6, 2) == millions


def test_the_tensors_are_the_ancestors_own() -> None:
    learngene, own = extracted(psi_epochs=0), ancestor_of().state_dict()
    for layer, centroids in enumerate(learngene.provenance["centroids"]):
        block = learngene.group(f"block.{layer}")
        for rank, centroid in enumerate(centroids):
            rows, columns = slice(64 * rank, 64 * rank + 64), slice(64 * centroid, 64 * centroid + 64)
            assert torch.equal(block["attn.proj.weight"][:, rows], own[f"blocks.{layer}.attn.proj.weight"][:, columns])
        assert torch.equal(block["norm2.weight"], own[f"blocks.{layer}.norm2.weight"])
        assert torch.equal(block["attn.proj.bias"], own[f"blocks.{layer}.attn.proj.bias"])
    assert torch.equal(learngene.tensors["tail.norm.weight"], own["norm.weight"])
    counts = [len(layer) for layer in learngene.provenance["centroids"]]
    want = stored_shapes(SMALL, counts, stored_groups(learngene.tensors))
    assert {name: tuple(tensor.shape) for name, tensor in learngene.tensors.items()} == want
    assert all(1 <= count <= 3 for count in counts) and min(counts) < 3 and max(counts) > 1


def test_images_are_drawn_with_the_seed_and_all_counted() -> None:
    few = extracted(images=5, **STILL)
    assert few.provenance["measured_images"] == 5 and extracted(**STILL).provenance["measured_images"] == 12
    again, other = (
        factory.extract(
            "cluster", ancestor_of(), {"one": noise()}, settings={"images": 5, "seed": seed, **STILL}, facts=FACTS
        )
        for seed in (0, 1)
    )
    assert again.provenance["attention_distance_px"] == few.provenance["attention_distance_px"]
    assert other.provenance["attention_distance_px"] != few.provenance["attention_distance_px"]
    both = factory.extract(
        "cluster", ancestor_of(), {"a": noise(4), "b": noise(8, seed=1)}, settings=STILL, facts=FACTS
    )
    a, b = (torch.tensor(factory.extract("cluster", ancestor_of(), {"x": each}, settings=STILL, facts=FACTS)
                         .provenance["attention_distance_px"]) for each in (noise(4), noise(8, seed=1)))  # fmt: skip
    torch.testing.assert_close(
        torch.tensor(both.provenance["attention_distance_px"]), (4 * a + 8 * b) / 12, rtol=0, atol=2e-3
    )
    assert both.provenance["data"] == {"a": {"images": 4}, "b": {"images": 8}}


# Growth ---------------------------------------------------------------------------------------------------------------


def test_with_one_cluster_per_head_the_descendant_is_the_ancestor() -> None:
    """Every tensor, to the last bit, and any multiple of the heads computes the same."""
    learngene, ancestor = extracted(eps=0.0, **STILL), ancestor_of()
    model = factory.expand(learngene)
    assert ViTShape.of(model) == SMALL
    for name, tensor in ancestor.state_dict().items():
        assert name.startswith("head.") or torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        want = ancestor(pixels())
        for heads in (6, 9, 24, (3, 6, 12, 9)):
            grown = with_head(factory.expand(learngene, heads=heads), ancestor)
            assert isinstance(HeadsShape.of(grown), HeadsShape)
            torch.testing.assert_close(grown(pixels()), want, rtol=1e-5, atol=1e-5)


def test_more_heads_never_change_what_the_centroids_add_up_to() -> None:
    learngene, ancestor = extracted(psi_epochs=0), ancestor_of()
    counts = tuple(len(layer) for layer in learngene.provenance["centroids"])
    with torch.no_grad():
        want = with_head(factory.expand(learngene, heads=counts), ancestor)(pixels())
        for heads in (3, 4, 7, 24):
            grown = with_head(factory.expand(learngene, heads=heads), ancestor)
            torch.testing.assert_close(grown(pixels()), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, ancestor(pixels()), atol=1e-3)  # which the clusters did change


def test_seven_heads_of_three_centroids_are_0120120() -> None:
    learngene, own = extracted(eps=0.0, **STILL), ancestor_of().state_dict()
    state = factory.expand(learngene, heads=7).state_dict()
    for number, (centroid, copies) in enumerate(zip([0, 1, 2, 0, 1, 2, 0], [3, 2, 2, 3, 2, 2, 3], strict=True)):
        *inputs, columns = head(state, 1, number)
        *same, whole = head(own, 1, centroid)
        assert all(torch.equal(a, b) for a, b in zip(inputs, same, strict=True)), number
        torch.testing.assert_close(columns * copies, whole)
    assert torch.equal(state["blocks.1.attn.proj.bias"], own["blocks.1.attn.proj.bias"])


def test_fewer_heads_than_centroids_are_the_first_of_them_as_they_are() -> None:
    own = ancestor_of().state_dict()
    state = factory.expand(extracted(eps=0.0, **STILL), heads=(2, 1, 3, 2)).state_dict()
    for place, count in enumerate((2, 1, 3, 2)):
        for number in range(count):
            assert all(
                torch.equal(a, b) for a, b in zip(head(state, place, number), head(own, place, number), strict=True)
            )


def test_centroids_come_in_the_order_of_priority() -> None:
    """The second and third head have one q and one k, so they look equally far, unlike the first: it comes last."""
    ancestor: Any = build_pico(SMALL)
    with torch.no_grad():
        for block in ancestor.blocks:
            block.attn.qkv.weight.mul_(6)
            for third in (0, 192):  # q, k
                for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
                    tensor[third + 128 : third + 192] = tensor[third + 64 : third + 128]
    settings = {"eps": 1e-6, **STILL}
    learngene = factory.extract("cluster", ancestor, {"one": noise()}, settings=settings, facts=FACTS)
    assert learngene.provenance["centroids"] == [[1, 0]] * 4
    assert learngene.provenance["cluster_sizes"] == [[2, 1]] * 4
    own, state = ancestor.state_dict(), factory.expand(learngene, heads=3).state_dict()
    for number, centroid in enumerate([1, 0, 1]):
        assert torch.equal(head(state, 2, number)[2], head(own, 2, centroid)[2])


@pytest.mark.parametrize(("select", "layers"), [("first", [0, 1, 2]), ("even", [0, 2, 3])])
def test_a_smaller_depth_takes_the_first_layers_or_evenly_spaced_ones(select: str, layers: list[int]) -> None:
    own = ancestor_of().state_dict()
    state = factory.expand(
        extracted(psi_epochs=0, ffn_groups=((1, 2),)), depth=3, settings={"select": select}
    ).state_dict()
    for place, layer in enumerate(layers):
        assert torch.equal(state[f"blocks.{place}.norm1.weight"], own[f"blocks.{layer}.norm1.weight"])
        kept = 1 if layer == 2 else layer
        assert torch.equal(state[f"blocks.{place}.mlp.fc2.weight"], own[f"blocks.{kept}.mlp.fc2.weight"])


@pytest.mark.parametrize(
    ("heads", "schedule", "want"),
    [
        (12, "decrementing", [6] * 4 + [9] * 4 + [12] * 4),
        (12, "incrementing", [12] * 4 + [9] * 4 + [6] * 4),
        (6, "decrementing", [3] * 4 + [4] * 4 + [6] * 4),
        (3, "decrementing", [1] * 4 + [2] * 4 + [3] * 4),
        (1, "incrementing", [1] * 12),
    ],
)
def test_schedules_spread_the_heads_over_thirds(heads: int, schedule: str, want: list[int]) -> None:
    native = ViTShape(depth=12, width=64 * heads, heads=heads)
    assert list(Cluster(schedule=schedule)._counts(native, heads, 12)) == want
    assert Cluster(schedule=schedule)._counts(native, (heads,) * 12, 12) == (heads,) * 12  # given, they are as given


def test_the_plan_is_a_plain_vit_where_it_can_be() -> None:
    learngene = extracted(psi_epochs=0)
    for asked in ({}, {"heads": 3}, {"heads": (3, 3, 3, 3)}, {"width": 192}):
        assert factory.plan(learngene, **asked) == SMALL
    assert factory.plan(learngene, depth=2, image_size=24, num_labels=9) == replace(
        SMALL, depth=2, image_size=24, classes=9
    )
    grown = factory.plan(learngene, heads=(4, 2), num_labels=7, in_chans=1)
    assert grown == HeadsShape(width=192, heads=(4, 2), head_dim=64, patch=8, image_size=16, in_chans=1, classes=7)
    slow = factory.plan(learngene, depth=3, settings={"schedule": "decrementing"})
    assert isinstance(slow, HeadsShape) and slow.heads == (1, 2, 3)
    assert learngene.reach.heads == (1, 24) and str(learngene.reach) == "depth 1-4, width 192, heads 1-24"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"width": 256}, "width 256 asked; cluster keeps the ancestor's 192: .* lsamd or net2net can"),
        ({"depth": 5}, "depth 5 asked; cluster has the ancestor's 4 layers: .* lsamd or net2net can"),
        ({"heads": 25}, "25 heads asked; 1 to 24 would work"),
        ({"heads": 0}, "0 heads asked"),
        ({"heads": (3, 3), "depth": 3}, "2 numbers of heads asked for 3 blocks"),
        ({"heads": (3, 3, 3, 3, 3)}, "depth 5 asked"),
        ({"image_size": 20}, "multiple of patch 8"),
    ],
)
def test_what_cannot_be_grown_is_refused_and_who_could_is_named(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        factory.expand(extracted(psi_epochs=0), **asked)


def test_expand_refuses_shapes_of_another_kind() -> None:
    learngene = extracted(psi_epochs=0)
    other = HeadsShape(width=192, heads=(2, 2), head_dim=64, patch=8, image_size=16, classes=5)
    Cluster().expand(learngene, other)
    for change in (
        {"patch": 4},
        {"head_dim": 32},
        {"mlp_ratio": 2.0},
        {"pool": "avg"},
        {"width": 256},
        {"heads": (25,)},
    ):
        with pytest.raises(ShapeError):
            Cluster().expand(learngene, replace(other, **change))


def test_a_stored_half_is_composed_in_float32() -> None:
    learngene = extracted(eps=0.0, **STILL).to(torch.float16)
    state = factory.expand(learngene, heads=9).state_dict()
    want = learngene.tensors["block.0.attn.proj.weight"][:, :64].float() / 3
    assert torch.equal(state["blocks.0.attn.proj.weight"][:, :64], want)


def test_images_of_other_sizes_and_channels_are_grown_for() -> None:
    model = factory.expand(extracted(psi_epochs=0), heads=4, image_size=32, in_chans=1, num_labels=2)
    with torch.no_grad():
        assert tuple(model(torch.zeros(2, 1, 32, 32)).shape) == (2, 2)
    want = ancestor_of().patch_embed.proj.weight.sum(1, keepdim=True)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(model.state_dict()["patch_embed.proj.weight"], want)
