"""Cards of learngenes and descendants that are no plain ViT: what they say of sizes, and of what loads them."""

from __future__ import annotations

import json
import re

import pytest
from kinds import OURS, SHAPES, grown_from, model_of

from learngene_hub import factory
from learngene_hub.card import card_text, descendant_card
from learngene_hub.descendant import wrap
from learngene_hub.shape import IMAGENET


def card_of(kind: str) -> str:
    return card_text(grown_from(kind), name=kind, source=f"org/{kind}", description="", nbytes=1234)


def test_the_card_of_a_cnn_speaks_of_networks_and_their_costs() -> None:
    card, gene = card_of("resnet"), grown_from("resnet")
    assert "part of a pre-trained convolutional network" in card and "a ViT of any" not in card
    assert "loads with plain `timm` and plain `transformers`" in card and "a plain timm ViT" not in card
    native = factory.plan(gene, num_labels=10)
    assert f"| {native} | {native.params() / 1e6:.2f} M | {native.flops() / 1e9:.2f} G |" in card
    assert "| depth, convolutions |" in card and "any that the network takes" in card


def test_the_card_of_free_heads_tells_them_and_what_must_be_imported() -> None:
    card, gene = card_of("heads"), grown_from("heads")
    (least, most) = gene.reach.heads or (0, 0)
    assert f"| heads of each block | {least} - {most} | {gene.shape.heads} |" in card
    assert "after `import learngene_hub.descendant`; where it is a plain ViT" in card
    for heads in (least, most):
        shape = factory.plan(gene, heads=heads, num_labels=10)
        assert f"| {shape} | {shape.params() / 1e6:.2f} M |" in card


@pytest.mark.parametrize("kind", SHAPES)
def test_the_card_of_a_descendant_tells_what_loads_it(kind: str) -> None:
    facts = json.loads(json.dumps(wrap(model_of(kind), preprocessing=IMAGENET)._facts()))
    facts["learngene"] = {"name": "x", "learngene_shape": SHAPES[kind].to_dict()}
    card = descendant_card(facts, repo="org/grown", license="MIT", params=SHAPES[kind].params())
    assert ("import learngene_hub.descendant" in card) is (kind in OURS)
    assert ("Plain `timm` and `transformers` load it." in card) is (kind not in OURS)
    assert "torch.zeros(1, 3, 32, 32)" in card and "images of 32 px, 7 labels" in card
    assert ("A convolutional network" in card) is (kind in ("resnet", "vgg"))
    assert f"| native shape | {SHAPES[kind]} |" in card
    blocks = {"vit": "2 blocks of width 64", "heads": "2 blocks of width 64, heads 2, 5",
              "stitched": "2 blocks of width 32 and 1 blocks of width 64"}  # fmt: skip
    assert blocks.get(kind, "parameters, images") in card


@pytest.mark.parametrize(
    "native",
    [{"kind": "x\ny"}, {"kind": 5}, {"kind": "conv", "stages": [[10**400]]}, {"kind": "heads", "heads": {"a": 1}}],
)
def test_a_native_shape_that_is_none_is_left_out(native: dict[str, object]) -> None:
    facts = {"architecture": "learngene_vgg", "model_args": {"depths": ["x"], "widths": [1], "heads": "12"}}
    card = descendant_card(
        facts | {"learngene": {"name": "x", "learngene_shape": native}}, repo="o/r", license="MIT", params=1
    )
    assert not re.search(r"native shape \| *[^|]*x", card) and "10000" not in card
