"""Cluster: the maps of the FFN groups, which are really learned; the errors of the released code, one test for each;
files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from clustered import STILL, ancestor_of, by_hand, extracted, head, noise, pixels, with_head
from planted import FACTS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from learngene_hub import factory
from learngene_hub._heads import HeadsShape
from learngene_hub.data import Images, normalise
from learngene_hub.descendant import Descendant
from learngene_hub.errors import ArtefactError, DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._cluster_attention import attention_distances
from learngene_hub.methods._cluster_groups import FfnGroup, given_groups
from learngene_hub.methods._cluster_maps import FFN_KEYS, identity_maps, regenerate
from learngene_hub.methods._cluster_parts import take_heads
from learngene_hub.methods.cluster import Cluster
from learngene_hub.shape import IMAGENET, Preprocessing, ViTShape
from learngene_hub.training import Step

TINY = ViTShape(depth=4, width=12, heads=3, head_dim=4, patch=4, image_size=8, classes=6)
TAUGHT: dict[str, Any] = {"eps": 0.0, "ffn_groups": ((1, 2, 3),), "psi_epochs": 4, "batch_size": 8, "seed": 3}


def taught(**settings: Any) -> Learngene:
    chosen = TAUGHT | settings
    chosen["ffn_groups"] = [list(each) for each in chosen["ffn_groups"]]
    return factory.extract("cluster", ancestor_of(TINY), {"one": noise(16, 8)}, settings=chosen, facts=FACTS)


def random_maps(groups: list[FfnGroup], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in identity_maps(groups).items()}


# Maps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_map_starts_as_the_identity_to_the_last_bit(count: int) -> None:
    groups = given_groups([range(1, 1 + count)], 7)
    maps = identity_maps(groups)
    assert len(maps) == 4 and {name.split(".")[1] for name in maps} == {f"1-{count}"}
    psi = {name.removeprefix(f"psi.1-{count}."): tensor for name, tensor in maps.items()}
    kept = {"mlp.fc1.weight": torch.randn(6, 3), "mlp.fc2.bias": torch.randn(3)}
    for place in range(count):
        made = regenerate(kept, psi, place)
        assert all(torch.equal(made[key], tensor) for key, tensor in kept.items())


def test_the_mth_layer_of_a_group_is_the_mth_number_of_its_map() -> None:
    """One number after the other: Linear(1, n), ReLU, Linear(n, n)."""
    learngene = extracted(TINY, psi_epochs=0, ffn_groups=((2, 1, 3),))
    maps = random_maps(given_groups([(2, 1, 3)], 4))
    grown = Cluster().expand(replace(learngene, tensors={**learngene.tensors, **maps}), TINY)
    psi = {name.removeprefix("psi.1-3."): tensor.tolist() for name, tensor in maps.items()}
    own = ancestor_of(TINY).state_dict()
    for m, layer in enumerate((1, 2, 3)):
        for key in FFN_KEYS:
            got = grown[f"blocks.{layer}.{key}"]
            assert got is not None
            for w, value in list(zip(own[f"blocks.2.{key}"].flatten().tolist(), got.flatten().tolist(), strict=True))[
                ::7
            ]:
                hidden = [max(0.0, psi["in.weight"][j][0] * w + psi["in.bias"][j]) for j in range(3)]
                want = sum(psi["out.weight"][m][j] * hidden[j] for j in range(3)) + psi["out.bias"][m]
                assert value == pytest.approx(want, abs=1e-5)
    for key in FFN_KEYS:  # of a layer in no group, the ancestor's
        assert torch.equal(grown[f"blocks.0.{key}"], own[f"blocks.0.{key}"])  # type: ignore[arg-type]


def test_gradients_of_expand_are_those_of_differences() -> None:
    """Of every tensor, maps among them, in float64, in a descendant of more heads and fewer blocks."""
    native = ViTShape(depth=3, width=4, heads=2, head_dim=2, patch=4, image_size=8, mlp_ratio=1.0, classes=2)
    learngene = extracted(native, eps=0.02, psi_epochs=0, ffn_groups=((0, 1),))
    named = {**learngene.tensors, **random_maps(given_groups([(0, 1)], 3))}
    names = sorted(named)
    shape = HeadsShape(width=4, heads=(3, 5), head_dim=2, patch=4, image_size=8, mlp_ratio=1.0, classes=2)

    def grow(*tensors: Tensor) -> tuple[Tensor, ...]:
        state = Cluster().expand(replace(learngene, tensors=dict(zip(names, tensors, strict=True))), shape)
        return tuple(tensor for name, tensor in sorted(state.items()) if tensor is not None)

    values = [named[name].double().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(grow, values, fast_mode=True)


def losses(learngene: Learngene, count: int = 32) -> float:
    """KL(ancestor || descendant of its depth and heads) on images that nobody saw."""
    ancestor = ancestor_of(TINY)
    x = normalise(noise(count, 8, seed=9).pixels, IMAGENET)
    with torch.no_grad():
        said = ancestor(x).log_softmax(-1)
        logits = with_head(factory.expand(learngene), ancestor)(x).log_softmax(-1)
    return float((said.exp() * (said - logits)).sum(-1).mean())


def test_error_4_the_maps_are_learned_and_nothing_else_is() -> None:
    """In the released code they are read once, through ``.data``, and stay as random as they started."""
    copied, learned = taught(psi_epochs=0), taught(psi_epochs=12)
    assert {
        name: torch.equal(tensor, learned.tensors[name]) for name, tensor in copied.tensors.items()
    } == dict.fromkeys(copied.tensors, True)
    maps = identity_maps(given_groups([(1, 2, 3)], 4))
    assert learned.tensors.keys() - copied.tensors.keys() == maps.keys()
    assert not any(torch.equal(learned.tensors[name], start) for name, start in maps.items())
    ffns = [factory.expand(learned).state_dict()[f"blocks.{layer}.mlp.fc1.weight"] for layer in (1, 2, 3)]
    assert not torch.allclose(ffns[0], ffns[1], atol=1e-4) and not torch.allclose(ffns[1], ffns[2], atol=1e-4)
    assert losses(learned) < 0.9 * losses(copied)
    said = learned.provenance["loss"]
    assert len(said) == 12 and said[-1] < said[0]


def test_losses_are_those_of_what_is_grown_so_nothing_but_the_maps_has_moved() -> None:
    """All images in one update: the first loss is KL(ancestor || copies) on them, by hand; the second is that of what
    grows from the learngene after one update, in which all but the maps is the ancestor's."""
    ancestor, x = ancestor_of(TINY), normalise(noise(16, 8).pixels, IMAGENET)
    want, learngenes = [], (taught(psi_epochs=0), taught(psi_epochs=1, batch_size=16))
    with torch.no_grad():
        said = ancestor(x).log_softmax(-1)
        for learngene in learngenes:
            logits = with_head(factory.expand(learngene), ancestor)(x).log_softmax(-1)
            want.append(float((said.exp() * (said - logits)).sum(-1).mean()))
    assert abs(want[0] - want[1]) > 3e-4
    assert taught(psi_epochs=2, batch_size=16).provenance["loss"] == pytest.approx(want, abs=1e-5)


