"""Heuristic learngene: what is cut and where it stands, what stays random, what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import FACTS
from small_heuristic import CNNS, RESNET, VGG, VGG16, ancestor_of, extracted, pictures
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub._conv import ConvShape
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _heuristic_cut as cut
from learngene_hub.methods import _heuristic_parts as parts
from learngene_hub.methods.heuristic import Heuristic
from learngene_hub.shape import ViTShape
from learngene_hub.training import Recipe
from learngene_hub.transforms import BLOCK_KEYS

# What is cut, and where it stands ------------------------------------------------------------------------------------


def test_the_published_sizes() -> None:
    """VGG16's last three convolutions: 7,082,496; an individual for 5 classes: 11.79 million, 60 % of it inherited;
    DeiT-B's last three blocks: 24.6 % of it."""
    kept = range(10, 13)
    sizes = parts.expected(VGG16, kept, stem=False, fisher=False)
    gene = sum(math.prod(size) for name, size in sizes.items() if "running" not in name)
    assert gene == 3 * (512 * 512 * 9 + 512 + 1024) == 7_082_496
    assert [parts.names(VGG16)[i] for i in kept] == ["features.34", "features.37", "features.40"]
    individual = cut.plan_conv(
        VGG16, kept, depth=None, front=(64, 128, 256), head_hidden=1024, num_labels=5, image_size=32, in_chans=3
    )
    assert individual.stages == ((64,), (128,), (256,), (512, 512, 512, 512)) and individual.head_kernel == 2
    assert individual.params() == 11_788_293 and gene / individual.params() == pytest.approx(0.60, abs=0.005)
    deit = ViTShape(depth=12, width=768, heads=12)
    sizes = parts.expected(deit, range(9, 12), stem=False, fisher=False)
    blocks = sum(math.prod(size) for name, size in sizes.items() if name.startswith("block."))
    assert deit.params() == 86_567_656 and blocks == 3 * 7_087_872
    assert 100 * blocks / deit.params() == pytest.approx(24.6, abs=0.05)
    assert sum(math.prod(size) for size in sizes.values()) - blocks == 2 * 768  # and the last norm


@pytest.mark.parametrize("stem", ["fresh", "inherit"])
def test_a_vits_descendant_ends_in_the_kept_blocks_and_is_random_before(stem: str) -> None:
    learngene, state = extracted("vit", stem=stem), ancestor_of("vit").state_dict()
    assert learngene.reach.depths == (2, 8)
    for depth in (2, 3, 6):
        grown = [factory.expand(learngene, depth=depth, num_labels=3, seed=seed).state_dict() for seed in (0, 1)]
        for name, tensor in grown[0].items():
            source = None
            if name.startswith("blocks.") and int(name.split(".")[1]) >= depth - 2:
                source = name.replace(name.split(".")[1], str(int(name.split(".")[1]) - depth + 4), 1)
            elif name in ("norm.weight", "norm.bias"):
                source = name
            elif stem == "inherit" and not name.startswith(("blocks.", "head")):
                source = name
            if source:
                assert torch.equal(tensor, state[source]) and torch.equal(grown[1][name], tensor), name
            elif tensor.dim() > 1:
                assert not torch.equal(grown[1][name], tensor), name
                assert tensor.std().item() == pytest.approx(0.02, rel=0.5), name


