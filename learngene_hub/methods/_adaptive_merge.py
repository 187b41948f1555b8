"""What an increment adds to its anchor: which parts of the anchor, how much of each, and the way back by least squares.

An anchor is a learngene whose ``expand`` is affine in its parts, each of the form of one block: whole blocks (net2net,
lsamd) or components (ldr, tleg, adaptive). An increment holds parts A^(1..N) of the same form; to part p of the anchor
it adds

    sum_n C[p, n] A^(n)

where C, the table, depends on the form of the entries of a pool alone:

``components``  of an anchor of components: C[p, n] = [p = n], the first N of them are changed. Of an anchor of blocks:
                C[p, n] = T_(n-1)(i / L), T the Chebyshev polynomials and i the block's place among the ancestor's L
                (our reading; with N = 2 a constant and a line in depth, as an anchor of components at order 0 has).
``blocks``      C is the identity: every part has an increment of its own.

Merging is done in the anchor's own parts, so that what is merged is a learngene of the anchor's method, of every depth
and width that the anchor reaches; and because ``expand`` is affine, it may as well be done after expansion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._auxiliary import numbers_of
from learngene_hub.shape import ViTShape
from learngene_hub.transforms import BLOCK_KEYS

FORMS = ("components", "blocks")
ANCHORS = ("net2net", "lsamd", "ldr", "tleg", "adaptive")  # methods whose expand is affine in parts of a block's form
RIDGE = 1e-10  # of the least squares, times the mean of the diagonal; 1e-6 would blur four components of four blocks


def chebyshev(order: int, x: float) -> float:
    """T_0 = 1, T_1 = x, T_(n+1) = 2 x T_n - T_(n-1)."""
    last, value = x, 1.0  # T_(-1) = x continues the recurrence backwards
    for _ in range(order):
        last, value = value, 2 * x * value - last
    return value


def design(depth: int, count: int) -> Tensor:
    """T_0 .. T_(count-1) at x = 0, 1 / depth, .. (depth - 1) / depth: (depth, count), float64."""
    rows = [[chebyshev(order, place / depth) for order in range(count)] for place in range(depth)]
    return torch.tensor(rows, dtype=torch.float64)


def places(anchor: Learngene) -> tuple[str, ...]:
    """The names of an anchor's parts: ``component.1``, ``block.0`` and so on.

    Raises:
        SettingsError: a learngene whose method is none of ANCHORS, or an increment.
    """
    if anchor.method not in ANCHORS or not isinstance(anchor.shape, ViTShape):
        raise SettingsError(
            f"a learngene of {anchor.method} given as an anchor; one of {', '.join(ANCHORS)} would work"
        )
    if anchor.settings.get("anchor"):
        raise SettingsError("an increment given as an anchor; the learngene that it was made on would work")
    if anchor.method == "tleg":
        return "base", "slope"
    group = "block" if anchor.method in ("net2net", "lsamd") else "component"
    return tuple(f"{group}.{number}" for number in numbers_of(anchor.tensors, group))


def table(anchor: Learngene, form: str, count: int) -> Tensor:
    """C (P, N) of an anchor of P parts, float64. ``count`` is N; of the form "blocks" it is P.

    Raises:
        SettingsError: an unknown form, a learngene that is no anchor, or more components than it allows.
    """
    names = places(anchor)
    if form not in FORMS:
        raise SettingsError(f"entry {form!r} asked; there are {', '.join(FORMS)}")
    if form == "blocks":
        return torch.eye(len(names), dtype=torch.float64)
    most = anchor.shape.depth if names[0].startswith("block.") else len(names)
    if not 1 <= count <= most:
        raise SettingsError(f"increments of {count} components asked; this anchor allows 1 to {most}")
    if not names[0].startswith("block."):
        return torch.eye(len(names), dtype=torch.float64)[:, :count]
    return design(anchor.shape.depth, count)[[int(name.split(".")[1]) for name in names]]


def merged_tensors(anchor: Learngene, increment: Mapping[str, Tensor], table_PN: Tensor) -> dict[str, Tensor]:
    """The anchor's tensors with ``increment`` ("n.key" -> tensor, n from 1) added; at least float32, differentiable."""
    tensors = dict(anchor.tensors)
    for key in BLOCK_KEYS:
        parts = torch.stack([increment[f"{n}.{key}"].flatten() for n in range(1, table_PN.shape[1] + 1)])
        added = table_PN.to(parts) @ parts
        for name, row in zip(places(anchor), added, strict=True):
            own = tensors[f"{name}.{key}"].to(row.device)
            tensors[f"{name}.{key}"] = own.to(row.dtype) + row.view(own.shape)
    return tensors


def add_scaled(total: dict[str, Tensor], increment: Mapping[str, Tensor], weight: float) -> None:
    """Adds ``weight`` times an increment to ``total`` ("n.key" -> tensor), in float32 and in place; empty is zero."""
    for name, tensor in increment.items():
        if name in total:
            total[name] += weight * tensor.float()
        else:
            total[name] = weight * tensor.float()


