"""Stitching: the tables of routes against brute force and published numbers, the shape and its network against plain
ViTs put together by hand, and where the linear layers start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import build_pico
from taught import TINY, noise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import learngene_hub
from learngene_hub._stitched import StitchedShape
from learngene_hub.errors import BudgetError, ShapeError
from learngene_hub.methods._stitch_net import StitchNet, features, least_squares, transpose
from learngene_hub.methods._stitching import Leg, Route, both_ways, cost_groups, layers_of, one_way, uses_of, windows
from learngene_hub.shape import IMAGENET, ViTShape, shape_from_dict, shape_of

DEIT = {n: ViTShape(depth=12, width=width, heads=width // 64) for n, width in enumerate((192, 384, 768))}
PLAIN = StitchedShape(
    depths=(2, 1, 3), widths=(8, 12, 16), heads=(2, 3, 2), mlp_ratios=(4.0, 4.0, 2.5), patch=4, image_size=8, classes=5
)
AVERAGED = replace(PLAIN, class_token=False, pool="avg", in_chans=1)


def family(*widths: int, depth: int = 3, **more: Any) -> dict[int, Any]:
    """Pico instances with 4 numbers per head, every parameter of them random."""
    shapes = [replace(TINY, depth=depth, width=width, heads=width // 4, **more) for width in widths]
    return {number: build_pico(shape, seed=number) for number, shape in enumerate(shapes)}


def images(count: int = 2) -> Tensor:
    return noise(count, 3, 8, 8, seed=9)


# Routes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 9, 12, 13])
def test_a_route_is_legal_where_j_and_k_differ_by_one_at_most(depth: int) -> None:
    rows = list(windows(depth))
    want = {(j, k) for j in range(depth) for k in range(depth) if abs(j - k) <= 1}
    assert {(j, k) for j, k, _ in rows} == want and len(rows) == len(want) == 3 * (depth - 1) + 1
    for j, k, layer in rows:
        assert layer == (min(j, k) if j != k else max(0, j - 1))
    assert len({layer for *_, layer in rows}) == max(1, depth - 1)


def test_the_order_of_the_windows_is_the_published_one() -> None:
    order = "00 01 10 11 12 21 22 23 32 33 34 43 44 45 54 55".split()
    layers = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [(f"{j}{k}", layer) for j, k, layer in windows(6)] == list(zip(order, layers, strict=True))


def test_three_anchors_of_12_blocks_make_71_networks() -> None:
    routes = one_way(dict.fromkeys(range(3), 12), nearest=True)
    assert [route.id for route in routes] == list(range(71))
    assert [len(route.legs) for route in routes] == [1] * 3 + [2] * 68
    pairs = [tuple(leg.instance for leg in route.legs) for route in routes]
    assert pairs[:3] == [(0,), (1,), (2,)] and pairs[3:37] == [(0, 1)] * 34 and pairs[37:] == [(1, 2)] * 34
    assert layers_of(routes) == {(0, 1): 11, (1, 2): 11}
    params = [route.shape(DEIT).params() for route in routes]
    assert params[:3] == [5_717_416, 22_050_664, 86_567_656]
    assert len({route.shape(DEIT) for route in routes}) == 71
    stitches = sum(11 * (DEIT[a].width + 1) * DEIT[b].width for a, b in ((0, 1), (1, 2)))
    assert (sum(params[:3]), stitches) == (114_335_736, 4_067_712)  # the published checkpoint


def test_pitfall_sizes_count_the_class_token_and_positions_of_the_front_model() -> None:
    """The released counter leaves them out; ours is above it by just those, and is what timm allocates."""
    shapes = {route.id: route.shape(DEIT) for route in one_way(dict.fromkeys(range(3), 12), nearest=True)}
    tokens = (197 + 1) * 192  # positions, and the class token
    assert shapes[3].params() - tokens == 22_345_960 and shapes[36].params() - tokens == 7_720_360
    for number in (3, 36, 56):
        assert sum(p.numel() for p in shapes[number].build(device="meta").parameters()) == shapes[number].params()


@pytest.mark.parametrize(("count", "networks"), [(2, 2 + 34), (4, 4 + 3 * 34)])
def test_pitfall_any_number_of_anchors_can_be_stitched(count: int, networks: int) -> None:
    """The released code is written for exactly three."""
    assert len(one_way(dict.fromkeys(range(count), 12), nearest=True)) == networks


def test_without_nearest_every_pair_is_stitched() -> None:
    routes = one_way(dict.fromkeys(range(3), 6), nearest=False)
    assert len(routes) == 3 + 3 * 16 and list(layers_of(routes)) == [(0, 1), (0, 2), (1, 2)]


# id: (j, k), layer, depth, millions of parameters: the 18 networks of the published pool of 6 blocks.
POOL = """
19 00 0 7 44.08 | 20 01 0 6 36.99 | 21 10 0 8 44.52 | 22 11 0 7 37.43 | 23 12 1 6 30.35 | 24 21 1 8 37.88
25 22 1 7 30.79 | 26 23 2 6 23.70 | 27 32 2 8 31.24 | 28 33 2 7 24.15 | 29 34 3 6 17.06 | 30 43 3 8 24.59
31 44 3 7 17.50 | 32 45 4 6 10.42 | 33 54 4 8 17.95 | 34 55 4 7 10.86
"""


def test_a_pool_of_6_blocks_has_18_networks_of_the_published_numbers_and_sizes() -> None:
    family = {number: replace(DEIT[number], depth=6) for number in (0, 2)}
    routes = one_way({0: 6, 2: 6}, nearest=False)
    got = {}
    for route in routes:
        shape = route.shape(family)
        size = round(sum(p.numel() for p in shape.build(device="meta").parameters()) / 1e6, 2)
        assert size == round(shape.params() / 1e6, 2)
        got[route.id] = (*((s.j, s.k, s.layer) for s in route.switches), shape.depth, size)
    want: dict[int, Any] = {0: (6, 3.05), 2: (6, 44.04)}
    for row in POOL.replace("\n", "|").split("|"):
        if row.strip():
            number, jk, layer, depth, size = row.split()
            want[int(number)] = ((int(jk[0]), int(jk[1]), int(layer)), int(depth), float(size))
    assert got == want and len(got) == 18


def test_a_pool_of_9_blocks_has_27_networks() -> None:
    family = {number: replace(DEIT[number], depth=9) for number in (0, 2)}
    routes = one_way({0: 9, 2: 9}, nearest=False)
    sizes = {route.id: round(route.shape(family).params() / 1e6, 2) for route in routes}
    assert sorted(sizes) == [0, 2, *range(28, 53)] and len(sizes) == 27
    assert (sizes.pop(0), sizes.pop(2)) == (4.38, 65.30)
    assert (min(sizes.values()), max(sizes.values())) == (11.75, 65.78)
    assert {route.shape(family).depth for route in routes} == {9, 10, 11}


def test_version_2_draws_134_of_135_numbered_routes() -> None:
    routes = both_ways(12, 24)
    assert [route.id for route in routes] == [number for number in range(135) if number != 13]
    kinds = [tuple(leg.instance for leg in route.legs) for route in routes]
    order = [(0,), (1,), (0, 1), (1, 0), (1, 0, 1), (0, 1, 0)]
    assert [kinds.count(kind) for kind in order] == [1, 1, 11, 11, 55, 55] and kinds == sorted(kinds, key=order.index)
    named = {route.id: str(route) for route in routes}
    assert (named[2], named[12]) == ("0[0-0] > 1[2-23]", "0[0-10] > 1[22-23]")
    assert (named[14], named[24]) == ("1[0-1] > 0[1-11]", "1[0-21] > 0[11-11]")
    assert layers_of(routes) == {(0, 1): 11, (1, 0): 11}
    assert len({route.legs for route in routes}) == 134 and min(leg.depth for r in routes for leg in r.legs) == 1


@pytest.mark.parametrize(("small", "large"), [(6, 6), (3, 9), (12, 24)])
def test_each_layer_of_version_2_belongs_to_one_place(small: int, large: int) -> None:
    """Both directions switch at the same relative depth, whatever the ratio; no layer is shared."""
    routes, ratio = both_ways(small, large), large // small
    for (pair, layer), uses in uses_of(routes).items():
        assert uses == ([(layer, (layer + 1) * ratio)] if pair == (0, 1) else [((layer + 1) * ratio - 1, layer + 1)])
    for route in routes:
        for front, end in zip(route.legs, route.legs[1:], strict=False):
            left, entered = (front.last + 1, end.first)
            assert left * (1 if front.instance else ratio) == entered * (1 if end.instance else ratio)


def test_one_direction_of_unequal_depth_switches_at_multiples() -> None:
    routes = one_way({0: 12, 1: 24}, nearest=True)
    assert len(routes) == 13  # the published count that version 2 is ten times of
    assert [(s.j, s.k, s.layer) for r in routes for s in r.switches] == [(j, 2 * j + 2, j) for j in range(11)]


@pytest.mark.parametrize("make", [lambda: both_ways(4, 6), lambda: one_way({0: 4, 1: 6}, nearest=True)])
def test_depths_that_are_no_multiple_are_refused(make: Any) -> None:
    with pytest.raises(ShapeError, match="4 and 6 blocks asked; .*4 and 8 would work"):
        make()


def test_groups_of_like_cost_open_where_the_gap_is_passed() -> None:
    costs = {0: 1.0, 1: 5.0, 2: 1.9, 3: 2.0, 4: 2.1, 5: 5.5}
    assert cost_groups(costs, 1.0) == [[0, 2, 3], [4], [1, 5]]  # 2.0 is one above 1.0, 2.1 is more
    assert cost_groups(costs, 10.0) == [[0, 2, 3, 4, 1, 5]]


# The shape and its network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [PLAIN, AVERAGED], ids=["token", "average"])
def test_a_stitched_shape_knows_its_network(shape: StitchedShape) -> None:
    model = shape.build(preprocessing=IMAGENET).eval()
    assert StitchedShape.of(model) == shape == shape_of(model)
    assert sum(p.numel() for p in model.parameters()) == shape.params() == shape.bytes() // 4
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, shape.in_chans, 8, 8))
    assert counter.get_total_flops() == shape.flops()
    assert shape.keys() == set(model.state_dict()) == set(shape.build(device="meta").state_dict())
    assert (shape.depth, shape.width, str(shape)) == (6, 16, "2x8+1x12+3x16")
    again = shape_from_dict(json.loads(json.dumps(shape.to_dict())))
    assert again == shape and shape.to_dict()["kind"] == "stitched"
    assert json.loads(json.dumps(shape.model_args())) == shape.model_args()
    shape.require_budget(shape.params())
    with pytest.raises(BudgetError, match=f"at most {shape.params() - 1:,} are allowed"):
        shape.require_budget(shape.params() - 1)


@pytest.mark.parametrize("shape", [PLAIN, AVERAGED], ids=["token", "average"])
def test_a_stitched_vit_is_its_segments_one_after_the_other(shape: StitchedShape) -> None:
    """Against three plain ViTs of timm that hold the same numbers, called module by module."""
    model: Any = build_pico(shape)  # type: ignore[arg-type]
    segments: list[Any] = [build_pico(part) for part in shape.segments]
    first, second, third = segments
    blocks = list(model.blocks)
    for ours, theirs in ((blocks[:2], first), (blocks[3:4], second), (blocks[5:], third)):
        theirs.blocks.load_state_dict(nn.Sequential(*ours).state_dict())
    for name in ("patch_embed", "norm", "fc_norm", "head"):
        source = first if name == "patch_embed" else third
        getattr(source, name).load_state_dict(getattr(model, name).state_dict())
    with torch.no_grad():
        for name in ("pos_embed", "cls_token"):
            if getattr(model, name) is not None:
                getattr(first, name).copy_(getattr(model, name))
        x = noise(2, shape.in_chans, 8, 8)
        tokens = first._pos_embed(first.patch_embed(x))
        for segment, stitch in ((first, blocks[2]), (second, blocks[4]), (third, None)):
            for block in segment.blocks:
                tokens = block(tokens)
            tokens = tokens if stitch is None else tokens @ stitch.weight.T + stitch.bias
        torch.testing.assert_close(model(x), third.forward_head(third.norm(tokens)))


def test_a_stitched_vit_gives_features_is_exported_and_rebuilt_by_timm() -> None:
    model: Any = build_pico(PLAIN)  # type: ignore[arg-type]
    x = images()
    with torch.no_grad():
        want = model(x)
        last, inner = model.forward_intermediates(x)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), want)
    widths = [8, 8, 12, 12, 16, 16, 16, 16]  # of the linear layers, those that they lead to
    assert [feature.shape[1] for feature in inner] == widths == [each["num_chs"] for each in model.feature_info]
    torch.testing.assert_close(model.forward_head(last), want)
    again = timm.create_model(PLAIN.architecture, num_classes=PLAIN.classes, **PLAIN.model_args()).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), want)
    again.reset_classifier(3)
    assert again.head.weight.shape == (3, 16) and again(x).shape == (2, 3)


def test_pitfall_drop_path_reaches_every_block_of_a_stitched_vit() -> None:
    """It rises evenly over all blocks, and a linear layer is none."""
    model: Any = PLAIN.build(drop_path_rate=0.5)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks if not isinstance(block, nn.Linear)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (8, 8, 16)}, "two neighbours of one width"),
        ({"depths": (2, 1)}, "they have one length"),
        ({"depths": (2, 0, 3)}, "depth 0 asked"),
        ({"heads": (3, 3, 2)}, "3 heads asked"),
        ({"depths": 6}, "it is a list of one number per segment"),
        ({"image_size": 9}, "multiple of patch"),
    ],
)
def test_shapes_that_no_stitched_vit_has_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        replace(PLAIN, **change)


def test_a_changed_stitched_vit_is_refused() -> None:
    for change in ("norm", "linear"):
        model: Any = PLAIN.build()
        if change == "norm":
            model.blocks[3].norm1 = nn.Identity()
        else:
            model.blocks[2] = nn.Linear(8, 12, bias=False)
        with pytest.raises((ShapeError, AttributeError)):
            StitchedShape.of(model)
    with pytest.raises(ShapeError, match="VisionTransformer given"):
        StitchedShape.of(build_pico(TINY))


# The net --------------------------------------------------------------------------------------------------------------


def test_the_net_is_its_parts_put_together_by_hand() -> None:
    vits = family(4, 8, 12)
    net = StitchNet(vits, one_way(dict.fromkeys(vits, 3), nearest=True), seed=1).eval()
    x = images()
    with torch.no_grad():
        for route in net.routes.values():
            first, last = (vits[leg.instance] for leg in (route.legs[0], route.legs[-1]))
            tokens = first._pos_embed(first.patch_embed(x))
            for place, leg in enumerate(route.legs):
                if place:
                    layers: Any = net.stitches[f"{route.legs[0].instance}-{leg.instance}"]
                    tokens = layers[route.layers[0]](tokens)
                for i in range(leg.first, leg.last + 1):
                    tokens = vits[leg.instance].blocks[i](tokens)
            assert torch.equal(net(x, route.id), last.forward_head(last.norm(tokens)))
        assert torch.equal(net(x, 1), vits[1](x))


def test_an_identity_between_two_copies_is_the_copy_where_k_follows_j() -> None:
    """Where k is j or j - 1, blocks run twice, and the function is another."""
    vit: Any = family(8, depth=6)[0]
    net = StitchNet({0: vit, 1: vit}, one_way({0: 6, 1: 6}, nearest=True)).eval()
    assert not list(net.stitches.parameters())
    with torch.no_grad():
        want = vit(images())
        for route in list(net.routes.values())[2:]:
            (switch,) = route.switches
            assert torch.equal(net(images(), route.id), want) == (switch.k == switch.j + 1), str(route)


def test_the_same_seed_starts_the_same_layers_and_the_callers_random_numbers_are_left_alone() -> None:
    vits, routes = family(4, 8), one_way({0: 3, 1: 3}, nearest=True)
    state = torch.get_rng_state()
    nets = [StitchNet(vits, routes, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (net.stitch((0, 1), 0).weight for net in nets)
    assert torch.equal(one, same) and not torch.equal(one, other)


# Where the layers start -----------------------------------------------------------------------------------------------


def tokens_of(vit: Any, x: Tensor) -> list[Tensor]:
    """Features by hooks: before the blocks, and after each."""
    found: list[Tensor] = []
    hooks = [vit.blocks[0].register_forward_pre_hook(lambda module, given: found.append(given[0]))]
    hooks += [block.register_forward_hook(lambda module, given, made: found.append(made)) for block in vit.blocks]
    with torch.no_grad():
        vit(x)
    for hook in hooks:
        hook.remove()
    return [tokens.flatten(0, 1) for tokens in found]


def test_features_are_what_hooks_see() -> None:
    vit = family(8)[0]
    with torch.no_grad():
        for ours, theirs in zip(features(vit, images()), tokens_of(vit, images()), strict=True):
            assert torch.equal(ours.flatten(0, 1), theirs)


def test_least_squares_are_those_of_lstsq_averaged_over_the_uses_of_a_layer() -> None:
    vits, x = family(4, 8), noise(40, 3, 8, 8, seed=2)  # 200 rows, more than one chunk
    net = StitchNet(vits, one_way({0: 3, 1: 3}, nearest=True))
    least_squares(net, x)
    front, end = (tokens_of(vits[n], x) for n in (0, 1))
    uses = {0: [(0, 0), (0, 1), (1, 0), (1, 1)], 1: [(1, 2), (2, 1), (2, 2)]}
    for layer, pairs in uses.items():
        solved = []
        for j, k in pairs:
            rows = torch.cat([front[j + 1], torch.ones(len(front[0]), 1)], dim=1).double()
            solved.append(torch.linalg.lstsq(rows, end[k].double()).solution)
        want = torch.stack(solved).mean(0)
        stitch = net.stitch((0, 1), layer)
        torch.testing.assert_close(stitch.weight.double(), want[:-1].T, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stitch.bias.double(), want[-1], atol=1e-5, rtol=1e-5)


def test_least_squares_recover_a_planted_map() -> None:
    """An end instance whose embedding is a linear map of the front's: exactly what the layer of (0, 0) should find."""
    vits = family(4, 8, depth=2)
    small, large = vits[0], vits[1]
    weight, bias = noise(8, 4, seed=5), noise(8, seed=6)
    with torch.no_grad():
        for block in small.blocks:  # blocks that add nothing: after block 0 the tokens are the embedding
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
        kernel = small.patch_embed.proj
        large.patch_embed.proj.weight.copy_(torch.einsum("oi,icxy->ocxy", weight, kernel.weight))
        large.patch_embed.proj.bias.copy_(weight @ kernel.bias + bias)
        large.pos_embed.copy_(small.pos_embed @ weight.T)
        large.cls_token.copy_(small.cls_token @ weight.T + bias)
    route = Route(2, (Leg(0, 0, 0), Leg(1, 0, 1)), (0,))
    net = StitchNet(vits, [Route(0, (Leg(0, 0, 1),)), Route(1, (Leg(1, 0, 1),)), route])
    least_squares(net, noise(30, 3, 8, 8, seed=3))
    torch.testing.assert_close(net.stitch((0, 1), 0).weight, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.stitch((0, 1), 0).bias, bias, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images(), 2), large(images()), atol=1e-4, rtol=1e-4)