@pytest.mark.parametrize("kind", CNNS)
def test_a_cnns_descendant_ends_in_the_kept_convolutions_and_is_random_before(kind: str) -> None:
    """Bit-identical with their running statistics; whatever else is random differs between seeds."""
    learngene, state = extracted(kind), ancestor_of(kind).state_dict()
    native = CNNS[kind]
    kept = cut.units(native)[-2:]
    for depth in (learngene.reach.depths[0], None, learngene.reach.depths[1]):
        grown = [factory.expand(learngene, depth=depth, num_labels=3, seed=seed) for seed in (0, 1)]
        shape: ConvShape = ConvShape.of(grown[0])
        assert shape == factory.plan(learngene, depth=depth, num_labels=3)
        pairs = [
            (there[0], here[0])
            for old, new in zip(kept, cut.units(shape)[-2:], strict=True)
            for here, there in zip(old.entries().values(), new.entries().values(), strict=True)
        ]
        first, second = (model.state_dict() for model in grown)
        inherited = {there for there, _ in pairs}
        assert len(pairs) == 2 * (6 if kind == "vgg" else 5)
        for there, here in pairs:
            assert torch.equal(first[there], state[here]) and torch.equal(second[there], state[here]), there
        for name in first.keys() - inherited:
            if first[name].dim() > 1:
                assert not torch.equal(first[name], second[name]), name
            elif name.endswith("num_batches_tracked"):
                assert first[name].dtype == torch.int64 and first[name] == 0
        with torch.no_grad():
            assert bool(grown[0](torch.randn(2, 3, 32, 32)).isfinite().all())


def test_the_front_of_a_vgg() -> None:
    """Depths other than the published one: evenly over the stages, the later first; too few, and the first stages
    go."""
    learngene = extracted("vgg")
    stages = {
        3: ((8, 8, 8),),
        4: ((5,), (8, 8, 8)),
        5: ((3,), (5,), (8, 8, 8)),
        6: ((3,), (5, 5), (8, 8, 8)),
        9: ((3, 3, 3), (5, 5, 5), (8, 8, 8)),
    }
    for depth, expected in stages.items():
        shape: Any = factory.plan(learngene, depth=depth)
        assert shape.stages == expected and shape.depth == depth
        assert shape.head_hidden == 12 and shape.head_kernel == min(32 >> len(expected), 7)
    assert factory.plan(learngene) == factory.plan(learngene, depth=5)
    wide: Any = factory.plan(learngene, settings={"front": [9, 9, 9], "head_hidden": 0}, image_size=64)
    assert wide.stages == ((9,), (9,), (9,), (8, 8, 8)) and wide.head_kernel == 0
    with pytest.raises(ShapeError, match="depth 2 asked; the gene has 2 convolutions and needs one before them"):
        factory.plan(learngene, depth=2)
    with pytest.raises(ShapeError, match="image size 4 asked; 3 stages halve it as often: 8 would work"):
        factory.plan(learngene, image_size=4)


def test_a_gene_from_the_middle_of_a_vgg_is_the_end_of_its_descendants() -> None:
    """Units 2 and 3 of 4,6,5,8,8,8 stand on both sides of a pool, and still do."""
    shape = cut.plan_conv(VGG, [2, 3], depth=None, front=(3,), head_hidden=0, num_labels=2, image_size=32, in_chans=3)
    assert shape.stages == ((3,), (6, 5), (8,))
    names = cut.placed(VGG, [2, 3], shape)
    assert names["conv.2.weight"] == "features.7.weight" and names["conv.3.weight"] == "features.11.weight"
    assert cut.units(VGG)[2].conv.name == "features.7" and cut.units(VGG)[3].conv.name == "features.11"
    with pytest.raises(ShapeError, match="in stages of its own"):
        cut.placed(VGG, [2, 3], replace(shape, stages=((3,), (6, 5, 8))))


