"""What a client tells once, checked: its subspace and its sensitivities. Private to ``strategy.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Message, MetricRecord
from torch import Tensor

from learngene_hub.federated import subspace
from learngene_hub.federated._round import LeftOut, read_xi
from learngene_hub.federated.settings import Federation

MAX_BASIS = (1_000_000, 1_000)  # largest (D, m) of a subspace that is taken


@dataclass(frozen=True, kw_only=True)
class Introduction:
    """What one client told."""

    client: int  # its own number
    images: int  # that it trains on; 0 where it does not say
    xi: tuple[float, ...]  # (L,) of the first model
    basis: Tensor | None = field(repr=False)  # (D, m); None: no clusters are sought, or it has too few images
    shown: int  # classes in the basis; 0: none is large enough, the basis is of all images, or there is none


def read_introduction(
    reply: Message, layers: int, known: Mapping[int, Tensor], *, sought: bool
) -> Introduction | LeftOut:
    """What a client told; without a basis where clusters are not ``sought``, or the client says that it has too few
    images for one (``shown`` 0 and no basis).

    ``known`` are the bases that are there already, of as many dimensions.
    """
    node = reply.metadata.src_node_id
    if reply.has_error():
        return LeftOut(node=node, why=f"it failed: {' '.join(str(reply.error.reason).split())[:200]}")
    metrics, record = reply.content.metric_records.get("metrics"), reply.content.array_records.get("arrays")
    xi = read_xi(metrics.get("xi") if metrics is not None else None, layers)
    if metrics is None or xi is None:
        return LeftOut(node=node, why=f"xi is not {layers} shares that sum to 1")
    shown = _whole(metrics, "shown", -1)
    basis = None
    if sought and not (record is None and shown == 0):
        try:
            told = np.asarray(record["subspace"].numpy() if record is not None else None, dtype=np.float64)
        except (KeyError, ValueError, TypeError, EOFError, OSError):
            return LeftOut(node=node, why="it told no subspace")
        fits = told.ndim == 2 and 1 <= told.shape[1] <= min(len(told), MAX_BASIS[1]) and len(told) <= MAX_BASIS[0]
        others = {len(other) for other in known.values()}
        if not fits or (others and len(told) not in others) or not np.isfinite(told).all() or not told.any():
            return LeftOut(node=node, why=f"its subspace is {list(told.shape)} numbers that cannot be used")
        basis = subspace.orthonormal(torch.from_numpy(told)).float()
    return Introduction(
        client=_whole(metrics, "client", 0), images=_whole(metrics, "num-examples", 0), xi=tuple(xi.tolist()),
        basis=basis, shown=shown,
    )  # fmt: skip


def small(told: Introduction, settings: Federation) -> str:
    """What is to be said of a client whose classes are all smaller than ``min_per_class``; empty of any other."""
    if settings.clusters == 1 or told.shown != 0:
        return ""
    least = f"client {told.client} has {told.images} images and no class of {settings.min_per_class} (min_per_class)"
    if told.basis is None:
        return f"{least}: it tells no subspace and joins the largest cluster"
    return f"{least}: its subspace is that of all its images, whatever their class"


def _whole(metrics: MetricRecord, name: str, otherwise: int) -> int:
    value = metrics.get(name)
    return value if isinstance(value, int) and value >= 0 else otherwise
