"""GENE-FL beside FedAvg, FedProx, local training and fixed layers: accuracy of clients and newcomers, and bytes.

    python benchmarks/federated.py --data DIR --ancestor deit_tiny.safetensors
    python benchmarks/federated.py --summarise

DIR holds cifar10/train.parquet and pacs/train.parquet; the ancestor is a safetensors file of timm's
deit_tiny_patch16_224, of which four evenly spaced blocks are taken. All settings stand in federated.yaml. One job is an
(arm, partition, start, seed) and a row of results/federated.csv; what is there with these settings is skipped. Clients
run one by one in this process, on the in-memory Grid, whose numbers are those of Flower's simulation
(tests/test_federated_engine.py). ``_federated_summary.py`` makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import yaml
from _arms import file_digest, machine
from _runs import read_rows, run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    arm: str
    partition: str
    start: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """What it came to; a line of the CSV."""

    accuracy: float  # mean over clients on own images they did not train on, per cent, after the last round
    accuracy_received: float  # the same before the last round's training, as it was received
    newcomer: float  # mean over newcomers, after training alone
    newcomer_received: float  # before it
    rounds: int
    up: int  # bytes from all clients, all rounds
    down: int  # bytes to all clients, all rounds
    start_up: int  # bytes of subspaces and sensitivities, both ways
    newcomer_down: int  # bytes that one newcomer downloads
    model_bytes: int  # one record of the whole model
    clusters: int
    layers: str  # those of each cluster at the end, as "3+4|0+1"; empty of whole models
    seconds: float
    settings: str  # sha256 of what the row follows from, 12 digits
    ancestor: str  # sha256 of the file of weights, 12 digits; empty: random
    machine: str

    @property
    def job(self) -> Job:
        """What made this row."""
        return Job(arm=self.arm, partition=self.partition, start=self.start, seed=self.seed)


def digest_of(config: dict[str, Any], job: Job) -> str:
    """A digest of all settings that a row follows from."""
    told = {
        "common": config["common"], "arm": config["arms"][job.arm], "partition": config["partitions"][job.partition],
        "start": config["starts"][job.start],
        "harness": [config["clients"], config["newcomers"], config["newcomer_epochs"]],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def current(rows: Sequence[Row], config: dict[str, Any]) -> list[Row]:
    """The newest row of each job of these settings."""
    known = {astuple(job) for seed in config["seeds"] for job in jobs(config, seed)}
    # Compared by values: as a script this file is another module than the one that the summary imports.
    found = {astuple(row.job): row for row in rows if row.settings == digest_of(config, row.job)}
    return [row for job, row in found.items() if job in known]


def jobs(config: dict[str, Any], seed: int) -> list[Job]:
    """All jobs of one seed."""
    return [
        Job(arm=arm, partition=partition, start=start, seed=seed)
        for partition in config["partitions"]
        for start in config["starts"]
        for arm, own in config["arms"].items()
        if partition in own.get("partitions", [partition]) and start in own.get("starts", [start])
    ]


def settings_of(config: dict[str, Any], job: Job, data: Path, ancestor: Path | None) -> Any:
    """The federation of a job."""
    from learngene_hub.federated.settings import federation

    own = {name: value for name, value in config["arms"][job.arm].items() if name not in ("partitions", "starts")}
    parts = config["partitions"][job.partition]
    told = {"strategy": job.arm} | config["common"] | config["starts"][job.start] | parts | own | {"seed": job.seed}
    told["data"] = str(data / parts["data"])
    if told.get("ancestor"):
        told["ancestor_weights"] = str(ancestor)
    return federation(told)


def measure(job: Job, config: dict[str, Any], data: Path, ancestor: Path | None) -> Row:
    """Run one job."""
    from learngene_hub.federated.client import make_client_app
    from learngene_hub.federated.memory import MemoryGrid, as_server
    from learngene_hub.federated.server import bytes_of, conduct, welcome
    from learngene_hub.federated.traffic import totals

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    as_server()
    began, settings = time.perf_counter(), settings_of(config, job, data, ancestor)
    clients, late = config["clients"], config["newcomers"]
    app = make_client_app(settings)
    outcome = conduct(MemoryGrid.of(app, clients, partitions=clients + late), settings)
    newcomers = MemoryGrid.of(app, late, partitions=clients + late, first=clients)
    found = welcome(outcome, settings, newcomers, newcomers.get_node_ids(), epochs=config["newcomer_epochs"])
    sent, last, strategy = totals(outcome.lines), outcome.history[-1], outcome.strategy
    groups = strategy.progress.clusters if strategy else ()
    native = strategy.native if strategy else _native(settings)
    return Row(
        **vars(job), accuracy=round(last["accuracy"], 4), accuracy_received=round(last["accuracy-before"], 4),
        newcomer=round(found["accuracy"], 4), newcomer_received=round(found["accuracy-before"], 4),
        rounds=int(last["round"]), up=sent["up"], down=sent["down"], start_up=sent["start_up"],
        newcomer_down=found["download"], model_bytes=bytes_of(settings, native, None), clusters=max(len(groups), 1),
        layers="|".join("+".join(map(str, cluster.blocks)) for cluster in groups),
        seconds=round(time.perf_counter() - began, 1), settings=digest_of(config, job),
        ancestor=file_digest(str(ancestor))[:12] if settings.ancestor else "", machine=machine("cpu"),
    )  # fmt: skip


def _native(settings: Any) -> Any:
    from learngene_hub.federated.models import native_shape
    from learngene_hub.federated.server import classes_of

    return native_shape(settings, classes_of(settings))


def told(job: Job, row: Row) -> str:
    """A line of the log."""
    mb = (row.up + row.down) / 1e6
    return (
        f"{job.arm} {job.partition} {job.start} seed {job.seed}: clients {row.accuracy:.1f}, newcomers "
        f"{row.newcomer:.1f}, {mb:.1f} MB, {row.seconds:.0f} s"
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of cifar10/train.parquet and pacs/train.parquet")
    parser.add_argument("--ancestor", type=Path, help="safetensors file of timm's deit_tiny_patch16_224")
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "federated.yaml")
    parser.add_argument("--arms", help="of those of the settings; default: all")
    parser.add_argument("--partitions", help="default: all")
    parser.add_argument("--starts", help="default: all")
    parser.add_argument("--seeds", help="default: those of the settings")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each; default: 1")
    parser.add_argument("--out", type=Path, default=RESULTS / "federated.csv")
    parser.add_argument("--summarise", action="store_true", help="only summarise the rows of --out, beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or summarise what is there."""
    args = arguments(argv)
    config = yaml.safe_load(args.config.read_text())
    if args.summarise:
        from _federated_summary import write_summary

        print(write_summary(read_rows(args.out, Row), args.out.with_suffix(""), config))
        return 0
    for name in ("arms", "partitions", "starts"):
        asked = getattr(args, name).split(",") if getattr(args, name) else list(config[name])
        if unknown := [each for each in asked if each not in config[name]]:
            raise SystemExit(f"{unknown[0]} asked; there are {', '.join(config[name])}")
        setattr(args, name, asked)
    if args.data is None or (args.ancestor is None and any(config["starts"][s].get("ancestor") for s in args.starts)):
        raise SystemExit("--data and --ancestor are missing: the folder of the data sets, and DeiT-Tiny's weights")
    failed = 0
    for seed in [int(text) for text in args.seeds.split(",")] if args.seeds else config["seeds"]:
        done = {row.job for row in current(read_rows(args.out, Row), config)}
        todo = [
            job
            for job in jobs(config, seed)
            if job not in done
            and job.arm in args.arms
            and job.partition in args.partitions
            and job.start in args.starts
        ]
        work = functools.partial(measure, config=config, data=args.data, ancestor=args.ancestor)
        failed += run(todo, work, told, args.workers, args.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
