"""The ServerApp: one run from its settings to its learngenes, with GeneFL or with a baseline of Flower's own.

Baselines in the same harness, with the same clients, traffic and seeds: ``fedavg`` and ``fedprox`` are Flower's
strategies; ``fedavg-bytes`` is FedAvg stopped when it has sent what gene-fl sends in ``rounds``; ``local`` sends no
weights; ``early`` and ``late`` send as many layers as gene-fl, always the first or the last. FedAvg and FedProx average
whatever they get: the checks of ``_round`` are GeneFL's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, FedProx

from learngene_hub.errors import LearngeneError, StoreError, TrainingError
from learngene_hub.federated import _saved
from learngene_hub.federated._round import LOG, tell_round
from learngene_hub.federated._saved import Cluster, Progress
from learngene_hub.federated.artefact import CLUSTER_FILES, ROUNDS, learngene_of, rounds_text, write_out
from learngene_hub.federated.client import to_record
from learngene_hub.federated.models import client_shape, count_of, initial_model, native_shape, sent_names
from learngene_hub.federated.settings import FLOWERS, Federation
from learngene_hub.federated.site import require_writable, whole_data
from learngene_hub.federated.strategy import GeneFL
from learngene_hub.federated.traffic import Metered, Sent
from learngene_hub.learngene import Learngene

TRAFFIC = "traffic.jsonl"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to."""

    history: tuple[dict[str, float], ...]  # per round: accuracy of clients after and before training, per cent; ...
    lines: tuple[Sent, ...]  # all that was sent, before an interruption too where ``out`` keeps it
    learngenes: tuple[Learngene, ...]  # one per cluster; none of the baselines that send whole models, or nothing
    strategy: GeneFL | None = field(repr=False)  # None: one of Flower's
    arrays: ArrayRecord | None = field(repr=False)  # of Flower's: the whole model
    done_before: int  # rounds that an earlier process did; where they are all of the history, nothing was run
    seconds: float  # of this process


