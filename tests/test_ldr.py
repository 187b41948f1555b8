"""LDR: coefficients by hand, phases whose earlier components stand still, recomposition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import FACTS
from taught import QUICK, TINY, ancestor_of, compare_gradients, compare_interrupted, noise, pictures, randomised
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _auxiliary, get_method
from learngene_hub.methods.ldr import BASES, Ldr, coefficients
from learngene_hub.methods.tleg import Tleg
from learngene_hub.shape import ViTShape
from learngene_hub.training import Step
from learngene_hub.transforms import BLOCK_KEYS, Resize

LESSON = QUICK | {"phases": [1, 2, 4], "epochs": 1, "labels": 0.5}


@cache
def extracted(**settings: Any) -> Learngene:
    """Read only."""
    chosen = LESSON | {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return factory.extract("ldr", ancestor_of(), {"one": pictures()}, settings=chosen, facts=FACTS)


def random_learngene(count: int = 4, native: ViTShape = TINY, **settings: Any) -> Learngene:
    blocks = [f"component.{n}" for n in range(1, count + 1)]
    dtype = settings.pop("dtype", torch.float32)
    return randomised("ldr", native, blocks, dtype=dtype, phases=[count], **settings)


def function(basis: str, order: int, x: float) -> float:
    """The basis functions by another road: closed forms and numpy's polynomials."""
    if basis == "chebyshev":
        return math.cos(order * math.acos(x))
    if basis == "legendre":
        return float(np.polynomial.legendre.Legendre.basis(order)(x))
    if basis == "taylor":
        return math.prod([x] * order)
    waves = [1.0] + [wave(k * math.pi * x) for k in range(1, 9) for wave in (math.cos, math.sin)]
    return waves[order]


# Coefficients ---------------------------------------------------------------------------------------------------------


def test_the_papers_worked_examples() -> None:
    """a(2, 3) = T_3(1/12) = 4/12^3 - 3/12 = -0.2477 and a(4, 3) = T_3(3/12) = -0.6875, of 12 blocks."""
    table = Ldr().table(12, range(1, 13))
    assert table.shape == (12, 12)
    assert float(table[1, 2]) == pytest.approx(4 / 12**3 - 3 / 12, abs=1e-12)
    assert round(float(table[1, 2]), 4) == -0.2477
    assert float(table[3, 2]) == pytest.approx(-0.6875)
    assert float(table[0, 0]) == 0.0 and table[0].tolist() == [0, -1, 0, 1] * 3
    assert Ldr(order_offset=0).table(12, [1, 2]).tolist() == [[1.0, place / 12] for place in range(12)]


@pytest.mark.parametrize("basis", BASES)
def test_coefficients_by_another_road(basis: str) -> None:
    for depth in (1, 2, 5, 12):
        got = coefficients(basis, depth, range(13))
        for place in range(depth):
            for order in range(13):
                assert float(got[place, order]) == pytest.approx(function(basis, order, place / depth), abs=1e-9)


def test_no_fourier_component_is_silent_at_all_blocks() -> None:
    assert float(coefficients("fourier", 12, range(1, 13)).abs().amax(0).min()) > 0.5


# Recomposition --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_block_l_is_the_sum_of_the_first_k_components(basis: str, offset: int, k: int) -> None:
    learngene, depth = random_learngene(), 5
    method = Ldr(basis=basis, order_offset=offset, phases=(4,), components=k)
    state = method.expand(learngene, replace(TINY, depth=depth))
    for layer in range(1, depth + 1):
        for key in ("attn.qkv.weight", "norm2.weight", "mlp.fc2.bias"):
            want = torch.zeros(learngene.tensors[f"component.1.{key}"].shape, dtype=torch.float64)
            for n in range(1, k + 1):
                a = function(basis, n - 1 + offset, (layer - 1) / depth)
                want += a * learngene.tensors[f"component.{n}.{key}"].double()
            got = state[f"blocks.{layer - 1}.{key}"]
            assert got is not None
            torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", range(1, 7))
