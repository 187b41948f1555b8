"""SN-Net: anchors cut and stitched, one route per update, every route exported, and its second version's options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS
from taught import TINY, compare_interrupted, noise, pictures
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub._stitched import StitchedShape
from learngene_hub.data import Images, normalise
from learngene_hub.descendant import Descendant
from learngene_hub.errors import ArtefactError, DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import get_method
from learngene_hub.methods._stitch_growth import net_of
from learngene_hub.methods._stitch_training import make_lesson, pool_loss
from learngene_hub.methods.sn_net import SnNet, cut, stitch
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.teacher import Teacher
from learngene_hub.training import Step

ROOT = replace(TINY, width=16, heads=4)
LESSON: dict[str, Any] = {
    "epochs": 2, "first_epochs": 1, "batch_size": 8, "crop_padding": 2, "init_images": 8, "held_out": 0.25, "seed": 3,
    "first_lr": 1e-2, "lr": 1e-2,
}  # fmt: skip


def anchors(*widths: int, depths: tuple[int, ...] = (3, 3, 3)) -> list[nn.Module]:
    return [
        build_pico(replace(TINY, depth=depth, width=width, heads=width // 4), seed=width)
        for width, depth in zip(widths, depths, strict=False)
    ]


def settings(**more: Any) -> SnNet:
    method = get_method("sn-net", LESSON | more)
    assert isinstance(method, SnNet)
    return method


@cache
def extracted() -> Learngene:
    """Three anchors of 3 blocks. Read only."""
    return factory.extract("sn-net", build_pico(ROOT), {"one": pictures()}, settings=LESSON, facts=FACTS)


@cache
def both() -> Learngene:
    """Version 2: 2 and 4 blocks, both directions, sampled by cost. Read only."""
    method = settings(direction="both", sampling="flops", flops_gap=2e4)
    return stitch(anchors(4, 8, depths=(2, 4)), {"one": pictures()}, method=method, facts=FACTS)


def routes_of(learngene: Learngene) -> list[int]:
    table: Any = learngene.provenance["routes"]
    return [row[0] for row in table["rows"]]


# Anchors --------------------------------------------------------------------------------------------------------------


def test_one_ancestor_makes_a_family() -> None:
    deit = ViTShape(depth=12, width=768, heads=12)
    assert [(shape.depth, shape.width) for shape in SnNet().anchors(deit)] == [(12, 192), (12, 384), (12, 768)]
    assert len(SnNet().routes([12, 12, 12])) == 71 and len(SnNet(direction="both").routes([12, 24])) == 134
    learngene = extracted()
    assert learngene.reach.routes == len(routes_of(learngene)) == 3 + 2 * 7 and learngene.shape == ROOT
    told: Any = learngene.provenance
    assert told["instances"] == {"0": "3x4", "1": "3x8", "2": "3x16"} and len(told["loss"]["first"]) == 2
    assert told["steps"] == 2 + 2 and told["teacher_flops"] == 32 * ROOT.flops()


def test_a_cut_anchor_has_evenly_spaced_blocks_and_leading_units() -> None:
    """Against slices of the ancestor's tensors: leading channels, heads of 4 and hidden units."""
    ancestor = build_pico(replace(ROOT, depth=5))
    state, small = ancestor.state_dict(), cut(ancestor, replace(ROOT, depth=3, width=8, heads=2)).state_dict()
    assert torch.equal(small["pos_embed"], state["pos_embed"][..., :8])
    assert torch.equal(small["head.weight"], state["head.weight"][:, :8])
    assert torch.equal(small["norm.bias"], state["norm.bias"][:8])
    for place, i in enumerate((0, 2, 4)):
        assert torch.equal(small[f"blocks.{place}.mlp.fc1.weight"], state[f"blocks.{i}.mlp.fc1.weight"][:32, :8])
        assert torch.equal(small[f"blocks.{place}.attn.proj.weight"], state[f"blocks.{i}.attn.proj.weight"][:8, :8])
        qkv = state[f"blocks.{i}.attn.qkv.weight"].view(3, 16, 16)[:, :8, :8].reshape(24, 8)
        assert torch.equal(small[f"blocks.{place}.attn.qkv.weight"], qkv)


