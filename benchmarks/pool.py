"""Learngene Pool beside SN-Net and single ViTs, at equal training compute, on cifar100 from a DeiT-Tiny ancestor.

    python benchmarks/pool.py --data DIR --ancestor deit_tiny.safetensors
    python benchmarks/pool.py --data DIR --ancestor deit_tiny.safetensors --stitches
    python benchmarks/pool.py --summarise

DIR holds cifar100/train.parquet and test.parquet; the ancestor is a safetensors file of timm's deit_tiny_patch16_224,
which is finetuned on cifar100 as learned.py does it, once. All settings stand in pool.yaml. One job is one (arm, seed),
and every route (network) that it gives is a row of results/pool.csv. What is there is skipped, unless it was made with
other settings, from another ancestor, or from another file than the one that is kept. Jobs go seed by seed.
``_pool_arms.py`` makes the arms, ``_pool_cost.py`` counts their FLOPs, ``_pool_summary.py`` makes the tables and the
plot, and ``--stitches`` looks at where the stitches of the first seed's pools lead (``_pool_stitches.py``).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from _arms import file_digest, machine
from _pool_arms import Network, Sources, make
from _pool_cost import recipe_of
from _runs import append_row, precision_here, read_rows, run

from learngene_hub.factory import evaluate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm with one seed."""

    arm: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """One network of an arm; a line of the CSV."""

    route: str  # its blocks: "3x64+4x128" are three of 64 channels, then four of 128
    number: int  # of the route in its pool; -1: it is a network by itself
    accuracy: float  # on the test images, per cent
    held_out: float  # on the held-out training images, per cent: what a pool chooses by. Empty: by itself
    params: int
    flops: int  # of one image's forward, two per multiply-add
    stored_bytes: int  # of everything that the arm stores, in float16
    # FLOPs of the arm's training: three times a forward for what learns, once for the teacher.
    first_students: int  # first stage: the instances
    first_teacher: int
    second_students: int  # second stage: the pool
    second_teacher: int
    solving: int  # least squares, and the features for it
    seconds: float  # of all training and testing of the job
    networks: int  # rows that the job has
    recipe: str  # sha256 of the settings, 12 digits
    ancestor: str  # sha256 of the finetuned ancestor's file
    digest: str  # sha256 of the learngene, or of the weights
    machine: str
    precision: str  # of the training

    @property
    def job(self) -> Job:
        """What made this row."""
        return Job(arm=self.arm, seed=self.seed)


def current(rows: Sequence[Row], recipes: dict[str, str]) -> list[Row]:
    """The newest row of each network, without those of other settings than these (arm -> recipe)."""
    newest = {(row.arm, row.seed, row.route): row for row in rows if row.recipe == recipes.get(row.arm)}
    return list(newest.values())


def complete(rows: Sequence[Row], sources: Sources) -> set[Job]:
    """The jobs all of whose rows are there, made with the settings and from the files that are there now."""
    config = sources.read()
    recipes = {arm: recipe_of(config, arm) for arm in config["arms"]}
    found: dict[Job, list[Row]] = {}
    for row in current(rows, recipes):
        kept = sources.stored(row.arm, row.seed)
        same = not kept.exists() or row.digest == file_digest(str(kept))
        if same and row.ancestor == file_digest(str(sources.finetuned)):
            found.setdefault(row.job, []).append(row)
    return {job for job, each in found.items() if len(each) == each[0].networks}


def measure(job: Job, sources: Sources, out: Path) -> list[Row]:
    """Make one arm with one seed, test every network of it, and add the rows to ``out``."""
    began, config = time.perf_counter(), sources.read()
    precision = precision_here(config["common"]["precision"])
    made = make(config | {"common": config["common"] | {"precision": precision}}, job.arm, job.seed, sources)
    test = sources.images("test")
    accuracies = [evaluate(each.model(), test, precision=precision).accuracy for each in made.networks]
    facts: dict[str, Any] = {
        **vars(job), **vars(made.cost), "stored_bytes": made.stored_bytes, "networks": len(made.networks),
        "seconds": round(time.perf_counter() - began, 1), "recipe": recipe_of(config, job.arm),
        "ancestor": file_digest(str(sources.finetuned)), "digest": made.digest, "machine": machine("cpu"),
        "precision": precision,
    }  # fmt: skip
    rows = [line(each, accuracy, facts) for each, accuracy in zip(made.networks, accuracies, strict=True)]
    for row in rows:
        append_row(out, row)
    return rows


def line(network: Network, accuracy: float, facts: dict[str, Any]) -> Row:
    """One row."""
    return Row(
        route=str(network.shape), number=network.number, accuracy=round(accuracy, 4), held_out=network.held_out,
        params=network.shape.params(), flops=network.shape.flops(), **facts,
    )  # fmt: skip


def told(job: Job, rows: Sequence[Row]) -> str:
    """A line of the log."""
    by_size = sorted(rows, key=lambda row: row.params)
    reached = " ".join(f"{row.accuracy:.1f}" for row in by_size)
    spent = sum(getattr(rows[0], name) for name in COST) / 1e12
    return f"{job.arm} seed {job.seed}: {reached}; {spent:.2f} TFLOPs, {rows[0].seconds:.0f} s"


COST = ("first_students", "first_teacher", "second_students", "second_teacher", "solving")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of cifar100/train.parquet and test.parquet")
    parser.add_argument("--ancestor", type=Path, help="safetensors file of timm's deit_tiny_patch16_224")
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "pool.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pool", help="where pools are kept")
    parser.add_argument("--learned", type=Path, default=ROOT / "build" / "learned", help="learned.py's --work")
    parser.add_argument("--arms", help="of those of the settings; default: all")
    parser.add_argument("--seeds", help="default: those of the settings")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; default: 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "pool.csv")
    parser.add_argument("--stitches", action="store_true", help="only look at the stitches of the first seed's pools")
    parser.add_argument("--summarise", action="store_true", help="only summarise the rows of --out, beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or summarise what is there."""
    args = arguments(argv)
    config = yaml.safe_load(args.config.read_text())
    if args.summarise:
        from _pool_summary import write_summary

        print(write_summary(read_rows(args.out, Row), args.out.with_suffix(""), config))
        return 0
    if args.data is None or args.ancestor is None:
        raise SystemExit("--data and --ancestor are missing: the folder of the data set, and DeiT-Tiny's weights")
    arms = args.arms.split(",") if args.arms else list(config["arms"])
    if unknown := [arm for arm in arms if arm not in config["arms"]]:
        raise SystemExit(f"arm {unknown[0]} asked; there are {', '.join(config['arms'])}")
    sources = Sources(data=args.data, ancestor=args.ancestor, work=args.work, learned=args.learned, config=args.config)
    args.work.mkdir(parents=True, exist_ok=True)
    sources.make_ancestor()
    if args.stitches:
        from _pool_stitches import write

        print(write(sources, args.out.with_name(f"{args.out.stem}_stitches.json")))
        return 0
    failed = 0
    for seed in [int(text) for text in args.seeds.split(",")] if args.seeds else config["seeds"]:
        done = complete(read_rows(args.out, Row), sources)
        there = [arm for arm in arms if seed in config["arms"][arm].get("seeds", [seed])]
        todo = [job for job in (Job(arm=arm, seed=seed) for arm in there) if job not in done]
        failed += run(todo, functools.partial(measure, sources=sources, out=args.out), told, args.workers, None)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
