"""LeTs' training: initial values, the loss, one expansion per step, resume, and refusals before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS, variant
from small_lets import (
    NATIVE,
    QUICK,
    SMALL,
    TOKEN,
    WIDE,
    Convnet,
    auxiliary,
    extract,
    images_of,
    made,
    noise,
    wrapped,
)
from torch import Tensor, nn

from learngene_hub import _state, factory
from learngene_hub.data import Images, normalise
from learngene_hub.errors import DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _lets_start as starting
from learngene_hub.methods import _lets_training as training
from learngene_hub.methods import get_method
from learngene_hub.methods._lets_maps import Groups, tensor_shapes
from learngene_hub.methods.lets import Lets
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.training import Step

# The start -----------------------------------------------------------------------------------------------------------


def test_rand_rows_are_positive_and_sum_to_one() -> None:
    """Uniform numbers over their sum: mean 1 / n, spread (1 / sqrt(12)) / (n / 2) = 0.577 / n."""
    rows = starting.initial_rows(Lets(), (200, 400), torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows.sum(1), torch.ones(200))
    assert bool((rows > 0).all()) and float(rows.std() * 400) == pytest.approx(0.577, rel=0.02)


@pytest.mark.parametrize("scheme", ["sel", "sel_noisy"])
def test_sel_rows_copy_one_old_unit_each(scheme: str) -> None:
    rows = starting.initial_rows(Lets(scheme=scheme, noise=0.1), (300, 20), torch.Generator().manual_seed(0))
    assert bool(((rows == 1).sum(1) == 1).all()) and rows.argmax(1).bincount(minlength=20).min() >= 3
    rest = rows[rows != 1]
    if scheme == "sel":
        assert not rest.any()
    else:
        assert 0 <= float(rest.min()) and float(rest.max()) <= 0.1
        assert float(rest.mean()) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(("scheme", "second"), [("stackbert_noisy", 0), ("alternate", 1)])
def test_coefficients_begin_at_one_layer_of_the_pair(scheme: str, second: int) -> None:
    """1 / (1 + u) with u up to 0.03: between 0.97 and 1; published, always the first layer of the pair."""
    groups = Groups.of(8, 4)
    mixed = starting.initial_coefficients(
        Lets(depth_scheme=scheme), groups, (4, 8, 2), torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(mixed.sum(-1), torch.ones(4, 8))
    for row, layer in enumerate([0, second, 0, second]):
        assert bool((mixed[row, :, layer] >= 1 / 1.03).all()) and bool((mixed[row, :, layer] < 1).all())


@pytest.mark.parametrize("layout", [{}, TOKEN])
def test_preserving_begins_with_the_learngenes_own_function_at_integer_multiples(layout: dict[str, Any]) -> None:
    """The same logits at 4, 8 and 12 channels, with norms and biases that are not at their defaults."""
    native, small = replace(WIDE, **layout), replace(SMALL, **layout)
    method = Lets(scheme="preserving")
    tensors = starting.initial_tensors(method, native, small)
    for place, name in enumerate(sorted(tensors)):
        if name.split(".")[0] in ("block", "tail", "head") or "patch_embed" in name or "cls" in name:
            tensors[name] = noise(*tensors[name].shape, seed=place)
    learngene, x = wrapped(tensors, native, small, scheme="preserving"), noise(2, 3, 4, 4)
    with torch.no_grad():
        logits = [factory.expand(learngene, width=width, depth=4)(x) for width in (4, 8, 12)]
    assert float(logits[0].std()) > 0.1
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-4)


def test_the_learngene_begins_as_timm_begins_and_by_its_seed() -> None:
    native, small = NATIVE, replace(SMALL, width=4)
    first, again, other = (starting.initial_tensors(Lets(seed=seed), native, small) for seed in (1, 1, 2))
    assert first.keys() == tensor_shapes(native, small).keys() and list(first) == sorted(first)
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == tensor_shapes(native, small)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    for name in ("block.0.attn.qkv.weight", "stem.pos_embed", "map.q.3", "depth.bias", "head.weight"):
        assert not torch.equal(first[name], other[name])
    assert bool((first["block.1.norm2.weight"] == 1).all()) and not first["block.1.mlp.fc1.bias"].any()


@pytest.mark.parametrize("kind", ["token", "avg"])
def test_an_ancestor_can_give_the_first_weights(kind: str) -> None:
    """Blocks 0 and 3 of four, their leading 32 units; positions at the full width; the classifier."""
    ancestor = build_pico(variant(kind, depth=4))
    native = variant(kind, depth=4)
    tensors = starting.initial_tensors(
        Lets(start="ancestor"), native, replace(native, depth=2, width=32, heads=1), ancestor
    )
    state = ancestor.state_dict()
    for layer, place in ((0, 0), (1, 3)):
        block = f"blocks.{place}"
        assert torch.equal(tensors[f"block.{layer}.attn.proj.weight"], state[f"{block}.attn.proj.weight"][:32, :32])
        assert torch.equal(tensors[f"block.{layer}.mlp.fc1.bias"], state[f"{block}.mlp.fc1.bias"][:128])
        thirds = [third[:32, :32] for third in state[f"{block}.attn.qkv.weight"].chunk(3)]
        assert torch.equal(tensors[f"block.{layer}.attn.qkv.weight"], torch.cat(thirds))
    assert torch.equal(tensors["stem.pos_embed"], state["pos_embed"])
    assert torch.equal(tensors["head.weight"], state["head.weight"][:, :32])


# Training ------------------------------------------------------------------------------------------------------------


def told(learngene: Learngene) -> str:
    facts = {key: value for key, value in learngene.provenance.items() if key != "seconds"}
    return replace(learngene, provenance=facts).digest


def test_a_seed_gives_one_learngene_whatever_the_callers_numbers() -> None:
    first = extract(seed=3)
    torch.manual_seed(7)
    assert told(first) == told(extract(seed=3)) != told(extract(seed=4))
    assert first.shape == ViTShape(
        depth=4, width=64, heads=2, patch=8, image_size=16, classes=5, class_token=False, pool="avg"
    )
    assert str(first.reach) == "depth 1-4, width 32-64 step 32"
    facts = first.provenance
    assert (facts["steps"], facts["images_seen"], facts["learngene"]) == (4, 24, "2x32")
    assert facts["flops"] == 24 * first.shape.flops()


def test_everything_is_trained_together() -> None:
    learngene, method = extract(), Lets(**QUICK)
    native = learngene.shape
    start = starting.initial_tensors(method, native, replace(native, depth=2, width=32, heads=1))
    assert all(not torch.equal(tensor, start[name]) for name, tensor in learngene.tensors.items())


def test_the_auxiliary_learns_what_the_teacher_says() -> None:
    still = {"flip": False, "crop_padding": 0, "color": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
    teacher = Convnet()
    with torch.no_grad():
        teacher.head.weight.mul_(20)
    learngene = extract(teacher, epochs=30, batch_size=12, lr=3e-3, drop_path=0.0, weight_decay=0.0, **still)
    losses = learngene.provenance["loss"]
    assert len(losses) == 30 and losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_expansion_happens_once_per_step_in_float32(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = Lets.expand, []

    def expand(self: Lets, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        state = plain(self, learngene, shape)
        seen.append({tensor.dtype for tensor in state.values() if tensor is not None})
        return state

    monkeypatch.setattr(Lets, "expand", expand)
    extract(precision=precision)
    assert seen == [{torch.float32}] * 4


def test_the_loss_is_the_divergence_from_the_teacher_and_its_share_of_the_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first update, by hand: tau^2 KL over the batch, and smoothed cross-entropy for the rest."""
    still = {"flip": False, "crop_padding": 0, "color": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
    settings = (
        QUICK
        | still
        | {"epochs": 1, "batch_size": 12, "drop_path": 0.0, "distil": 0.7, "labels": 0.3, "temperature": 2.0}
    )
    teacher, images = Convnet(3).train(), images_of()
    losses: list[float] = []

    def watch(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            losses.append(step.loss)
            yield step

    learngene = factory.extract("lets", teacher, {"one": images}, settings=settings, facts=FACTS, watch=watch)
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    teacher.eval()
    native = learngene.shape
    start = starting.initial_tensors(Lets(**settings), native, replace(native, depth=2, width=32, heads=1))
    with torch.no_grad():
        x = normalise(images.pixels, IMAGENET)
        logits = factory.expand(replace(learngene, tensors=start))(x)
        p, q = ((z / 2.0).softmax(-1) for z in (teacher(x), logits))
        kl = 4.0 * (p * (p.log() - q.log())).sum(-1).mean()
        target = torch.eye(3)[images.labels] * 0.9 + 0.1 / 3
        ce = -(target * logits.log_softmax(-1)).sum(-1).mean()
    assert losses == [pytest.approx(float(0.7 * kl + 0.3 * ce), rel=1e-4)]
    cached = factory.extract(
        "lets", teacher.train(), {"one": images}, settings=settings | {"teacher": "once"}, facts=FACTS
    )
    for name, tensor in learngene.tensors.items():
        torch.testing.assert_close(cached.tensors[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_matrices_decay_but_not_coefficients_positions_and_vectors() -> None:
    model = auxiliary(made(replace(NATIVE, **TOKEN), replace(SMALL, **TOKEN)))
    decay, plain = training.groups(model)
    assert plain["weight_decay"] == 0.0 and "weight_decay" not in decay
    kept = {id(p) for p in plain["params"]}
    still = {name for name, tensor in model.tensors().items() if id(tensor) in kept}
    assert {"depth.weight", "depth.bias", "stem.pos_embed", "stem.cls_token", "tail.norm.weight"} <= still
    moved = model.tensors().keys() - still
    assert {"map.stream", "map.hidden.3", "head.weight", "block.0.mlp.fc1.weight"} <= moved
    assert len(decay["params"]) + len(plain["params"]) == len(model.tensors())


def test_drop_path_acts_in_training_alone() -> None:
    learngene, x = made(), noise(8, 3, 4, 4)
    model = training.auxiliary(Lets(drop_path=0.5), NATIVE, learngene.tensors, IMAGENET)
    still = auxiliary(learngene)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), still(x))
        assert not torch.equal(model.train()(x), still(x))


def test_settings_of_growth_change_nothing_of_training() -> None:
    lists: dict[str, Any] = {"layer_map": [0, 3, 3, 0], "coefficients": [2, 2, 0, 0]}
    plain, other = extract(), extract(select="random", head="fresh", **lists)
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in plain.tensors.items())


class Stop(Exception):
    pass


@pytest.mark.parametrize("teacher", ["live", "once"])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_an_interrupted_extraction_ends_as_the_straight_one(
    at: int, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_state, "SAVE_SECONDS", 0.0)
    settings = QUICK | ({"teacher": "once", "mixup": 0.0, "cutmix": 0.0} if teacher == "once" else {})
    ancestor, data = Convnet(), {"one": images_of()}

    def stop(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            yield step
            if step.step == at + 1:  # the state of update ``at`` is on disk
                raise Stop
        raise Stop  # after the last update

    def run(watch: Any = iter, **more: Any) -> Learngene:
        return factory.extract("lets", ancestor, data, settings=settings, facts=FACTS, watch=watch, **more)

    with pytest.raises(Stop):
        run(stop, state_dir=tmp_path / "state")
    assert told(run(state_dir=tmp_path / "state")) == told(run())


# Refusals: each one line, before any training ------------------------------------------------------------------------


def never(steps: Iterator[Step]) -> Iterator[Step]:
    for _ in steps:
        pytest.fail("training began")
    yield from ()


class Silent(Convnet):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Flat(nn.Module):
    """Takes images of 16 px alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


@pytest.mark.parametrize(
    ("settings", "error", "line"),
    [
        ({"learngene_depth": 3}, ShapeError, "learngene_depth 3 asked.*2 or 4 would work"),
        ({"depth": 5, "learngene_depth": 4}, ShapeError, "auxiliary depth 5 asked.*depth 4 or 6 would work"),
        ({"learngene_width": 48}, ShapeError, "learngene_width 48 asked.*multiple of head_dim 32 up to.*64"),
        ({"learngene_width": 96}, ShapeError, "learngene_width 96 asked"),
        ({"width": 80}, ShapeError, "width 80 asked; the heads are 32 wide: a multiple of head_dim 32 would work"),
        ({"patch": 5}, ShapeError, "image size 16 asked.*patch 5"),
        ({"depth": 0}, ShapeError, "depth of the ancestor asked: Convnet given"),
        ({"layout": "ancestor"}, ShapeError, "layout of the ancestor asked: Convnet given"),
        ({"start": "ancestor"}, ShapeError, "Convnet given"),
        ({"labels": 0.5}, SettingsError, "one has 3 classes, the ancestor 5; labels=0, the distillation alone"),
        ({"crop_padding": 16}, SettingsError, "crop_padding 16 asked; it is below the image size 16"),
        ({"precision": "fp16"}, SettingsError, "precision 'fp16' needs a GPU"),
    ],
)
def test_what_cannot_be_is_refused_before_training(settings: dict[str, Any], error: type, line: str) -> None:
    with pytest.raises(error, match=line) as caught:
        factory.extract("lets", Convnet(), {"one": images_of()}, settings=QUICK | settings, facts=FACTS, watch=never)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "error", "line"),
    [
        ({}, SettingsError, "no data sets asked"),
        ({"one": images_of(0)}, DataError, "one is empty"),
        ({"one": images_of(), "two": images_of(size=24)}, DataError, "images of shapes"),
    ],
)
def test_data_that_is_missing_or_mixed_is_refused(data: dict[str, Images], error: type, line: str) -> None:
    with pytest.raises(error, match=line) as caught:
        extract(data=data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("teacher", "settings", "line"),
    [
        (Silent(), {}, r"the ancestor gives \[1, 4, 14, 14\]"),
        (Flat(), {"teacher_size": 24}, "fails on an image of 24 px.*teacher_size=0, its own, may work"),
        (build_pico(variant("avg", classes=0)), {}, "without a classifier"),
    ],
)
def test_a_teacher_that_says_nothing_is_refused(teacher: nn.Module, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError, match=line) as caught:
        extract(teacher, **settings)
    assert "\n" not in str(caught.value)


def test_a_teacher_of_another_image_size_sees_larger_images() -> None:
    learngene = extract(build_pico(variant("token")), epochs=1, batch_size=12)
    assert (learngene.shape.image_size, learngene.shape.classes) == (16, 10)


def test_starting_from_an_ancestor_of_another_kind_is_refused() -> None:
    settings: dict[str, Any] = {"start": "ancestor"}
    for ancestor, line in ((variant("token"), "class_token False"), (variant("avg", mlp_ratio=2.0), "mlp_ratio 4.0")):
        with pytest.raises(ShapeError, match=line):
            extract(build_pico(ancestor), **settings)
    with pytest.raises(ShapeError, match="patch 4; the ancestor's is 8"):
        extract(build_pico(variant("avg")), **settings, patch=4)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"scheme": "magic"}, "there are rand, sel, sel_noisy, preserving"),
        ({"select": "best"}, "there are continuous, step, random, magnitude"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr is above 0"),
        ({"warmup": 1.0}, "warmup"),
        ({"drop_path": 1.5}, "drop_path 1.5 asked; it is a number from 0 to 0.999"),
        ({"distil": 0.0}, "distil 0 and labels 0 asked"),
        ({"labels": -1.0}, "labels -1.0 asked; 0 is the least"),
        ({"stride": 0}, "stride 0 asked"),
        ({"first": -1}, "first -1 asked"),
        ({"mlp_ratio": -1.0}, "mlp_ratio -1.0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"teacher": "once"}, "mixup or cutmix asked with teacher 'once'"),
        ({"layer_map": [0, 1]}, "layer_map of 2 and coefficients of 0"),
        ({"layer_map": [0.5], "coefficients": [0]}, "it is a list of layers"),
        ({"layer_map": 4}, "it is a list of layers"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError, match=line) as caught:
        get_method("lets", settings)
    assert "\n" not in str(caught.value)
