"""Which heads of a layer are alike, and which layers share one FFN: the two groupings of Cluster-Learngene.

The one statistic is the mean attention distance of a head (``_cluster_attention.py``), in pixels. DBSCAN on numbers
with ``min_samples`` 1 has neither noise nor an order: it sorts them and cuts wherever a gap exceeds eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from learngene_hub.errors import SettingsError
from learngene_hub.shape import ViTShape

_TIE = 1e-6  # pixels: nearer than this is equally near. Of two heads both are equally near their mean, up to rounding

# The groups of the released code for DeiT-Ti, -S and -B, by width: layers counted from 0, the kept one first.
PUBLISHED = {192: ((1, 2), (10, 11)), 384: ((9, 10, 11),), 768: ((6, 7), (9, 10, 11))}
PUBLISHED_DEPTH, PUBLISHED_HEAD_DIM = 12, 64
RULES = ("auto", "published", "measured", "none")


@dataclass(frozen=True)
class HeadCluster:
    """Heads of one layer that attend equally far."""

    centroid: int  # the head that stands for them
    members: tuple[int, ...]  # ascending


def cluster_heads(distances: Sequence[float], eps: float) -> list[HeadCluster]:
    """The clusters of one layer's heads in the order of priority: the largest first, equally large ones by first head.

    The centroid is the head nearest to the mean of its cluster, the lowest of equally near ones.

    Args:
        distances: of each head, pixels.
        eps: the largest gap within a cluster, pixels.
    """
    order = sorted(range(len(distances)), key=lambda head: distances[head])
    cuts = [i for i, (a, b) in enumerate(pairwise(order), 1) if distances[b] - distances[a] > eps]
    parts = [sorted(order[start:end]) for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    found = [HeadCluster(_nearest([distances[i] for i in part], part), tuple(part)) for part in sorted(parts)]
    return sorted(found, key=lambda cluster: -len(cluster.members))  # stable: by first head among equals


def _nearest(values: Sequence[float], names: Sequence[int]) -> int:
    """The name whose value is nearest to their mean, the first of equally near ones."""
    mean = sum(values) / len(values)
    off = [abs(value - mean) for value in values]
    return next(name for name, distance in zip(names, off, strict=True) if distance <= min(off) + _TIE)


@dataclass(frozen=True, order=True)
class FfnGroup:
    """Consecutive layers ``first`` to ``last`` whose FFNs are regenerated from that of layer ``kept``."""

    first: int
    last: int
    kept: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer <= self.last

    @property
    def name(self) -> str:
        """Its part of a tensor's name: ``FIRST-LAST`` under ``psi``, ``FIRST-LAST.KEPT`` under ``ffn``."""
        return f"{self.first}-{self.last}"

    def to_list(self) -> list[int]:
        """Its layers, the kept one first."""
        return [self.kept, *(i for i in range(self.first, self.last + 1) if i != self.kept)]


def measured_groups(distances: Sequence[Sequence[float]], eps: float) -> list[FfnGroup]:
    """The longest runs of consecutive layers each of which attends as far as the next, head for head once sorted.

    Two layers do where the mean absolute difference of their sorted distances is below ``eps``. The kept layer is the
    one nearest to the mean of its run (our reading: the paper's own rule was not found).
    """
    profiles = [sorted(layer) for layer in distances]
    cuts = [i for i, (a, b) in enumerate(pairwise(profiles), 1) if not _apart(a, b) < eps]
    groups = []
    for start, end in zip([0, *cuts], [*cuts, len(profiles)], strict=True):
        run = profiles[start:end]
        mean = [sum(values) / len(run) for values in zip(*run, strict=True)]
        off = [_apart(profile, mean) for profile in run]
        kept = next(i for i, distance in enumerate(off, start) if distance <= min(off) + _TIE)
        groups.append(FfnGroup(start, end - 1, kept))
    return groups


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def given_groups(lists: Sequence[Sequence[int]], depth: int) -> list[FfnGroup]:
    """All groups of ``depth`` layers, of which ``lists`` names those of several layers, the kept one first.

    Raises:
        SettingsError: a layer that is not there, or stands in two groups, or a group that is not one run.
    """
    groups: list[FfnGroup] = []
    for layers in lists:
        ordered = sorted(layers)
        if not ordered or ordered != list(range(ordered[0], ordered[0] + len(ordered))):
            raise SettingsError(
                f"ffn_groups {[list(each) for each in lists]} asked; a group is one run of layers, such as [9, 10, 11]"
            )
        if ordered[0] < 0 or ordered[-1] >= depth:
            raise SettingsError(f"ffn_groups {list(layers)} asked; the ancestor's layers are 0 to {depth - 1}")
        groups.append(FfnGroup(ordered[0], ordered[-1], layers[0]))
    taken = [layer for group in groups for layer in range(group.first, group.last + 1)]
    if twice := sorted({layer for layer in taken if taken.count(layer) > 1}):
        raise SettingsError(f"layer {twice[0]} stands in two of the ffn_groups; one would work")
    return sorted(groups + [FfnGroup(i, i, i) for i in range(depth) if i not in taken])


def fixed_groups(rule: str | Sequence[Sequence[int]], native: ViTShape) -> list[FfnGroup] | None:
    """The groups of an ancestor's layers by one of RULES, or as they are given; None: they are to be measured.

    Raises:
        SettingsError: the published ones are asked for an ancestor that has none, or groups that do not fit it.
    """
    if not isinstance(rule, str):
        return given_groups(rule, native.depth)
    is_deit = (native.depth, native.head_dim) == (PUBLISHED_DEPTH, PUBLISHED_HEAD_DIM) and native.width in PUBLISHED
    if rule == "published" and not is_deit:
        raise SettingsError(
            f"ffn_groups 'published' asked for an ancestor of {native}; there are such of DeiT-Ti, -S and -B, 12 "
            f"blocks of width {', '.join(map(str, PUBLISHED))}: 'measured' would work"
        )
    if rule == "none":
        return given_groups((), native.depth)
    return given_groups(PUBLISHED[native.width], native.depth) if is_deit and rule != "measured" else None


def group_of(groups: Sequence[FfnGroup], layer: int) -> FfnGroup:
    """The group that a layer belongs to."""
    return next(group for group in groups if layer in group)
