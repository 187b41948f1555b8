"""Which cluster a client belongs to. Private to ``strategy.py``.

The first clients are clustered together; one that joins later goes to the nearest cluster, or by ``far`` to none (-1:
the global gene). A client with too few images to tell a subspace (``min_per_class`` in all) joins the largest cluster,
the one of most clients, and the lower number of two: it has nothing that could be compared, and most clients are there.
The paper says nothing of such clients; this is our reading.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from learngene_hub.federated import subspace
from learngene_hub.federated._introduction import Introduction
from learngene_hub.federated._saved import Progress
from learngene_hub.federated.settings import Federation

SAME = 1e-6  # two sensitivities of one client may differ by so much


def joined(
    progress: Progress, told: Mapping[int, Introduction], settings: Federation, online: Collection[int]
) -> Progress:
    """The progress with these clients (by node, in the order that clusters are numbered by) in their clusters.

    ``online`` are the nodes that are there: a client that is known by a node that is gone has come again.
    """
    progress, back = _without_the_gone(progress, told, online)
    bases = {node: one.basis for node, one in told.items() if one.basis is not None}
    member = dict(progress.member) | back
    fresh = [node for node in told if node not in back]
    if not progress.clusters and settings.clusters != 1:
        order = [node for node in fresh if node in bases]
        apart = subspace.distances([bases[node] for node in order], settings.distance)
        found = subspace.agglomerate(apart, clusters=settings.clusters, threshold=settings.threshold)
        member |= dict(zip(order, found, strict=True))
        progress = replace(progress, member=member)
        member |= {node: largest(progress) for node in fresh if node not in bases}
    else:
        member |= {node: nearest(progress, bases.get(node), settings) for node in fresh}
    return replace(
        progress, member=member, bases={**progress.bases, **bases},
        xi={**progress.xi, **{node: list(one.xi) for node, one in told.items()}},
        clients={**progress.clients, **{node: one.client for node, one in told.items()}},
    )  # fmt: skip


def nearest(progress: Progress, basis: Tensor | None, settings: Federation) -> int:
    """The cluster of a client that joins later; -1: none is close (``far``), it takes the global gene."""
    groups = bases_by_cluster(progress)
    if settings.clusters == 1:
        return 0
    if basis is None or not groups:
        return largest(progress)
    number, apart = subspace.nearest(basis, groups, settings.distance)
    within = subspace.intra(groups[number], settings.distance)
    return -1 if settings.far and within and apart > settings.far * within else number


def largest(progress: Progress) -> int:
    """The cluster of most clients; of two the lower number; 0 where there is none yet."""
    numbers = [number for number in progress.member.values() if number >= 0]
    return min(set(numbers), key=lambda number: (-numbers.count(number), number), default=0)


def bases_by_cluster(progress: Progress) -> dict[int, list[Tensor]]:
    """The subspaces (D, m) of each cluster's clients."""
    groups: dict[int, list[Tensor]] = {}
    for node, basis in progress.bases.items():
        if progress.member.get(node, -1) >= 0:
            groups.setdefault(progress.member[node], []).append(basis)
    return groups


def _without_the_gone(
    progress: Progress, told: Mapping[int, Introduction], online: Collection[int]
) -> tuple[Progress, dict[int, int]]:
    """(the progress without nodes whose clients came again, node -> cluster of those clients).

    Flower draws the nodes' numbers anew in every run, so after the server was killed each client is a new node. It is
    the same client by its own number and the sensitivities of the first model, which its images decide.
    """
    back, gone = {}, set()
    for node, one in told.items():
        for old in sorted(progress.member.keys() - set(online) - gone):
            same = progress.clients.get(old) == one.client and len(progress.xi.get(old, ())) == len(one.xi)
            if same and np.allclose(progress.xi[old], one.xi, atol=SAME, rtol=0):
                back[node] = progress.member[old]
                gone.add(old)
                break
    return replace(
        progress, member={n: v for n, v in progress.member.items() if n not in gone},
        clients={n: v for n, v in progress.clients.items() if n not in gone},
        bases={n: v for n, v in progress.bases.items() if n not in gone},
        xi={n: v for n, v in progress.xi.items() if n not in gone},
    ), back  # fmt: skip
