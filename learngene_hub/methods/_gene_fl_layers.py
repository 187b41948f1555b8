"""The layers of a network that federated learngenes are made of: the blocks of a plain ViT, the convolutions of a VGG.

A layer is the smallest thing that is sent as a whole. Stem, last norm and classifier are none: they are private. A
convolution of a VGG takes its BatchNorm along, running statistics too, but not the count of batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from learngene_hub import transforms
from learngene_hub._conv import ConvShape
from learngene_hub.errors import ArtefactError, ShapeError
from learngene_hub.shape import ViTShape

_CONV = {"weight": "weight", "bias": "bias"}
_NORM = ("weight", "bias", "running_mean", "running_var")


def require_layered(shape: Any) -> None:
    """Nothing, where networks of this shape have layers.

    Raises:
        ShapeError: it is neither a plain ViT nor a VGG.
    """
    if isinstance(shape, ViTShape) or (isinstance(shape, ConvShape) and shape.family == "vgg"):
        return
    raise ShapeError(f"{shape} of kind {shape.kind} asked; gene-fl knows plain ViTs and VGGs with batch norm")


def group_of(shape: Any) -> str:
    """The group of a learngene that holds layers of this shape's kind: "block" or "conv"."""
    return "block" if isinstance(shape, ViTShape) else "conv"


def layer_entries(shape: Any) -> tuple[dict[str, str], ...]:
    """Of each layer, in order: name of a tensor within the layer -> its name in the model's state dict.

    Raises:
        ShapeError: as ``require_layered``.
    """
    require_layered(shape)
    if isinstance(shape, ViTShape):
        return tuple({key: f"blocks.{i}.{key}" for key in transforms.BLOCK_KEYS} for i in range(shape.depth))
    return tuple(
        {key: f"{conv.name}.{key}" for key in _CONV} | {f"norm.{key}": f"{conv.norm}.{key}" for key in _NORM}
        for conv in shape.convs()
    )


def layer_params(shape: Any) -> tuple[int, ...]:
    """Parameters of each layer; running statistics are none."""
    if isinstance(shape, ViTShape):
        return (shape._block_params(),) * shape.depth
    require_layered(shape)
    return tuple(conv.params() for conv in shape.convs())


def quarter(shape: Any) -> int:
    """How many layers a quarter of the network's parameters holds, at least one: floor(P / (4 layer)).

    Of layers of different sizes (a VGG) the largest counts. Source: the headline of four times less communication than
    FedAvg; the rule is ours.
    """
    return max(1, shape.params() // (4 * max(layer_params(shape))))


def kept_layers(names: Mapping[str, Any] | Sequence[str], group: str) -> tuple[int, ...]:
    """The numbers n of the names ``group.n.rest``, ascending; what is no number is -1."""
    seconds = {name.split(".")[1] for name in names if name.startswith(f"{group}.")}
    return tuple(sorted({int(text) if text.isdecimal() and len(text) <= 4 else -1 for text in seconds}))


def layer_sizes(shape: Any, kept: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Name in a learngene -> size of the layers ``kept``.

    Raises:
        ArtefactError: no layer, or one that the network does not have.
    """
    count = len(layer_entries(shape))
    if not kept or not set(kept) <= set(range(count)):
        raise ArtefactError(f"layers {list(kept)}; those of the native shape are 0 to {count - 1}")
    if isinstance(shape, ViTShape):
        whole = transforms.expected_shapes(shape, set(kept))
        return {name: size for name, size in whole.items() if name.startswith("block.")}
    sizes = {name: size for conv in shape.convs() for name, size in conv.sizes().items()}
    entries = layer_entries(shape)
    return {f"conv.{i}.{rest}": sizes[name] for i in kept for rest, name in entries[i].items()}
