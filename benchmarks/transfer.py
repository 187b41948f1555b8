"""The comparison of record: how fast descendants of a learngene learn data sets that it never saw.

    python benchmarks/transfer.py --data DIR --ancestor FILE.safetensors --learngene lsamd-base
    python benchmarks/transfer.py --summarise

Every (arm, shape, set, seed) is one run and one row of the CSV (see ``_arms.py``), appended as it finishes. A second
call skips the rows that are there, and several calls may write into one file. A row that was made from another
learngene or ancestor is stale and is made again. Jobs go seed by seed, so that a partial run is balanced. What comes
out of the rows is ``_summary.py``'s.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import _runs
import torch
from _arms import ARMS, DEFAULT_ARMS, Job, Row, Sources, initialise, learngene_of, measure, parse_shape
from _runs import append_row, read_rows

RESULTS = Path(__file__).parent / "results"
SHAPES = "4x128,6x192,12x192,16x192,6x256,12x256,7x320,12x384"
SETS = "signdigits,trashnet,dtd10"


def jobs(
    arms: Iterable[str], shapes: Sequence[str], sets: Sequence[str], seeds: Iterable[int], precision: str
) -> list[Job]:
    """Every cell, the seed in the outermost place."""
    arms = list(arms)
    return [
        Job(arm=arm, shape=shape, set=data, seed=seed, precision=precision)
        for seed in seeds
        for shape in shapes
        for data in sets
        for arm in arms
    ]


def missing(wanted: Iterable[Job], rows: Iterable[Row], digests: dict[str, str]) -> list[Job]:
    """The jobs without a row made from what their arm inherits from now (arm -> digest)."""
    done = {row.job for row in rows if row.digest == digests.get(row.arm)}
    return [job for job in wanted if job not in done]


def run(todo: Sequence[Job], sources: Sources, out: Path, workers: int) -> int:
    """Run the jobs in ``workers`` processes of one thread each; returns how many failed."""
    return _runs.run(todo, functools.partial(measure, sources=sources), told, workers, out)


def told(job: Job, row: Row) -> str:
    """A run in one line."""
    reached = f"{row.epoch_1:.1f} {row.epoch_2:.1f} {row.epoch_3:.1f} in {row.seconds:.0f} s"
    return f"{job.arm} {job.shape} {job.set} seed {job.seed}: {reached}"


def adopt(rows: Sequence[Row], old: Sources, new: Sources) -> list[Row]:
    """The rows that the learngene of ``new`` would give again: those of ``old`` whose start it has to the last bit.

    A run follows from its start, its data and its seed alone, so it need not be made again.
    """
    same: dict[tuple[str, str], bool] = {}
    kept = []
    for row in rows:
        grown = ARMS[row.arm].source == "learngene" and not ARMS[row.arm].variant
        if not grown or row.digest != old.digest(row.arm):
            continue
        key = (row.arm, row.shape)
        if key not in same:
            same[key] = starts_equal(row.arm, row.shape, old, new)
        if same[key]:
            kept.append(dataclasses.replace(row, digest=new.digest(row.arm)))
    return kept


def starts_equal(arm: str, shape: str, old: Sources, new: Sources) -> bool:
    """Whether the arm grows the same ViT of this shape from both."""
    depth, width = parse_shape(shape)
    one, other = (
        initialise(learngene_of(arm, sources, width), depth, width, 10, seed=0).state_dict() for sources in (old, new)
    )
    return all(torch.equal(one[name], other[name]) for name in one)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with one folder of parquet files (train, test) per data set")
    parser.add_argument("--sets", default=SETS, help=f"default: {SETS}")
    parser.add_argument("--shapes", default=SHAPES, help=f"DEPTHxWIDTH, default: {SHAPES}")
    parser.add_argument("--arms", default=",".join(DEFAULT_ARMS), help=f"of {','.join(DEFAULT_ARMS)}")
    parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    parser.add_argument("--ancestor", help="safetensors file of timm's deit_tiny_patch16_224, for the arm rows")
    parser.add_argument("--learngene", help="path or name, for the arms lsamd-base and base-even")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"), help="default: bf16")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; default: 2")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--limit", type=int, help="training images of a set, and half as many for the test; all")
    parser.add_argument("--out", type=Path, default=RESULTS / "transfer.csv")
    parser.add_argument("--adopt", help="another learngene: keep those of its rows whose start --learngene has too")
    parser.add_argument("--base", default="rows", help="the arm that --summarise compares with; default: rows")
    parser.add_argument("--summarise", action="store_true", help="only summarise the rows of --out, beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or summarise what is there."""
    args = arguments(argv)
    if args.summarise:
        from _summary import write_summary

        rows = [row for row in read_rows(args.out, Row) if row.precision == args.precision and row.arm in DEFAULT_ARMS]
        print(write_summary(rows, args.out.with_suffix(""), base=args.base, picture=args.base == "rows"))
        return 0
    arms = args.arms.split(",")
    if unknown := set(arms) - set(DEFAULT_ARMS):
        raise SystemExit(f"no arm {', '.join(sorted(unknown))}; there are {', '.join(DEFAULT_ARMS)}")
    if args.data is None:
        raise SystemExit("--data is missing: the folder with one folder per data set")
    sources = Sources(
        data=args.data, ancestor=args.ancestor, learngene=args.learngene, device=args.device, limit=args.limit
    )
    if args.adopt:
        rows = read_rows(args.out, Row)
        kept = adopt(rows, dataclasses.replace(sources, learngene=args.adopt), sources)
        for row in kept:
            append_row(args.out, row)
        print(f"{len(kept)} rows kept", flush=True)
        return 0
    seeds = [int(seed) for seed in args.seeds.split(",")]
    wanted = jobs(arms, args.shapes.split(","), args.sets.split(","), seeds, args.precision)
    todo = missing(wanted, read_rows(args.out, Row), {arm: sources.digest(arm) for arm in arms})
    print(f"{len(wanted)} runs, {len(wanted) - len(todo)} there already", flush=True)
    return 1 if run(todo, sources, args.out, args.workers) else 0


if __name__ == "__main__":
    sys.exit(main())