def test_the_stages_of_a_resnet() -> None:
    """The gene's stages keep the ancestor's blocks; a first convolution fixes the channels before it."""
    assert [unit.conv.name for unit in cut.units(RESNET)][-6:-4] == ["layer4.0.conv1", "layer4.0.conv2"]
    learngene = extracted("resnet")  # layer4.2 whole
    shape: Any = factory.plan(learngene)
    assert shape.stages == ((3,), (5,), (7,), (10, 10, 10)) and learngene.reach.depths == (6, 14)
    shape = factory.plan(learngene, depth=8)
    assert shape.stages == ((3,), (5, 5), (7, 7), (10, 10, 10))
    whole = extracted("resnet", last_k=6)  # layer4 with its shortcut
    assert "conv.13.shortcut.weight" in whole.tensors or any("shortcut" in name for name in whole.tensors)
    shape = factory.plan(whole)
    assert shape.stages == ((3,), (5,), (8,), (10, 10, 10))  # 8: what layer4.0.conv1 reads
    grown = factory.expand(whole).state_dict()
    old = ancestor_of("resnet").state_dict()
    for name in old:
        if name.startswith("layer4") and not name.endswith("num_batches_tracked"):
            assert torch.equal(grown[name], old[name]), name
    across = extracted("resnet", last_k=8)  # layer3.1 and layer4
    shape = factory.plan(across)
    assert shape.stages == ((5,), (7,), (8, 8), (10, 10, 10))


@pytest.mark.parametrize("kind", CNNS)
def test_a_cnns_learngene_survives_the_disk(kind: str, tmp_path: Path) -> None:
    learngene = extracted(kind, tasks=2, fisher=2)
    digest = learngene.save(tmp_path / "learngene.safetensors")
    loaded = Learngene.load(tmp_path / "learngene.safetensors", sha256=digest)
    assert loaded.shape == CNNS[kind] and loaded.digest == digest and dict(loaded.provenance) == learngene.provenance
    first, second = (factory.expand(each).state_dict() for each in (learngene, loaded))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("kind", CNNS)
def test_a_grown_cnn_trains(kind: str) -> None:
    images = pictures(classes=3)
    model = factory.expand(extracted(kind), num_labels=3)
    recipe = Recipe(epochs=12, batch_size=18, lr=1e-2, schedule="constant")
    losses = [step.loss for step in factory.finetune(model, images, recipe=recipe)]
    assert losses[-1] < 0.5 * losses[0]


# The ancestor, the data, the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CNNS)
def test_pitfall_4_the_tasks_train_a_copy_and_not_the_ancestor(kind: str) -> None:
    """Pitfall 4: what is trained is never the object that was given, running statistics included."""
    ancestor = copy.deepcopy(ancestor_of(kind)).train()
    before = {name: tensor.clone() for name, tensor in ancestor.state_dict().items()}
    state = torch.get_rng_state()
    settings = {"tasks": 2, "fisher": 2, "classes_per_task": 2, "batch_size": 6, "lr": 0.1, "last_k": 2}
    found = [
        factory.extract("heuristic", ancestor, {"a": pictures()}, settings=settings, facts=FACTS) for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state) and ancestor.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in ancestor.state_dict().items())
    assert all(p.grad is None for p in ancestor.parameters())
    again = [replace(each, provenance={**each.provenance, "seconds": 0}).digest for each in found]
    assert again[0] == again[1]  # the second began where the first did
    rho = found[0].provenance["calmness"]["rho"]
    assert len(rho) == 2 and len(rho[0]) == len(cut.units(CNNS[kind])) and any(value > 0 for value in rho[0])