def test_least_squares_of_too_few_rows_are_the_smallest_solution() -> None:
    vits, x = family(8, 16), images(1)  # 5 rows of 9 numbers
    net = StitchNet(vits, [Route(2, (Leg(0, 0, 0), Leg(1, 1, 2)), (0,))])
    least_squares(net, x)
    front, end = tokens_of(vits[0], x)[1], tokens_of(vits[1], x)[1]
    rows = torch.cat([front, torch.ones(5, 1)], dim=1).double()
    want = torch.linalg.pinv(rows) @ end.double()
    torch.testing.assert_close(net.stitch((0, 1), 0).weight.double(), want[:-1].T, atol=1e-4, rtol=1e-4)


def test_pitfall_least_squares_see_the_eval_mode_and_leave_the_mode_as_it_was() -> None:
    """The released code solves with stochastic depth at work."""
    maps = []
    for training in (True, False):
        shapes = [replace(TINY, width=width, heads=width // 4) for width in (4, 8)]
        vits = {}
        for number, shape in enumerate(shapes):
            vits[number] = shape.build(drop_path_rate=0.5)
            vits[number].load_state_dict(build_pico(shape, seed=number).state_dict())
        net = StitchNet(vits, one_way({0: 3, 1: 3}, nearest=True)).train(training)
        state = torch.get_rng_state()
        least_squares(net, images(10))
        assert torch.equal(torch.get_rng_state(), state) and net.training is training
        maps.append(net.stitch((0, 1), 1).weight)
    assert torch.equal(*maps)


def test_a_learned_map_is_transposed_after_the_mean() -> None:
    """To an instance as wide as the ancestor (12) the mean's transpose; to a narrower one on through the mean of its
    own maps. The bias stays where it was."""
    net = StitchNet(family(4, 8, 12), one_way(dict.fromkeys(range(3), 3), nearest=False), seed=2)
    maps = {n: [noise(width, 12, seed=10 * n + p) for p in range(3)] for n, width in enumerate((4, 8, 12))}
    biases = {key: tensor.clone() for key, tensor in net.stitches.state_dict().items() if key.endswith("bias")}
    transpose(net, maps)
    means = {n: (each[0] + each[1] + each[2]) / 3 for n, each in maps.items()}
    for layer in range(2):
        assert torch.equal(net.stitch((0, 2), layer).weight, means[0].T.contiguous())
        assert torch.equal(net.stitch((1, 2), layer).weight, means[1].T.contiguous())
        torch.testing.assert_close(net.stitch((0, 1), layer).weight, means[1] @ means[0].T)
    assert all(torch.equal(net.stitches.state_dict()[key], tensor) for key, tensor in biases.items())
    assert all(bool(tensor.any()) for tensor in biases.values())


# Several processes ----------------------------------------------------------------------------------------------------

WORKER = """
import sys
import torch
from conftest import build_pico
from taught import TINY
from dataclasses import replace
from learngene_hub.methods._stitch_net import StitchNet
from learngene_hub.methods._stitch_training import Draws
from learngene_hub.methods._stitching import one_way
from learngene_hub.training import Recipe, fit

vits = {n: build_pico(replace(TINY, width=w, heads=w // 4), seed=n) for n, w in enumerate((4, 8))}
net = StitchNet(vits, one_way({0: 3, 1: 3}, nearest=True), seed=1)
draws, drawn, rank = Draws([[2, 3, 4, 5, 6, 7, 8]]), [], None
x = torch.load(sys.argv[1] + "/x.pt", weights_only=True)

def batches(epoch):
    rank = torch.distributed.get_rank()
    while True:
        yield x[2 * rank : 2 * rank + 2], torch.tensor([0, 1])

def loss(model, batch):
    drawn.append(draws.next())
    return torch.nn.functional.cross_entropy(model(batch[0], drawn[-1]), batch[1])

recipe = Recipe(epochs=1, batch_size=4, lr=1e-2, schedule="constant", seed=SEED)
steps = fit(net, batches, loss, recipe=recipe, steps_per_epoch=4, device="cpu")
grads = None
for step in steps:
    if grads is None:
        grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
rank = torch.distributed.get_rank()
torch.save((net.state_dict(), drawn, grads), sys.argv[1] + f"/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_pitfall_two_processes_average_the_gradients_of_their_routes(tmp_path: Path) -> None:
    """The released code of one version steps around the averaging, so that each process trains a pool of its own."""
    x = noise(4, 3, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    (tmp_path / "worker.py").write_text(WORKER.replace("SEED", "3"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = [str(Path(learngene_hub.__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(tmp_path / "worker.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (one, drawn, grads), (other, drawn_too, _) = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert drawn != drawn_too and len(drawn) == len(drawn_too) == 4  # each process draws for itself
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    net = StitchNet(family(4, 8), one_way({0: 3, 1: 3}, nearest=True), seed=1).train()
    want: dict[str, Tensor] = {}
    for rank, number in enumerate((drawn[0], drawn_too[0])):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[2 * rank : 2 * rank + 2], number), torch.tensor([0, 1])).backward()
        for name, parameter in net.named_parameters():
            if parameter.grad is not None:
                want[name] = want.get(name, torch.zeros_like(parameter)) + parameter.grad / 2
    assert grads.keys() == want.keys()  # a parameter that one of them used
    for name, gradient in want.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-6, rtol=1e-4)
