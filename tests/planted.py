"""Learngenes whose tensors are an ancestor's own, made without training: what grows from them is known in advance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub.learngene import Learngene
from learngene_hub.shape import IMAGENET, Reach, ViTShape

FACTS = {"name": "pico", "sha256": "", "license": "apache-2.0", "source": "tests"}

# Class token, average pooling without one, an odd number of heads.
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "avg": {"class_token": False, "pool": "avg"},
    "odd": {"heads": 3, "width": 96},
}


def variant(name: str, **more: Any) -> ViTShape:
    """A pico shape of one of VARIANTS: three blocks, heads of 32, 32 px in patches of 8, 10 classes."""
    pico = ViTShape(depth=3, width=64, heads=2, head_dim=32, patch=8, image_size=32, classes=10)
    return replace(pico, **VARIANTS[name], **more)


def planted(
    ancestor: nn.Module,
    *,
    kept: Sequence[int] | None = None,
    frequency: Sequence[float] | None = None,
    probability: Sequence[float] | None = None,
    settings: Mapping[str, Any] | None = None,
    width: Mapping[str, Tensor] | None = None,
    reach: Reach | None = None,
) -> Learngene:
    """An LSAMD learngene that keeps the ancestor's blocks ``kept`` (all) as they are, under a search that never was."""
    shape = ViTShape.of(ancestor)
    state = {name: tensor.detach().clone() for name, tensor in ancestor.state_dict().items()}
    kept = range(shape.depth) if kept is None else kept
    stem = ("cls_token", "patch_embed.proj.bias", "patch_embed.proj.weight", "pos_embed")
    norm = "norm" if shape.pool == "token" else "fc_norm"
    tensors = {f"stem.{name}": state[name] for name in stem if name in state}
    tensors |= {f"tail.norm.{kind}": state[f"{norm}.{kind}"] for kind in ("weight", "bias")}
    for name, tensor in state.items():
        if name.startswith("blocks.") and int(name.split(".")[1]) in kept:
            tensors[name.replace("blocks.", "block.", 1)] = tensor
    tensors |= {
        "search.alpha": torch.zeros(2, shape.depth, 2),
        "search.paths": torch.zeros(2, shape.depth),
        "search.frequency": torch.tensor(frequency if frequency is not None else [1.0] * shape.depth),
        "search.probability": torch.tensor(probability if probability is not None else [0.5] * shape.depth),
    }
    tensors |= {f"width.{name}": tensor for name, tensor in (width or {}).items()}
    step = shape.head_dim
    return Learngene(
        tensors=tensors,
        method="lsamd",
        settings=dict(settings or {}),
        shape=shape,
        reach=reach or Reach(depths=(1, 2 * shape.depth), widths=(step, 4 * shape.width, step)),
        ancestor=dict(FACTS),
        preprocessing=IMAGENET,
        license="apache-2.0",
        provenance={},
    )


def features(model: nn.Module, x: Tensor) -> Tensor:
    """What the head sees: (B, width)."""
    with torch.no_grad():
        return model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
