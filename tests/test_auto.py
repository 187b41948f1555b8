"""Auto-Learngene: what is kept, where it stands in a descendant, the published lists, and the bugs of released code."""

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
from taught import TINY, ancestor_of, compare_interrupted, noise, pictures
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub._conv import ConvShape
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, DataError, SettingsError, ShapeError, TrainingError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import Auto, get_method
from learngene_hub.methods import _auto_search as searching
from learngene_hub.methods._auto_loop import Bilevel, Inner, Searched
from learngene_hub.methods._auto_matching import MetaNetwork, Pseudo
from learngene_hub.methods.auto import PUBLISHED, select
from learngene_hub.shape import ViTShape, shape_of
from learngene_hub.training import Recipe, Step, fit
from learngene_hub.transforms import BLOCK_KEYS, Resize

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "crop_padding": 2, "lr": 1e-2, "seed": 3}
SIX = replace(TINY, depth=6)
SMALL_VGG = ConvShape(family="vgg", stages=((3, 3), (4, 4, 4), (4, 4, 4)), image_size=8, classes=5)
SMALL_RESNET = ConvShape(family="resnet", stages=((4, 4), (6, 6, 6), (8,), (8, 8)), image_size=32, classes=5)


@cache
def extracted(shape: ViTShape = SIX, **settings: Any) -> Learngene:
    """Read only."""
    data = {} if settings.get("layers") else {"one": pictures()}
    return factory.extract("auto", ancestor_of(shape), data, settings=QUICK | settings, facts=FACTS)


def cnn(shape: ConvShape, seed: int = 0) -> nn.Module:
    """A CNN whose every number is random, running statistics too; read only where it is an ancestor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = shape.build()
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.dtype.is_floating_point:
            tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)
    return model.eval()


def cnn_learngene(shape: ConvShape, **settings: Any) -> Learngene:
    return factory.extract("auto", cnn(shape), {}, settings=settings, facts=FACTS)


# The selection -------------------------------------------------------------------------------------------------------


def test_the_groups_of_the_largest_sums_are_kept_in_the_ancestors_order() -> None:
    """The 6 x 3 scores of a scratch file of a later paper's authors: groups 0, 1, 2, which are blocks 0 to 5."""
    rows = torch.tensor([0.92, 0.91, 0.80, 0.48, 0.60, 0.67])
    assert select(rows[:, None].expand(6, 3), 3) == (0, 1, 2)
    assert select(rows[:, None], 1) == (0,) and select(rows[:, None], 4) == (0, 1, 2, 5)
    by_hand = torch.tensor([[1.0, 1.0, 1.0], [2.9, 0.0, 0.0], [0.5, 0.5, 2.5]])  # sums 3, 2.9, 3.5; maxima 1, 2.9, 2.5
    assert select(by_hand, 2) == (0, 2) and select(by_hand, 2, "max") == (1, 2)


def test_equal_scores_keep_the_lower_group() -> None:
    assert select(torch.ones(6, 2), 3) == (0, 1, 2)
    assert select(torch.tensor([[1.0], [2.0], [1.0], [2.0]]), 3) == (0, 1, 3)