def test_given_anchors_are_stitched_as_they_are_and_left_alone() -> None:
    """With a pool that hardly trains every instance is the anchor that was given."""
    given = anchors(4, 8, 12)
    for vit in given:
        vit.train()
    before = [{key: tensor.clone() for key, tensor in vit.state_dict().items()} for vit in given]
    state = torch.get_rng_state()
    learngene = stitch(given, {"one": pictures()}, method=settings(lr=1e-9, drop_path=0.5), facts=FACTS)
    assert (
        torch.equal(torch.get_rng_state(), state) and learngene.ancestor == FACTS and learngene.license == "apache-2.0"
    )
    for number, (vit, kept) in enumerate(zip(given, before, strict=True)):
        assert vit.training and all(torch.equal(tensor, kept[key]) for key, tensor in vit.state_dict().items())
        model = factory.expand(learngene, settings={"route": number})
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, kept[key], atol=1e-6, rtol=0)
    assert learngene.provenance["loss"]["first"] == [] and learngene.reach.routes == 3 + 2 * 7
    loaded = get_method("sn-net", learngene.settings)
    assert loaded == settings(lr=1e-9, drop_path=0.5)


def test_the_loss_is_labels_and_the_class_that_the_teacher_names() -> None:
    """Half and half, as published, and the teacher is no anchor; labels smoothed by a tenth."""
    teacher = build_pico(replace(TINY, depth=1), seed=7)
    method = SnNet(crop_padding=2)
    lesson = make_lesson(method, Teacher(teacher), {"one": pictures()}, TINY, IMAGENET, "sn-net")
    logits, x, y = noise(3, 4), noise(3, 3, 8, 8), torch.tensor([0, 3, 1])
    with torch.no_grad():
        named = teacher(x).argmax(-1).tolist()
    log = logits.log_softmax(-1)
    hard = -sum(float(log[b, c]) for b, c in enumerate(named)) / 3
    truth = -sum(0.9 * float(log[b, c]) + 0.1 * float(log[b].mean()) for b, c in enumerate((0, 3, 1))) / 3
    got = pool_loss(method, lesson, logits, x, y, method.recipe(first=False).label_smoothing)
    assert float(got) == pytest.approx(0.5 * truth + 0.5 * hard, rel=1e-5)


def test_another_teacher_is_asked() -> None:
    """One that names another class than the widest anchor does leads the pool elsewhere."""
    teacher = build_pico(TINY, seed=5)
    with torch.no_grad():
        teacher.head.bias.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0]))  # type: ignore[union-attr]
    method = settings(labels=0.0, distil=1.0, lr=3e-2, epochs=12, mixup=0.0, cutmix=0.0, held_out=0.0)
    learngene = stitch(anchors(4, 8), {"one": pictures()}, method=method, teacher=teacher)
    rows: Any = learngene.provenance["routes"]["rows"]
    assert {row[-1] for row in rows} == {100.0} and "agreement" in learngene.provenance["measured"]
    again = factory.extract("sn-net", build_pico(ROOT), {"one": pictures()}, settings=LESSON, teacher=teacher)
    assert again.provenance["teacher"] == {"name": "", "sha256": factory.state_digest(teacher)}
    assert "teacher" not in extracted().provenance
    own = extracted().tensors
    assert any(not torch.equal(tensor, own[name]) for name, tensor in again.tensors.items())


# Routes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [extracted, both])
def test_every_route_is_exported_as_it_was_trained(make: Any) -> None:
    """A descendant of its own, against the net of all routes."""
    learngene = make()
    net, x = net_of(learngene, nearest=True), noise(2, 3, 8, 8)
    assert list(net.routes) == routes_of(learngene)
    with torch.no_grad():
        for number, route in net.routes.items():
            model = factory.expand(learngene, settings={"route": number})
            assert isinstance(factory.plan(learngene, settings={"route": number}), StitchedShape) == bool(route.layers)
            torch.testing.assert_close(model(x), net(x, number))


def test_both_directions_reach_four_kinds_of_routes() -> None:
    learngene = both()
    shapes = [str(factory.plan(learngene, settings={"route": number})) for number in routes_of(learngene)]
    assert shapes == ["2x4", "4x8", "1x4+2x8", "2x8+1x4"]  # one layer each way; two switches need three blocks
    assert routes_of(learngene) == [0, 1, 2, 4]
    deeper = SnNet(direction="both").routes([3, 6])
    assert [str(route) for route in deeper[6:]] == ["1[0-1] > 0[1-1] > 1[4-5]", "0[0-0] > 1[2-3] > 0[2-2]"]


