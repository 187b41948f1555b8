"""Who has which images: one data set divided among clients, as federated learning is usually measured.

``dirichlet``  the images of each class go to the clients by shares drawn from a Dirichlet distribution (Hsu et al.,
               arXiv:1909.06335); small alpha: few classes per client.
``labels``     each client has a few labels, and the images of a label are divided evenly among those who have it
               (pathological; McMahan et al., arXiv:1602.05629, as PACFL uses it).
``domain``     the values of a column, such as photo or sketch; clients of one domain divide its images.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from learngene_hub.data import seed_of
from learngene_hub.errors import DataError, SettingsError

MIN_IMAGES = 8  # of a client; a Dirichlet draw that leaves one with fewer is drawn again
_DRAWS = 200


def partition(
    kind: str,
    labels_N: Tensor,
    clients: int,
    *,
    seed: int,
    alpha: float = 0.5,
    labels_per_client: int = 2,
    domains: Sequence[Hashable] | None = None,
) -> list[Tensor]:
    """Indices (n_i,) of the images of each client, ascending: disjoint, together all (but "labels": labels that no
    client has are left out).

    Raises:
        DataError: too few images for so many clients, or more labels per client than there are.
        SettingsError: an unknown kind, fewer than one client, or "domain" without domains.
    """
    if clients < 1:
        raise SettingsError(f"{clients} clients asked; 1 is the least")
    generator = torch.Generator().manual_seed(seed_of("partition", kind, seed))
    if kind == "dirichlet":
        shares = _dirichlet(labels_N, clients, alpha, seed)
    elif kind == "labels":
        shares = _few_labels(labels_N, clients, labels_per_client, generator)
    elif kind == "domain" and domains is not None:
        shares = _by_domain(domains, clients, generator)
    else:
        raise SettingsError(
            f"partition {kind!r} asked; there are dirichlet, labels, and domain where there are domains"
        )
    smallest = min(len(share) for share in shares)
    if smallest < 2:
        raise DataError(
            f"{len(labels_N)} images for {clients} clients asked, which leave one with {smallest}; it needs 2: fewer "
            "clients, or more images, would work"
        )
    return [torch.sort(share).values for share in shares]


def _dirichlet(labels_N: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    import numpy as np

    if len(labels_N) < clients * MIN_IMAGES:
        most = len(labels_N) // MIN_IMAGES
        works = (
            f"{most} client{'' if most == 1 else 's'} or fewer" if most else f"{clients * MIN_IMAGES} images or more"
        )
        raise DataError(
            f"{len(labels_N)} images for {clients} clients asked; each needs {MIN_IMAGES}: {works} would work"
        )
    draw = np.random.default_rng(seed_of("dirichlet", seed))
    for _ in range(_DRAWS):
        parts: list[list[Tensor]] = [[] for _ in range(clients)]
        for label in labels_N.unique().tolist():
            own = torch.nonzero(labels_N == label)[:, 0]
            own = own[torch.from_numpy(draw.permutation(len(own)))]
            cuts = (np.cumsum(draw.dirichlet([alpha] * clients))[:-1] * len(own)).round().astype(int).tolist()
            for part, piece in zip(parts, torch.tensor_split(own, cuts), strict=True):
                part.append(piece)
        shares = [torch.cat(part) for part in parts]
        if min(len(share) for share in shares) >= MIN_IMAGES:
            return shares
    raise DataError(
        f"alpha {alpha} asked of {clients} clients; it leaves one with fewer than {MIN_IMAGES} of {len(labels_N)} "
        f"images in {_DRAWS} draws: a larger alpha or fewer clients would work"
    )


def _few_labels(labels_N: Tensor, clients: int, count: int, generator: torch.Generator) -> list[Tensor]:
    there = labels_N.unique()
    if count > len(there):
        raise DataError(f"labels_per_client {count} asked; the data has {len(there)} labels")
    order = there[torch.randperm(len(there), generator=generator)].tolist()
    owners: dict[int, list[int]] = {label: [] for label in order}
    for client in range(clients):
        for turn in range(count):  # neighbours on the circle of labels, so that each is had about equally often
            owners[order[(client * count + turn) % len(order)]].append(client)
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for label, having in owners.items():
        own = torch.nonzero(labels_N == label)[:, 0]
        own = own[torch.randperm(len(own), generator=generator)]
        for client, piece in zip(having, torch.tensor_split(own, len(having)) if having else (), strict=True):
            parts[client].append(piece)
    return [torch.cat(part) for part in parts]


def _by_domain(domains: Sequence[Hashable], clients: int, generator: torch.Generator) -> list[Tensor]:
    known = sorted(set(domains), key=str)
    if clients < len(known):
        raise DataError(f"{clients} clients for {len(known)} domains; {len(known)} clients or more would work")
    having = [[c for c in range(clients) if c % len(known) == place] for place in range(len(known))]
    shares: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * clients
    for domain, own_clients in zip(known, having, strict=True):
        own = torch.tensor([i for i, value in enumerate(domains) if value == domain])
        own = own[torch.randperm(len(own), generator=generator)]
        for client, piece in zip(own_clients, torch.tensor_split(own, len(own_clients)), strict=True):
            shares[client] = piece
    return shares