def test_what_is_kept_is_what_the_stored_similarity_says() -> None:
    for settings in ({}, {"keep": 2, "score": "max", "seed": 8}, {"group": 1, "keep": 2}):
        learngene = extracted(**settings)
        size = settings.get("group", 2)
        similarity = learngene.tensors["search.similarity"]
        assert similarity.shape == (6 // size, -(-3 // size)) and bool((similarity != 1).all())
        chosen = select(similarity, settings.get("keep", 1), str(settings.get("score", "sum")))
        want = [size * m + i for m in chosen for i in range(size)]
        assert learngene.provenance["kept"] == want
        names = {name for name in learngene.tensors if not name.startswith(("stem.", "search."))}
        assert names == {f"block.{i}.{key}" for i in want for key in BLOCK_KEYS}


def test_a_group_that_helps_to_learn_gets_more_weight_than_one_that_misleads() -> None:
    """Two groups of features: to match the one, the label, is half of learning it; to match its opposite undoes it."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.head = nn.Conv2d(3, 4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            map_ = self.lift(x)
            return self.head(map_.mean((2, 3))), [map_]

    y = torch.arange(32) % 2
    x = noise(32, 3, 4, 4, seed=1) + (2.0 * y - 1).view(-1, 1, 1, 1) * 0.3
    told = (2.0 * y - 1).view(-1, 1, 1, 1).expand(32, 4, 1, 1).clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Searched(Pseudo(Body(), [4, 4], [4]), MetaNetwork([4, 4], 1))
    for linear in model.phi.pairs:
        nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
    for rows in model.pseudo.matchers:
        rows[0] = nn.Identity()  # type: ignore[index]
    with torch.no_grad():  # of the signs that the label has
        model.pseudo.body.head.weight.copy_(torch.tensor([[-0.5] * 4, [0.5] * 4]))  # type: ignore[union-attr]
    inner = Inner(lr=0.05, momentum=0.0, weight_decay=0.0, steps=2, match=0.1, order=2)
    loop = Bilevel([told, -told], x, inner, lambda k: 0.05, phi_decay=0.0, last=11)
    recipe = Recipe(epochs=2, lr=0.1, weight_decay=0.0, schedule="constant")
    groups = [{"params": list(model.phi.parameters()), "weight_decay": 0.0}]
    steps = fit(
        model, lambda epoch: [(x, y)] * 10, loop.loss, recipe=recipe, steps_per_epoch=10, groups=groups, extra=loop,
        device="cpu",
    )  # fmt: skip
    for step in steps:
        loop.after(step)
    helpful, misleading = loop.similarity().flatten().tolist()
    assert helpful > 1.2 > 0.8 > misleading


# Descendants of a ViT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [4, 5, 9])
def test_kept_blocks_stand_at_the_bottom_and_everything_above_is_fresh(depth: int) -> None:
    learngene = extracted(layers=(0, 1, 4, 5))
    state, ancestor = factory.expand(learngene, depth=depth, seed=1).state_dict(), ancestor_of(SIX).state_dict()
    for place, position in enumerate((0, 1, 4, 5)):
        for key in BLOCK_KEYS:
            assert torch.equal(state[f"blocks.{place}.{key}"], ancestor[f"blocks.{position}.{key}"]), key
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert torch.equal(state[key], ancestor[key])
    assert torch.equal(state["norm.weight"], torch.ones(8)) and torch.equal(state["norm.bias"], torch.zeros(8))
    old = [tensor for name, tensor in ancestor.items() if "mlp.fc1.weight" in name]
    for place in range(4, depth):
        assert not any(torch.equal(state[f"blocks.{place}.mlp.fc1.weight"], tensor) for tensor in old)
        assert torch.equal(state[f"blocks.{place}.norm1.weight"], torch.ones(8))
    assert len({tuple(state[f"blocks.{i}.mlp.fc1.weight"].flatten().tolist()) for i in range(depth)}) == depth


def test_the_function_is_that_of_the_kept_blocks_one_after_the_other() -> None:
    learngene, x = extracted(layers=(1, 2, 5)), noise(2, 3, 8, 8)
    ancestor: Any = ancestor_of(SIX)
    model: Any = factory.expand(learngene, depth=3, num_labels=7)
    with torch.no_grad():
        z = ancestor._pos_embed(ancestor.patch_embed(x))
        for position in (1, 2, 5):
            z = ancestor.blocks[position](z)
        want = model.head(nn.functional.layer_norm(z, (8,), eps=1e-6)[:, 0])
        torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("form", ["copy", "exact"])
def test_another_width_is_the_shared_transform_of_the_kept_blocks(form: str) -> None:
    learngene, shape = extracted(layers=(0, 5)), replace(SIX, width=12, heads=3)
    state = Auto(layers=(0, 5), form=form).expand(learngene, shape)
    resize = Resize.of({}, SIX, shape, form)
    for place, position in enumerate((0, 5)):
        for key, tensor in resize.block(learngene.group(f"block.{position}"), position).items():
            assert torch.equal(state[f"blocks.{place}.{key}"], tensor), key  # type: ignore[arg-type]
    assert state["blocks.2.mlp.fc1.weight"] is None and state["head.weight"] is None and state["norm.bias"] is None


def test_fewer_blocks_than_are_kept_are_refused() -> None:
    learngene = extracted(layers=(0, 1, 4, 5))
    with pytest.raises(ShapeError, match="depth 3 asked; this learngene reaches depth 4-12.*: depth 4 would work"):
        factory.expand(learngene, depth=3)
    with pytest.raises(
        ShapeError, match="depth 3 asked; this learngene is 4 blocks that stay together: 4 is the least"
    ):
        Auto(layers=(0, 1, 4, 5)).expand(learngene, replace(SIX, depth=3))
    with pytest.raises(ShapeError, match="5 heads asked at width 8"):
        factory.expand(learngene, heads=5)


# Published lists ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "want"), [("dino-vits16", [0, 1, 8, 9, 10, 11]), ("deit", [0, 1, 2, 3, 4, 5])])
def test_the_published_lists_of_vits(name: str, want: list[int]) -> None:
    learngene = extracted(replace(TINY, depth=12), layers=name)
    assert learngene.provenance["kept"] == want and learngene.provenance["steps"] == 0
    assert factory.expand(learngene, depth=6).state_dict().keys() == replace(TINY, depth=6).keys()
    with pytest.raises(SettingsError, match=f"'{name}' asked, of a vit of depth 12; the ancestor is a vit of 6 blocks"):
        extracted(SIX, layers=name)


def test_the_published_list_of_vgg16_is_the_authors_layers_and_their_size() -> None:
    """``features`` 0:3, 7:10, 14:20 and 37:44 of vgg16_bn, 6 of 13 convolutions, 5.68 million parameters."""
    ancestor = _vgg16()
    learngene = factory.extract("auto", ancestor, {}, settings={"layers": "vgg16"}, facts=FACTS)
    listed = {f"features.{i}" for part in (range(0, 3), range(7, 10), range(14, 20), range(37, 44)) for i in part}
    old = {n: t for n, t in ancestor.state_dict().items() if n.rpartition(".")[0] in listed and t.dim()}
    ours = sorted(tuple(t.flatten()[:2].tolist()) for t in learngene.tensors.values())
    assert ours == sorted(tuple(t.flatten()[:2].tolist()) for t in old.values()) and len(ours) == 36
    params = sum(t.numel() for n, t in learngene.tensors.items() if "running" not in n)
    assert round(params / 1e6, 2) == 5.68
    shape = factory.plan(learngene, image_size=32, num_labels=5)
    assert isinstance(shape, ConvShape) and shape.stages == ((64,), (128,), (256, 256), (512, 512), (512, 512))
    assert (shape.head_hidden, shape.head_kernel) == (1024, 1)  # FC 512-1024-1024-C
    state = factory.expand(learngene, image_size=32, num_labels=5).state_dict()
    convs = [shape_conv.name for shape_conv in shape.convs()]
    for place, position in zip([0, 1, 2, 3, 6, 7], [0, 7, 14, 17, 37, 40], strict=True):
        assert torch.equal(state[f"{convs[place]}.weight"], ancestor.state_dict()[f"features.{position}.weight"])
    assert not any(torch.equal(state[f"{convs[4]}.weight"], t) for t in old.values())


def _vgg16() -> nn.Module:
    """vgg16_bn's convolutions under a small head."""
    stages = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
    return cnn(ConvShape(family="vgg", stages=stages, image_size=32, classes=2))


def test_the_published_list_of_resnet18_is_its_first_and_last_stage() -> None:
    stages = tuple((width,) * 2 for width in (64, 128, 256, 512))
    ancestor = cnn(ConvShape(family="resnet", stages=stages, classes=2))
    learngene = factory.extract("auto", ancestor, {}, settings={"layers": "resnet18"}, facts=FACTS)
    assert {name.split(".")[1] for name in learngene.tensors if name.startswith("block.")} == {"0", "3"}
    state, old = factory.expand(learngene, image_size=32).state_dict(), ancestor.state_dict()
    inherited = {name for name in state if name in old and state[name].dim() and torch.equal(state[name], old[name])}
    modules = {name.split(".")[0] for name in inherited}
    assert modules == {"conv1", "bn1", "layer1", "layer4"}
    with pytest.raises(
        SettingsError, match="'resnet18' asked, of a resnet of depth 8; the ancestor is a vgg of 8 conv"
    ):
        factory.extract("auto", cnn(SMALL_VGG), {}, settings={"layers": "resnet18"}, facts=FACTS)


def test_the_published_lists_are_those_of_the_specification() -> None:
    assert {name: units for name, (_, _, units) in PUBLISHED.items()} == {
        "dino-vits16": (0, 1, 8, 9, 10, 11), "deit": (0, 1, 2, 3, 4, 5), "vgg16": (0, 1, 2, 4), "resnet18": (0, 3),
    }  # fmt: skip


# Descendants of a CNN -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SMALL_VGG, SMALL_RESNET])
def test_a_kept_stage_is_copied_to_the_last_bit_and_the_others_are_fresh(shape: ConvShape) -> None:
    """First layers of a stage, of the last stage of a VGG the last; statistics too."""
    ancestor, last = cnn(shape), len(shape.stages) - 1
    learngene = cnn_learngene(shape, layers=[0, last])
    old = ancestor.state_dict()
    grown = factory.plan(learngene)
    assert isinstance(grown, ConvShape) and grown.depth == {"vgg": 1 + 2 + 2, "resnet": 1 + 2 + 1 + 1}[shape.family]
    first, second = (factory.expand(learngene, seed=seed).state_dict() for seed in (0, 1))
    by_place = {(c.stage, c.block, c.name.rpartition(".")[2] if "layer" in c.name else ""): c for c in shape.convs()}
    for conv in grown.convs():
        offset = 1 if shape.family == "vgg" and conv.stage == last else 0
        key = (conv.stage, conv.block + offset, conv.name.rpartition(".")[2] if "layer" in conv.name else "")
        there = by_place[key]
        for name, source in [(conv.name, there.name), (conv.norm, there.norm)]:
            for kind in ("weight", "bias", "running_mean", "running_var"):
                if f"{name}.{kind}" not in first:
                    continue
                same = torch.equal(first[f"{name}.{kind}"], old[f"{source}.{kind}"])
                assert same == (conv.stage in (-1, 0, last)), f"{name}.{kind}"
        if conv.stage not in (-1, 0, last):
            assert not torch.equal(first[f"{conv.name}.weight"], second[f"{conv.name}.weight"])
            assert torch.equal(first[f"{conv.norm}.running_var"], torch.ones(conv.outputs))
    assert all(t == 0 for n, t in first.items() if n.endswith("num_batches_tracked"))


@pytest.mark.parametrize("family", ["vgg", "resnet"])
def test_where_the_skeleton_is_the_ancestor_its_features_are_the_ancestors(family: str) -> None:
    """One layer per stage, all stages kept."""
    count = 3 if family == "vgg" else 4
    shape = ConvShape(family=family, stages=((4,), (6,), (8,), (8,))[:count], image_size=32, classes=3)
    learngene, x = cnn_learngene(shape, layers=list(range(count))), noise(2, 3, 32, 32)
    model, ancestor = factory.expand(learngene), cnn(shape)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), ancestor.forward_features(x))  # type: ignore[operator]


