"""The arms of parts.py that no method of the package makes: blocks and heads that nobody searched for; few classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from learngene_hub.data import Images, seed_of
from learngene_hub.errors import SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._cluster_parts import take_heads
from learngene_hub.shape import ViTShape
from learngene_hub.transforms import even_positions

BLOCKS = ("first", "last", "even", "random", "random-from-0")


def few_classes(images: Images, classes: int, per_class: int) -> Images:
    """``per_class`` images of each of ``classes`` classes, both drawn with seed 0."""
    names = torch.randperm(len(images.classes), generator=torch.Generator().manual_seed(0))[:classes].tolist()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    chosen = [order[images.labels[order] == label][:per_class] for label in names]
    labels = torch.cat([torch.full((len(part),), place) for place, part in enumerate(chosen)])
    return Images(images.pixels[torch.cat(chosen)], labels, tuple(images.classes[i] for i in names), images.name)


def chosen_blocks(rule: str, count: int, depth: int, seed: int) -> list[int]:
    """``count`` of an ancestor's ``depth`` blocks that nobody searched for, in its order.

    Raises:
        SettingsError: no such rule.
    """
    if rule not in BLOCKS:
        raise SettingsError(f"blocks {rule!r} asked; there are {', '.join(BLOCKS)}")
    if rule.startswith("random"):  # or all but block 0, which is kept
        least = 1 if rule == "random-from-0" else 0
        generator = torch.Generator().manual_seed(seed_of("parts", "blocks", seed))
        drawn = torch.randperm(depth - least, generator=generator)[: count - least] + least
        return sorted([*range(least), *drawn.tolist()])
    return {
        "first": list(range(count)),
        "last": list(range(depth - count, depth)),
        "even": list(even_positions(depth, count)),
    }[rule]


def with_blocks(ancestor: nn.Module, order: Sequence[int]) -> nn.Module:
    """The same ViT with these of its blocks alone, in this order."""
    state = {name: tensor for name, tensor in ancestor.state_dict().items() if not name.startswith("blocks.")}
    for place, block in enumerate(order):
        head = f"blocks.{block}."
        own = {name: tensor for name, tensor in ancestor.state_dict().items() if name.startswith(head)}
        state |= {f"blocks.{place}.{name.removeprefix(head)}": tensor for name, tensor in own.items()}
    model = replace(ViTShape.of(ancestor), depth=len(order)).build()
    model.load_state_dict(state, strict=True)
    return model.eval()


def prepared(arm: dict[str, Any], ancestor: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any], list[int]]:
    """(ancestor, settings, blocks) with which the arm's method keeps the blocks that the arm asks for; [] where none.

    auto takes a list. heuristic keeps the last ones, so they are brought there; net2net keeps all, so others go.
    """
    settings = dict(arm.get("settings", {}))
    if "blocks" not in arm:
        return ancestor, settings, []
    depth = len(ancestor.blocks)  # type: ignore[arg-type]
    blocks = chosen_blocks(arm["blocks"], arm["count"], depth, seed)
    if arm["method"] == "auto":
        return ancestor, settings | {"layers": blocks}, blocks
    others = [i for i in range(depth) if i not in blocks] if arm["method"] == "heuristic" else []
    return with_blocks(ancestor, [*others, *blocks]), settings, blocks


def with_random_heads(learngene: Learngene, ancestor: nn.Module, seed: int) -> Learngene:
    """A learngene of cluster whose heads are drawn, as many in each layer; everything else stays."""
    native: ViTShape = learngene.shape
    state = ancestor.state_dict()
    generator = torch.Generator().manual_seed(seed_of("parts", "heads", seed))
    tensors, drawn = dict(learngene.tensors), []
    for layer, heads in enumerate(learngene.provenance["centroids"]):
        drawn.append(torch.randperm(native.heads, generator=generator)[: len(heads)].tolist())
        keys = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias")
        block = {key: state[f"blocks.{layer}.{key}"] for key in keys}
        taken = take_heads(block, drawn[-1], native.head_dim)
        tensors |= {f"block.{layer}.{key}": tensor.contiguous() for key, tensor in taken.items()}
    return replace(learngene, tensors=tensors, provenance={**learngene.provenance, "centroids": drawn})
