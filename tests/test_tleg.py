"""TLEG: the line by hand, the auxiliary is what is expanded, gradients against differences, early refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS, variant
from taught import QUICK, TINY, ancestor_of, compare_gradients, compare_interrupted, noise, pictures, randomised
from torch import nn

from learngene_hub import factory
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _auxiliary, _lesson, get_method
from learngene_hub.methods.tleg import Tleg
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.training import Step
from learngene_hub.transforms import BLOCK_KEYS, Resize


def extract(data: dict[str, Images] | None = None, *, shape: ViTShape = TINY, **settings: Any) -> Learngene:
    chosen = {"one": pictures()} if data is None else data
    return factory.extract("tleg", ancestor_of(shape), chosen, settings=QUICK | settings, facts=FACTS)


def random_learngene(native: ViTShape, dtype: torch.dtype = torch.float32) -> Learngene:
    """A learngene whose every number is random, under settings left at their defaults."""
    return randomised("tleg", native, ("base", "slope"), dtype=dtype)


def renamed(images: Images) -> Images:
    return Images(images.pixels, images.labels, tuple(f"other {name}" for name in images.classes), images.name)


# The line -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_block_l_is_a_plus_l_over_the_depth_times_b(depth: int) -> None:
    learngene = random_learngene(TINY)
    state = Tleg().expand(learngene, replace(TINY, depth=depth))
    base, slope = learngene.group("base"), learngene.group("slope")
    assert len(BLOCK_KEYS) == 12 and state.keys() == replace(TINY, depth=depth).keys()
    for place in range(depth):
        for key in BLOCK_KEYS:
            got = state[f"blocks.{place}.{key}"]
            assert got is not None
            flat = zip(got.flatten().tolist(), base[key].flatten().tolist(), slope[key].flatten().tolist(), strict=True)
            for value, a, b in flat:  # the formula, number by number
                assert value == pytest.approx(a + place / depth * b, abs=1e-5)
    assert all(torch.equal(state[f"blocks.0.{key}"], base[key]) for key in BLOCK_KEYS)  # type: ignore[arg-type]


def test_the_last_block_never_reaches_a_plus_b() -> None:
    learngene = random_learngene(TINY)
    got = Tleg().expand(learngene, replace(TINY, depth=4))["blocks.3.norm1.weight"]
    want = learngene.tensors["base.norm1.weight"] + 0.75 * learngene.tensors["slope.norm1.weight"]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", ["copy", "balanced", "exact"])
@pytest.mark.parametrize("width", [4, 12, 16])
def test_another_width_is_the_shared_transform_of_every_block(form: str, width: int) -> None:
    """A and B are resized, then put together: the same as resizing each block."""
    learngene, shape = random_learngene(TINY), replace(TINY, width=width, heads=width // 4)
    got = Tleg(form=form).expand(learngene, shape)
    native = Tleg().expand(learngene, TINY)
    resize = Resize.of({}, TINY, shape, form)
    for place in range(TINY.depth):
        block = resize.block({key: native[f"blocks.{place}.{key}"] for key in BLOCK_KEYS}, place)  # type: ignore[misc]
        for key, tensor in block.items():
            torch.testing.assert_close(got[f"blocks.{place}.{key}"], tensor, atol=1e-5, rtol=1e-5)


def test_half_precision_is_put_together_in_float32() -> None:
    learngene = random_learngene(TINY).to(torch.float16)
    got = Tleg().expand(learngene, TINY)["blocks.2.mlp.fc1.weight"]
    a, b = (learngene.tensors[f"{name}.mlp.fc1.weight"].double() for name in ("base", "slope"))
    assert got is not None and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), a + 2 / 3 * b, atol=1e-6, rtol=1e-6)


def test_gradients_of_expand_are_those_of_differences() -> None:
    native = replace(TINY, width=4, heads=1)
    shape = replace(native, depth=2, width=8, heads=2, image_size=12)
    compare_gradients(Tleg().expand, random_learngene(native, torch.float64), shape)


# The auxiliary --------------------------------------------------------------------------------------------------------


def test_what_is_trained_is_what_is_expanded() -> None:
    learngene = random_learngene(TINY)
    head = {"weight": noise(4, 8), "bias": noise(4)}
    auxiliary = _auxiliary.Auxiliary(learngene, Tleg().expand, TINY, head)
    grown: Any = factory.expand(learngene)
    x = noise(2, 3, 8, 8)
    grown.head.load_state_dict(head)
    with torch.no_grad():
        torch.testing.assert_close(auxiliary(x), grown(x))
        torch.testing.assert_close(auxiliary.materialise()(x), grown(x))
    assert auxiliary.found().keys() == learngene.tensors.keys()
    assert all(torch.equal(tensor, learngene.tensors[name]) for name, tensor in auxiliary.found().items())


def test_every_tensor_of_the_learngene_and_the_head_learns() -> None:
    auxiliary = _auxiliary.Auxiliary(
        random_learngene(TINY), Tleg().expand, TINY, {"weight": noise(4, 8), "bias": noise(4)}
    )
    auxiliary(noise(2, 3, 8, 8)).square().sum().backward()
    for name, parameter in auxiliary.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_it_is_expanded_once_per_update_in_float32_outside_of_autocast() -> None:
    learngene, seen = random_learngene(TINY), []

    def watched(given: Learngene, shape: ViTShape) -> Any:
        state = Tleg().expand(given, shape)
        seen.append(
            (torch.is_autocast_enabled("cpu"), {tensor.dtype for tensor in state.values() if tensor is not None})
        )
        return state

    auxiliary = _auxiliary.Auxiliary(learngene, watched, TINY, {"weight": noise(4, 8), "bias": noise(4)})
    with torch.autocast("cpu", torch.bfloat16):
        assert auxiliary(noise(2, 3, 8, 8)).dtype == torch.bfloat16
    assert seen == [(False, {torch.float32})]
    low = extract(precision="bf16").tensors
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in low.values())


def test_the_published_start() -> None:
    """Linear weights of A and B from a normal of 0.02, gains of A 1 and of B 0, every bias 0."""
    shape = replace(TINY, width=64, heads=16)
    learngene = extract(shape=shape, epochs=1, lr=1e-12, weight_decay=0.0)
    for name in ("base", "slope"):
        for key, tensor in learngene.group(name).items():
            if key.startswith("norm") and key.endswith("weight"):
                assert torch.allclose(tensor, torch.full_like(tensor, float(name == "base")))
            elif key.endswith("bias"):
                assert torch.allclose(tensor, torch.zeros_like(tensor))
            else:
                assert float(tensor.std()) == pytest.approx(0.02, rel=0.1), key
    assert not torch.equal(learngene.tensors["base.mlp.fc1.weight"], learngene.tensors["slope.mlp.fc1.weight"])


def test_a_start_from_the_ancestor_is_its_middle_block_at_every_depth() -> None:
    learngene = extract(start="ancestor", epochs=1, lr=1e-12, weight_decay=0.0)
    state, grown = ancestor_of().state_dict(), factory.expand(learngene).state_dict()
    for place in range(TINY.depth):
        for key in BLOCK_KEYS:
            torch.testing.assert_close(grown[f"blocks.{place}.{key}"], state[f"blocks.1.{key}"])
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight", "norm.bias"):
        torch.testing.assert_close(grown[key], state[key])


def outspoken(seed: int) -> nn.Module:
    """A model whose logits differ by whole numbers, so that one direction of the divergence is not the other."""
    model: Any = build_pico(TINY, seed=seed)
    with torch.no_grad():
        model.head.weight.mul_(60.0)
    return model


@pytest.mark.parametrize("teacher", ["once", "live"])
def test_the_loss_is_the_divergence_from_the_ancestor_and_the_labels(teacher: str) -> None:
    data, settings = {"one": pictures()}, {"labels": 0.5, "distil": 2.0, "temperature": 3.0, "teacher": teacher}
    method = Tleg(**(QUICK | settings | {"crop_padding": 0, "flip": False}))
    ancestor, student = outspoken(seed=0), outspoken(seed=4)
    lesson = _lesson.prepare(
        method, ancestor, data, depth=0, method="tleg", preprocessing=IMAGENET, teacher=None
    )  # fmt: skip
    lesson.ask(None)
    assert lesson.native == TINY
    batches, count = lesson.batches(method.recipe())
    assert count == 2
    x, y = next(iter(batches(0)))
    truth = y if teacher == "live" else data["one"].labels[y]
    with torch.no_grad():
        got = float(lesson.loss(student, (x, y)))
        said, taught = (model(x).double() / 3.0 for model in (student, ancestor))
        p, q = taught.softmax(-1), said.softmax(-1)
        divergence = sum(float(p[b, c] * (p[b, c] / q[b, c]).log()) for b in range(8) for c in range(4)) / 8
        smooth = (3.0 * said).log_softmax(-1)
        labels = -sum(
            (0.9 * (c == int(truth[b])) + 0.1 / 4) * float(smooth[b, c]) for b in range(8) for c in range(4)
        ) / 8  # fmt: skip
    assert divergence > 0.1 and got == pytest.approx(2.0 * 9.0 * divergence + 0.5 * labels, rel=1e-4)


def test_training_brings_the_auxiliary_nearer_to_the_ancestor() -> None:
    learngene = extract(epochs=12, lr=3e-3)
    losses = learngene.provenance["loss"]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]


def test_the_provenance_counts() -> None:
    learngene = extract({"one": pictures(), "two": pictures(7)})
    facts = learngene.provenance
    assert facts["steps"] == 8 and facts["images_seen"] == 64  # 32 images in batches of 8, twice
    assert facts["flops"] == 64 * TINY.flops() and facts["teacher_flops"] == 32 * TINY.flops()
    assert facts["data"] == {"one": {"images": 16}, "two": {"images": 16}} and facts["seconds"] > 0
    live = extract(teacher="live", mixup=0.5, cutmix=0.5, labels=0.5).provenance
    assert live["teacher_flops"] == live["flops"] == 32 * TINY.flops()
    assert extract(distil=0.0, labels=1.0).provenance["teacher_flops"] == 0


def test_an_auxiliary_of_other_sizes_than_the_ancestor() -> None:
    small = replace(TINY, image_size=16)
    learngene = extract({"one": pictures(size=8)}, shape=small, depth=2, width=12, patch=2)
    assert learngene.shape == replace(TINY, depth=2, width=12, heads=3, patch=2, image_size=8)
    assert learngene.tensors["stem.pos_embed"].shape == (1, 17, 12)


def test_an_interrupted_extraction_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_interrupted("tleg", QUICK, tmp_path, monkeypatch, stops_after=3, of=4)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": -1}, "depth -1 asked"),
        ({"start": "warm"}, "start 'warm' asked; there are random, ancestor"),
        ({"teacher": "twice"}, "teacher 'twice' asked"),
        ({"form": "wide"}, "form 'wide' asked"),
        ({"distil": 0.0}, "distil 0 and labels 0 asked"),
        ({"labels": -1.0}, "labels -1.0 asked"),
        ({"temperature": 0.0}, "temperature 0.0 asked"),
        ({"mixup": 0.2}, "mixup or cutmix asked with teacher 'once'"),
        ({"epochs": 0}, "epochs is a whole number of at least 1"),
        ({"lr": 0.0}, "lr is above 0"),
        ({"precision": "int8"}, "precision 'int8'"),
        ({"flip": "no"}, "flip 'no' asked; it is a bool"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        get_method("tleg", settings)


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        ({}, {}, SettingsError, "no data sets asked; tleg needs at least one"),
        ({"a": pictures(count=0)}, {}, DataError, "a is empty; tleg needs images"),
        ({"a": pictures(), "b": pictures(size=16)}, {}, DataError, "images of shapes .* asked; load all with one size"),
        ({"a": pictures(channels=1)}, {}, DataError, "images of 1 channels asked; the ancestor takes 3"),
        ({"a": pictures(7)}, {"labels": 1.0}, SettingsError, "a has 7 classes, the ancestor 4; labels=0"),
        ({"a": pictures(), "b": renamed(pictures())}, {"labels": 1.0}, SettingsError, "data sets of different classes"),
        ({"a": pictures(size=10)}, {}, ShapeError, "image size 10 asked; it must be a multiple of patch 4"),
        ({"a": pictures()}, {"width": 10}, ShapeError, "width 10 asked; the heads are 4 wide"),
        ({"a": pictures()}, {"width": 12, "start": "ancestor"}, ShapeError, "start 'ancestor' asked with width 12"),
        ({"a": pictures()}, {"crop_padding": 8}, SettingsError, "crop_padding 8 asked; it is below the image size 8"),
        ({"a": pictures()}, {"teacher_size": 10}, ShapeError, "image size 10 asked"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_training(
    data: dict[str, Images], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    def never(_: Iterator[Step]) -> Iterator[Step]:
        raise AssertionError("training began")

    with pytest.raises(error, match=message) as caught:
        factory.extract("tleg", ancestor_of(), data, settings=QUICK | settings, facts=FACTS, watch=never)
    assert "\n" not in str(caught.value)


def test_an_ancestor_of_another_family_or_without_a_classifier_is_refused() -> None:
    data = {"one": pictures()}
    with pytest.raises(ShapeError, match="only timm's plain VisionTransformer"):
        factory.extract("tleg", nn.Linear(2, 2), data, facts=FACTS)
    with pytest.raises(SettingsError, match="an ancestor without a classifier given; the auxiliary learns from its"):
        factory.extract("tleg", ancestor_of(replace(TINY, classes=0)), data, facts=FACTS)


def test_a_learngene_of_other_tensors_is_refused() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in random_learngene(TINY).tensors.items()}
    Tleg().check(shapes, TINY)
    with pytest.raises(ArtefactError, match="1 tensors are missing, the first is slope.norm1.bias"):
        Tleg().check({name: shape for name, shape in shapes.items() if name != "slope.norm1.bias"}, TINY)
    with pytest.raises(ArtefactError, match="unknown tensors, the first is frozen.norm1.bias"):
        Tleg().check(shapes | {"frozen.norm1.bias": (3, 8)}, TINY)


def test_the_published_sizes() -> None:
    """Numbers stored for 12 blocks, without class token: specification, 3.92 million at 384 and 14.92 at 768."""
    for width, want in ((384, 3.92e6), (768, 14.92e6)):
        shape = variant("avg", depth=12, width=width, heads=width // 64, head_dim=64, patch=16, image_size=224)
        block = shape.params() - replace(shape, depth=11).params()
        stored = 2 * block + replace(shape, depth=1, classes=0).params() - block
        assert stored == pytest.approx(want, rel=2e-3)
