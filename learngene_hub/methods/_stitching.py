"""The routes through a set of stitched ViTs: which there are, how they are numbered, and what each of them costs.

A route runs through the stem and some blocks of one instance, a linear layer, some blocks of another instance, and so
on, and ends with the last norm and the head of the instance that it ends in. Blocks are counted from 0. (j, k) means:
after block j of the front instance, on to block k of the end instance.

One direction, small to large, equal depth n (SN-Net). A window of 2 blocks slides over the depth by 1, and every
ordered pair inside a window is legal, so (j, k) is legal exactly where |j - k| <= 1: 3 (n - 1) + 1 routes for each pair
of instances. They share n - 1 linear layers, one per window: (j, k) has min(j, k) where j != k, and max(0, j - 1) where
j = k. Unequal depth, the larger r times the smaller: from j to (j + 1) r alone, one layer each.

Both directions (SN-Net v2), two instances of d and r d blocks: also from block i of the larger, where i is the last of
a group of r, to block i // r + 1 of the smaller, and routes that switch twice, in either order. (Our reading, where the
released code asks for odd i: the same at r = 2.)

Numbers: the instances alone, then each pair in the order of its windows, (0, 1), (0, 2), ... In both directions: alone,
small to large, large to small, large-small-large, small-large-small. There v2 numbers one route more than it draws:
from the last block of the smaller past the last block of the larger; its number stays free here.

Sources: Pan, Cai, Zhuang, "Stitchable Neural Networks", CVPR 2023, arXiv:2302.06586; the same with He and Liu,
"Stitched ViTs are Flexible Vision Backbones" (SN-Net v2), arXiv:2307.00154; and the released code of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from learngene_hub._stitched import StitchedShape
from learngene_hub.errors import ShapeError
from learngene_hub.shape import ViTShape

Pair = tuple[int, int]


@dataclass(frozen=True)
class Leg:
    """The blocks of one instance that a route runs through, first and last included."""

    instance: int
    first: int
    last: int

    @property
    def depth(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.instance}[{self.first}-{self.last}]"


@dataclass(frozen=True)
class Switch:
    """Where a route goes from one instance to another: after block ``j``, through ``layer``, on to block ``k``."""

    pair: Pair  # front instance, end instance
    layer: int  # among those of the pair
    j: int
    k: int


@dataclass(frozen=True)
class Route:
    """One of the networks in a pool."""

    id: int
    legs: tuple[Leg, ...]
    layers: tuple[int, ...] = ()  # of each switch

    def __str__(self) -> str:
        return " > ".join(map(str, self.legs))

    @property
    def switches(self) -> tuple[Switch, ...]:
        """Each change of instance, in order."""
        return tuple(
            Switch((front.instance, end.instance), layer, front.last, end.first)
            for (front, end), layer in zip(pairwise(self.legs), self.layers, strict=True)
        )

    def shape(self, instances: Mapping[int, ViTShape]) -> ViTShape | StitchedShape:
        """The network, which is a plain ViT where the route stays in one instance."""
        return StitchedShape.join(tuple(replace(instances[leg.instance], depth=leg.depth) for leg in self.legs))


def windows(depth: int) -> Iterator[tuple[int, int, int]]:
    """(j, k, layer) of a pair of instances of ``depth`` blocks, in the order in which a sliding window meets them."""
    seen: set[Pair] = set()
    for start in range(max(1, depth - 1)):
        inside = range(start, min(start + 2, depth))
        for j, k in ((j, k) for j in inside for k in inside):
            if (j, k) not in seen:
                seen.add((j, k))
                yield j, k, start


def one_way(depths: Mapping[int, int], *, nearest: bool) -> tuple[Route, ...]:
    """The routes from small to large through instances of ``depths`` (number -> blocks).

    ``nearest``: neighbours alone are stitched. A number below the highest that is not there keeps its place in the
    numbering, as if it had as many blocks.

    Raises:
        ShapeError: depths of a pair that are no multiple of each other.
    """
    count = max(depths) + 1
    pairs = list(pairwise(range(count))) if nearest else list(combinations(range(count), 2))
    found = [Route(number, (Leg(number, 0, depth - 1),)) for number, depth in depths.items()]
    number = count
    for front, end in pairs:
        front_depth, end_depth = (depths.get(place, next(iter(depths.values()))) for place in (front, end))
        for j, k, layer in _upwards(front_depth, end_depth):
            if front in depths and end in depths:
                found.append(Route(number, (Leg(front, 0, j), Leg(end, k, end_depth - 1)), (layer,)))
            number += 1
    return tuple(found)


def both_ways(small: int, large: int) -> tuple[Route, ...]:
    """The routes in both directions through instance 0 of ``small`` blocks and instance 1 of ``large``.

    Raises:
        ShapeError: depths that are no multiple of each other.
    """
    ratio = _ratio(small, large)
    ups = [(i, (i + 1) * ratio, i) for i in range(small - 1)]
    downs = [((m + 1) * ratio - 1, m + 1, m) for m in range(small - 1)]
    legs: list[tuple[tuple[Leg, ...], tuple[int, ...]] | None] = [
        ((Leg(0, 0, small - 1),), ()),
        ((Leg(1, 0, large - 1),), ()),
    ]
    legs += [((Leg(0, 0, j), Leg(1, k, large - 1)), (layer,)) for j, k, layer in ups]
    legs.append(None)  # numbered in the released code, and not drawn: the last block of the small one was the last
    legs += [((Leg(1, 0, j), Leg(0, k, small - 1)), (layer,)) for j, k, layer in downs]
    for (j, k, down), (i, m, up) in ((a, b) for a in downs for b in ups):
        if i >= k:
            legs.append(((Leg(1, 0, j), Leg(0, k, i), Leg(1, m, large - 1)), (down, up)))
    for (i, m, up), (j, k, down) in ((a, b) for a in ups for b in downs):
        if j >= m:
            legs.append(((Leg(0, 0, i), Leg(1, m, j), Leg(0, k, small - 1)), (up, down)))
    return tuple(Route(number, *row) for number, row in enumerate(legs) if row is not None)


def _upwards(front: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(j, k, layer) from an instance of ``front`` blocks to one of ``end``."""
    if front == end:
        yield from windows(front)
        return
    ratio = _ratio(front, end)
    yield from ((j, (j + 1) * ratio, j) for j in range(front - 1))


