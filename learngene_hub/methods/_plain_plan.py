"""The usual rule of which plain ViTs there are: for the factory, and for methods that also plan other networks."""

from __future__ import annotations

from dataclasses import replace

from learngene_hub.errors import ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.shape import ViTShape


def plan_plain(
    learngene: Learngene,
    *,
    depth: int | None,
    width: int | None,
    heads: int | tuple[int, ...] | None,
    num_labels: int | None,
    image_size: int | None,
    in_chans: int,
) -> ViTShape:
    """The plain ViT of these sizes, the native ones where left out, with heads as wide as the native ones.

    Raises:
        ShapeError: a size outside the learngene's reach, or other heads than the width has.
    """
    native: ViTShape = learngene.shape
    depth, width = depth or native.depth, width or native.width
    learngene.reach.require(depth, width)
    shape = replace(
        native,
        depth=depth,
        width=width,
        heads=width // native.head_dim,
        classes=native.classes if num_labels is None else num_labels,
        image_size=image_size or native.image_size,
        in_chans=in_chans,
    )
    if heads is not None and heads not in (shape.heads, (shape.heads,) * shape.depth):
        told = f"{heads} heads" if isinstance(heads, int) else f"heads {', '.join(map(str, heads))}"
        raise ShapeError(
            f"{told} asked at width {width}; this learngene's heads are {native.head_dim} wide: {shape.heads} heads "
            "would work"
        )
    return shape