def test_without_a_group_of_several_layers_there_is_nothing_to_learn() -> None:
    def never(_steps: Iterator[Step]) -> Iterator[Step]:
        raise AssertionError("training began")

    data = {"one": noise(16, 8)}
    settings = {"ffn_groups": "none", "psi_epochs": 5}
    learngene = factory.extract("cluster", ancestor_of(TINY), data, settings=settings, facts=FACTS, watch=never)
    assert not learngene.group("psi") and learngene.provenance["steps"] == 0


def test_the_ancestor_is_left_as_it_was_and_the_same_call_gives_the_same() -> None:
    ancestor = ancestor_of(TINY)
    before = {name: tensor.clone() for name, tensor in ancestor.state_dict().items()}
    state = torch.get_rng_state()
    first, second = taught(), taught()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in ancestor.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in ancestor.parameters())
    assert not any(module._forward_hooks for module in ancestor.modules())


def test_an_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learngene_hub._state.SAVE_SECONDS", 0.0)
    settings = TAUGHT | {"ffn_groups": [[1, 2, 3]]}
    told: list[int] = []

    def stop(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            told.append(step.step)
            yield step
            if step.step == 5:
                raise KeyboardInterrupt

    def listen(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            told.append(step.step)
            yield step

    arguments = ("cluster", ancestor_of(TINY), {"one": noise(16, 8)})
    with pytest.raises(KeyboardInterrupt):
        factory.extract(*arguments, settings=settings, facts=FACTS, watch=stop, state_dir=tmp_path)
    told.clear()
    learngene = factory.extract(*arguments, settings=settings, facts=FACTS, watch=listen, state_dir=tmp_path)
    assert told[0] > 1 and told[-1] == 8
    whole = taught()
    assert all(torch.equal(learngene.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert dict(learngene.provenance) | {"seconds": 0} == dict(whole.provenance) | {"seconds": 0}


# The errors of the released code (specification, section 3.8; the fourth stands above) --------------------------------


def test_error_1_heads_are_sliced_out_of_q_k_and_v_apart() -> None:
    """A head is a third of its rows from each third of qkv, not 3 d rows in a row."""
    width, d = 12, 4
    rows = torch.arange(3 * width, dtype=torch.float32)
    block = {
        "attn.qkv.weight": rows[:, None].expand(-1, width).clone(),
        "attn.qkv.bias": rows,
        "attn.proj.weight": torch.arange(12.0).expand(width, -1).clone(),
        "attn.proj.bias": torch.zeros(width),
    }
    taken = take_heads(block, [2, 0], d)
    want = [8, 9, 10, 11, 0, 1, 2, 3, 20, 21, 22, 23, 12, 13, 14, 15, 32, 33, 34, 35, 24, 25, 26, 27]
    assert taken["attn.qkv.weight"][:, 5].tolist() == taken["attn.qkv.bias"].tolist() == want
    assert taken["attn.proj.weight"][3].tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


def test_error_2_the_bias_of_qkv_is_kept() -> None:
    own = ancestor_of().state_dict()
    assert bool(own["blocks.0.attn.qkv.bias"].any())
    state = factory.expand(extracted(eps=0.0, **STILL), heads=6).state_dict()
    for number in range(6):
        for got, want in zip(head(state, 2, number)[3:6], head(own, 2, number % 3)[3:6], strict=True):
            assert torch.equal(got, want)


def test_error_3_columns_of_proj_cycle_as_heads_do_and_are_divided_by_the_copies() -> None:
    """Twice the heads: columns h0 h1 h2 h0 h1 h2, each half as large; not c0 c0 c1 c1, as large as before."""
    own = ancestor_of().state_dict()["blocks.1.attn.proj.weight"]
    grown = factory.expand(extracted(eps=0.0, **STILL), heads=6).state_dict()["blocks.1.attn.proj.weight"]
    assert torch.equal(grown, torch.cat([own, own], dim=1) / 2)
    assert not torch.allclose(grown, own.repeat_interleave(2, dim=1))


def test_error_5_images_are_normalised_once() -> None:
    """The released code subtracts 255 times the mean and divides by 255 times the deviation: every input is about
    -2.1, whatever the image. Ours are (x / 255 - mean) / std, and other images give other distances."""
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (IMAGENET.mean, IMAGENET.std))
    images = noise(2)
    right, wrong = (images.pixels / 255 - mean) / std, (images.pixels / 255 - 255 * mean) / (255 * std)
    assert float(right.std()) > 1 and float(wrong.std(dim=(0, 2, 3)).max()) < 0.01
    got = factory.extract("cluster", ancestor_of(), {"one": images}, settings=STILL, facts=FACTS).provenance
    own = [by_hand(factory.expand(extracted(eps=0.0, **STILL)), x, side=2, patch=8) for x in (right, wrong)]
    assert got["attention_distance_px"] == [pytest.approx(layer, abs=2e-3) for layer in own[0]]
    assert (torch.tensor(own[0]) - torch.tensor(own[1])).abs().max() > 0.1
    other = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert not torch.allclose(
        *(attention_distances(ancestor_of(), images, each) for each in (IMAGENET, other)), atol=1e-3
    )


def test_error_6_every_epoch_sees_every_image() -> None:
    """The released code passes over the second half of the batches."""
    seen: list[int] = []

    def listen(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            seen.append(step.images)
            yield step

    data, settings = {"one": noise(16, 8)}, TAUGHT | {"ffn_groups": [[1, 2, 3]]}
    learngene = factory.extract("cluster", ancestor_of(TINY), data, settings=settings, facts=FACTS, watch=listen)
    told = learngene.provenance
    assert seen == [8 * (i + 1) for i in range(8)] and told["images_seen"] == 4 * 16 and told["steps"] == 8
    assert told["flops"] == 64 * TINY.flops() and told["teacher_flops"] == (16 + 64) * TINY.flops()


def test_error_7_all_parameters_and_products_are_counted() -> None:
    """A profiler that does not see qkv makes a descendant of the ancestor's heads look a quarter smaller. It is not."""
    learngene = extracted(psi_epochs=0)
    for heads in (3, 5, (1, 2, 3, 4)):
        shape, model = factory.plan(learngene, heads=heads), factory.expand(learngene, heads=heads)
        assert shape.params() == sum(parameter.numel() for parameter in model.parameters())
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(pixels(count=1))
        assert shape.flops() == counter.get_total_flops()
    assert factory.plan(learngene).params() == sum(parameter.numel() for parameter in ancestor_of().parameters())


def test_error_8_heads_may_be_permuted_and_attention_keeps_its_scale() -> None:
    """1 / sqrt(d) of the ancestor's d, at any number of heads; the order of priority alone changes no output."""
    model: Any = factory.expand(extracted(eps=0.0, **STILL), heads=(1, 5, 3, 24))
    assert [block.attn.scale for block in model.blocks] == [64**-0.5] * 4
    learngene = extracted(eps=0.0, **STILL)
    turned = dict(learngene.tensors)
    for layer in range(4):
        turned |= {
            f"block.{layer}.{k}": t for k, t in take_heads(learngene.group(f"block.{layer}"), [2, 0, 1], 64).items()
        }
    with torch.no_grad():
        got, want = (
            factory.expand(each, heads=6)(pixels()) for each in (replace(learngene, tensors=turned), learngene)
        )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_descendant_of_more_heads_is_saved_and_read_by_timm_and_transformers(tmp_path: Path) -> None:
    path = tmp_path / "learngene.safetensors"
    taught().save(path)
    model = Descendant.from_learngene(path, heads=(3, 6, 4), num_labels=3).eval()
    assert HeadsShape.of(model.timm_model).heads == (3, 6, 4)
    model.save_pretrained(tmp_path / "saved")
    again = Descendant.from_pretrained(tmp_path / "saved").eval()
    read = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    auto = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    x = pixels(TINY)
    with torch.no_grad():
        want = model(x).logits
        assert torch.equal(again(x).logits, want) and torch.equal(read(x), want) and torch.equal(auto(x).logits, want)


def test_a_descendant_of_the_ancestors_heads_is_a_plain_timm_model(tmp_path: Path) -> None:
    path = tmp_path / "learngene.safetensors"
    taught().save(path)
    Descendant.from_learngene(path, depth=2, num_labels=3).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224" and config["model_args"]["num_heads"] == 3


def test_a_learngene_is_read_as_it_was_written_and_grows_with_other_settings(tmp_path: Path) -> None:
    learngene = taught()
    digest = learngene.save(tmp_path / "learngene.safetensors")
    read = Learngene.load(tmp_path / "learngene.safetensors", sha256=digest)
    assert dict(read.settings) == dict(learngene.settings) and read.reach == learngene.reach
    even = factory.expand(read, depth=2, settings={"select": "even", "schedule": "incrementing"})
    assert HeadsShape.of(even).heads == (3, 2)
    assert torch.equal(even.state_dict()["blocks.1.norm1.bias"], ancestor_of(TINY).state_dict()["blocks.3.norm1.bias"])


def test_a_learngene_of_other_tensors_is_refused() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in taught().tensors.items()}
    Cluster().check(shapes, TINY)
    Cluster().check({name: shape for name, shape in shapes.items() if not name.startswith("psi.")}, TINY)

    def renamed(old: str, new: str) -> dict[str, tuple[int, ...]]:
        return {name.replace(old, new): shape for name, shape in shapes.items()}

    wrong: list[dict[str, tuple[int, ...]]] = [
        {},
        renamed("ffn.1-3.1.", "ffn.1-2.1."),  # a layer without an FFN
        renamed("ffn.1-3.1.", "ffn.1-3.0."),  # kept outside of its group
        renamed("ffn.1-3.1.", "ffn.0-3.1."),  # twice
        renamed("ffn.1-3.1.", "ffn.01-3.1."),
        renamed("psi.1-3.", "psi.0-3."),
        shapes | {"psi.0-0.in.weight": (1, 1)},
        shapes | {"block.1.attn.qkv.bias": (3 * 4 * 4,)},  # more heads than the ancestor's
        shapes | {"block.1.attn.qkv.bias": (13,)},
        shapes | {"block.1.mlp.fc1.bias": (48,)},
        {name: shape for name, shape in shapes.items() if name != "psi.1-3.out.bias"},
    ]
    for each in wrong:
        with pytest.raises(ArtefactError):
            Cluster().check(each, TINY)
    with pytest.raises(ArtefactError, match="kind heads given; one of cluster is a plain ViT"):
        Cluster().check(shapes, HeadsShape(width=12, heads=(2,), head_dim=4, patch=4, image_size=8))


# Refusals, before anything is measured or trained ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"eps": -0.1}, "eps -0.1 asked"),
        ({"eps": float("nan")}, "eps nan asked"),
        ({"images": -1}, "images -1 asked"),
        ({"size": True}, "size True asked"),
        ({"psi_epochs": 1.5}, "psi_epochs 1.5 asked"),
        ({"psi_lr": 0.0}, "lr is above 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"select": "last"}, "there are first, even"),
        ({"schedule": "rising"}, "there are same, decrementing, incrementing"),
        ({"ffn_groups": "all"}, "there are auto, published, measured, none"),
        ({"ffn_groups": 3}, "or lists of layers, the kept one first"),
        ({"ffn_groups": [[1, "2"]]}, "layer of ffn_groups '2' asked"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Cluster(**wrong)


def test_bad_input_is_refused_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_given: Any) -> Tensor:
        raise AssertionError("measuring began")

    monkeypatch.setattr("learngene_hub.methods.cluster.attention_distances", never)
    empty = Images(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), ("any",), "nothing")
    headless = replace(TINY, classes=0).build()
    cases: list[tuple[nn.Module, dict[str, Images], dict[str, Any], type[Exception], str]] = [
        (ancestor_of(TINY), {}, {}, SettingsError, "no data sets asked; cluster measures"),
        (ancestor_of(TINY), {"a": empty}, {}, DataError, "a is empty"),
        (ancestor_of(TINY), {"a": noise(2, 8), "b": noise(2, 16)}, {}, DataError, "load all with one size"),
        (ancestor_of(TINY), {"a": noise(2, 8, channels=1)}, {}, DataError, "1 channels asked; the ancestor takes 3"),
        (ancestor_of(TINY), {"a": noise(2, 8)}, {"size": 10}, ShapeError, "multiple of patch 4: 8 or 12"),
        (ancestor_of(TINY), {"a": noise(2, 8)}, {"ffn_groups": "published"}, SettingsError, "'measured' would work"),
        (ancestor_of(TINY), {"a": noise(2, 8)}, {"ffn_groups": [[3, 4]]}, SettingsError, "layers are 0 to 3"),
        (headless, {"a": noise(2, 8)}, {}, SettingsError, "psi_epochs=0 would work"),
        (nn.Linear(2, 2), {"a": noise(2, 8)}, {}, ShapeError, "only timm's plain VisionTransformer"),
    ]
    for ancestor, data, settings, error, said in cases:
        with pytest.raises(error, match=said):
            factory.extract("cluster", ancestor, data, settings=settings, facts=FACTS)