def test_two_components_of_the_other_offset_are_tleg_at_every_depth(depth: int) -> None:
    learngene, shape = random_learngene(2), replace(TINY, depth=depth)
    names = {"component.1.": "base.", "component.2.": "slope."}
    same = {n.replace(old, new): t for n, t in learngene.tensors.items() for old, new in names.items() if old in n}
    outer = {name: t for name, t in learngene.tensors.items() if not name.startswith("component.")}
    line = Tleg().expand(replace(learngene, method="tleg", tensors=same | outer), shape)
    got = Ldr(order_offset=0, phases=(2,)).expand(learngene, shape)
    assert got.keys() == line.keys()
    for key, tensor in line.items():
        assert tensor is None or torch.equal(got[key], tensor), key  # type: ignore[arg-type]


def test_with_one_component_as_published_the_first_block_passes_its_input_on() -> None:
    learngene = random_learngene(order_offset=1, components=1)
    model: Any = factory.expand(learngene, depth=4)
    x = noise(2, 5, 8)
    with torch.no_grad():
        assert torch.equal(model.blocks[0](x), x)
        assert not torch.allclose(model.blocks[1](x), x)
    assert not any(bool(p.any()) for p in model.blocks[0].parameters())


def test_components_of_zeros_change_nothing() -> None:
    learngene, x = random_learngene(2), noise(2, 3, 8, 8)
    zeros = {n.replace("component.2.", "component.3."): t * 0 for n, t in learngene.tensors.items() if "t.2." in n}
    more = replace(learngene, tensors={**learngene.tensors, **zeros}, settings={"phases": [2, 3]})
    assert len(zeros) == 12
    for depth in (1, 3, 6):
        with torch.no_grad():
            torch.testing.assert_close(
                factory.expand(more, depth=depth)(x), factory.expand(learngene, depth=depth)(x), atol=1e-6, rtol=1e-6
            )


