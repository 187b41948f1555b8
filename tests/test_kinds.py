"""Shapes that are no plain ViT: read off models, out of files and from headers; and what is grown of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import build_pico
from kinds import RESNET, SHAPES, grown_from, model_of, noise
from planted import FACTS, planted, variant
from taught import randomised
from torch import nn

from learngene_hub import factory
from learngene_hub._format import canonical_metadata, encode, parse
from learngene_hub._heads import HeadsShape
from learngene_hub._kinds import KINDS
from learngene_hub.errors import ArtefactError, BudgetError, DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene, read_facts
from learngene_hub.shape import Reach, ViTShape, shape_from_dict, shape_of
from learngene_hub.training import Recipe
from learngene_hub.widening import Widening

everywhere = pytest.mark.parametrize("kind", SHAPES)


# What a shape says ----------------------------------------------------------------------------------------------------


@everywhere
def test_a_shape_and_its_model_say_the_same(kind: str) -> None:
    shape, model = SHAPES[kind], model_of(kind)
    assert shape_of(model) == shape
    assert shape.keys() == set(model.state_dict())
    assert shape.params() == sum(parameter.numel() for parameter in model.parameters())
    assert shape.bytes() == 4 * shape.params() and shape.bytes(torch.float16) == 2 * shape.params()
    shape.require_budget(shape.params())
    with pytest.raises(BudgetError, match=f"at most {shape.params() - 1:,} are allowed"):
        shape.require_budget(shape.params() - 1)


@everywhere
def test_json_gives_it_back_and_timm_builds_it_from_its_arguments(kind: str) -> None:
    shape = SHAPES[kind]
    values = json.loads(json.dumps(shape.to_dict(), allow_nan=False))
    assert shape_from_dict(values) == shape and values.get("kind", "vit") == shape.kind
    arguments = json.loads(json.dumps(shape.model_args(), allow_nan=False))
    built = timm.create_model(shape.architecture, num_classes=shape.classes, **arguments)
    want = {name: entry.shape for name, entry in model_of(kind).state_dict().items()}
    assert {name: entry.shape for name, entry in built.state_dict().items()} == want


def test_the_table_has_each_kind_under_its_own_name() -> None:
    assert {shape.kind for shape in SHAPES.values()} == set(KINDS)
    assert "kind" not in SHAPES["vit"].to_dict()


def test_reading_a_shape_imports_neither_torch_nor_timm() -> None:
    code = (
        "import json, sys; from learngene_hub.shape import shape_from_dict\n"
        "for values in json.loads(sys.argv[1]): shape_from_dict(values)\n"
        "print(*[m for m in ('torch', 'timm', 'numpy', 'transformers') if m in sys.modules])"
    )
    given = json.dumps([shape.to_dict() for shape in SHAPES.values()])
    run = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kind": "unknown"}, "kind 'unknown' given; there are conv, heads, stitched, and plain ViTs without a kind"),
        ({"kind": "learngene_hub._conv"}, "kind 'learngene_hub._conv' given"),
        ({"kind": 5}, "kind 5 given"),
        ({"kind": ["conv"]}, r"kind \['conv'\] given"),
        ({"kind": None}, "kind None given"),
        ({"kind": "vit", "depth": 1, "width": 4, "heads": 1}, "unknown keys kind"),
        ({"kind": "conv", "depth": 1, "width": 4, "heads": 1}, "unknown keys depth, heads, width"),
        ({"kind": "heads", "width": 64, "heads": [2, 5]}, "keys head_dim are missing"),
        ({"kind": "stitched"}, "missing"),
    ],
)
def test_other_kinds_and_other_fields_are_refused_on_one_line(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ShapeError, match=told) as caught:
        shape_from_dict(values)
    assert "\n" not in str(caught.value)


def test_models_of_no_kind_are_refused_by_what_they_have() -> None:
    with pytest.raises(ShapeError, match="only timm's plain VisionTransformer"):
        shape_of(nn.Linear(2, 2))
    with pytest.raises(ShapeError, match="blocks of type Bottleneck"):
        shape_of(timm.create_model("resnet50"))
    with pytest.raises(ShapeError, match="layer scale"):
        shape_of(timm.create_model("vit_tiny_patch16_224", depth=1, init_values=1e-5))


def test_heads_that_differ_but_fill_the_same_tensors_are_no_plain_vit() -> None:
    """qkv is (3 width, width) with 2 heads of 32 and with 4 of 16; only the attention itself tells them apart."""
    model = ViTShape(depth=2, width=64, heads=2, patch=8, image_size=32).build(device="meta")
    model.blocks[1].attn.num_heads, model.blocks[1].attn.head_dim = 4, 16  # type: ignore[union-attr]
    with pytest.raises(ShapeError, match=r"blocks have \[2, 4\] heads given"):
        shape_of(model)


def test_a_reach_with_heads_and_routes() -> None:
    plain = Reach(depths=(1, 4), widths=(64, 64, 1))
    assert plain.to_dict() == {"depths": [1, 4], "widths": [64, 64, 1]}
    heads, routes = replace(plain, heads=(1, 6)), replace(plain, routes=13)
    assert heads.to_dict() == plain.to_dict() | {"heads": [1, 6]}
    assert routes.to_dict() == plain.to_dict() | {"routes": 13}
    assert str(heads) == "depth 1-4, width 64, heads 1-6"
    assert str(routes) == "depth 1-4, width 64, 13 fixed sizes among them"
    for reach in (plain, heads, routes):
        assert Reach.from_dict(json.loads(json.dumps(reach.to_dict()))) == reach
    wrong: list[dict[str, Any]] = [{"heads": [2, 1]}, {"heads": [1]}, {"heads": None}, {"heads": 3}, {"heads": [0, 1]}]
    wrong += [{"routes": 0}, {"routes": True}, {"routes": "3"}, {"routes": 2.0}, {"extra": 1}]
    for change in wrong:
        with pytest.raises(SettingsError):
            Reach.from_dict(plain.to_dict() | change)


# Headers --------------------------------------------------------------------------------------------------------------


def header(shape: Any, reach: Any) -> tuple[bytes, int]:
    """The header of a file of one tensor with this native shape and reach, as plain values, and the file's size."""
    gene = planted(build_pico(variant("token")))
    keys = ("ancestor", "license", "method", "preprocessing", "provenance", "settings")
    metadata = canonical_metadata({key: getattr(gene, key) for key in keys} | {"shape": shape, "reach": reach})
    made = encode(metadata, {"stem.x": ("F32", (2,))})[0]
    return made, 8 + len(made) + 8


