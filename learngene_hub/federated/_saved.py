"""What the server needs to go on after it was killed: every finished round, in one file. Private to ``strategy.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from learngene_hub.errors import SettingsError, StoreError
from learngene_hub.federated.settings import Federation
from learngene_hub.federated.site import read_arrays, write_arrays

FILE = "server.npz"
FREE = ("rounds", "timeout", "wait", "out", "client_state", "min_clients")  # settings that may differ when it goes on


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One cluster at the server: K of these are all the models it has."""

    blocks: tuple[int, ...]  # S_k: the layers that are sent
    xi: tuple[float, ...]  # smoothed over rounds, one number per layer
    gene: Mapping[str, np.ndarray] = field(repr=False)  # Theta_k^S by the native network's names, float32
    images: int = 0  # of the clients of the last average
    measured: Mapping[str, float] = field(default_factory=dict)  # means over these clients, as ``means_of``

    def known(self) -> dict[str, np.ndarray]:
        """The learngene in float64, to compare updates with."""
        return {name: value.astype(np.float64) for name, value in self.gene.items()}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A run after a finished round."""

    round: int = 0
    clusters: tuple[Cluster, ...] = ()
    member: Mapping[int, int] = field(default_factory=dict)  # node -> cluster
    clients: Mapping[int, int] = field(default_factory=dict)  # node -> the client's own number, as it says
    bases: Mapping[int, Tensor] = field(default_factory=dict, repr=False)  # node -> basis (D, m)
    xi: Mapping[int, Sequence[float]] = field(default_factory=dict, repr=False)  # node -> xi of the first model
    history: tuple[Mapping[str, float], ...] = ()  # one mapping per round


def save(progress: Progress, settings: Federation, folder: Path) -> None:
    """Write ``folder/server.npz``, whole or not at all.

    Raises:
        StoreError: it cannot be written.
    """
    head = {
        "format": 1,
        "settings": _identity(settings),
        "round": progress.round,
        "clusters": [
            {"blocks": c.blocks, "xi": c.xi, "images": c.images, "measured": dict(c.measured)}
            for c in progress.clusters
        ],
        "member": {str(node): cluster for node, cluster in progress.member.items()},
        "clients": {str(node): client for node, client in progress.clients.items()},
        "xi": {str(node): list(xi) for node, xi in progress.xi.items()},
        "history": list(progress.history),
    }
    arrays = {"head": np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)}
    for number, cluster in enumerate(progress.clusters):
        arrays |= {f"gene/{number}/{name}": value for name, value in cluster.gene.items()}
    arrays |= {f"basis/{node}": basis.numpy() for node, basis in progress.bases.items()}
    write_arrays(folder / FILE, arrays)


def load(settings: Federation, folder: Path) -> Progress | None:
    """The progress that lies in ``folder``; None where there is none.

    Raises:
        SettingsError: it is of a run with other settings.
        StoreError: it is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    arrays = read_arrays(path)
    try:
        head = json.loads(arrays["head"].tobytes())
        other = {name for name, value in _identity(settings).items() if head["settings"].get(name) != value}
        clusters = tuple(
            Cluster(
                blocks=tuple(c["blocks"]), xi=tuple(c["xi"]), images=c["images"], measured=dict(c.get("measured", {})),
                gene={n.split("/", 2)[2]: a for n, a in arrays.items() if n.startswith(f"gene/{number}/")},
            )
            for number, c in enumerate(head["clusters"])
        )  # fmt: skip
        found = Progress(
            round=head["round"], clusters=clusters, history=tuple(head["history"]),
            member={int(node): cluster for node, cluster in head["member"].items()},
            clients={int(node): client for node, client in head["clients"].items()},
            bases={int(n.split("/")[1]): torch.from_numpy(a) for n, a in arrays.items() if n.startswith("basis/")},
            xi={int(node): xi for node, xi in head["xi"].items()},
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} is no state of a run ({error!r:.80}); remove it to begin anew") from error
    if other:
        name = sorted(other)[0]
        raise SettingsError(
            f"{name} {getattr(settings, name)!r} asked; {path} is of a run with {head['settings'].get(name)!r}: the "
            "same settings, or another out folder, would work"
        )
    return found


def _identity(settings: Federation) -> dict[str, str | int | float | bool]:
    config = settings.to_run_config()
    return {name.replace("-", "_"): value for name, value in config.items() if name.replace("-", "_") not in FREE}