def layers(anchor: Learngene, table_PN: Tensor) -> dict[str, Tensor]:
    """Key of a block -> Phi (L, N): what one unit of that tensor of part n of an increment adds to block l of the
    descendant of the native shape; float64.

    Read off ``expand`` itself, through parts that hold one number each, so that it holds for whatever rule of depth
    there is; a rule may scale what a block writes, and then Phi is not the same for all keys.
    """
    from learngene_hub.methods import get_method  # the table of methods stands above this file

    method, depth = get_method(anchor.method, anchor.settings), anchor.shape.depth
    silent = {name: torch.zeros_like(tensor.float()) for name, tensor in anchor.tensors.items()}
    found = {key: torch.zeros(depth, table_PN.shape[1], dtype=torch.float64) for key in BLOCK_KEYS}
    for n, column in enumerate(table_PN.T):
        lit = {
            f"{name}.{key}": torch.full_like(silent[f"{name}.{key}"], float(c))
            for name, c in zip(places(anchor), column, strict=True)
            for key in BLOCK_KEYS
        }
        state = method.expand(replace(anchor, tensors=_searched(anchor, silent) | lit), anchor.shape)
        for key, phi_LN in found.items():
            rows = (state[f"blocks.{i}.{key}"] for i in range(depth))
            phi_LN[:, n] = torch.tensor([0.0 if row is None else float(row.flatten()[0]) for row in rows])
    return found


def blocks_of(state: Mapping[str, Tensor | None], depth: int) -> dict[str, Tensor]:
    """Key of a block -> (L, numbers of that tensor), of a ViT's state dict."""
    found = {}
    for key in BLOCK_KEYS:
        rows = [state[f"blocks.{place}.{key}"] for place in range(depth)]
        found[key] = torch.stack([row.flatten() for row in rows if row is not None])
    return found


def raised(
    blocks: Mapping[str, Tensor], increment: Mapping[str, Tensor], layers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Blocks, as of ``blocks_of``, with an increment ("n.key" -> tensor) added by ``layers``, under timm's names.

    One product for each key, whose gradient is one product again: the blocks need none of their own.
    """
    state = {}
    for key, phi_LN in layers.items():
        parts = [increment[f"{n}.{key}"] for n in range(1, phi_LN.shape[1] + 1)]
        rows = torch.addmm(blocks[key], phi_LN, torch.stack([part.flatten() for part in parts]))
        state |= {f"blocks.{place}.{key}": row.view(parts[0].shape) for place, row in enumerate(rows.unbind())}
    return state


def _searched(anchor: Learngene, silent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``silent``, but for what tells where blocks go and not what they hold."""
    return {name: anchor.tensors[name] if name.startswith("search.") else tensor for name, tensor in silent.items()}


def fitted(changes: Mapping[str, Tensor], layers: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """(an increment, its residual) for changes of blocks: key -> (L, numbers of that tensor).

    A = (Phi' Phi + e I)^-1 Phi' D of each key, with e = RIDGE tr(Phi' Phi) / N, and |D - Phi A| / |D| over all keys
    together.
    """
    found, left, whole = {}, 0.0, 0.0
    for key, change in changes.items():
        d_LM, phi_LN = change.double().flatten(1), layers[key]
        gram = phi_LN.T @ phi_LN
        ridge = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        a_NM = torch.linalg.solve(gram + ridge, phi_LN.T) @ d_LM
        left += float((d_LM - phi_LN @ a_NM).square().sum())
        whole += float(d_LM.square().sum())
        found |= {f"{n}.{key}": a.float().view(change.shape[1:]) for n, a in enumerate(a_NM, 1)}
    return found, (left / whole) ** 0.5 if whole else 0.0


def changes(anchor: Learngene, ancestor_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an ancestor's blocks have beyond those of the anchor at its native shape: key -> (L, ...).

    Raises:
        ShapeError: the ancestor's blocks have another shape, or there are more or fewer of them.
    """
    from learngene_hub.methods import get_method

    own = get_method(anchor.method, anchor.settings).expand(anchor, anchor.shape)
    depth = anchor.shape.depth
    there = {int(name.split(".")[1]) for name in ancestor_state if name.startswith("blocks.")}
    if there != set(range(depth)):
        raise ShapeError(f"an ancestor of {len(there)} blocks given; the anchor has {depth}, which would work")
    found: dict[str, list[Tensor]] = {key: [] for key in BLOCK_KEYS}
    for place in range(depth):
        for key in BLOCK_KEYS:
            theirs, ours = ancestor_state[f"blocks.{place}.{key}"], own[f"blocks.{place}.{key}"]
            if ours is None or theirs.shape != ours.shape:
                raise ShapeError(
                    f"an ancestor with blocks.{place}.{key} of {list(theirs.shape)} given; the anchor {anchor.shape} "
                    f"has {None if ours is None else list(ours.shape)}: the same model, finetuned, would work"
                )
            found[key].append(theirs.detach().cpu().float() - ours.float())
    return {key: torch.stack(rows) for key, rows in found.items()}


def flattened(weights: Mapping[str, float], methods: Mapping[str, Any]) -> dict[str, float]:
    """sha256 -> how much of each increment is in a weighted sum of increments that stand on their parents.

    ``methods`` maps the sha256 of every increment of a pool, the oldest first, to its ``Adaptive``: what an increment
    stands for is its own parts and its parents' shares, each of which stands for its own and its parents', and so on.

    Raises:
        SettingsError: a weight of an increment that is not there.
        ArtefactError: a parent that is not there before its child.
    """
    if odd := sorted(set(weights) - set(methods)):
        raise SettingsError(f"increment {odd[0][:12]} asked; this pool does not hold it: select from it again")
    order = {sha256: place for place, sha256 in enumerate(methods)}
    total = dict.fromkeys(methods, 0.0) | {sha256: float(weight) for sha256, weight in weights.items()}
    for sha256 in reversed(list(methods)):
        method = methods[sha256]
        for parent, share in method.parents.items():
            if order.get(parent, len(order)) >= order[sha256]:
                raise ArtefactError(f"increment {sha256[:12]} stands on {parent[:12]}, which is not there before it")
            total[parent] += total[sha256] * share
    return {sha256: weight for sha256, weight in total.items() if weight}