@everywhere
def test_a_header_holds_any_kind(kind: str) -> None:
    reach = Reach(depths=(1, 3), widths=(64, 64, 1), heads=(1, 4), routes=2)
    facts = parse(*header(SHAPES[kind], reach))
    assert facts.shape == SHAPES[kind] and facts.reach == reach


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (SHAPES["resnet"].to_dict() | {"stages": [[2**21]]}, "no number above"),
        (SHAPES["resnet"].to_dict() | {"stages": [[10**400]]}, "no number above"),
        (SHAPES["resnet"].to_dict() | {"stages": {"a": [[4], {"b": -(2**21)}]}}, "no number above"),
        (SHAPES["heads"].to_dict() | {"heads": [2] * 5000}, "heads"),
        (SHAPES["stitched"].to_dict() | {"widths": [32, "64"]}, "width '64' asked"),
        (SHAPES["vgg"].to_dict() | {"family": "os.system"}, "family"),
        (SHAPES["vit"].to_dict() | {"kind": "vit"}, "unknown keys kind"),
        (SHAPES["vit"].to_dict() | {"kind": "conv"}, "unknown keys"),
        ({"kind": 5}, "kind 5 given"),
    ],
)
def test_hostile_shapes_are_refused_on_one_line(shape: dict[str, Any], told: str) -> None:
    with pytest.raises(ArtefactError, match=told) as caught:
        parse(*header(shape, Reach(depths=(1, 3), widths=(64, 64, 1))))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_method_of_plain_vits_takes_no_other_native_shape(tmp_path: Path) -> None:
    gene = replace(planted(build_pico(variant("token"))), shape=RESNET)
    with pytest.raises(ArtefactError, match="native shape of kind conv; lsamd grows plain ViTs alone"):
        gene.save(tmp_path / "learngene.safetensors")
    with pytest.raises(SettingsError, match="a width stage asked; it is for plain ViTs"):
        Widening(widths=(96,)).require(RESNET)  # type: ignore[arg-type]


def test_a_file_of_a_cnn_is_read_and_grown_again(tmp_path: Path) -> None:
    gene = grown_from("resnet")
    digest = gene.save(tmp_path / "learngene.safetensors")
    loaded = Learngene.load(tmp_path / "learngene.safetensors", sha256=digest)
    assert loaded.shape == RESNET == read_facts(tmp_path / "learngene.safetensors").shape
    states = [factory.expand(each, seed=4).state_dict() for each in (gene, loaded)]
    assert all(torch.equal(entry, states[1][name]) for name, entry in states[0].items())


# Growing --------------------------------------------------------------------------------------------------------------


def test_batch_norm_grows_with_its_counters_whole() -> None:
    half = factory.expand(grown_from("resnet"), dtype=torch.float16)
    kinds = {name.rsplit(".", 1)[1]: entry.dtype for name, entry in half.state_dict().items() if ".bn1." in name}
    assert kinds.pop("num_batches_tracked") == torch.int64 and set(kinds.values()) == {torch.float16}
    model = factory.expand(grown_from("resnet"), num_labels=6)
    recipe = Recipe(epochs=2, batch_size=8, lr=1e-2)
    steps = list(factory.finetune(model, noise(), recipe=recipe))
    assert int(model.bn1.num_batches_tracked) == len(steps) == 6  # type: ignore[union-attr, arg-type]
    assert float(model.bn1.running_mean.abs().sum()) > 0  # type: ignore[union-attr, operator]
    assert factory.evaluate(model, noise()).count == 24