@pytest.mark.parametrize("number", [1, 7])
def test_a_saved_descendant_says_the_same(number: int, tmp_path: Path) -> None:
    """An anchor, which is a plain ViT, and a stitched one."""
    learngene = extracted()
    learngene.save(tmp_path / "pool.safetensors")
    grown = Descendant.from_learngene(tmp_path / "pool.safetensors", settings={"route": number}).eval()
    grown.save_pretrained(tmp_path / "saved")
    loaded = Descendant.from_pretrained(tmp_path / "saved").eval()
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        want = factory.expand(learngene, settings={"route": number})(x)
        assert torch.equal(grown(x).logits, want) and torch.equal(loaded(x).logits, want)


def test_one_route_is_trained_at_a_time() -> None:
    """After one update with a large step, what changed is exactly what one route of those there are runs through."""
    given = anchors(4, 8)
    start = stitch(given, {"one": pictures()}, method=settings(epochs=1, lr=1e-12, batch_size=12))
    after = stitch(given, {"one": pictures()}, method=settings(epochs=1, lr=1e-2, batch_size=12, weight_decay=0.0))
    changed = {
        name for name, tensor in after.tensors.items() if float((tensor - start.tensors[name]).abs().max()) > 1e-4
    }
    net = net_of(start, nearest=True)
    paths = []
    for route in net.routes.values():
        names = {f"instance.{leg.instance}.block.{i}" for leg in route.legs for i in range(leg.first, leg.last + 1)}
        names |= {f"stitch.0-1.{layer}" for layer in route.layers}
        paths.append(names | {f"instance.{route.legs[0].instance}.stem", f"instance.{route.legs[-1].instance}.head"})
    blocks = {".".join(name.split(".")[: 4 if ".block." in name else 3]) for name in changed if ".tail." not in name}
    assert blocks in paths


def test_stitches_alone_can_be_tuned() -> None:
    given = anchors(4, 8)
    learngene = stitch(given, {"one": pictures()}, method=settings(tune="stitches", epochs=6))
    stitches = [name for name in learngene.tensors if name.startswith("stitch.")]
    for number, vit in enumerate(given):
        model = factory.expand(learngene, settings={"route": number})
        for key, tensor in vit.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor) or key == "cls_token", key
    still = stitch(given, {"one": pictures()}, method=settings(tune="stitches", lr=1e-12))
    assert any(not torch.allclose(learngene.tensors[name], still.tensors[name], atol=1e-4) for name in stitches)


def test_the_table_can_be_measured_again_and_then_decides() -> None:
    """On images whose labels are what route 5 says, route 5 is right about all of them."""
    learngene = extracted()
    images = pictures(count=40)
    model = factory.expand(learngene, settings={"route": 5})
    with torch.no_grad():
        labels = model(normalise(images.pixels, IMAGENET)).argmax(-1)
    told = Images(images.pixels, labels, images.classes, "told")
    again = settings().measured(learngene, told)
    rows: Any = again.provenance["routes"]["rows"]
    table = {row[0]: row[-1] for row in rows}
    assert table[5] == 100.0 and again.provenance["measured"] == "labels, on 40 of told"
    for number in (0, 3, 16):
        grown = factory.expand(learngene, settings={"route": number})
        assert factory.evaluate(grown, told).accuracy == pytest.approx(table[number], abs=1e-3)
    best = [number for number, accuracy in table.items() if accuracy == 100.0]
    chosen = factory.plan(again, max_params=10**9)
    assert chosen in [factory.plan(again, settings={"route": number}) for number in best]
    assert dict(learngene.provenance) != dict(again.provenance) and learngene.tensors is again.tensors
    with pytest.raises(DataError, match="the pool takes .3, 8, 8. of 4"):
        settings().measured(learngene, pictures(3))


def test_the_same_seed_gives_the_same_pool() -> None:
    again = factory.extract("sn-net", build_pico(ROOT), {"one": pictures()}, settings=LESSON, facts=FACTS)
    first = extracted()
    assert all(torch.equal(tensor, first.tensors[name]) for name, tensor in again.tensors.items())
    other = factory.extract("sn-net", build_pico(ROOT), {"one": pictures()}, settings=LESSON | {"seed": 4})
    assert any(not torch.equal(tensor, first.tensors[name]) for name, tensor in other.tensors.items())