def test_a_deeper_cnn_has_fresh_layers_at_the_top_and_other_sizes_are_refused() -> None:
    learngene = cnn_learngene(SMALL_VGG, layers=[0, 1, 2])
    deeper = factory.plan(learngene, depth=7, num_labels=9)
    assert isinstance(deeper, ConvShape) and deeper.stages == ((3,), (4, 4), (4, 4, 4, 4)) and deeper.classes == 9
    state, plain = (factory.expand(learngene, depth=depth).state_dict() for depth in (7, 5))
    for conv in factory.plan(learngene).convs():  # type: ignore[attr-defined]
        assert torch.equal(state[f"{conv.name}.weight"], plain[f"{conv.name}.weight"])
    fresh = [f"{conv.name}.weight" for conv in deeper.convs()][-2:]
    again = factory.expand(learngene, depth=7, seed=1).state_dict()
    assert not any(torch.equal(state[name], again[name]) for name in fresh)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"depth": 4}, "depth 4 asked; this learngene reaches depth 5-8"),
        ({"depth": 9}, "depth 9 asked"),
        ({"width": 8}, "width 8 asked; auto keeps a CNN's channels: width 4 would work"),
        ({"heads": 2}, "heads 2 asked; this learngene grows a vgg, which has none"),
        ({"image_size": 4}, "image size 4 asked"),
    ]
    for asked, message in refused:
        with pytest.raises(ShapeError, match=message):
            factory.expand(learngene, **asked)
    other = replace(SMALL_VGG, classes=5)
    with pytest.raises(ShapeError, match="vgg 3,3-4,4,4-4,4,4 asked; .* at that depth grows vgg 3-4,4-4,4,4,4,4"):
        get_method("auto", {"layers": [0, 1, 2]}).expand(learngene, other)


