"""A pool as a learngene: its tensors, their check, the choice of a route, and the descendant of one.

Tensors: ``instance.<n>.stem|block|tail|head...`` of each instance, in a learngene's names, and
``stitch.<front>-<end>.<layer>.weight|bias``. What instances and routes there are is read off these names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import shortest_ratio
from learngene_hub._stitched import StitchedShape
from learngene_hub.errors import ArtefactError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._stitch_net import StitchNet
from learngene_hub.methods._stitching import Leg, Route, both_ways, one_way
from learngene_hub.methods._whole import last_norm, parts_of
from learngene_hub.shape import Reach, ViTShape
from learngene_hub.transforms import BLOCK_KEYS, HEAD_KEYS

GROUPS = frozenset({"instance", "stitch"})
COLUMNS = ("id", "route", "params", "flops", "accuracy")  # of the table in the provenance
MAX_INSTANCES = 32
AnyShape = ViTShape | StitchedShape


def tensors_of(net: StitchNet) -> dict[str, Tensor]:
    """What a learngene of this net holds: float32 copies on the CPU."""
    found = {}
    for number, vit in net.instances.items():
        parts = parts_of(vit, ViTShape.of(vit))
        parts |= {key: vit.state_dict()[key].detach().cpu().float().clone() for key in HEAD_KEYS}
        found |= {f"instance.{number}.{name}": tensor for name, tensor in parts.items()}
    for name, parameter in net.stitches.named_parameters():
        found[f"stitch.{name}"] = parameter.detach().cpu().float().clone()
    return {name: tensor.contiguous() for name, tensor in found.items()}


def instances_of(shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> dict[int, ViTShape]:
    """The shape of each instance, by its number.

    Raises:
        ArtefactError: these tensors are of no instances.
        ShapeError: they are of instances that no ViT is.
    """
    blocks: dict[int, set[str]] = {}
    for name in shapes:
        group, number, part, *rest = *name.split("."), "", ""
        if group == "instance" and part == "block":
            blocks.setdefault(_number(number), set()).add(rest[0])
    numbers = sorted(blocks)
    if numbers != [0, 2] and (numbers != list(range(len(numbers))) or not 2 <= len(numbers) <= MAX_INSTANCES):
        raise ArtefactError(f"instances {numbers[:5]} given; they are 0, 1 and so on, or 0 and 2")
    found = {}
    for number in numbers:
        stem = shapes.get(f"instance.{number}.stem.patch_embed.proj.bias") or (0,)
        hidden = shapes.get(f"instance.{number}.block.0.mlp.fc1.bias") or (0,)
        width = stem[0]
        if not width or width % native.head_dim or not hidden[0]:
            raise ArtefactError(f"instance {number} is {width} wide; the native heads are {native.head_dim} wide")
        found[number] = replace(
            native,
            depth=len(blocks[number]),
            width=width,
            heads=width // native.head_dim,
            mlp_ratio=shortest_ratio(width, hidden[0]),
        )
    return found


def routes_of(names: Mapping[str, Any], instances: Mapping[int, ViTShape], *, nearest: bool) -> tuple[Route, ...]:
    """The routes of a pool with tensors of these names: in both directions where a layer leads downwards.

    Raises:
        ShapeError: instances that no routes lead through.
    """
    depths = {number: shape.depth for number, shape in instances.items()}
    pairs = {name.split(".")[1] for name in names if name.startswith("stitch.")}
    if "1-0" in pairs and set(depths) == {0, 1}:
        return both_ways(depths[0], depths[1])
    return one_way(depths, nearest=nearest)


def routes_in(learngene: Learngene, *, nearest: bool) -> tuple[dict[int, ViTShape], tuple[Route, ...]]:
    """(instances, routes) of a learngene."""
    shapes = {name: tuple(tensor.shape) for name, tensor in learngene.tensors.items()}
    instances = instances_of(shapes, learngene.shape)
    return instances, routes_of(shapes, instances, nearest=nearest)


def reach_of(instances: Mapping[int, ViTShape], routes: Sequence[Route]) -> Reach:
    """The depths and widths between which the routes lie."""
    depths = [route.shape(instances).depth for route in routes]
    widths = sorted({route.shape(instances).width for route in routes})
    step = math.gcd(*(width - widths[0] for width in widths)) or instances[max(instances)].head_dim
    return Reach(depths=(min(depths), max(depths)), widths=(widths[0], widths[-1], step), routes=len(routes))


def check(shapes: Mapping[str, tuple[int, ...]], native: Any, *, nearest: bool) -> None:
    """Refuse tensors that no pool with this largest instance has.

    Raises:
        ArtefactError: a tensor is missing, unknown, or of another shape.
    """
    if not isinstance(native, ViTShape) or not native.classes:
        raise ArtefactError(
            f"a native shape {native} given; a pool's is its largest instance's, a plain ViT with a head"
        )
    instances = instances_of(shapes, native)
    widths = [shape.width for shape in instances.values()]
    if instances[max(instances)] != native or widths != sorted(set(widths)) or len(widths) < 2:
        raise ArtefactError(
            f"instances {', '.join(map(str, instances.values()))} given; they rise to the native {native}"
        )
    want: dict[str, tuple[int, ...]] = {}
    for number, shape in instances.items():
        parts = transforms.expected_shapes(shape, set(range(shape.depth)))
        parts |= {"head.weight": (shape.classes, shape.width), "head.bias": (shape.classes,)}
        want |= {f"instance.{number}.{name}": size for name, size in parts.items()}
    try:
        routes = routes_of(shapes, instances, nearest=nearest)
    except ShapeError as error:
        raise ArtefactError(f"instances that no routes lead through: {error}") from error
    for switch in (switch for route in routes for switch in route.switches):
        front, end = (instances[number].width for number in switch.pair)
        name = f"stitch.{switch.pair[0]}-{switch.pair[1]}.{switch.layer}"
        want |= {f"{name}.weight": (end, front), f"{name}.bias": (end,)}
    if missing := sorted(want.keys() - shapes.keys()):
        raise ArtefactError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(shapes.keys() - want.keys()):
        raise ArtefactError(f"{len(unknown)} unknown tensors, the first is {unknown[0]}")
    for name, size in shapes.items():
        if tuple(size) != want[name]:
            raise ArtefactError(f"tensor {name} is {list(size)}; the instances need {list(want[name])}")


def accuracies(learngene: Learngene) -> dict[int, float]:
    """The measured accuracy of each route, in per cent, as far as the provenance has it."""
    table = learngene.provenance.get("routes")
    rows = table.get("rows") if isinstance(table, Mapping) else None
    if not isinstance(rows, (list, tuple)) or list(table.get("columns", ())) != list(COLUMNS):  # type: ignore[union-attr]
        return {}
    numbers = [(row[0], row[-1]) for row in rows if isinstance(row, (list, tuple)) and len(row) == len(COLUMNS)]
    return {n: float(value) for n, value in numbers if type(n) is int and isinstance(value, (int, float))}


def table_of(
    routes: Sequence[Route], instances: Mapping[int, ViTShape], measured: Mapping[int, float]
) -> dict[str, list[Any]]:
    """The table that the provenance holds: one row for each route."""
    rows = []
    for route in routes:
        shape = route.shape(instances)
        rows.append([route.id, str(route), shape.params(), shape.flops(), round(measured[route.id], 3)])
    return {"columns": list(COLUMNS), "rows": rows}


def choose(
    learngene: Learngene,
    *,
    nearest: bool,
    route: int,
    depth: int | None,
    width: int | None,
    heads: int | Sequence[int] | None,
    num_labels: int | None,
    image_size: int | None,
    in_chans: int,
) -> AnyShape:
    """The route that fits these sizes best: the most accurate by the learngene's own table, else the largest.

    With ``route`` it is that one, and with nothing asked the native one, the largest instance alone. Where ``depth``
    and ``width`` are both those of an instance it is that instance alone, a plain ViT, whatever the table says of the
    routes of as many blocks that end in it.

    Raises:
        ShapeError: no route has these sizes.
    """
    instances, routes = routes_in(learngene, nearest=nearest)
    changed = {"in_chans": in_chans}
    changed |= {} if num_labels is None else {"classes": num_labels}
    changed |= {} if image_size is None else {"image_size": image_size}
    instances = {number: replace(shape, **changed) for number, shape in instances.items()}
    shapes = {each.id: each.shape(instances) for each in routes}
    if route >= 0:
        if route not in shapes:
            raise ShapeError(f"route {route} asked; this pool has {_ranges(sorted(shapes))}")
        shapes = {route: shapes[route]}
    elif depth is None and width is None and heads is None:
        return instances[max(instances)]
    fitting = {
        number: shape
        for number, shape in shapes.items()
        if depth in (None, shape.depth) and width in (None, shape.width) and _has_heads(shape, heads)
    }
    if not fitting:
        raise ShapeError(_nothing_fits(shapes, learngene.shape, route, depth, width, heads))
    plain = {n: shape for n, shape in fitting.items() if isinstance(shape, ViTShape)}
    if depth is not None and width is not None and plain:
        fitting = plain
    known = accuracies(learngene)
    if fitting.keys() <= known.keys():  # of equal ones the smallest
        return fitting[max(fitting, key=lambda number: (known[number], -fitting[number].params(), -number))]
    return fitting[max(fitting, key=lambda number: (fitting[number].params(), -number))]


def _has_heads(shape: AnyShape, heads: int | Sequence[int] | None) -> bool:
    """Whether the last block, or each block, has so many heads."""
    segments = shape.segments if isinstance(shape, StitchedShape) else (shape,)
    if heads is None or isinstance(heads, int):
        return heads in (None, segments[-1].heads)
    return list(heads) == [part.heads for part in segments for _ in range(part.depth)]


def _nothing_fits(
    shapes: Mapping[int, AnyShape],
    native: ViTShape,
    route: int,
    depth: int | None,
    width: int | None,
    heads: int | Sequence[int] | None,
) -> str:
    """Which sizes there are, and who has others."""
    sizes = {"depth": depth, "width": width, "heads": heads}
    asked = " and ".join(f"{name} {value}" for name, value in sizes.items() if value is not None) + " asked"
    if route >= 0:
        return f"{asked} with route {route}, which is {shapes[route]}; leave one of them out"

    def off(number: int) -> tuple[float, int, int]:
        shape = shapes[number]
        wide = 0.0 if width is None else abs(math.log2(shape.width / width))
        deep = 0 if depth is None else abs(shape.depth - depth)
        return wide, deep, number

    near = ", ".join(f"{number} ({shapes[number]})" for number in sorted(shapes, key=off)[:2])
    depths, widths = (sorted({getattr(shape, name) for shape in shapes.values()}) for name in ("depth", "width"))
    return (
        f"{asked}; the routes of this pool have depth {_ranges(depths)} and end {', '.join(map(str, widths))} wide: "
        f"the nearest are route {near}{_elsewhere(native, width, heads)}"
    )


def _elsewhere(native: ViTShape, width: int | None, heads: int | Sequence[int] | None) -> str:
    """Whose learngenes may have the sizes; "" where none has. How deep and wide the ancestor is, no pool says."""
    uneven = width is not None and width % native.head_dim
    other = heads is not None and set([heads] if isinstance(heads, int) else heads) != {
        (width or native.width) // native.head_dim
    }
    if uneven or other:
        return f"; heads are {native.head_dim} wide everywhere, so the width is a multiple of it"
    return "; a learngene of net2net grows every depth and width of whole heads up to 2 and 4 times its ancestor's"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0, 2, 19-34"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def expand(learngene: Learngene, shape: Any, *, nearest: bool, head: str) -> dict[str, Tensor | None]:
    """Every parameter of the route that has ``shape``; the head is fresh (None) for other classes than the pool's.

    Raises:
        ShapeError: no route has it.
    """
    instances, routes = routes_in(learngene, nearest=nearest)
    if not isinstance(shape, (ViTShape, StitchedShape)):
        raise ShapeError(
            f"a shape of kind {getattr(shape, 'kind', shape)!r} asked; a pool grows plain and stitched ViTs"
        )
    changed = {name: getattr(shape, name) for name in ("image_size", "in_chans", "classes")}
    asked = {number: replace(each, **changed) for number, each in instances.items()}
    found = [route for route in routes if route.shape(asked) == shape]
    if not found:
        raise ShapeError(f"{shape} asked; no route of this pool has that shape: plan, or settings route, name one")
    return _state(learngene, found[0], shape, inherit=head == "inherit" and shape.classes == learngene.shape.classes)


def _state(learngene: Learngene, route: Route, shape: AnyShape, *, inherit: bool) -> dict[str, Tensor | None]:
    first, last = (learngene.group(f"instance.{leg.instance}") for leg in (route.legs[0], route.legs[-1]))
    state: dict[str, Tensor | None] = {
        key: first[f"stem.{key}"] for key in transforms.STEM_KEYS if f"stem.{key}" in first
    }
    side, prefix = shape.image_size // shape.patch, int(shape.class_token)
    state["patch_embed.proj.weight"] = transforms.adapt_channels(first["stem.patch_embed.proj.weight"], shape.in_chans)
    state["pos_embed"] = transforms.resample_positions(first["stem.pos_embed"], side, prefix)
    place = 0
    for number, leg in enumerate(route.legs):
        if number:
            switch = route.switches[number - 1]
            layer = learngene.group(f"stitch.{switch.pair[0]}-{switch.pair[1]}.{switch.layer}")
            state |= {f"blocks.{place}.{kind}": layer[kind] for kind in ("weight", "bias")}
            place += 1
        for block in range(leg.first, leg.last + 1):
            tensors = learngene.group(f"instance.{leg.instance}.block.{block}")
            state |= {f"blocks.{place}.{key}": tensors[key] for key in BLOCK_KEYS}
            place += 1
    end = learngene.shape  # pools are of one kind of pooling
    state |= {f"{last_norm(end)}.{kind}": last[f"tail.norm.{kind}"] for kind in ("weight", "bias")}
    heads = {key: last[key] if inherit else None for key in HEAD_KEYS}
    return state | (heads if shape.classes else {})


def net_of(learngene: Learngene, *, nearest: bool) -> StitchNet:
    """All routes of a learngene at once, in eval mode on the CPU."""
    instances, routes = routes_in(learngene, nearest=nearest)
    vits: dict[int, nn.Module] = {}
    for number, shape in instances.items():
        alone = Route(number, (Leg(number, 0, shape.depth - 1),))
        state = _state(learngene, alone, shape, inherit=True)
        vits[number] = shape.build(preprocessing=learngene.preprocessing)
        vits[number].load_state_dict({name: t.float() for name, t in state.items() if t is not None})
    net = StitchNet(vits, routes)
    stitches = {name: tensor.float() for name, tensor in learngene.group("stitch").items()}
    net.stitches.load_state_dict(stitches)
    return net.eval()


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) <= 4 else -1
