"""One round at the server: which replies can be used, and their average. Private to ``strategy.py``.

A reply is left out, with its reason, where the client failed, where names or shapes are not exactly those that were
asked for, where a number is not finite, or where its update lies far outside the others'. Averages then are of what is
left; where nothing is left, nothing changes. This is no defence against clients that agree on a lie of usual size, and
numbers of images are taken on trust.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message

LOG = logging.getLogger("flwr.gene_fl")  # below Flower's own, so that it is seen wherever Flower's log is
MAX_IMAGES = 10**9  # of one client


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A usable reply of one client."""

    node: int
    images: int
    arrays: Mapping[str, np.ndarray]  # float64
    xi: np.ndarray | None  # (L,)
    metrics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A reply that is not used, and why."""

    node: int
    why: str


def read_reply(message: Message, sizes: Mapping[str, tuple[int, ...]], layers: int | None) -> Reply | LeftOut:
    """The reply checked: exactly the tensors ``sizes`` (name -> size), finite; xi of ``layers`` numbers."""
    node = message.metadata.src_node_id
    if message.has_error():
        reason = " ".join(str(message.error.reason or "no reason").split())
        return LeftOut(node=node, why=f"it failed: {reason[:200]}")
    content = message.content
    metrics = content.metric_records.get("metrics")
    if metrics is None or len(content.array_records) > 1:
        return LeftOut(node=node, why="it has no metrics, or several records of arrays")
    images = metrics.get("num-examples")
    if not isinstance(images, int | float) or not math.isfinite(images) or not 1 <= images <= MAX_IMAGES:
        return LeftOut(node=node, why=f"num-examples {images!r:.40}")
    record = next(iter(content.array_records.values()), {})
    if record.keys() != sizes.keys():
        odd = sorted(record.keys() ^ sizes.keys())
        return LeftOut(node=node, why=f"{len(odd)} tensors too many or too few, the first is {odd[0]:.80}")
    arrays = {}
    for name, size in sizes.items():
        try:
            value = record[name].numpy()
        except (ValueError, TypeError, EOFError, OSError) as error:
            return LeftOut(node=node, why=f"{name} cannot be read: {error}"[:200])
        if value.shape != size or value.dtype.kind != "f":
            return LeftOut(node=node, why=f"{name} is {value.dtype} {list(value.shape)}; {list(size)} was asked for")
        arrays[name] = value.astype(np.float64)
        if not np.isfinite(arrays[name]).all():
            return LeftOut(node=node, why=f"{name} has numbers that are not finite")
    xi = None
    if layers is not None:
        xi = read_xi(metrics.get("xi"), layers)
        if xi is None:
            return LeftOut(node=node, why=f"xi is not {layers} shares that sum to 1")
    return Reply(node=node, images=int(images), arrays=arrays, xi=xi, metrics=dict(metrics))


def norm(arrays: Mapping[str, np.ndarray], minus: Mapping[str, np.ndarray], names: Sequence[str]) -> float:
    """Euclidean norm of ``arrays`` less ``minus`` (0 where it has none) over ``names``."""
    total = sum(
        float(((arrays[name] - minus[name]) if name in minus else arrays[name]).__pow__(2).sum()) for name in names
    )
    return math.sqrt(total)


def without_outliers(
    replies: Sequence[Reply], before: Mapping[str, np.ndarray], max_drift: float
) -> tuple[list[Reply], list[LeftOut]]:
    """(kept, left out): updates whose norm is above ``max_drift`` times the lower median of all replies' are left out.

    Tensors that the server had (``before``) are judged by their change, newly chosen ones by their own norm. Of one
    reply alone, a change larger than what was there before is too large.
    """
    kept, out = list(replies), []
    names = sorted(replies[0].arrays) if replies else []
    for part in ([n for n in names if n in before], [n for n in names if n not in before]):
        if not part or not kept:
            continue
        sizes = [norm(reply.arrays, before, part) for reply in kept]
        had = math.sqrt(sum(float((before[name] ** 2).sum()) for name in part if name in before))
        limit = max_drift * max(sorted(sizes)[(len(sizes) - 1) // 2], 1e-6 * had)
        if len(kept) == 1:
            limit = had if had else math.inf
        far = [(reply, size) for reply, size in zip(kept, sizes, strict=True) if size > limit]
        out += [
            LeftOut(node=r.node, why=f"its update has norm {size:.3g}, at most {limit:.3g} is usual") for r, size in far
        ]
        kept = [reply for reply, size in zip(kept, sizes, strict=True) if size <= limit]
    return kept, out


def weights_of(replies: Sequence[Reply], before: Mapping[str, np.ndarray], kind: str) -> list[float]:
    """The share of each reply in the average, summing to 1.

    "n": its images. "n*exp(-drift)": times exp(-|theta - Theta| / |Theta|), our reading of the paper's "multiplier".
    """
    raw = [float(reply.images) for reply in replies]
    if kind == "n*exp(-drift)" and before:
        names = sorted(before)
        size = math.sqrt(sum(float((before[name] ** 2).sum()) for name in names)) or 1.0
        raw = [w * math.exp(-norm(reply.arrays, before, names) / size) for w, reply in zip(raw, replies, strict=True)]
    return [w / sum(raw) for w in raw]


def average(replies: Sequence[Reply], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """Theta^S = sum_i w_i theta_i^S, float32, summed in float64 in the order of the replies."""
    names = list(replies[0].arrays)
    return {
        name: sum(w * reply.arrays[name] for w, reply in zip(weights, replies, strict=True)).astype(np.float32)  # type: ignore[union-attr]
        for name in names
    }


def means_of(used: Sequence[Reply]) -> dict[str, float]:
    """The clients' own numbers, each client counting once."""
    found: dict[str, float] = {}
    for name in ("accuracy", "accuracy-before", "loss"):
        told = [reply.metrics.get(name) for reply in used]
        values = [float(value) for value in told if isinstance(value, int | float) and math.isfinite(value)]
        if values:
            found[name] = sum(values) / len(values)
    return found


def tell_round(row: Mapping[str, float], rounds: int) -> None:
    """A line of the log on a finished round of ``rounds``."""
    accuracy = f", accuracy {row['accuracy']:.1f} %" if "accuracy" in row else ""
    out = f", {row['left_out']} left out" if row.get("left_out") else ""
    clients = f"{row['used']} client{'' if row['used'] == 1 else 's'}"
    LOG.info(f"round {row['round']} of {rounds}: {clients}{out}{accuracy}")


def read_xi(value: Any, layers: int) -> np.ndarray | None:
    """xi (L,) of a client: shares that sum to 1; None where it is something else."""
    xi = np.asarray(value if value is not None else [], dtype=np.float64)
    fits = xi.shape == (layers,) and np.isfinite(xi).all() and (xi >= 0).all() and abs(xi.sum() - 1) <= 1e-3
    return xi if fits else None