@pytest.mark.parametrize("form", ["copy", "balanced", "exact"])
@pytest.mark.parametrize("width", [4, 12])
def test_another_width_is_the_shared_transform_of_every_block(form: str, width: int) -> None:
    learngene, shape = random_learngene(), replace(TINY, width=width, heads=width // 4)
    got = Ldr(form=form, phases=(4,)).expand(learngene, shape)
    native = Ldr(phases=(4,)).expand(learngene, TINY)
    resize = Resize.of({}, TINY, shape, form)
    for place in range(TINY.depth):
        for key, tensor in resize.block({k: native[f"blocks.{place}.{k}"] for k in BLOCK_KEYS}, place).items():  # type: ignore[misc]
            torch.testing.assert_close(got[f"blocks.{place}.{key}"], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("basis", BASES)
def test_gradients_of_expand_are_those_of_differences(basis: str) -> None:
    native = replace(TINY, width=4, heads=1)
    learngene = random_learngene(3, native, dtype=torch.float64)
    compare_gradients(Ldr(basis=basis, phases=(3,)).expand, learngene, replace(native, depth=2, width=8, heads=2))


# Phases ---------------------------------------------------------------------------------------------------------------


def phases_of(**settings: Any) -> list[dict[str, Tensor]]:
    """The components, stem and norm of the same extraction stopped after each of its phases."""
    phases = LESSON["phases"]
    return [dict(extracted(phases=tuple(phases[: i + 1]), **settings).tensors) for i in range(len(phases))]


def test_a_phase_leaves_earlier_components_alone_and_moves_the_new_ones() -> None:
    one, two, four = phases_of()
    for before, after, count in ((one, two, 1), (two, four, 2)):
        for name, tensor in before.items():
            if name.startswith("component."):
                assert torch.equal(after[name], tensor), name
        for n in range(count + 1, 2 * count + 1):
            assert all(bool(after[f"component.{n}.{key}"].any()) for key in BLOCK_KEYS if key != "attn.qkv.bias")
        assert not torch.equal(after["stem.pos_embed"], before["stem.pos_embed"])  # which learns in every phase


def test_stem_and_norm_are_kept_as_they_were_after_each_phase() -> None:
    one, two, four = phases_of()
    for phase, tensors in ((1, one), (2, two)):
        for name, tensor in tensors.items():
            if name.startswith(("stem.", "tail.")):
                assert torch.equal(four[f"phase.{phase}.{name}"], tensor), name
    assert not any(name.startswith("phase.4.") for name in four)


@pytest.mark.parametrize(("k", "phase"), [(1, 1), (2, 2), (3, 4), (4, 4), (0, 4)])
def test_a_descendant_takes_the_stem_of_the_phase_that_reached_k(k: int, phase: int) -> None:
    learngene = extracted()
    chosen = replace(learngene, settings={**learngene.settings, "components": k})
    state = factory.expand(chosen, depth=5).state_dict()
    want = phases_of()[[1, 2, 4].index(phase)]
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        assert torch.equal(state[key], want[f"stem.{key}"])
    assert torch.equal(state["norm.weight"], want["tail.norm.weight"])
    table = Ldr(phases=(4,)).table(5, range(1, (k or 4) + 1)).float()
    components = torch.stack([learngene.tensors[f"component.{n}.mlp.fc1.bias"] for n in range(1, (k or 4) + 1)])
    torch.testing.assert_close(state["blocks.4.mlp.fc1.bias"], table[4] @ components)


def test_all_at_once_is_one_phase() -> None:
    learngene = extracted(phases=(3,))
    assert _auxiliary.numbers_of(learngene.tensors, "component") == [1, 2, 3]
    assert not any(name.startswith("phase.") for name in learngene.tensors)


@pytest.mark.parametrize("added", ["zeros", "normal"])
def test_where_components_start(added: str) -> None:
    learngene = extracted(phases=(3,), added=added, lr=1e-12, weight_decay=0.0)
    for n in (1, 2, 3):
        for key, tensor in learngene.group(f"component.{n}").items():
            random = tensor.dim() > 1 and (n == 1 or added == "normal")
            want = float(n == 1 and key.startswith("norm") and key.endswith("weight"))
            if random:
                assert 0.01 < float(tensor.std()) < 0.03, (n, key)
            else:
                assert torch.allclose(tensor, torch.full_like(tensor, want), atol=1e-8), (n, key)


def test_frozen_sums_are_computed_once_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The auxiliary of a phase, which holds the sum of the earlier components, is the whole recomposition."""
    learngene, x = random_learngene(), noise(2, 3, 8, 8)
    method = Ldr(phases=(2, 4))
    done = [learngene.group(f"component.{n}") for n in (1, 2)]
    rest = {name: t for name, t in learngene.tensors.items() if not name.startswith(("component.1.", "component.2."))}
    held = rest | _auxiliary.prefixed("frozen", method.frozen(done, TINY.depth))
    head = {"weight": noise(4, 8), "bias": noise(4)}
    auxiliary = _auxiliary.Auxiliary(replace(learngene, tensors=held), method.expand, TINY, head)
    whole: Any = factory.expand(learngene)
    whole.head.load_state_dict(head)
    seen: list[int] = []
    mixed = _auxiliary.mix

    def counted(parts: Any, *rest: Any) -> dict[str, Tensor]:
        seen.append(len(parts))
        return mixed(parts, *rest)

    monkeypatch.setattr(_auxiliary, "mix", counted)
    torch.testing.assert_close(auxiliary(x), whole(x), atol=1e-4, rtol=1e-4)
    assert seen == [2]  # one expansion, of the two new components alone
    auxiliary(x).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in auxiliary.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    assert not any(name.startswith(("component.1.", "component.2.", "frozen.")) for name in grads)
    assert not any(name.startswith("frozen.") for name in auxiliary.state_dict())


def test_a_new_phase_begins_with_the_function_of_the_last() -> None:
    """All images in one update, as they are: the second phase's first loss is the one-component model's second."""
    settings = LESSON | {"batch_size": 16, "crop_padding": 0, "flip": False, "warmup": 0.0}

    def losses(**more: Any) -> list[float]:
        data = {"one": pictures()}
        found = factory.extract("ldr", ancestor_of(), data, settings=settings | more, facts=FACTS)
        return list(found.provenance["loss"])

    first, second = losses(phases=[1, 2], epochs=1)
    assert losses(phases=[1], epochs=2) == pytest.approx([first, second], abs=2e-5)
    assert abs(first - second) > 1e-3


def test_the_same_seed_gives_the_same_bytes_and_the_provenance_counts() -> None:
    learngene = extracted()
    again = factory.extract("ldr", ancestor_of(), {"one": pictures()}, settings=LESSON, facts=FACTS)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in learngene.tensors.items())
    facts = learngene.provenance
    assert facts["steps"] == 6 and facts["images_seen"] == 48 and len(facts["loss"]) == 3
    assert facts["flops"] == 48 * TINY.flops() and facts["teacher_flops"] == 16 * TINY.flops()
    assert learngene.shape == TINY and learngene.settings["phases"] == [1, 2, 4]


def test_an_interrupted_extraction_goes_on_in_its_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_interrupted("ldr", LESSON, tmp_path, monkeypatch, stops_after=4, of=6)


def test_training_brings_the_auxiliary_nearer_to_the_ancestor() -> None:
    losses = extracted(phases=(2,), epochs=12, lr=3e-3, order_offset=0, labels=0.0).provenance["loss"]
    assert losses[-1] < 0.8 * losses[0]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis": "wavelet"}, "basis 'wavelet' asked; there are chebyshev, taylor, legendre, fourier"),
        ({"components": 13}, "components 13 asked; there are 12 after the last phase"),
        ({"order_offset": 2}, "order_offset 2 asked; there are 0, 1"),
        ({"order_offset": -1}, "order_offset -1 asked"),
        ({"added": "ones"}, "added 'ones' asked; there are zeros, normal"),
        ({"phases": []}, r"phases \[\] asked"),
        ({"phases": 12}, "phases 12 asked"),
        ({"phases": [1, 2, 2]}, r"phases \[1, 2, 2\] asked; each has more components than the one before"),
        ({"phases": [0, 1]}, "phase 0 asked; 1 is the least that works"),
        ({"phases": [1, "2"]}, "phase '2' asked"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        get_method("ldr", settings)


def test_what_cannot_be_trained_is_refused_before_training() -> None:
    def never(_: Iterator[Step]) -> Iterator[Step]:
        raise AssertionError("training began")

    def asked(ancestor: nn.Module, *classes: int) -> None:
        data = {f"of {count}": pictures(count) for count in classes}
        factory.extract("ldr", ancestor, data, settings=LESSON, facts=FACTS, watch=never)

    with pytest.raises(SettingsError, match="no data sets asked; ldr needs at least one"):
        asked(ancestor_of())
    with pytest.raises(ShapeError, match="only timm's plain VisionTransformer"):
        asked(nn.Linear(2, 2), 4)
    with pytest.raises(SettingsError, match="of 7 has 7 classes, the ancestor 4; labels=0, .*ancestor finetuned"):
        asked(ancestor_of(), 4, 7)


def test_components_beyond_the_stored_ones_are_refused() -> None:
    learngene = random_learngene(2)
    for asking in ({"phases": [3], "components": 3}, {"components": 5}):
        with pytest.raises(SettingsError, match=r"components \d asked; this learngene has 2"):
            factory.expand(replace(learngene, settings=asking))


def test_a_learngene_of_other_tensors_is_refused() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in extracted().tensors.items()}
    Ldr().check(shapes, TINY)
    gap = {name.replace("component.4.", "component.5."): shape for name, shape in shapes.items()}
    late = {name.replace("phase.2.", "phase.4."): shape for name, shape in shapes.items()}
    frozen = shapes | {"frozen.norm1.bias": (3, 8)}
    for wrong in (gap, late, frozen, {}, shapes | {"component.x.norm1.bias": (8,)}):
        with pytest.raises(ArtefactError):
            Ldr().check(wrong, TINY)
    with pytest.raises(ArtefactError, match="1 tensors are missing, the first is phase.1.tail.norm.bias"):
        Ldr().check({name: shape for name, shape in shapes.items() if name != "phase.1.tail.norm.bias"}, TINY)


@pytest.mark.parametrize(("count", "want"), [(1, 7.83e6), (2, 14.92e6), (4, 29.10e6), (8, 57.45e6), (12, 85.80e6)])
def test_the_published_sizes(count: int, want: float) -> None:
    """Numbers of so many components of DeiT-B with stem and norm: specification, section 4.5."""
    assert ViTShape(depth=count, width=768, heads=12, classes=0).params() == pytest.approx(want, rel=1e-3)
