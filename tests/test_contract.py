"""What every method must do, whatever its paper: the same checks over METHODS x {class token, average, odd heads}."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS, VARIANTS, variant
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, BudgetError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import BUILT_IN, METHODS, Method, get_method, is_planning
from learngene_hub.shape import IMAGENET, ViTShape, shape_of

# Settings with which a method extracts from a pico ancestor in about a second. A new method adds its line here.
QUICK: dict[str, dict[str, Any]] = {
    "lsamd": {"epochs": 3, "steps_per_epoch": 2, "batch_size": 9, "alpha_lr": 1.0, "crop_padding": 2, "seed": 5},
    "net2net": {},
    "weight-selection": {"elements": "random", "layers": "random", "seed": 5},
    "front": {"attention": "heads"},
    "gene-fl": {"blocks": 2, "images": 8, "seed": 5},
    "heuristic": {
        "stem": "inherit",
        "last_k": 2,
        "choice": "calmest",
        "tasks": 2,
        "classes_per_task": 3,
        "batch_size": 30,
        "crop_padding": 2,
        "fisher": 2,
        "seed": 5,
    },
    "auto": {"epochs": 2, "batch_size": 30, "crop_padding": 2, "lr": 1e-2, "seed": 5},
    "cluster": {"eps": 0.02, "ffn_groups": [[1, 2]], "psi_epochs": 1, "batch_size": 30, "seed": 5},
    "learngene-pool": {
        **dict.fromkeys(("epochs", "first_epochs"), 1),
        **dict.fromkeys(("labels", "first_labels"), 0.0),
        "widths": [32, 64],
        "batch_size": 30,
        "crop_padding": 2,
        "seed": 5,
    },
    "sn-net": {
        **dict.fromkeys(("epochs", "first_epochs"), 1),
        "labels": 0.0,
        "depths": [2, 2],
        "widths": [32, 64],
        "batch_size": 30,
        "crop_padding": 2,
        "seed": 5,
    },
    "tleg": {"epochs": 2, "batch_size": 30, "crop_padding": 2, "lr": 1e-2, "seed": 5},
    "adaptive": {"components": 3},
    "ldr": {"phases": [1, 2], "epochs": 1, "batch_size": 30, "crop_padding": 2, "labels": 0.0, "lr": 1e-2, "seed": 5},
    "sws": {"stages": [2, 2], "epochs": 2, "batch_size": 30, "crop_padding": 2, "lr": 1e-2, "seed": 5},
    "lets": {
        **dict.fromkeys(("depth", "width", "head_dim", "mlp_ratio", "patch"), 0),
        "layout": "ancestor",
        "learngene_depth": 2,
        "learngene_width": 32,
        "epochs": 2,
        "batch_size": 30,
        "crop_padding": 2,
        "seed": 5,
    },
}
# Facts of a run that differ from one run to the next: a clock's.
CLOCKS = ("seconds",)

everywhere = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in BUILT_IN for kind in VARIANTS])


def data_sets() -> dict[str, Images]:
    sets = {}
    for seed, name in enumerate(("one", "two", "three")):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(256, (20, 3, 32, 32), generator=generator, dtype=torch.uint8)
        labels = torch.randint(3 + seed, (20,), generator=generator)
        sets[name] = Images(pixels, labels, tuple(str(i) for i in range(3 + seed)), name)
    return sets


@cache
def ancestor_of(kind: str) -> nn.Module:
    """Four blocks, so that keeping some is less than keeping all. Read only."""
    return build_pico(variant(kind, depth=4))


def extract(name: str, kind: str) -> Learngene:
    return factory.extract(
        name, ancestor_of(kind), data_sets(), settings=QUICK[name], facts=FACTS, preprocessing=IMAGENET
    )


@cache
def learngene_of(name: str, kind: str) -> Learngene:
    """One extraction for all tests. Read only."""
    return extract(name, kind)


def sizes_of(learngene: Learngene) -> list[dict[str, Any]]:
    """What to ask of the factory so that every depth within reach, and every width, is grown at least once."""
    (low, high), (narrow, wide, step) = learngene.reach.depths, learngene.reach.widths
    native = learngene.shape
    if learngene.reach.routes is not None:  # descendants of fixed sizes: the largest, and what fits into less
        largest = factory.plan(learngene).params()
        least = next(n for n in range(largest // 20, largest, largest // 20) if fits(learngene, n))
        return [{}, *({"max_params": n} for n in range(least, largest, max(1, (largest - least) // 5)))]
    sizes = [(depth, native.width) for depth in range(low, high + 1)]
    sizes += [(native.depth, width) for width in range(narrow, wide + 1, step)] + [(low, narrow), (high, narrow)]
    asked: list[dict[str, Any]] = [{"depth": depth, "width": width} for depth, width in sizes]
    return asked + [{"heads": heads} for heads in learngene.reach.heads or ()]


def fits(learngene: Learngene, max_params: int) -> bool:
    """Whether a pool has a descendant of so few parameters."""
    try:
        return bool(factory.plan(learngene, max_params=max_params))
    except (ShapeError, BudgetError):
        return False


def another_size(learngene: Learngene) -> dict[str, Any]:
    """One head more than the native width or, where that is out of reach, one less; the last one of a fixed width."""
    narrow, wide, step = learngene.reach.widths
    native = learngene.shape.width
    if narrow == wide or learngene.reach.routes is not None:
        return sizes_of(learngene)[-1]
    return {"width": native + step if native + step <= wide else native - step}


def timeless(learngene: Learngene) -> Learngene:
    """The same without what a clock said."""
    return replace(learngene, provenance={k: v for k, v in learngene.provenance.items() if k not in CLOCKS})


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_frozen_dataclass_with_name_paper_and_groups(name: str) -> None:
    method = METHODS[name]
    assert method.name == name and method.paper.startswith("https://")
    assert isinstance(method.groups, frozenset) and all(group.isidentifier() for group in method.groups)
    assert dataclasses.is_dataclass(method) and isinstance(method(), Method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method(), dataclasses.fields(method)[0].name, None)
    assert method.__init__.__kwdefaults__ is not None  # settings by keyword alone
    assert name in QUICK or name not in BUILT_IN, f"give {name} quick settings at the top of this file"


@everywhere
def test_extraction_leaves_the_ancestor_the_data_and_the_callers_random_numbers_alone(name: str, kind: str) -> None:
    ancestor, data = build_pico(variant(kind, depth=4)).train(), data_sets()
    before = {key: tensor.clone() for key, tensor in ancestor.state_dict().items()}
    pixels = {key: images.pixels.clone() for key, images in data.items()}
    state = torch.get_rng_state()
    factory.extract(name, ancestor, data, settings=QUICK[name], facts=FACTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert ancestor.training and all(p.requires_grad and p.grad is None for p in ancestor.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in ancestor.state_dict().items())
    assert all(torch.equal(images.pixels, pixels[key]) for key, images in data.items())


@everywhere
def test_the_same_seed_gives_the_same_bytes(name: str, kind: str) -> None:
    torch.manual_seed(99)  # whatever the caller's random numbers are
    first, second = timeless(learngene_of(name, kind)), timeless(extract(name, kind))
    assert first.digest == second.digest


@everywhere
def test_a_learngene_knows_its_ancestor_and_is_smaller(name: str, kind: str) -> None:
    learngene, ancestor = learngene_of(name, kind), ancestor_of(kind)
    assert learngene.method == name
    if learngene.reach.routes is None:  # a pool holds models of its own, several of them
        assert learngene.shape == ViTShape.of(ancestor)
        assert learngene.nbytes < sum(tensor.nbytes for tensor in ancestor.state_dict().values())
    assert learngene.ancestor == FACTS | {"sha256": factory.state_digest(ancestor)}
    assert learngene.license == FACTS["license"] and learngene.preprocessing == IMAGENET
    assert {key.partition(".")[0] for key in learngene.tensors} <= METHODS[name].groups
    assert all(bool(tensor.isfinite().all()) for tensor in learngene.tensors.values())
    assert not any(tensor.requires_grad for tensor in learngene.tensors.values())


@everywhere
def test_settings_survive_json(name: str, kind: str) -> None:
    learngene = learngene_of(name, kind)
    settings = json.loads(json.dumps(dict(learngene.settings), allow_nan=False))
    assert get_method(name, settings) == get_method(name, QUICK[name])
    assert asdict(get_method(name, settings)).keys() == settings.keys()  # type: ignore[call-overload]


@everywhere
def test_the_disk_gives_back_the_same_learngene_and_descendant(name: str, kind: str, tmp_path: Path) -> None:
    learngene = learngene_of(name, kind)
    digest = learngene.save(tmp_path / "learngene.safetensors")
    loaded = Learngene.load(tmp_path / "learngene.safetensors", sha256=digest)
    assert loaded.digest == digest == learngene.digest
    assert loaded.tensors.keys() == learngene.tensors.keys()
    for key, tensor in learngene.tensors.items():
        assert torch.equal(loaded.tensors[key], tensor) and loaded.tensors[key].dtype == tensor.dtype, key
    for field in ("method", "shape", "reach", "preprocessing", "license"):
        assert getattr(loaded, field) == getattr(learngene, field)
    assert dict(loaded.settings) == dict(learngene.settings) and dict(loaded.provenance) == dict(learngene.provenance)
    sizes = sizes_of(learngene)[-1]
    states = [factory.expand(each, **sizes).state_dict() for each in (learngene, loaded)]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


@everywhere
def test_every_depth_and_width_within_reach_grows(name: str, kind: str) -> None:
    """Its shape is the asked one, its keys are timm's exactly, its numbers are finite, nothing is left on "meta"."""
    learngene = learngene_of(name, kind)
    native, method = learngene.shape, get_method(name, learngene.settings)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for sizes in sizes_of(learngene):
        asked = factory.plan(learngene, **sizes)
        if not is_planning(method):
            depth, width = sizes["depth"], sizes["width"]
            assert asked == replace(native, depth=depth, width=width, heads=width // native.head_dim)
        assert all(getattr(asked, size) == sizes[size] for size in ("depth", "width") if size in sizes)
        assert asked.params() <= sizes.get("max_params", asked.params())
        expanded = method.expand(learngene, asked)
        assert expanded.keys() == asked.keys(), f"{asked}"
        model = factory.expand(learngene, **sizes)
        assert shape_of(model) == asked
        assert sum(parameter.numel() for parameter in model.parameters()) == asked.params()
        with torch.no_grad():
            assert bool(model(x).isfinite().all()), f"{asked}"


@everywhere
def test_growing_changes_nothing_and_shares_nothing(name: str, kind: str) -> None:
    learngene = learngene_of(name, kind)
    before = learngene.digest
    ours = {tensor.untyped_storage().data_ptr() for tensor in learngene.tensors.values()}
    sizes = sizes_of(learngene)
    for asked in ({}, another_size(learngene), sizes[0], sizes[-1]):
        state = torch.get_rng_state()
        model = factory.expand(learngene, **asked)
        assert torch.equal(torch.get_rng_state(), state)
        theirs = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
        assert len(set(theirs)) == len(theirs) and not ours & set(theirs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    vars(learngene).pop("digest", None)  # computed anew from the tensors
    assert learngene.digest == before


@everywhere
def test_expand_is_pure_and_differentiable(name: str, kind: str) -> None:
    """Twice the same; and every stored weight of a block that is used gets a gradient."""
    learngene = learngene_of(name, kind)
    shape = factory.plan(learngene, **another_size(learngene))
    method = get_method(name, learngene.settings)
    first, second = (method.expand(learngene, shape) for _ in range(2))
    for key, tensor in first.items():
        again = second[key]
        assert (tensor is None) == (again is None) and (tensor is None or torch.equal(tensor, again)), key  # type: ignore[arg-type]
    tensors = {key: tensor.float().clone().requires_grad_() for key, tensor in learngene.tensors.items()}
    state = method.expand(replace(learngene, tensors=tensors), shape)
    total = sum((tensor.sum() for tensor in state.values() if isinstance(tensor, Tensor)), torch.zeros(()))
    total.backward()
    stems = {key: tensor for key, tensor in tensors.items() if key.startswith(("stem.", "tail."))}
    assert all(tensor.grad is not None for tensor in stems.values())


@everywhere
def test_shapes_outside_the_reach_or_of_another_kind_are_refused(name: str, kind: str) -> None:
    learngene = learngene_of(name, kind)
    low, high = learngene.reach.depths
    narrow, wide, step = learngene.reach.widths
    wrong: list[dict[str, Any]] = [{"depth": high + 1}, {"depth": 0}, {"width": wide + step}, {"width": narrow + 1}]
    wrong += [{"depth": low - 1}] if low > 1 else []
    for sizes in wrong:
        with pytest.raises(ShapeError, match=f"{next(iter(sizes.values()))} asked") as caught:
            factory.expand(learngene, **sizes)
        assert "\n" not in str(caught.value)
    native = factory.plan(learngene)
    other: list[dict[str, Any]] = [
        {"patch": 16},
        {"class_token": True, "pool": "token"} if native.pool == "avg" else {"class_token": False, "pool": "avg"},
    ]
    if isinstance(native, ViTShape):
        other += [{"mlp_ratio": 2.0}, {"heads": 2 * native.heads, "head_dim": native.head_dim // 2}]
    for change in other:
        with pytest.raises(ShapeError):
            get_method(name, learngene.settings).expand(learngene, replace(native, **change))


@everywhere
def test_tensors_that_do_not_belong_are_refused(name: str, kind: str) -> None:
    learngene = learngene_of(name, kind)
    method, shapes = get_method(name), {key: tuple(tensor.shape) for key, tensor in learngene.tensors.items()}
    method.check(shapes, learngene.shape)
    for key in sorted(shapes):
        with pytest.raises(ArtefactError):
            method.check({k: v for k, v in shapes.items() if k != key}, learngene.shape)
        with pytest.raises(ArtefactError):
            method.check(shapes | {key: (*shapes[key], 2)}, learngene.shape)
    for group in sorted(method.groups):
        with pytest.raises(ArtefactError):
            method.check(shapes | {f"{group}.surprise": (1,)}, learngene.shape)
    with pytest.raises(ArtefactError):
        method.check({}, learngene.shape)
