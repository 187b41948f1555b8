"""GeneFL: Flower's Strategy that exchanges learngenes, one per cluster of clients.

    start-up    each client tells the subspace of its data and its sensitivities once; the server clusters
    configure   to each client of cluster k its learngene Theta_k^S, S_k and xi_k
    aggregate   Theta_k^S = sum_i (n_i / n) theta_i^S over usable replies, n = sum_i n_i;
                xi_k <- (1 - a) xi_k + a sum_i (n_i / n) xi_i;
                until ``freeze_round`` S_k = the top q layers of xi_k, then it stays
    newcomer    tells its subspace, joins the nearest cluster, gets one learngene
    few images  a client that has no class of ``min_per_class`` images tells the subspace of all its images; with fewer
                in all it tells none and joins the largest cluster (our reading); both are told at WARNING

A layer that is chosen anew has no Theta yet: it is asked for, not sent, and the first average is one of the clients'
own versions. The controls "early" and "late" send the first or last q layers, "local" none; ``share="everything"`` adds
stem, last norm and classifier, and with all blocks, one cluster and no constraint GeneFL is FedAvg.

Source: GENE-FL, arXiv:2504.14628 (stages condense, aggregate, initialise; one-shot clustering; nearest cluster's
learngene for a newcomer). When S is chosen, its smoothing (a = 0.3) and its freezing are our reading.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from learngene_hub.data import seed_of
from learngene_hub.errors import TrainingError
from learngene_hub.federated import _saved
from learngene_hub.federated._introduction import Introduction, read_introduction, small
from learngene_hub.federated._membership import joined
from learngene_hub.federated._round import (
    LOG,
    LeftOut,
    Reply,
    average,
    means_of,
    read_reply,
    tell_round,
    weights_of,
    without_outliers,
)
from learngene_hub.federated._saved import Cluster, Progress
from learngene_hub.federated.client import NONE, to_record
from learngene_hub.federated.models import count_of, initial_model, sent_names
from learngene_hub.federated.settings import Federation
from learngene_hub.methods._gene_fl_layers import layer_entries
from learngene_hub.methods._gene_fl_sensitivity import condensed

POLL = 0.5  # seconds between two looks at who is there


class GeneFL(Strategy):
    """The strategy of one run; ``progress`` is what there is after the last finished round.

    Args:
        native: the shape that learngenes are native to.
        folder: where each finished round is kept, and found again; None: nowhere.
    """

    def __init__(self, settings: Federation, native, *, folder: Path | None = None) -> None:  # type: ignore[no-untyped-def]
        self.settings, self.native, self.folder = settings, native, folder
        self.layers = len(layer_entries(native))
        self.count = count_of(settings, native)
        state = initial_model(settings, native).state_dict()
        self.sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.first = {name: tensor.numpy().copy() for name, tensor in state.items() if tensor.is_floating_point()}
        self.progress = (_saved.load(settings, folder) if folder else None) or Progress()
        self.offset = self.progress.round  # rounds done before this ``start``
        self.asked: dict[int, int] = {}  # node -> cluster, of the round in progress
        self.left_out: list[LeftOut] = []  # of the last round

    def summary(self) -> None:
        """Flower's hook; nothing is told here that the settings do not say."""

    # --- the first and the last thing a client does -------------------------------------------------------------

    def introduce(self, grid: Grid, nodes: Sequence[int], round: int) -> None:
        """Ask ``nodes`` for their subspaces, and give each a cluster: all at once the first time, then the nearest.

        Those that fail are asked again in the next round.
        """
        config = {"server-round": round}
        messages = [
            Message(RecordDict({"config": ConfigRecord(dict(config))}), dst_node_id=node, message_type="query.subspace")
            for node in nodes
        ]
        told: dict[int, Introduction] = {}
        for reply in grid.send_and_receive(messages, timeout=self.settings.timeout):
            found = read_introduction(reply, self.layers, self.progress.bases, sought=self.settings.clusters != 1)
            if isinstance(found, LeftOut):
                self.left_out.append(found)
            else:
                told[reply.metadata.src_node_id] = found
        if not told:
            return
        told = {node: told[node] for node in sorted(told, key=lambda node: (told[node].client, node))}
        for one in told.values():
            if said := small(one, self.settings):
                LOG.warning(said)
        first = not self.progress.clusters
        self.progress = joined(self.progress, told, self.settings, set(grid.get_node_ids()))
        if first:
            numbers = range(max(self.progress.member.values()) + 1)
            self.progress = replace(self.progress, clusters=tuple(map(self._first_cluster, numbers)))

    def in_order(self, nodes: Iterable[int]) -> list[int]:
        """Nodes by the clients' own numbers: Flower draws the nodes' numbers anew in every run."""
        return sorted(nodes, key=lambda node: (self.progress.clients.get(node, 0), node))

    def _first_cluster(self, number: int) -> Cluster:
        """A cluster before its first round: the layers by its members' sensitivities of the first model."""
        members = [node for node, cluster in self.progress.member.items() if cluster == number]
        shares = np.mean([self.progress.xi[node] for node in members if node in self.progress.xi], axis=0)
        blocks = self.choose(shares.tolist())
        return Cluster(blocks=blocks, xi=tuple(shares.tolist()), gene={n: self.first[n] for n in self.names(blocks)})

    # --- what is sent -------------------------------------------------------------------------------------------

    def choose(self, xi: Sequence[float]) -> tuple[int, ...]:
        """The layers that are sent, in depth order."""
        fixed = {"early": range(self.count), "late": range(self.layers - self.count, self.layers), "local": ()}
        if self.settings.strategy in fixed:
            return tuple(fixed[self.settings.strategy])
        return condensed(xi, self.count, self.settings.criterion)

    def names(self, blocks: Sequence[int]) -> tuple[str, ...]:
        """The tensors that are sent, by the native network's names."""
        return sent_names(self.native, None if self.settings.share == "everything" else blocks)

    def cluster(self, number: int) -> Cluster:
        """A cluster; -1: the global gene, the blocks that most clusters have, each their mean by images."""
        if number >= 0:
            return self.progress.clusters[number]
        clusters = self.progress.clusters
        having = {i: [c for c in clusters if i in c.blocks and c.gene] for i in range(self.layers)}
        blocks = tuple(sorted(sorted(having, key=lambda i: (-len(having[i]), i))[: self.count]))
        xi = np.average([c.xi for c in clusters], axis=0, weights=[max(c.images, 1) for c in clusters])
        gene = {}
        for name in self.names(blocks):
            own = [c for c in clusters if name in c.gene]
            if own:
                mean = np.average([c.gene[name] for c in own], axis=0, weights=[max(c.images, 1) for c in own])
                gene[name] = mean.astype(np.float32)
        return Cluster(blocks=blocks, xi=tuple(xi.tolist()), gene=gene)

    def message(
        self, node: int, number: int, round: int, kind: str = "train", more: Mapping[str, Any] | None = None
    ) -> Message:
        """A learngene for one client, with a config of its own; ``more``: what Flower's caller put into it."""
        cluster = self.cluster(number)
        tensors = {name: torch.from_numpy(value) for name, value in cluster.gene.items()}
        config: dict[str, Any] = dict(more or {}) | {
            "server-round": round, "cluster": number, "epochs": self.settings.epochs, "lr": self.settings.lr,
        }  # fmt: skip
        if self.settings.share != "everything":
            config["blocks"] = ",".join(map(str, cluster.blocks)) or NONE
        if self.settings.depth_list():
            config["xi"] = list(cluster.xi)
        content = RecordDict({"arrays": to_record(tensors, self.settings.wire), "config": ConfigRecord(config)})
        return Message(content, dst_node_id=node, message_type=kind)

    # --- Flower's hooks -----------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per client of this round. ``arrays`` is not looked at: there is one learngene per cluster.

        Raises:
            TrainingError: too few clients come in time, or none tells a usable subspace.
        """
        round, self.left_out = self.offset + server_round, []
        nodes = self._wait(grid)
        if strangers := [node for node in nodes if node not in self.progress.member]:
            self.introduce(grid, strangers, round)
        known = self.in_order(node for node in nodes if node in self.progress.member)
        if not known:
            reasons = "; ".join(sorted({out.why for out in self.left_out}))[:300] or "no answer"
            raise TrainingError(f"round {round}: none of {len(nodes)} clients told a usable subspace ({reasons})")
        count = max(min(self.settings.min_clients, len(known)), int(self.settings.fraction * len(known) + 0.5), 1)
        draw = np.random.default_rng(seed_of("clients", self.settings.seed, round))
        chosen = sorted(draw.permutation(len(known))[:count].tolist())
        self.asked = {known[i]: self.progress.member[known[i]] for i in chosen}
        return [self.message(node, number, round, more=config) for node, number in self.asked.items()]

    def _wait(self, grid: Grid) -> list[int]:
        """The clients that are there, at least ``min_clients``."""
        until = time.monotonic() + self.settings.wait
        while len(nodes := sorted(grid.get_node_ids())) < self.settings.min_clients:
            if time.monotonic() >= until:
                raise TrainingError(
                    f"{len(nodes)} clients are there after {self.settings.wait:g} s; min_clients "
                    f"{self.settings.min_clients} asked: more clients, or a smaller min_clients, would work"
                )
            time.sleep(POLL)
        return nodes

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """(all learngenes, named ``k{cluster}/{tensor}``; means over the clients that were used).

        Raises:
            TrainingError: no reply can be used; the last finished round stays as it was saved.
        """
        round, used, history = self.offset + server_round, [], dict
        by_node = {reply.metadata.src_node_id: reply for reply in replies}
        clusters = list(self.progress.clusters)
        for number in range(-1, len(clusters)):
            own = [by_node[node] for node, cluster in self.asked.items() if cluster == number and node in by_node]
            kept = self._usable(number, own)
            used += kept
            if kept and number >= 0:
                clusters[number] = self._next(clusters[number], kept, round)
        silent = [node for node in self.asked if node not in by_node]
        self.left_out += [LeftOut(node=node, why="no reply in time") for node in silent]
        if not used:
            reasons = "; ".join(sorted({out.why for out in self.left_out}))[:400]
            raise TrainingError(
                f"round {round}: none of {len(self.asked)} clients gave a usable reply ({reasons}); nothing was "
                f"changed, round {round - 1} is the last: run again to go on from there"
            )
        told = history(round=round, used=len(used), left_out=len(self.left_out), **means_of(used))
        self.progress = replace(
            self.progress, round=round, clusters=tuple(clusters), history=(*self.progress.history, told)
        )
        if self.folder is not None:
            _saved.save(self.progress, self.settings, self.folder)
        tell_round(told, self.settings.rounds)
        return self.merged(), MetricRecord({name: value for name, value in told.items() if name != "round"})

    def _usable(self, number: int, messages: Sequence[Message]) -> list[Reply]:
        """The replies of a cluster that can be used, by node."""
        cluster = self.cluster(number)
        sizes = {name: self.sizes[name] for name in self.names(cluster.blocks)}
        read = [read_reply(message, sizes, self.layers) for message in messages]
        good = [reply for reply in read if isinstance(reply, Reply)]
        self.left_out += [reply for reply in read if isinstance(reply, LeftOut)]
        kept, far = without_outliers(good, cluster.known(), self.settings.max_drift)
        self.left_out += far
        return kept

    def _next(self, cluster: Cluster, replies: Sequence[Reply], round: int) -> Cluster:
        """The cluster after a round: the average, the sensitivities, and the layers of the next round."""
        weights = weights_of(replies, cluster.known(), self.settings.weight)
        gene = average(replies, weights) if replies[0].arrays else {}
        images = sum(reply.images for reply in replies)
        told = sum(reply.images / images * reply.xi for reply in replies if reply.xi is not None)
        a = self.settings.smoothing
        xi = (1 - a) * np.asarray(cluster.xi) + a * np.asarray(told)
        blocks = self.choose(xi.tolist()) if round < self.settings.freeze_round else cluster.blocks
        kept = set(self.names(blocks))
        return Cluster(
            blocks=blocks, xi=tuple(xi.tolist()), images=images, measured=means_of(replies),
            gene={name: value for name, value in gene.items() if name in kept},
        )  # fmt: skip

    def merged(self) -> ArrayRecord:
        """Every cluster's learngene in one record."""
        return to_record(
            {
                f"k{number}/{name}": torch.from_numpy(value)
                for number, cluster in enumerate(self.progress.clusters)
                for name, value in cluster.gene.items()
            },
            "float32",
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: clients test inside the round, for a round of its own would send every learngene twice."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as nothing was asked."""
        return None
