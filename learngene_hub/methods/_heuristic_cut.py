"""Cutting convolutions out of a CNN, and where they stand in a descendant.

The units of a CNN are its convolutions in order, each with the BatchNorm behind it; the shortcut of a ResNet's stage
belongs to the first convolution beside it, whose input it reads. A learngene holds a few units in a row. In a
descendant they are the last ones, with pooling and residual blocks around them as in the ancestor; what stands before
them is random and of any width (``front``):

    vgg     one stage per number of ``front``, and one convolution to the gene's input channels that stands in the
            gene's first stage: [64, M, 128, M, 256, M, 512] before three of 512 is the published individual. Another
            depth spreads the convolutions evenly over the stages, the later ones taking what is left over; where there
            are too few, the first stages go. (Our reading of depths other than the published one.)
    resnet  (our reading; the paper has VGGs) the stages that the gene lies in keep the ancestor's blocks up to the
            gene's last one; blocks of ``front`` channels fill the stages before, of which timm wants four in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from learngene_hub._conv import Conv, ConvShape
from learngene_hub.errors import ArtefactError, ShapeError

_KINDS = ("weight", "bias", "running_mean", "running_var")
MAX_KERNEL = 7  # side of the features that the head of a descendant sees at once, at most; timm's own


@dataclass(frozen=True)
class Unit:
    """A convolution, and the shortcut beside it where there is one."""

    conv: Conv
    shortcut: Conv | None

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name within a learngene's unit -> name in the model and size."""
        found = _entries(self.conv, "")
        return found | (_entries(self.shortcut, "shortcut.") if self.shortcut else {})