def _ratio(small: int, large: int) -> int:
    if large % small:
        near = max(1, round(large / small)) * small
        raise ShapeError(
            f"{small} and {large} blocks asked; the larger depth is a multiple: {small} and {near} would work"
        )
    return large // small


def layers_of(routes: Sequence[Route]) -> dict[Pair, int]:
    """Linear layers of each pair of instances."""
    found: dict[Pair, int] = {}
    for switch in (switch for route in routes for switch in route.switches):
        found[switch.pair] = max(found.get(switch.pair, 0), switch.layer + 1)
    return found


def uses_of(routes: Sequence[Route]) -> dict[tuple[Pair, int], list[Pair]]:
    """The (j, k) that share each linear layer, in the order of the routes that switch once."""
    found: dict[tuple[Pair, int], list[Pair]] = {}
    for switch in (route.switches[0] for route in routes if len(route.layers) == 1):
        found.setdefault((switch.pair, switch.layer), []).append((switch.j, switch.k))
    return found


def cost_groups(costs: Mapping[int, float], gap: float) -> list[list[int]]:
    """Route numbers in groups of like cost: in rising order, one opens where it costs over ``gap`` more than the
    cheapest of the last group. Source: the ROS sampling of SN-Net v2, section 3.3 (its costs are multiply-adds)."""
    groups: list[list[int]] = []
    for number in sorted(costs, key=lambda number: (costs[number], number)):
        if not groups or costs[number] - costs[groups[-1][0]] > gap:
            groups.append([])
        groups[-1].append(number)
    return groups