def test_grey_images_see_the_sum_of_the_kernels() -> None:
    for shape, first in ((SMALL_VGG, "features.0"), (SMALL_RESNET, "conv1")):
        learngene, old = cnn_learngene(shape, layers=[0]), cnn(shape).state_dict()
        state = factory.expand(learngene, in_chans=1).state_dict()
        torch.testing.assert_close(state[f"{first}.weight"], old[f"{first}.weight"].sum(1, keepdim=True))


@pytest.mark.parametrize("shape", [SMALL_VGG, SMALL_RESNET])
def test_a_cnn_is_searched_and_left_as_it_was(shape: ConvShape, tmp_path: Path) -> None:
    """All stages but the weakest; running statistics of the ancestor do not move; the file comes back."""
    ancestor = cnn(shape)
    before = {name: tensor.clone() for name, tensor in ancestor.state_dict().items()}
    data = {"one": pictures(size=shape.image_size, count=8)}
    learngene = factory.extract(
        "auto", ancestor, data, settings=QUICK | {"batch_size": 4, "inner_steps": 2}, facts=FACTS
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in ancestor.state_dict().items())
    stages = len(shape.stages)
    similarity = learngene.tensors["search.similarity"]
    assert similarity.shape == (stages, stages) and learngene.shape == shape_of(ancestor)
    kept = [s for s in range(stages) if s != int(similarity.sum(1).argmin())]
    assert learngene.provenance["kept"] == kept and learngene.provenance["match_weight"] == 1.0
    digest = learngene.save(tmp_path / "learngene.safetensors")
    loaded = Learngene.load(tmp_path / "learngene.safetensors", sha256=digest)
    states = [factory.expand(each, num_labels=3, seed=4).state_dict() for each in (learngene, loaded)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_learngene_of_other_stages_or_sizes_is_refused() -> None:
    shapes = {n: tuple(t.shape) for n, t in cnn_learngene(SMALL_RESNET, layers=[1, 3]).tensors.items()}
    method = Auto(layers=(1, 3))
    method.check(shapes, SMALL_RESNET)
    for wrong, message in (
        ({n: s for n, s in shapes.items() if "stem" not in n}, "tensors are missing, the first is stem.conv.norm.bias"),
        (shapes | {"block.9.0.conv1.weight": (8, 8, 3, 3)}, r"stages \[1, 3, 9\]; the ancestor's are 0 to 3"),
        (shapes | {"block.3.0.conv1.weight": (8, 8, 1, 1)}, r"block.3.0.conv1.weight is \[8, 8, 1, 1\]"),
        (shapes | {"search.similarity": (4, 4)}, "unknown tensors, the first is search.similarity"),
        ({}, r"stages \[\]"),
    ):
        with pytest.raises(ArtefactError, match=message):
            method.check(wrong, SMALL_RESNET)
    with pytest.raises(ArtefactError, match="missing, the first is search.similarity"):
        Auto().check(shapes, SMALL_RESNET)


# Extraction -----------------------------------------------------------------------------------------------------------


def test_several_sets_are_one_whose_classes_stand_side_by_side() -> None:
    one, two = pictures(2, count=3), pictures(3, count=4)
    images = searching.joined({"a": one, "b": two}, 3)
    assert images.labels.tolist() == one.labels.tolist() + [2 + label for label in two.labels.tolist()]
    assert images.classes == ("a 0", "a 1", "b 0", "b 1", "b 2") and len(images) == 7
    assert torch.equal(images.pixels[3:], two.pixels)


def test_the_provenance_counts_and_says_which_derivatives() -> None:
    """16 images in batches of 8, 2 epochs, 2 inner steps: 4 updates."""
    facts = extracted().provenance
    assert facts["steps"] == 4 and facts["images_seen"] == 32 and facts["data"] == {"one": {"images": 16}}
    forwards = 3 * 32 + (1 + 2) * 8 * 4  # (i), (iii), (iv) on the batch; (i) and (ii) on the fixed one
    assert facts["flops"] == forwards * replace(SIX, depth=3, classes=4).flops() + 8 * SIX.flops()
    assert facts["gradients"] == "second order" and [entry["epoch"] for entry in facts["log"]] == [1, 2]
    first = extracted(order=1)
    assert first.provenance["gradients"].startswith("first order, an approximation")
    assert not torch.equal(first.tensors["search.similarity"], extracted().tensors["search.similarity"])


def test_an_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pseudo descendant, its velocity, phi, Adam and the running mean: in the last epoch, with one update left."""
    compare_interrupted("auto", QUICK, tmp_path, monkeypatch, stops_after=3, of=4)


def test_the_pseudo_descendant_learns() -> None:
    """Its own cross-entropy, before each update, on images of which one class is bright."""
    labels = torch.arange(16) % 2
    pixels = (labels * 100 + 50).to(torch.uint8).view(-1, 1, 1, 1).expand(16, 3, 8, 8).contiguous()
    data = {"one": Images(pixels, labels, ("dark", "bright"), "one")}
    settings = QUICK | {"epochs": 14, "batch_size": 16, "lr": 0.3, "inner_steps": 1, "crop_padding": 0}
    learngene = factory.extract("auto", ancestor_of(TINY), data, settings=settings, facts=FACTS)
    log = learngene.provenance["log"]
    assert log[-1]["first"] < 0.5 * log[0]["first"]


# Bugs of released code ------------------------------------------------------------------------------------------------


def test_pitfall_the_optimiser_is_used_but_never_set() -> None:
    """Both networks move: lambda is not what it was, and the pseudo descendant's loss falls."""
    learngene = extracted()
    assert bool((learngene.tensors["search.similarity"] != 1).all())
    log = learngene.provenance["log"]
    assert log[0]["first"] != log[1]["first"] and log[0]["loss"] != log[1]["loss"]


def test_pitfall_the_method_is_not_passed_so_that_the_vit_has_no_blocks() -> None:
    model: Any = factory.expand(extracted(layers=(0, 5)), depth=3)
    assert len(model.blocks) == 3 and ViTShape.of(model) == replace(SIX, depth=3)


def test_pitfall_random_initialisation_after_the_copies_overwrites_them() -> None:
    """Whatever the seed of what is fresh, the inherited tensors are the stored ones to the last bit."""
    learngene = extracted(layers=(0, 5))
    for seed in (0, 1, 2):
        state = factory.expand(learngene, depth=4, seed=seed).state_dict()
        for place, position in enumerate((0, 5)):
            for key in BLOCK_KEYS:
                assert torch.equal(state[f"blocks.{place}.{key}"], learngene.tensors[f"block.{position}.{key}"])


def test_random_layers_differ_across_seeds_and_agree_within_one() -> None:
    learngene = extracted(layers=(0, 5))
    one, same, other = (factory.expand(learngene, depth=4, seed=seed).state_dict() for seed in (0, 0, 1))
    for name in ("blocks.2.attn.qkv.weight", "blocks.3.mlp.fc2.weight", "head.weight"):
        assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


def test_pitfall_one_task_goes_on_from_the_weights_and_momentum_of_the_last() -> None:
    """Tuning a descendant for one task changes neither the learngene nor what the next task starts from."""
    learngene = extracted(layers=(0, 5))
    before = {name: tensor.clone() for name, tensor in learngene.tensors.items()}
    recipe, tuned = Recipe(epochs=1, lr=1e-2, batch_size=8), []
    for _ in range(2):
        model = factory.expand(learngene, depth=4)
        for _ in factory.finetune(model, pictures(), recipe=recipe):
            pass
        tuned.append(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in learngene.tensors.items())
    assert all(torch.equal(tensor, tuned[1][name]) for name, tensor in tuned[0].items())
    assert not torch.equal(tuned[0]["blocks.0.mlp.fc1.weight"], before["block.0.mlp.fc1.weight"])


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": 3}, "order 3 asked; there are 1, 2"),
        ({"score": "mean"}, "score 'mean' asked; there are sum, max"),
        ({"form": "square"}, "form 'square' asked"),
        ({"group": 0}, "group 0 asked; 1 is the least that works"),
        ({"keep": -1}, "keep -1 asked"),
        ({"lr": 0.0}, "lr 0.0 asked; it must be above 0"),
        ({"meta_lr": 0.0}, "lr is above 0"),
        ({"match": -1.0}, "match -1.0 asked"),
        ({"epochs": 0}, "epochs is a whole number of at least 1"),
        ({"layers": "swin"}, "layers 'swin' asked; there are dino-vits16, deit, vgg16, resnet18"),
        ({"layers": [3, 1]}, r"layers \[3, 1\] asked; each is above the one before"),
        ({"layers": [0, "1"]}, "layer '1' asked"),
        ({"layers": 3}, "layers 3 asked; it is a list of positions"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        get_method("auto", settings)


def test_what_cannot_be_searched_is_refused_before_training() -> None:
    def never(_: Iterator[Step]) -> Iterator[Step]:
        raise AssertionError("training began")

    def asked(data: dict[str, Images], ancestor: nn.Module | None = None, **settings: Any) -> None:
        factory.extract(
            "auto", ancestor or ancestor_of(SIX), data, settings=QUICK | settings, facts=FACTS, watch=never
        )  # fmt: skip

    with pytest.raises(SettingsError, match="no data sets asked; auto needs at least one"):
        asked({})
    with pytest.raises(SettingsError, match="one class asked, a 0; a cross-entropy needs at least 2"):
        asked({"a": pictures(1)})
    with pytest.raises(DataError, match="load all with one size"):
        asked({"a": pictures(), "b": pictures(size=12)})
    with pytest.raises(DataError, match="images of 1 channels asked; the ancestor takes 3"):
        asked({"a": pictures(channels=1)})
    with pytest.raises(DataError, match="a is empty"):
        asked({"a": pictures(count=0)})
    with pytest.raises(SettingsError, match="images of 10 px asked; the ancestor's patch is 4"):
        asked({"a": pictures(size=10)})
    with pytest.raises(SettingsError, match="keep 4 asked; the ancestor has 3 groups"):
        asked({"a": pictures()}, keep=4)
    with pytest.raises(SettingsError, match="pseudo_depth 7 asked; the ancestor has 6 blocks"):
        asked({"a": pictures()}, pseudo_depth=7)
    with pytest.raises(SettingsError, match="pseudo_depth 2 asked of a CNN"):
        asked({"a": pictures()}, cnn(SMALL_VGG), pseudo_depth=2)
    with pytest.raises(SettingsError, match="crop_padding 8 asked; it is below the image size 8"):
        asked({"a": pictures()}, crop_padding=8)
    with pytest.raises(SettingsError, match="layer 6 asked; the ancestor's are 0 to 5"):
        asked({}, layers=[0, 6])
    with pytest.raises(ShapeError):
        asked({"a": pictures()}, nn.Linear(2, 2))
    uneven = ConvShape(family="vgg", stages=((3, 4), (4, 4)), image_size=8, classes=2)
    with pytest.raises(ShapeError, match=r"stage 0 of \[3, 4\] channels given"):
        asked({"a": pictures()}, cnn(uneven))


def test_a_search_that_diverges_says_which_rate_to_lower() -> None:
    with pytest.raises(TrainingError, match=r"the pseudo descendant's loss is (nan|inf) at step .*an lr below 1e\+18"):
        extracted(lr=1e18, weight_decay=1e18)


def test_the_ancestor_is_asked_for_before_any_data_is_read() -> None:
    Auto().require_ancestor(build_pico(TINY))
    Auto().require_ancestor(cnn(SMALL_RESNET))
    with pytest.raises(ShapeError):
        Auto().require_ancestor(nn.Linear(2, 2))