def test_a_cnn_takes_images_of_any_size_but_where_it_says_so() -> None:
    model = factory.expand(grown_from("resnet"), num_labels=6)
    assert factory.evaluate(model, noise(side=48)).count == 24
    model.pretrained_cfg = {**model.pretrained_cfg, "fixed_input_size": True}  # type: ignore[dict-item]
    with pytest.raises(DataError, match="images of 48 px; the model takes 32: image_size=48 would work"):
        factory.evaluate(model, noise(side=48))


def test_a_method_is_asked_for_its_own_shapes() -> None:
    gene = grown_from("heads")
    assert factory.plan(gene) == gene.shape
    asked = factory.plan(gene, heads=[1, 2, 4], num_labels=5, in_chans=1)
    assert isinstance(asked, HeadsShape) and (asked.heads, asked.classes, asked.in_chans) == ((1, 2, 4), 5, 1)
    assert shape_of(factory.expand(gene, heads=(1, 2, 4), num_labels=5, in_chans=1)) == asked
    with pytest.raises(BudgetError):
        factory.plan(gene, heads=[1, 2, 4], max_params=1000)


@pytest.mark.parametrize("sizes", [{"heads": [2, 0]}, {"heads": "2"}, {"heads": []}, {"heads": 2.0}, {"heads": [True]},
                                   {"depth": 0}, {"depth": "3"}, {"width": 0}, {"image_size": -8}, {"in_chans": True},
                                   {"max_params": 0}, {"num_labels": 0}])  # fmt: skip
@pytest.mark.parametrize("kind", ["heads", "resnet"])
def test_sizes_that_are_none_never_reach_a_method(kind: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match=r"asked") as caught:
        factory.plan(grown_from(kind), **sizes)
    assert "\n" not in str(caught.value)


def test_one_number_of_heads_for_each_block_of_a_plain_vit() -> None:
    gene = planted(build_pico(variant("token")))
    assert factory.plan(gene, heads=[2, 2, 2]) == gene.shape
    with pytest.raises(ShapeError, match="heads 2, 2, 4 asked at width 64.*2 heads would work"):
        factory.plan(gene, heads=[2, 2, 4])


# Settings of one call -------------------------------------------------------------------------------------------------


def test_settings_of_a_call_are_those_of_the_learngene_replaced() -> None:
    gene = factory.extract("net2net", build_pico(variant("token")), {}, facts=FACTS)
    before, changed = gene.digest, replace(gene, settings={**gene.settings, "form": "exact", "tilt": 0.5})
    sizes: dict[str, Any] = {"depth": 4, "width": 160, "num_labels": 3, "seed": 2}
    got = factory.expand(gene, **sizes, settings={"form": "exact", "tilt": 0.5}).state_dict()
    want, own = factory.expand(changed, **sizes).state_dict(), factory.expand(gene, **sizes).state_dict()
    assert all(torch.equal(entry, want[name]) for name, entry in got.items())
    assert not all(torch.equal(entry, own[name]) for name, entry in got.items())
    again = gene.expand(**sizes, settings={"form": "exact", "tilt": 0.5}).state_dict()
    assert all(torch.equal(entry, got[name]) for name, entry in again.items())
    vars(gene).pop("digest")
    assert gene.digest == before


def test_components_of_one_call_of_ldr() -> None:
    native = ViTShape(depth=4, width=64, heads=2, patch=8, image_size=32, classes=5)
    gene = randomised("ldr", native, [f"component.{n}" for n in (1, 2, 3)], phases=[3])
    one, two = (factory.expand(gene, settings={"components": n}).state_dict() for n in (1, 2))
    want = factory.expand(replace(gene, settings={"phases": [3], "components": 1})).state_dict()
    assert all(torch.equal(entry, want[name]) for name, entry in one.items())
    assert not all(torch.equal(entry, two[name]) for name, entry in one.items())


def test_settings_that_do_not_fit_are_refused_before_anything_grows() -> None:
    gene = planted(build_pico(variant("token")))
    wanted = {name: entry.shape for name, entry in gene.shape.build(device="meta").state_dict().items()}
    for settings, told in (
        ({"selct": "even"}, "selct"),
        ({"select": 3}, "select 3 asked; it is a str"),
        ({"select": "odd"}, "select"),
    ):
        for verb in (factory.plan, factory.expand):
            with pytest.raises(SettingsError, match=told):
                verb(gene, settings=settings)
        with pytest.raises(SettingsError, match=told):
            factory.grown_state(gene, gene.shape, wanted, seed=0, settings=settings)
    cnn = grown_from("resnet")
    assert factory.plan(cnn, settings={"front": [4, 4, 4]}).params() != factory.plan(cnn).params()