def _entries(conv: Conv, prefix: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    named = {f"{conv.name}.{kind}": f"{prefix}{kind}" for kind in ("weight", "bias")}
    named |= {f"{conv.norm}.{kind}": f"{prefix}norm.{kind}" for kind in _KINDS}
    return {named[name]: (name, size) for name, size in conv.sizes().items()}


def units(shape: ConvShape) -> tuple[Unit, ...]:
    """The units of a CNN, in order."""
    shortcuts = {(conv.stage, conv.block): conv for conv in shape.convs() if conv.shortcut}
    found = []
    for conv in shape.convs():
        if not conv.shortcut:
            found.append(Unit(conv, shortcuts.pop((conv.stage, conv.block), None)))
    return tuple(found)


def stored(native: ConvShape, kept: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a learngene of the units ``kept`` holds: its name -> name in the ancestor and size."""
    all_units = units(native)
    return {
        f"conv.{i}.{rest}": entry for i in kept for rest, entry in all_units[i].entries().items()
    }  # fmt: skip


def placed(native: ConvShape, kept: Sequence[int], shape: ConvShape) -> dict[str, str]:
    """Where the tensors of the units ``kept`` stand in a descendant: a learngene's name -> name in the model.

    Raises:
        ShapeError: the last units of ``shape`` are not of the gene's kind.
    """
    if shape.family != native.family:
        raise ShapeError(f"a {shape.family} asked; this learngene is of a {native.family}, and grows those alone")
    old, new = units(native), units(shape)
    if len(new) < len(kept):
        raise ShapeError(f"{len(new)} convolutions asked; this learngene has {len(kept)} itself")
    tail, names = new[len(new) - len(kept) :], {}
    for i, unit in zip(kept, tail, strict=True):
        have, there = old[i].entries(), unit.entries()
        same = _place(old[i], old[kept[-1]]) == _place(unit, tail[-1])
        if not same or any(rest not in there or there[rest][1] != size for rest, (_, size) in have.items()):
            raise ShapeError(
                f"{unit.conv.name} of {unit.conv.inputs} to {unit.conv.outputs} channels asked; this learngene has "
                f"{old[i].conv.name} of {old[i].conv.inputs} to {old[i].conv.outputs} there, in stages of its own"
            )
        names |= {f"conv.{i}.{rest}": there[rest][0] for rest in have}
    return names


def _place(unit: Unit, last: Unit) -> tuple[int, str, int]:
    """Stages before the last unit's, which convolution of a block ("" in a VGG), and side of the kernel."""
    part = unit.conv.name.rpartition(".")[2]
    return last.conv.stage - unit.conv.stage, part if part.startswith("conv") else "", unit.conv.kernel


def plan_conv(
    native: ConvShape,
    kept: Sequence[int],
    *,
    depth: int | None,
    front: Sequence[int],
    head_hidden: int,
    num_labels: int | None,
    image_size: int | None,
    in_chans: int,
) -> ConvShape:
    """The CNN that ends in the units ``kept``, of this depth (None: the least with all of ``front``).

    Raises:
        ShapeError: there is none of this depth, or the images are too small.
    """
    size = image_size or native.image_size
    classes = native.classes if num_labels is None else num_labels
    stages = _vgg_stages(native, kept, depth, front) if native.family == "vgg" else _resnet_stages(
        native, kept, depth, front
    )  # fmt: skip
    plain = ConvShape(family=native.family, stages=stages, image_size=size, in_chans=in_chans, classes=classes)
    if native.family == "resnet" or not head_hidden:
        return plain
    return replace(plain, head_hidden=head_hidden, head_kernel=min(plain.side, MAX_KERNEL))


def gene_stages(native: ConvShape, kept: Sequence[int]) -> list[list[int]]:
    """Channels of the convolutions ``kept``, stage by stage."""
    convs = [units(native)[i].conv for i in kept]
    numbers = dict.fromkeys(conv.stage for conv in convs)
    return [[conv.outputs for conv in convs if conv.stage == number] for number in numbers]


def _vgg_stages(
    native: ConvShape, kept: Sequence[int], depth: int | None, front: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    convs = [units(native)[i].conv for i in kept]
    gene = gene_stages(native, kept)
    least = len(convs) + 1
    loose = (least + len(front) if depth is None else depth) - least
    if loose < 0:
        raise ShapeError(
            f"depth {depth} asked; the gene has {len(convs)} convolutions and needs one before them: depth {least} "
            "would work"
        )
    before = [[width] * count for width, count in zip(front, spread(loose, len(front)), strict=True) if count]
    if loose and not front:
        before = [[convs[0].inputs] * loose]
    return tuple(map(tuple, [*before, [convs[0].inputs, *gene[0]], *gene[1:]]))


def _resnet_stages(
    native: ConvShape, kept: Sequence[int], depth: int | None, front: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    convs = [units(native)[i].conv for i in kept]
    first, last = convs[0], convs[-1]
    gene = [native.stages[number] for number in range(first.stage, last.stage)]
    gene.append(native.stages[last.stage][: last.block + 1])
    room, fixed = 4 - len(gene), sum(map(len, gene))
    channels = list(front)[-room:] if room else []
    if len(channels) < room:
        raise ShapeError(f"front {list(front)} asked; {room} stages stand before the gene's: give {room} numbers")
    if room and first.block == 0 and first.name.endswith("conv1"):
        channels[-1] = first.inputs  # what the gene's first convolution reads
    loose = room if depth is None else depth - fixed
    if loose < room or (loose and not room):
        near = str(fixed + room) if loose < room else str(fixed)
        raise ShapeError(
            f"depth {depth} asked; the gene's stages have {fixed} blocks, and {room} stages before them at least one "
            f"each: depth {near} would work"
        )
    return tuple((width,) * count for width, count in zip(channels, spread(loose, room), strict=True)) + tuple(gene)


def spread(count: int, stages: int) -> tuple[int, ...]:
    """``count`` layers over ``stages``, as even as possible; the later ones take what is left over."""
    each, more = divmod(count, stages) if stages else (0, 0)
    return tuple(each + int(stage >= stages - more) for stage in range(stages))


def least_depth(native: ConvShape, kept: Sequence[int]) -> int:
    """The least depth of a descendant: convolutions of a VGG, blocks of a ResNet."""
    if native.family == "vgg":
        return len(kept) + 1
    convs = [units(native)[i].conv for i in kept]
    first, last = convs[0], convs[-1]
    inside = sum(len(native.stages[number]) for number in range(first.stage, last.stage)) + last.block + 1
    return inside + 3 - (last.stage - first.stage)


def expected(native: ConvShape, kept: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Name -> size of what a learngene of the units ``kept`` holds.

    Raises:
        ArtefactError: none, or units that the ancestor does not have or that cannot be kept.
    """
    last = len(units(native)) - 1
    if not kept or kept[0] < 1 or kept[-1] > last:
        raise ArtefactError(f"convolutions {list(kept)}; of those of {native}, 1 to {last} can be kept")
    return {name: size for name, (_, size) in stored(native, kept).items()}
