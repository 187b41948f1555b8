"""Cluster: attention distances by a naive loop, clusters by a naive DBSCAN, groups of layers by hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clustered import SMALL, STILL, ancestor_of, by_hand, extracted, noise
from conftest import build_pico
from planted import FACTS, variant
from torch import nn

from learngene_hub import factory
from learngene_hub.errors import SettingsError
from learngene_hub.methods._cluster_attention import attention_distances, patch_distances, seen_at
from learngene_hub.methods._cluster_groups import FfnGroup, cluster_heads, given_groups, measured_groups
from learngene_hub.methods._cluster_parts import stored_groups
from learngene_hub.methods.cluster import Cluster
from learngene_hub.shape import IMAGENET, ViTShape

# The mean attention distances of a layer of DeiT-B that the authors published, pixels of 224.
PUBLISHED = [120.81, 117.08, 72.93, 109.22, 28.47, 1.39, 118.59, 1.21, 84.95, 6.84, 27.55, 114.17]


# Mean attention distance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["token", "avg", "odd"])
def test_distances_are_those_of_a_loop_over_timms_own_attention(kind: str) -> None:
    model, images = seen_at(ancestor_of(variant(kind)), 24), noise(2, size=24)
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (IMAGENET.mean, IMAGENET.std))
    want = by_hand(seen_at(model, 24), (images.pixels / 255 - mean) / std, side=3, patch=8)
    got = attention_distances(model, images, IMAGENET)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert float(got.max() - got.min()) > 0.5  # the heads do differ


def test_a_head_that_attends_everywhere_alike_looks_as_far_as_the_grid_is_wide() -> None:
    """2 x 2 patches of 8 px and a class token: each fifth of the attention goes 0, 8, 8 and 8 sqrt(2) px far, and a
    fifth to the class token, which counts nothing."""
    model = build_pico(SMALL)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()  # type: ignore[union-attr, operator]
            block.attn.qkv.bias.zero_()  # type: ignore[union-attr, operator]
    got = attention_distances(model, noise(), IMAGENET)
    torch.testing.assert_close(got, torch.full((4, 3), (16 + 8 * 2**0.5) / 5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_patches_lie_on_a_grid_row_by_row() -> None:
    far = patch_distances(3, 4)
    assert far.shape == (9, 9) and float(far[0, 1]) == 4 and float(far[0, 3]) == 4
    assert float(far[2, 3]) == pytest.approx(4 * 5**0.5) and float(far[0, 8]) == pytest.approx(4 * 8**0.5)


def test_the_ancestor_sees_images_at_the_size_that_is_asked() -> None:
    """At its own size it is itself; at another its positions are resampled as timm does, and so are the images."""
    from timm.layers import resample_abs_pos_embed  # type: ignore[attr-defined]

    own = seen_at(ancestor_of(), 16)
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in ancestor_of().state_dict().items())
    other = seen_at(ancestor_of(), 32)
    want = resample_abs_pos_embed(ancestor_of().pos_embed, [4, 4], num_prefix_tokens=1)  # type: ignore[arg-type]
    torch.testing.assert_close(other.state_dict()["pos_embed"], want)
    grown = extracted(size=32, **STILL)
    assert grown.provenance["image_size"] == 32
    large = nn.functional.interpolate(noise().pixels / 255, size=(32, 32), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (IMAGENET.mean, IMAGENET.std))
    want = by_hand(other, ((large - mean) / std)[:1], side=4, patch=8)
    data = {"one": noise().subset([0])}
    one = factory.extract("cluster", ancestor_of(), data, settings={"size": 32, **STILL}, facts=FACTS)
    assert one.provenance["attention_distance_px"] == [pytest.approx(layer, abs=2e-3) for layer in want]


# Clusters -------------------------------------------------------------------------------------------------------------


def dbscan(values: Sequence[float], eps: float) -> list[list[int]]:
    """DBSCAN with min_samples 1: what can be reached over steps of at most eps, in the order of the first heads."""
    left, found = list(range(len(values))), []
    while left:
        part = [left.pop(0)]
        for member in part:
            near = [other for other in left if abs(values[other] - values[member]) <= eps]
            part += near
            left = [other for other in left if other not in near]
        found.append(sorted(part))
    return found


def test_the_published_layer() -> None:
    clusters = cluster_heads(PUBLISHED, 10)
    assert [cluster.centroid for cluster in clusters] == [1, 5, 4, 2, 8]
    assert [len(cluster.members) for cluster in clusters] == [5, 3, 2, 1, 1]
    assert clusters[0].members == (0, 1, 3, 6, 11)


@pytest.mark.parametrize("seed", range(20))
def test_clusters_are_dbscans_the_largest_first(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(12, generator=generator, dtype=torch.float64) * 128).round(decimals=seed % 3).tolist()
    clusters, naive = cluster_heads(values, 5.0), dbscan(values, 5.0)
    assert sorted(cluster.members for cluster in clusters) == sorted(map(tuple, naive))
    assert [c.members for c in clusters] == [tuple(p) for n in range(12, 0, -1) for p in naive if len(p) == n]
    for cluster in clusters:
        mean = sum(values[head] for head in cluster.members) / len(cluster.members)
        off = {head: abs(values[head] - mean) for head in cluster.members}
        assert off[cluster.centroid] <= min(off.values()) + 1e-6
        assert not any(head < cluster.centroid and off[head] <= min(off.values()) for head in off)


def test_of_two_heads_the_lower_stands_for_both_whichever_way_rounding_goes() -> None:
    for a, b in ((28.47, 27.55), (27.55, 28.47), (0.1, 0.3), (0.3, 0.1), (1 / 3, 2 / 3)):
        assert [cluster.centroid for cluster in cluster_heads([a, b], 10)] == [0]


def test_a_gap_of_exactly_eps_does_not_cut() -> None:
    assert len(cluster_heads([1.0, 3.0], 2.0)) == 1 and len(cluster_heads([1.0, 3.0], 1.999)) == 2


def test_eps_is_a_share_of_the_image_side() -> None:
    """A bit above the widest gap of a layer, in pixels over 16, all of its heads are one cluster; a bit below, two."""
    layer = sorted(extracted(**STILL).provenance["attention_distance_px"][0])
    gap = max(b - a for a, b in zip(layer, layer[1:], strict=False))
    assert gap > 0.05
    above, below = (extracted(eps=(gap + off) / 16, **STILL) for off in (0.01, -0.01))
    assert [len(each.provenance["centroids"][0]) for each in (above, below)] == [1, 2]
    assert Cluster().eps * 224 == 10


def test_the_picture_tells_the_clusters() -> None:
    """Twelve layers of DeiT-Tiny, all of them alike: of each, heads 0 and 2 are joined and 2 is as near as 0."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package
    import heads_picture

    deit = ViTShape(depth=12, width=192, heads=3)
    found = heads_picture.said(deit, [[50.0, 20.0, 58.0]] * 12, 224)
    assert found["heads"] == 36 and found["heads_kept"] == 24 and found["eps"] == 10
    assert found["layers"][5]["clusters"] == [{"centroid": 0, "heads": [0, 2]}, {"centroid": 1, "heads": [1]}]
    assert found["ffn_groups"] == {"published": [[1, 2], [10, 11]], "measured": [list(range(12))]}
    block, ffn = deit.params() - replace(deit, depth=11).params(), 8 * 192**2 + 5 * 192
    outer = replace(deit, classes=0).params() - 12 * block
    head = 4 * 64 * 192 + 3 * 64
    assert found["stored_with_these_ffns"]["published"] == outer + 12 * (block - ffn - head) + 10 * ffn


