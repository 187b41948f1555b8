"""What the methods that train nothing share: the ancestor's parts, a descendant put together from parts, refusals."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.shape import Preprocessing, Reach, Shape, ViTShape


def parts_of(ancestor: nn.Module, native: ViTShape) -> dict[str, Tensor]:
    """The stem, all blocks and the last norm of a plain timm ViT: float32 copies on the CPU, in a learngene's names."""
    state = {name: tensor.detach().cpu().float().clone() for name, tensor in ancestor.state_dict().items()}
    parts = {f"stem.{key}": state[key] for key in transforms.STEM_KEYS if key in state}
    for place in range(native.depth):
        parts |= {f"block.{place}.{key}": state[f"blocks.{place}.{key}"] for key in transforms.BLOCK_KEYS}
    return parts | {f"tail.norm.{kind}": state[f"{last_norm(native)}.{kind}"] for kind in ("weight", "bias")}


def last_norm(shape: ViTShape) -> str:
    """timm's name of the last norm, another one after average pooling."""
    return "norm" if shape.pool == "token" else "fc_norm"


def untrained(
    method: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    native: Shape,
    reach: Reach,
    facts: Mapping[str, Any],
    preprocessing: Preprocessing,
    began: float,
) -> Learngene:
    """A learngene that was made without a training step, ``began`` (``time.perf_counter``) until now."""
    return Learngene(
        tensors={name: tensor.contiguous() for name, tensor in tensors.items()},
        method=method,
        settings=dict(settings),
        shape=native,
        reach=reach,
        ancestor=dict(facts),
        preprocessing=preprocessing,
        license=str(facts.get("license", "")),
        provenance={
            "data": {},
            "steps": 0,
            "images_seen": 0,
            "flops": 0,  # of training: images seen times the FLOPs of one
            "seconds": round(time.perf_counter() - began, 3),
        },
    )


def assemble(
    shape: ViTShape, stem: Mapping[str, Tensor], blocks: Iterable[Mapping[str, Tensor]], norm: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """Every parameter of a ViT of ``shape`` from parts of its width, the position embeddings brought to its image size
    and the kernel to its input channels; None: the head."""
    side, prefix = shape.image_size // shape.patch, int(shape.class_token)
    state: dict[str, Tensor | None] = dict(stem)
    state["patch_embed.proj.weight"] = transforms.adapt_channels(stem["patch_embed.proj.weight"], shape.in_chans)
    state["pos_embed"] = transforms.resample_positions(stem["pos_embed"], side, prefix)
    for place, block in enumerate(blocks):
        state |= {f"blocks.{place}.{key}": tensor for key, tensor in block.items()}
    state |= {f"{last_norm(shape)}.{kind}": tensor for kind, tensor in norm.items()}
    return state | (dict.fromkeys(transforms.HEAD_KEYS) if shape.classes else {})


def check_whole(shapes: Mapping[str, tuple[int, ...]], native: ViTShape, groups: frozenset[str]) -> None:
    """Refuse tensors that are not the stem, every block and the last norm (and a width stage, where ``groups`` has it).

    Raises:
        ArtefactError: a tensor is missing, unknown, or of another shape.
    """
    for name in sorted(shapes):
        if name.partition(".")[0] not in groups:
            raise ArtefactError(f"unknown tensor {name}; the groups are {', '.join(sorted(groups))}")
    transforms.check_parts(shapes, native, searched=False)
    kept = transforms.stored_positions(shapes)
    if len(kept) != native.depth:
        raise ArtefactError(f"blocks at positions {list(kept)}; this method needs all {native.depth} of the ancestor")


def require_same(native: ViTShape, shape: ViTShape, method: str) -> None:
    """Refuse a shape that differs from the native one in what no method of this kind can change.

    Raises:
        ShapeError: patch, class token, pooling, head_dim or hidden units per channel differ.
    """
    for name in ("patch", "class_token", "pool", "head_dim", "mlp_ratio"):
        have, asked = getattr(native, name), getattr(shape, name)
        if name == "mlp_ratio" and shape.hidden == int(shape.width * native.mlp_ratio):
            continue  # the same hidden units; the shortest decimal of the ratio depends on the width
        if have != asked:
            raise ShapeError(
                f"{name} {asked} asked; this learngene has {have}, which {method} cannot change: {have} would work"
            )


def require_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Refuse a setting that is none of ``known``.

    Raises:
        SettingsError: it is not.
    """
    if value not in tuple(known):
        raise SettingsError(f"{name} {value!r} asked; there are {', '.join(known)}")