def test_an_interrupted_extraction_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the pool, whose next routes are then those of an uninterrupted run."""
    compare_interrupted("sn-net", LESSON | {"held_out": 0.0}, tmp_path, monkeypatch, stops_after=4, of=6)


def test_the_disk_gives_back_both_directions(tmp_path: Path) -> None:
    digest = both().save(tmp_path / "pool.safetensors")
    loaded = Learngene.load(tmp_path / "pool.safetensors", sha256=digest)
    assert loaded.reach.routes == 4 and routes_of(loaded) == routes_of(both())
    x = noise(1, 3, 8, 8)
    with torch.no_grad():
        for number in routes_of(loaded):
            ours, theirs = (factory.expand(each, settings={"route": number}) for each in (both(), loaded))
            assert torch.equal(ours(x), theirs(x))


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [16]}, "two or more that rise"),
        ({"widths": [8, 32]}, "width 32 asked of an anchor; .* up to 16 in steps of 4"),
        ({"widths": [6, 16]}, "width 6 asked of an anchor"),
        ({"depths": [3, 4], "widths": [8, 16]}, "depth 4 asked of an anchor"),
        ({"depths": [2, 3], "widths": [8, 16]}, "2 and 3 blocks asked; .* 2 and 4 would work"),
        ({"depths": [3]}, "one for each would work"),
        ({"init": "transpose"}, "learns no maps"),
        ({"direction": "down"}, "direction 'down' asked; there are up, both"),
        ({"direction": "both", "widths": [4, 8, 16]}, "two anchors would work"),
    ],
)
def test_settings_are_refused_before_anything_is_trained(change: dict[str, Any], message: str) -> None:
    def never(steps: Iterator[Step]) -> Iterator[Step]:
        raise AssertionError("training began")

    with pytest.raises(SettingsError, match=message):
        factory.extract("sn-net", build_pico(ROOT), {"one": pictures()}, settings=LESSON | change, watch=never)


def test_anchors_that_do_not_go_together_are_refused() -> None:
    data, one = {"one": pictures()}, anchors(8)[0]
    with pytest.raises(SettingsError, match="1 anchors given"):
        stitch([one], data)
    with pytest.raises(SettingsError, match="their widths rise"):
        stitch([one, anchors(4)[0]], data)
    other = build_pico(replace(TINY, width=12, heads=3, classes=5))
    with pytest.raises(SettingsError, match=r"anchors of classes \[4, 5\] given"):
        stitch([one, other], data)
    with pytest.raises(ShapeError):
        stitch([one, nn.Linear(2, 2)], data)
    with pytest.raises(SettingsError, match="a teacher of 5 classes given, the pool has 4"):
        stitch(anchors(4, 8), data, method=settings(), teacher=other)
    with pytest.raises(SettingsError, match="a teacher cache asked"):
        stitch(anchors(4, 8), data, method=settings(), teacher=Teacher(one, cache="/nowhere"))


@pytest.mark.parametrize("damage", ["missing", "renamed", "narrow", "instances", "numbers", "depths"])
def test_a_damaged_pool_is_refused(damage: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in both().tensors.items()}
    native: Any = both().shape
    SnNet().check(shapes, native)
    if damage == "missing":
        del shapes["stitch.1-0.0.bias"]
    elif damage == "renamed":
        shapes["stitch.1-0.7.bias"] = shapes.pop("stitch.1-0.0.bias")
    elif damage == "narrow":
        native = replace(native, width=4, heads=1)
    elif damage == "numbers":  # as many pairs as that would make are never counted
        shapes = {name.replace("instance.1.", "instance.9999."): shape for name, shape in shapes.items()}
    elif damage == "depths":  # 2 and 3 blocks
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("instance.1.block.3.")}
        native = replace(native, depth=3)
    else:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("instance.0.")}
    with pytest.raises(ArtefactError):
        SnNet().check(shapes, native)


def test_a_head_sees_what_the_pool_saw(tmp_path: Path) -> None:
    """Average pooling without class token: the last norm comes after the pooling in every route."""
    shape = replace(ROOT, class_token=False, pool="avg")
    learngene = factory.extract("sn-net", build_pico(shape), {"one": pictures()}, settings=LESSON)
    net, x = net_of(learngene, nearest=True), noise(2, 3, 8, 8)
    with torch.no_grad():
        for number in net.routes:
            model: Any = factory.expand(learngene, settings={"route": number})
            torch.testing.assert_close(model(x), net(x, number))
    assert isinstance(model.fc_norm, nn.LayerNorm) and isinstance(model.norm, nn.Identity)
    assert isinstance(net.stitch((0, 1), 0).weight, Tensor)
