"""What a learngene's card says of the networks that grow from it: which there are, what they cost, what loads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from learngene_hub._card_facts import table
from learngene_hub._card_federation import federation_of
from learngene_hub.errors import LearngeneError
from learngene_hub.shape import ViTShape

if TYPE_CHECKING:
    from learngene_hub.learngene import Learngene
    from learngene_hub.shape import Shape

LABELS = 10  # of the examples, where the classes of the data do not say it
COMMON_SHAPES = ((4, 128), (6, 192), (12, 192), (6, 256), (7, 320), (12, 384), (12, 768))
BUDGETS = (0.25, 0.4, 0.55, 0.7, 0.85)  # of a pool's largest descendant, parameters


def labels(learngene: Learngene) -> int:
    """Labels of the examples: of a federated run those of its data."""
    known = learngene.shape.classes if federation_of(learngene.provenance) else 0
    return known or LABELS


def family(learngene: Learngene) -> tuple[str, str]:
    """What the ancestor is, and what is grown."""
    if learngene.shape.kind == "conv":
        return "convolutional network", "a network of any size"
    if learngene.reach.routes is not None:
        return "vision transformer", "a ViT of a size that it has"
    return "vision transformer", "a ViT of any depth and width"


def loading(shapes: Sequence[Shape]) -> tuple[str, str]:
    """What these networks are, and what loads them once they are saved."""
    ours = [shape.architecture.startswith("learngene_") for shape in shapes]
    if not any(ours):
        plain = all(isinstance(shape, ViTShape) for shape in shapes)
        return "a plain timm ViT" if plain else "a timm model", "plain `timm` and plain `transformers`"
    some = "" if all(ours) else "; where it is a plain ViT or a ResNet, without that"
    return "a timm model", f"`timm` and `transformers` after `import learngene_hub.descendant`{some}"


def _plan(learngene: Learngene, **asked: Any) -> Shape | None:
    """The shape that would be grown; None where it is out of reach, or there is none."""
    from learngene_hub.factory import plan

    try:
        return plan(learngene, **asked, num_labels=labels(learngene), in_chans=learngene.shape.in_chans)
    except LearngeneError:
        return None


def example(learngene: Learngene) -> Shape | None:
    """A shape of the native depth, twice as wide where that is within reach."""
    (shallow, deep), (narrow, wide, step) = learngene.reach.depths, learngene.reach.widths
    most = max(narrow, min(2 * learngene.shape.width, wide))
    depth = min(max(learngene.shape.depth, shallow), deep)
    return _plan(learngene, depth=depth, width=narrow + (most - narrow) // step * step)


def examples(learngene: Learngene) -> list[Shape]:
    """Some of the shapes within reach, the least parameters first."""
    native, reach = learngene.shape, learngene.reach
    (shallow, deep), (narrow, wide, _) = reach.depths, reach.widths
    sizes = [(shallow, narrow), (native.depth, native.width), *COMMON_SHAPES, (deep, wide)]
    asked: list[dict[str, Any]] = [{"depth": depth, "width": width} for depth, width in sizes]
    asked += [{"heads": heads} for heads in reach.heads or ()]
    if reach.routes is not None and (largest := _plan(learngene)) is not None:
        asked += [{}, *({"max_params": int(share * largest.params())} for share in BUDGETS)]
    found = {str(shape): shape for each in asked if (shape := _plan(learngene, **each)) is not None}
    return sorted(found.values(), key=lambda shape: shape.params())


def reach_section(learngene: Learngene, classifier: str) -> str:
    """The section of what can be grown; ``classifier`` says where the head comes from."""
    native, reach, shapes = learngene.shape, learngene.reach, examples(learngene)
    (shallow, deep), (narrow, wide, step) = reach.depths, reach.widths
    count = reach.routes or (deep - shallow + 1) * ((wide - narrow) // step + 1)
    costs = [
        [
            str(shape),
            f"{shape.params() / 1e6:.2f} M",
            f"{shape.flops() / 1e9:.2f} G",
            f"{4 * shape.params() / 1e6:.1f} MB",
        ]
        for shape in shapes
    ]
    in_heads = f", in heads of {native.head_dim}" if hasattr(native, "head_dim") else ""
    ways = [
        [
            "depth, convolutions" if native.kind == "conv" else "depth, blocks",
            _span(shallow, deep, 1),
            str(native.depth),
        ],
        ["width", _span(narrow, wide, step), f"{native.width}{in_heads}"],
        ["side of the images, px", _sides(native), str(native.image_size)],
        ["channels of the images", "any number", str(native.in_chans)],
        ["labels", "any number", classifier.lower()],
    ]
    if reach.heads is not None:
        ways.insert(2, ["heads of each block", _span(*reach.heads, 1), str(getattr(native, "heads", ""))])
    size = "depth x width" if all(isinstance(shape, ViTShape) for shape in shapes) else "size"
    parts = [
        "## Reach",
        table(["", "from - to", "native"], ways),
        f"One file, {learngene.nbytes / 1e6:.1f} MB of tensors, stands for {count:,} shapes. Some of them, with "
        f"{labels(learngene)} labels at {learngene.image_size} px (FLOPs of one image; weights in float32):",
        table([size, "parameters", "FLOPs", "weights"], costs),
    ]
    return "\n\n".join(parts if costs else parts[:2])


def _sides(native: Shape) -> str:
    patch = getattr(native, "patch", None)
    return "any that the network takes" if patch is None else f"multiples of {patch}"


def _span(least: int, most: int, step: int) -> str:
    if least == most:
        return str(least)
    return f"{least} - {most}" + (f" in steps of {step}" if step > 1 else "")
