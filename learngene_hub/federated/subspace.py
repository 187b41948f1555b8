"""One-shot clustering: clients whose data span near subspaces belong together.

A client takes the features of its images (or the raw pixels), per class the leading left singular vectors of the D x
n_c matrix, and an orthonormal basis V (D, m) of what they span together. The server gets V once. Principal angles of
two bases are arccos of the singular values of V_i^T V_j; their mean is the distance ("smallest": the smallest one), and
average linkage merges the nearest clusters.

Source: PACFL (AAAI 2023), whose step DFL2G mirrors; its script takes arccos of the elements of V_i^T V_j, which depends
on signs, so the singular values are taken here. The common orthonormal basis (it hides which vector is of which class,
and makes the singular values cosines) and the mean over all angles (clients have different numbers of classes) are our
reading.

Privacy: vectors of raw pixels can show near-images of a class with few samples. Features of a frozen public encoder are
the default, classes of fewer than ``min_per_class`` images do not show, and noise can be added. Of a client without a
larger class the basis is that of all its images as one class, if they are ``min_per_class``; else there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learngene_hub.errors import DataError

SHARED = 1.5  # members that must have a direction before it is told


def class_basis(x_ND: Tensor, labels_N: Tensor, *, vectors: int, min_per_class: int) -> Tensor:
    """An orthonormal basis (D, m), m <= vectors x classes, of the leading directions of each class.

    Where no class has ``min_per_class`` rows, all rows count as one class.

    Raises:
        DataError: fewer rows than ``min_per_class`` in all.
    """
    if len(x_ND) < min_per_class:
        raise DataError(f"{len(x_ND)} images; a subspace that gives none away needs {min_per_class} (min_per_class)")
    groups = [x_ND[labels_N == label] for label in labels_N.unique().tolist()]
    large = [group for group in groups if len(group) >= min_per_class] or [x_ND]
    found = [torch.linalg.svd(group.double().T, full_matrices=False)[0][:, :vectors] for group in large]
    return orthonormal(torch.cat(found, dim=1)).float()


def large_classes(labels_N: Tensor, min_per_class: int) -> int:
    """How many classes have ``min_per_class`` images or more."""
    return int((labels_N.unique(return_counts=True)[1] >= min_per_class).sum())


def orthonormal(v_DM: Tensor) -> Tensor:
    """An orthonormal basis (D, m) of the columns' span, m its rank."""
    u, s, _ = torch.linalg.svd(v_DM.double(), full_matrices=False)
    return u[:, s > 1e-6 * s[0].clamp(min=1e-30)]


def noisy(v_DM: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """The basis with normal noise of deviation noise / sqrt(D) on each number, made orthonormal again."""
    if not noise:
        return v_DM
    draw = torch.randn(v_DM.shape, generator=generator, dtype=torch.float64)
    return orthonormal(v_DM.double() + noise / v_DM.shape[0] ** 0.5 * draw).float()


def principal_angles(a_DM: Tensor, b_DK: Tensor) -> Tensor:
    """The min(m, k) principal angles of two orthonormal bases, degrees, ascending, float64."""
    cosines = torch.linalg.svdvals(a_DM.double().T @ b_DK.double()).clamp(0, 1)
    return torch.rad2deg(torch.arccos(cosines))


def distance(a_DM: Tensor, b_DK: Tensor, kind: str = "mean") -> float:
    """Degrees between two subspaces: the mean of the principal angles, or the smallest."""
    angles = principal_angles(a_DM, b_DK)
    return float(angles.mean() if kind == "mean" else angles[0])


def distances(bases: Sequence[Tensor], kind: str = "mean") -> Tensor:
    """(n, n) degrees, symmetric, 0 on the diagonal."""
    found = torch.zeros(len(bases), len(bases), dtype=torch.float64)
    for i, one in enumerate(bases):
        for j in range(i):
            found[i, j] = found[j, i] = distance(one, bases[j], kind)
    return found


def agglomerate(apart: Tensor, *, clusters: int = 0, threshold: float = 0.0) -> list[int]:
    """The cluster of each of n clients, numbered by first appearance; average linkage on distances (n, n).

    ``clusters`` above 0: merging stops at so many. 0: when the nearest two are farther apart than ``threshold``.
    """
    groups = [[i] for i in range(len(apart))]
    while len(groups) > max(clusters, 1):
        pairs = [(float(apart[groups[a]][:, groups[b]].mean()), a, b) for b in range(len(groups)) for a in range(b)]
        nearest, a, b = min(pairs)
        if not clusters and nearest > threshold:
            break
        groups[a] += groups.pop(b)
    member = {client: number for number, group in enumerate(sorted(groups, key=min)) for client in group}
    return [member[i] for i in range(len(apart))]


def nearest(basis: Tensor, groups: Mapping[int, Sequence[Tensor]], kind: str = "mean") -> tuple[int, float]:
    """(cluster, mean distance to its members) of the cluster that is nearest; a tie goes to the lower number."""
    means = {
        number: sum(distance(basis, member, kind) for member in members) / len(members)
        for number, members in sorted(groups.items())
        if members
    }
    best = min(means, key=lambda number: (means[number], number))
    return best, means[best]


def intra(members: Sequence[Tensor], kind: str = "mean") -> float:
    """Mean distance between two different members of a cluster, degrees; 0 for one alone."""
    count = len(members)
    return float(distances(members, kind).sum()) / (count * (count - 1)) if count > 1 else 0.0


def mean_subspace(members: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Basis (D, p) and spread (p,), p <= size: the leading eigenvectors of the mean projector, and its eigenvalues
    (1: a direction that every member has)."""
    stacked = torch.cat([member.double() for member in members], dim=1) / len(members) ** 0.5
    u, s, _ = torch.linalg.svd(stacked, full_matrices=False)
    kept = min(size, int((s > 1e-6).sum()))
    return u[:, :kept].float().contiguous(), (s[:kept] ** 2).float()


def shared_subspace(members: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """``mean_subspace`` of n members without what is one member's own; None where nothing is left, as of one member.

    A direction that one member alone has has eigenvalue 1 / n, and its vector is that member's; kept are those of
    SHARED / n and more, which another has by half too.
    """
    if len(members) < 2:
        return None
    basis, spread = mean_subspace(members, max(member.shape[1] for member in members))
    kept = int((spread >= SHARED / len(members)).sum())
    return (basis[:, :kept].contiguous(), spread[:kept]) if kept else None