# FFN groups -----------------------------------------------------------------------------------------------------------


def test_layers_that_attend_alike_share_an_ffn() -> None:
    """Sorted, layers 1 and 2 differ by (1 + 1) / 2 = 1, layers 2 and 3 by 1.5, the others by more than 2. Their mean is
    (11.33, 21.17): layer 1 is off by 1.25, layer 2 by 0.25, layer 3 by 1.25."""
    distances = [[1.0, 9.0], [20.0, 10.0], [11.0, 21.0], [22.5, 12.5], [40.0, 50.0]]
    groups = measured_groups(distances, 2.0)
    assert [(group.first, group.last, group.kept) for group in groups] == [(0, 0, 0), (1, 3, 2), (4, 4, 4)]
    assert len(measured_groups(distances, 1.5)) == 4  # a difference of eps is no likeness
    assert measured_groups([[1.0], [1.0]], 0.1) == [FfnGroup(0, 1, 0)]  # the first of equally near ones


@pytest.mark.parametrize(
    ("width", "groups", "stored"),
    [(768, [[6, 7], [9, 10, 11]], 9), (384, [[9, 10, 11]], 10), (192, [[1, 2], [10, 11]], 10)],
)
def test_deits_have_the_published_groups(width: int, groups: list[list[int]], stored: int) -> None:
    from learngene_hub.methods._cluster_groups import fixed_groups

    deit = ViTShape(depth=12, width=width, heads=width // 64)
    for rule in ("auto", "published"):
        found = fixed_groups(rule, deit)
        assert found is not None and [group.to_list() for group in found if len(group) > 1] == groups
        assert len(found) == stored
    assert fixed_groups("measured", deit) is None and fixed_groups("auto", replace(deit, depth=11)) is None
    with pytest.raises(SettingsError, match="'published' asked for an ancestor of 11x"):
        fixed_groups("published", replace(deit, depth=11))


def test_given_groups_keep_the_layer_that_is_named_first() -> None:
    learngene = extracted(psi_epochs=0, ffn_groups=((2, 1), (3,)))
    assert [group.to_list() for group in stored_groups(learngene.tensors)] == [[0], [2, 1], [3]]
    assert learngene.provenance["ffn_groups"] == [[2, 1]] and learngene.settings["ffn_groups"] == [[2, 1], [3]]
    state = factory.expand(learngene).state_dict()
    for place in (1, 2):
        assert torch.equal(
            state[f"blocks.{place}.mlp.fc1.weight"], ancestor_of().state_dict()["blocks.2.mlp.fc1.weight"]
        )
    for wrong, said in (
        ([[0, 2]], "one run of layers"),
        ([[3, 4]], "0 to 3"),
        ([[0, 1], [1, 2]], "layer 1 stands in two"),
    ):
        with pytest.raises(SettingsError, match=said):
            given_groups(wrong, 4)
