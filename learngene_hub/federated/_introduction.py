"""What a client tells once, checked: its subspace and its sensitivities. Private to ``strategy.py``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from learngene_hub.federated import subspace
from learngene_hub.federated._round import LeftOut, read_xi

MAX_BASIS = (1_000_000, 1_000)  # largest (D, m) of a subspace that is taken

Introduction = tuple[Tensor | None, list[float], int]


def read_introduction(
    reply: Message, layers: int, known: Mapping[int, Tensor], *, sought: bool
) -> Introduction | LeftOut:
    """(basis, xi, the client's own number) of a client; no basis where clusters are not ``sought``.

    ``known`` are the bases that are there already, of as many dimensions.
    """
    node = reply.metadata.src_node_id
    if reply.has_error():
        return LeftOut(node=node, why=f"it failed: {' '.join(str(reply.error.reason).split())[:200]}")
    metrics, record = reply.content.metric_records.get("metrics"), reply.content.array_records.get("arrays")
    xi = read_xi(metrics.get("xi") if metrics is not None else None, layers)
    if metrics is None or xi is None:
        return LeftOut(node=node, why=f"xi is not {layers} shares that sum to 1")
    said = metrics.get("client", 0)
    client = said if isinstance(said, int) else 0
    if not sought:
        return None, xi.tolist(), client
    try:
        basis = np.asarray(record["subspace"].numpy() if record is not None else None, dtype=np.float64)
    except (KeyError, ValueError, TypeError, EOFError, OSError):
        return LeftOut(node=node, why="it told no subspace")
    fits = basis.ndim == 2 and 1 <= basis.shape[1] <= min(len(basis), MAX_BASIS[1]) and len(basis) <= MAX_BASIS[0]
    others = {len(other) for other in known.values()}
    if not fits or (others and len(basis) not in others) or not np.isfinite(basis).all() or not basis.any():
        return LeftOut(node=node, why=f"its subspace is {list(basis.shape)} numbers that cannot be used")
    return subspace.orthonormal(torch.from_numpy(basis)).float(), xi.tolist(), client
