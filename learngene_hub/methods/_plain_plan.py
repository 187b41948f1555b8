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
    try:
        learngene.reach.require(depth, width)
    except ShapeError as error:
        raise ShapeError(f"{error}{_others(native, depth, width)}") from None
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
            f"would work{_others(native, depth, width, heads=True)}"
        )
    return shape


def _others(native: ViTShape, depth: int, width: int, *, heads: bool = False) -> str:
    """Whose learngenes of the same ancestor have this size, or other heads at this size; "" where none has."""
    if heads:
        fits = width == native.width and depth <= native.depth
        return ", and a learngene of cluster can grow any number of heads at this width" if fits else ""
    step = native.head_dim
    if depth < 1 or not step <= width <= 4 * native.width or width % step:
        return ""
    if depth > 2 * native.depth:  # their auxiliaries may be deeper than the ancestor
        return f", and a learngene of tleg or ldr extracted with depth={-(-depth // 2)} can grow {depth}x{width}"
    return f", and a learngene of {'net2net or lsamd' if depth > 1 else 'net2net'} can grow {depth}x{width}"