def make_server_app(
    settings: Federation | None = None,
    done: Callable[[Outcome], None] | None = None,
    failed: Callable[[LearngeneError], None] | None = None,
) -> ServerApp:
    """Flower's ServerApp of a federation; ``settings`` None: those of the run_config. ``done`` gets the outcome, or
    ``failed`` the error, which Flower makes an exit status of."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            outcome = conduct(grid, settings or Federation.from_run_config(context.run_config))
        except LearngeneError as error:
            if failed is not None:
                failed(error)
            raise
        if done is not None:
            done(outcome)

    return app


def conduct(grid: Grid, settings: Federation) -> Outcome:
    """The run of these settings with the clients of ``grid``; one that was interrupted goes on after its last round.

    Raises:
        TrainingError: a round in which no client gave a usable reply, or too few clients.
        SettingsError: the settings do not fit together, or ``out`` holds a run with others.
        StoreError: ``out`` cannot be written.
    """
    began = time.perf_counter()
    folder = Path(settings.out) if settings.out else None
    native = native_shape(settings, classes_of(settings))
    for client in range(len(settings.depth_list())):
        client_shape(settings, native, client)
    if folder is not None:
        _make(folder)
    else:
        LOG.info("out is empty: nothing is kept, neither learngenes nor rounds to go on from")
    metered = Metered(grid, folder / TRAFFIC if folder else None)
    outcome = (_flowers_run if settings.strategy in FLOWERS else _our_run)(metered, settings, native, folder)
    if folder is not None and not (outcome.done_before == len(outcome.history) and is_written(folder, outcome)):
        write_out(folder, outcome.learngenes, outcome.history, outcome.lines)
    return replace(outcome, seconds=time.perf_counter() - began)


def is_written(folder: Path, outcome: Outcome) -> bool:
    """Whether what this run leaves lies in the folder already."""
    files = [folder / f"cluster-{n}" / name for n in range(len(outcome.learngenes)) for name in CLUSTER_FILES]
    rounds = folder / ROUNDS
    return all(path.is_file() for path in (rounds, *files)) and rounds.read_text() == rounds_text(outcome.history)


def _our_run(grid: Metered, settings: Federation, native: Any, folder: Path | None) -> Outcome:
    """The run of a strategy of ours."""
    strategy = GeneFL(settings, native, folder=folder)
    done = strategy.progress.round
    if settings.rounds > done:
        strategy.start(grid, strategy.merged(), num_rounds=settings.rounds - done, timeout=settings.timeout)
    numbers = range(len(strategy.progress.clusters)) if strategy.count else ()
    return Outcome(
        history=tuple(dict(row) for row in strategy.progress.history), lines=tuple(grid.lines),
        learngenes=tuple(learngene_of(strategy, number, lines=grid.lines) for number in numbers), strategy=strategy,
        arrays=None, done_before=done, seconds=0.0,
    )  # fmt: skip


def classes_of(settings: Federation) -> int:
    """Outputs of the classifier: as the settings say, or as many classes as the data has.

    Raises:
        DataError: the data cannot be had here; a server without data needs the setting ``classes``.
    """
    if settings.classes:
        return settings.classes
    s = settings
    return len(whole_data(s.data, s.split, s.image_size, s.limit, s.seed).classes)


def bytes_of(settings: Federation, native: Any, blocks: Sequence[int] | None) -> int:
    """Bytes of a record of the layers ``blocks`` (None: the whole model), as Flower counts them."""
    state = initial_model(settings, native).state_dict()
    return to_record({name: state[name] for name in sent_names(native, blocks)}, settings.wire).count_bytes()


def rounds_of(settings: Federation, native: Any) -> int:
    """Rounds that are run: those of the settings; of FedAvg at equal bytes fewer, at least one."""
    if settings.strategy != "fedavg-bytes":
        return settings.rounds
    ours = bytes_of(settings, native, range(count_of(settings, native)))
    return max(1, int(settings.rounds * ours / bytes_of(settings, native, None)))


def _flowers_run(grid: Metered, settings: Federation, native: Any, folder: Path | None) -> Outcome:
    """The run of Flower's own FedAvg or FedProx; every round is kept in ``folder``."""
    saved = (_saved.load(settings, folder) if folder else None) or Progress()
    state = initial_model(settings, native).state_dict()
    first = {name: state[name] for name in sent_names(native, None)}
    if saved.clusters:
        first = {name: torch.from_numpy(value) for name, value in saved.clusters[0].gene.items()}
    history: list[dict[str, float]] = [dict(row) for row in saved.history]
    rounds = rounds_of(settings, native)

    def means(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        found = {}
        for name in ("accuracy", "accuracy-before", "loss"):
            found[name] = float(np.mean([content["metrics"][name] for content in contents]))  # type: ignore[index]
        history.append({"round": saved.round + len(history) - len(saved.history) + 1, "used": len(contents), **found})
        tell_round(history[-1], rounds)
        return MetricRecord(found)

    def keep(round: int, arrays: ArrayRecord) -> None:
        if folder is None or not round:
            return
        gene = {name: array.numpy() for name, array in arrays.items()}
        now = Progress(
            round=saved.round + round, clusters=(Cluster(blocks=(), xi=(), gene=gene),), history=tuple(history)
        )
        _saved.save(now, settings, folder)

    common: dict[str, Any] = {
        "fraction_train": settings.fraction, "fraction_evaluate": 0.0, "min_train_nodes": settings.min_clients,
        "min_available_nodes": settings.min_clients, "train_metrics_aggr_fn": means,
    }  # fmt: skip
    prox = settings.strategy == "fedprox"
    strategy = FedProx(**common, proximal_mu=settings.mu) if prox else FedAvg(**common)
    left = rounds - saved.round
    arrays = to_record(first, settings.wire)
    if left > 0:
        config = ConfigRecord({"round-offset": saved.round, "epochs": settings.epochs, "lr": settings.lr})
        result = strategy.start(
            grid, arrays, num_rounds=left, timeout=settings.timeout, train_config=config,
            evaluate_fn=lambda round, record: keep(round, record),
        )  # fmt: skip
        if not history:
            raise TrainingError(f"{settings.strategy}: no client gave a reply in {left} rounds")
        arrays = result.arrays
    return Outcome(
        history=tuple(history), lines=tuple(grid.lines), learngenes=(), strategy=None, arrays=arrays,
        done_before=saved.round, seconds=0.0,
    )  # fmt: skip


def welcome(outcome: Outcome, settings: Federation, grid: Grid, nodes: Sequence[int], *, epochs: int) -> dict[str, Any]:
    """How newcomers do: each takes what the run offers (one learngene; of FedAvg the model; of local training nothing),
    trains alone for ``epochs``, and tells its accuracy.

    Returns mean "accuracy" and "accuracy-before" (per cent), "download" (bytes of the largest) and "lines", the
    traffic.
    """
    metered, messages = Metered(grid), []
    if outcome.strategy is not None:
        outcome.strategy.introduce(metered, nodes, outcome.strategy.progress.round)
        member = outcome.strategy.progress.member
        messages = [
            outcome.strategy.message(node, member[node], settings.rounds, "train.adopt")
            for node in nodes
            if node in member
        ]
        for message in messages:
            message.content["config"]["epochs"] = epochs  # type: ignore[index]
    elif outcome.arrays is not None:
        arrays = to_record(dict(outcome.arrays.to_torch_state_dict()), settings.wire)
        config = {"epochs": epochs, "server-round": settings.rounds}
        messages = [
            Message(
                RecordDict({"arrays": arrays, "config": ConfigRecord(dict(config))}),
                dst_node_id=node, message_type="train.adopt",
            )
            for node in nodes
        ]  # fmt: skip
    replies = [reply for reply in metered.send_and_receive(messages, timeout=settings.timeout) if reply.has_content()]
    if not replies:
        raise TrainingError(f"none of {len(nodes)} newcomers answered")
    told = [reply.content["metrics"] for reply in replies]
    means = {name: float(np.mean([one[name] for one in told])) for name in ("accuracy", "accuracy-before")}  # type: ignore[index]
    download = max(line.down for line in metered.lines if line.kind == "newcomer")
    return {**means, "download": download, "lines": tuple(metered.lines)}


def _make(folder: Path) -> None:
    """The folder of a run; where the server kept nothing in it, without the traffic of a run before."""
    require_writable(folder, "out")
    try:
        if not (folder / _saved.FILE).exists():
            (folder / TRAFFIC).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write into {folder}: {error.strerror}; another out folder would work") from error