def test_pitfall_4_training_one_descendant_leaves_the_others_alone() -> None:
    """Pitfall 4, in the target phase: task 2 began with task 1's weights, as both were one object."""
    learngene = extracted("vgg")
    first, second = (factory.expand(learngene, num_labels=3) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    for _ in factory.finetune(first, pictures(classes=3), recipe=Recipe(epochs=1, batch_size=6, lr=0.1)):
        pass
    assert not torch.equal(first.get_parameter("head.fc.weight"), second.get_parameter("head.fc.weight"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in second.state_dict().items())
    third = factory.expand(learngene, num_labels=3).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in third.items())


def test_nothing_is_trained_or_looked_at_without_tasks() -> None:
    learngene = extracted("vit")
    assert learngene.provenance["steps"] == 0 and learngene.provenance["data"] == {}
    assert "calmness" not in learngene.provenance and learngene.provenance["kept"] == ["blocks.2", "blocks.3"]
    assert (
        learngene.params
        == 2 * sum(ancestor_of("vit").get_parameter(f"blocks.0.{key}").numel() for key in BLOCK_KEYS) + 2 * 64
    )


def test_the_choice_follows_the_curves() -> None:
    """ "calmest" keeps what the stored scores say, "last" the last ones of the same run."""
    measured = {"tasks": 8, "epochs": 1, "lr": 3e-2, "last_k": 2}
    learngene = extracted("vgg", choice="calmest", **measured)
    facts = learngene.provenance["calmness"]
    score = torch.tensor(facts["score"])
    best = max(range(1, 5), key=lambda start: (round(float(score[start : start + 2].sum()), 6), start))
    names = [unit.conv.name for unit in cut.units(VGG)]
    assert facts["units"] == names and learngene.provenance["kept"] == names[best : best + 2]
    last = extracted("vgg", choice="last", **measured)
    assert last.provenance["kept"] == names[-2:] and last.provenance["calmness"] == facts
    seen = 8 * 18 // 9 * 9
    assert last.provenance["images_seen"] == seen and last.provenance["flops"] == seen * VGG.flops()


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"last_k": 0}, "last_k 0 asked; 1 is the least"),
        ({"choice": "best"}, "there are last, calmest"),
        ({"choice": "calmest"}, "tasks 0, which measures nothing"),
        ({"sigma": -1.0}, "sigma -1.0 asked"),
        ({"quantile": 1.0}, "quantile 1.0 asked"),
        ({"classes_per_task": 1}, "classes_per_task 1 asked; 2 is the least"),
        ({"front": "wide"}, "it is a list of channels"),
        ({"front": [64, 0]}, "channels of the front 0 asked"),
        ({"stem": "odd"}, "there are fresh, inherit"),
        ({"form": "odd"}, "there are copy"),
        ({"lr": 0.0}, "lr is above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        factory.extract("heuristic", ancestor_of("vit"), {}, settings=settings, facts=FACTS)


def refuse_training(steps: Any) -> Any:
    raise AssertionError("trained before it was refused")


@pytest.mark.parametrize(
    ("kind", "settings", "images", "match"),
    [
        ("vit", {"last_k": 5}, {}, "last_k 5 asked of 4x64; at most 4 would work"),
        ("vgg", {"last_k": 6}, {}, "last_k 6 asked of vgg 4-6,5-8,8,8; at most 5 would work"),
        ("vit", {"tasks": 1}, {}, "no images given"),
        ("vit", {"tasks": 1, "classes_per_task": 7}, {"classes": 6}, "the data has 6: 2 to 6 would work"),
        ("vgg", {"tasks": 1, "classes_per_task": 2}, {"channels": 1}, "has 1 channels; the ancestor takes 3"),
        ("vgg", {"tasks": 1, "classes_per_task": 2}, {"side": 4}, "image size 4 asked"),
        ("vit", {"tasks": 1, "classes_per_task": 2}, {"side": 30}, "multiple of patch 8"),
        ("vit", {"fisher": 1}, {"side": 40}, "needs the ancestor's 32"),
    ],
)
def test_extraction_is_refused_before_anything_is_trained(
    kind: str, settings: dict[str, Any], images: dict[str, Any], match: str
) -> None:
    data: Mapping[str, Images] = {"a": pictures(**images)} if images else {}
    with pytest.raises((SettingsError, ShapeError, DataError), match=match) as caught:
        factory.extract(
            "heuristic", ancestor_of(kind), data, settings=settings, facts=FACTS, watch=refuse_training
        )  # fmt: skip
    assert "\n" not in str(caught.value)


def test_other_ancestors_are_refused() -> None:
    with pytest.raises(ShapeError, match="Linear given"):
        Heuristic().require_ancestor(nn.Linear(2, 2))
    Heuristic().require_ancestor(ancestor_of("vgg"))


@pytest.mark.parametrize(
    ("kind", "asked", "match"),
    [
        ("vgg", {"width": 16}, "width 16 asked; a descendant of this learngene ends with the gene's 8 channels"),
        ("vgg", {"heads": 2}, "grows CNNs, which have none"),
        ("vgg", {"depth": 13}, "depth 13 asked; this learngene reaches depth 3-12"),
        ("resnet", {"depth": 5}, "3 stages before them at least one each: depth 6 would work"),
        ("resnet", {"settings": {"front": [4]}}, "3 stages stand before the gene's: give 3 numbers"),
        ("vit", {"heads": 3}, "2 heads would work"),
        ("vit", {"depth": 1}, "depth 1 asked; this learngene reaches depth 2-8"),
    ],
)
def test_sizes_out_of_reach_are_refused(kind: str, asked: dict[str, Any], match: str) -> None:
    with pytest.raises(ShapeError, match=match):
        factory.plan(extracted(kind), **asked)


def test_a_stem_that_was_not_stored_cannot_be_inherited() -> None:
    with pytest.raises(SettingsError, match="extracted without one: 'fresh' would work"):
        factory.expand(extracted("vit"), settings={"stem": "inherit"})
    grown = factory.expand(extracted("vit", stem="inherit"), settings={"stem": "fresh"}).state_dict()
    assert not torch.equal(grown["pos_embed"], ancestor_of("vit").state_dict()["pos_embed"])


@pytest.mark.parametrize("kind", CNNS)
def test_tensors_that_do_not_belong_are_refused(kind: str) -> None:
    learngene = extracted(kind, tasks=2, fisher=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in learngene.tensors.items()}
    method = Heuristic()
    method.check(shapes, learngene.shape)
    wrong: list[dict[str, Any]] = [{k: v for k, v in shapes.items() if k != name} for name in shapes]
    wrong += [shapes | {name: (*size, 2)} for name, size in shapes.items()]
    wrong += [shapes | {f"{group}.surprise": (1,)} for group in sorted(method.groups)] + [{}]
    wrong += [{name.replace("conv.", "conv.9", 1): size for name, size in shapes.items()}]
    wrong += [{name: size for name, size in shapes.items() if name.startswith("fisher")}]
    for each in wrong:
        with pytest.raises(ArtefactError):
            method.check(each, learngene.shape)
    with pytest.raises(ArtefactError):
        method.check(shapes, ViTShape(depth=4, width=64, heads=2))


def test_a_network_of_another_kind_is_refused() -> None:
    vit, vgg = extracted("vit"), extracted("vgg")
    with pytest.raises(ShapeError, match="this learngene is of kind conv"):
        Heuristic(**vgg.settings).expand(vgg, vit.shape)
    with pytest.raises(ShapeError, match="this learngene is of kind vit"):
        Heuristic(**vit.settings).expand(vit, vgg.shape)
    with pytest.raises(ShapeError, match="a resnet asked; this learngene is of a vgg"):
        Heuristic(**vgg.settings).expand(vgg, RESNET)


def test_half_precision_keeps_counters_whole() -> None:
    model = factory.expand(extracted("vgg"), dtype=torch.bfloat16)
    kinds: dict[str, torch.dtype] = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for name, dtype in kinds.items():
        assert dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.bfloat16), name


def test_a_wider_vit_holds_the_resized_gene() -> None:
    """Twice the width, "exact": a block's function is copied, so its first 64 outputs are the native block's."""
    learngene = extracted("vit")
    wide: Tensor = factory.expand(learngene, width=128, depth=2).state_dict()["blocks.1.mlp.fc1.weight"]
    native = ancestor_of("vit").state_dict()["blocks.3.mlp.fc1.weight"]
    assert torch.allclose(wide[:256, :64] + wide[:256, 64:], native, atol=1e-6)
