"""What a run leaves: a learngene per cluster with its card, the rounds, the traffic and its plot, in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from learngene_hub.card import card_text
from learngene_hub.errors import StoreError
from learngene_hub.federated import subspace
from learngene_hub.federated._membership import bases_by_cluster
from learngene_hub.federated.models import ancestor_of, preprocessing_of
from learngene_hub.federated.settings import Federation
from learngene_hub.federated.strategy import GeneFL
from learngene_hub.federated.traffic import Sent, draw, totals
from learngene_hub.learngene import Learngene
from learngene_hub.methods._gene_fl_layers import group_of, layer_entries
from learngene_hub.methods.gene_fl import BASIS, SCORE, SPREAD, GeneFl, assemble_learngene

ROUNDS = "rounds.jsonl"
CLUSTER_FILES = ("learngene.safetensors", "README.md")
SOMEWHERE = "path/to"  # stands in a card, which may travel, for the folder of the run
PLACES = ("out", "client_state")  # settings that are folders of one machine, which no file tells another
SOURCES = ("data", "ancestor", "ancestor_weights")  # settings that may be a path: only its last part is told


def learngene_of(strategy: GeneFL, number: int, *, lines: Sequence[Sent] = ()) -> Learngene:
    """The learngene of one cluster, as it is after the last finished round: the layers that were averaged last, every
    layer's xi, and of the clients' subspaces what they share, where there are two and more that share something.

    A file that is published holds no client's own subspace: newcomers of the run are compared with those in
    ``server.npz``, which stays in the folder of the run.

    A layer that was chosen after the last average, which has no Theta yet, is not in it. Nor is the time that the run
    took: the same run gives the same bytes.
    """
    settings, native = strategy.settings, strategy.native
    cluster, entries = strategy.progress.clusters[number], layer_entries(native)
    have = [i for i in cluster.blocks if all(name in cluster.gene for name in entries[i].values())]
    group = group_of(native)
    tensors = {
        f"{group}.{i}.{rest}": torch.from_numpy(cluster.gene[name]).clone()
        for i in have
        for rest, name in entries[i].items()
    }
    tensors[SCORE] = torch.tensor(cluster.xi, dtype=torch.float32)
    if shared := subspace.shared_subspace(bases_by_cluster(strategy.progress).get(number, [])):
        tensors[BASIS], tensors[SPREAD] = shared
    own = GeneFl(
        blocks=len(have), criterion=settings.criterion, images=settings.fisher_images, seed=settings.seed
    )  # fmt: skip
    ancestor = ancestor_of(settings.ancestor, settings.ancestor_weights)
    none = {"name": f"none: drawn with seed {settings.seed}", "sha256": "", "license": "", "source": ""}
    provenance = {
        "data": {Path(settings.data).name: {"images": cluster.images}}, "image_size": settings.image_size,
        "federation": _facts(strategy, number, have, lines),
    }  # fmt: skip
    return assemble_learngene(
        tensors, native, asdict(own), facts=none if ancestor is None else dict(ancestor.ancestor),
        preprocessing=preprocessing_of(settings), provenance=provenance,
    )  # fmt: skip


def _facts(strategy: GeneFL, number: int, layers: Sequence[int], lines: Sequence[Sent]) -> dict[str, Any]:
    """What is known of a cluster at the end of the run; its card shows it."""
    progress = strategy.progress
    cluster, numbers = progress.clusters[number], list(progress.member.values())
    accuracy = {name: round(value, 2) for name, value in cluster.measured.items() if name.startswith("accuracy")}
    return {
        "rounds": progress.round, "cluster": number, "clusters": len(progress.clusters), "layers": list(layers),
        "clients": numbers.count(number), "run_clients": len(numbers), "images": cluster.images,
        **{name.replace("-", "_"): value for name, value in accuracy.items()},
        "traffic_bytes": totals(lines), "settings": told(strategy.settings),
    }  # fmt: skip


def told(settings: Federation) -> dict[str, Any]:
    """The settings of a run as a file may tell them: without folders of this machine."""
    values = {name: value for name, value in asdict(settings).items() if name not in PLACES}
    return values | {name: Path(values[name]).name for name in SOURCES}


def write_out(
    folder: Path, learngenes: Sequence[Learngene], history: Sequence[Mapping[str, float]], lines: Sequence[Sent]
) -> list[Path]:
    """The files of the learngenes, ``folder/cluster-N/learngene.safetensors`` with a card beside each; and
    ``traffic.png``; and last ``rounds.jsonl``. ``traffic.jsonl`` grows while the run goes on.

    Raises:
        StoreError: one cannot be written.
    """
    paths = []
    for number, learngene in enumerate(learngenes):
        path = learngene.save_pretrained(folder / f"cluster-{number}")
        card = card_text(
            learngene, name=f"GENE-FL, cluster {number}", source=f"{SOMEWHERE}/{path.parent.name}",
            description=_description(learngene.provenance["federation"]["clients"]),
            nbytes=path.stat().st_size,
        )  # fmt: skip
        _write(path.parent / "README.md", card)
        paths.append(path)
    accuracy = {int(row["round"]): row["accuracy"] for row in history if "accuracy" in row}
    if lines and accuracy:
        draw(lines, accuracy, folder / "traffic.png")
    _write(folder / ROUNDS, rounds_text(history))
    return paths


def _description(clients: int) -> str:
    return f"The layers that {clients} clients of one cluster share." if clients != 1 else "The layers of 1 client."


def rounds_text(history: Sequence[Mapping[str, float]]) -> str:
    """The text of ``rounds.jsonl``."""
    return "".join(json.dumps(dict(row)) + "\n" for row in history)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; another out folder would work") from error
