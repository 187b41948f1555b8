"""A pool that grows without old data, beside what else could be made of data that arrives in pieces.

    python benchmarks/continual.py --data DIR --ancestor deit_tiny.safetensors
    python benchmarks/continual.py --summarise

DIR holds one folder of train.parquet and test.parquet for each data set; the ancestor is a safetensors file of timm's
deit_tiny_patch16_224. All settings stand in continual.yaml. Five corpora arrive one after the other, four superclasses
of cifar100 each. Six stages, each of which skips what is there, so that a second call goes on:

growing     the base, the entries of the pool, and the models that a pool must beat  -> continual_growing.csv
selections  what TALS and simpler rules select for each task of few images           -> continual_selections.csv
trials      tasks of which it is known where they come from: are they found?         -> continual_trials.csv
cost        seconds and memory of a selection from 5 to 20 entries                   -> continual_cost.json
probe       a linear probe of every descendant, for every arm and number of corpora  -> continual.csv
tune        the descendants finetuned, for some numbers of corpora                   -> continual.csv

The arms are explained in ``_continual_growth.py`` and ``_continual_arms.py``, the trials in
``_continual_selection.py``. All arms have the same rule of depth (evenly spaced blocks), images, order, recipe and way
to a head. A seed draws the images of a task and their order; growing was done once. Runs that begin with the same
weights to the last bit would give the same line, so the line is taken over: where TALS abstains, say, it is the
anchor's. ``_continual_summary.py`` makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from _continual_arms import ANCHOR, SINGLE, Ask, Job, Row, measure, select, selections, source_of, told_found, told_row
from _continual_cost import measured
from _continual_data import Sources
from _continual_growth import POOL, STORED, make, missing, pool_of
from _continual_growth import told as told_growth
from _continual_selection import Trial, Tried, attempt, trials
from _continual_selection import told as told_trial
from _runs import read_rows, run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STAGES = ("growing", "selections", "trials", "cost", "probe", "tune")


def rules_at(config: dict[str, Any], size: int) -> list[str]:
    """The arms that need a selection from a pool of so many entries."""
    return [arm for arm, sizes in config["rules"].items() if size in sizes]


def asks(config: dict[str, Any], seed: int, sizes: Sequence[int]) -> list[Ask]:
    """Every selection of a seed from pools of these sizes."""
    return [
        Ask(arm=arm, size=size, set=name, seed=seed)
        for name in config["sets"]
        for size in sizes
        if size
        for arm in rules_at(config, size)
    ]


def jobs(config: dict[str, Any], way: str, seed: int, sizes: Sequence[int], depths: Sequence[int]) -> list[Job]:
    """Every run of a seed and a way, the largest pools first: what is cut short is what matters less."""
    stage, full = config["ways"][way], len(config["corpora"])
    found = []
    for size in (size for size in stage["sizes"] if size in sizes):
        arms = [*rules_at(config, size), *STORED] if size else [ANCHOR]
        cells = [(arm, stage["depths"]) for arm in arms]
        if size == full:
            cells += [(SINGLE + name, stage["single_depths"]) for name in config["corpora"]]
        found += [
            Job(way=way, arm=arm, size=size, depth=depth, set=name, seed=seed)
            for name in config["sets"]
            for arm, its in cells
            for depth in its
            if depth in depths
        ]
    return found


def grow_all(sources: Sources, sizes: Sequence[int]) -> int:
    """The first stage: one after the other, as each stands on what is there; returns how many failed.

    The pool and ``sequential`` go through all corpora, whatever the sizes.
    """
    wanted = missing(sources, len(sources.read()["corpora"]))
    todo = [job for job in wanted if job.size in (0, 1, *sizes) or job.arm in (POOL, "sequential")]
    return run(todo, functools.partial(make, sources=sources), told_growth, 1, sources.beside("growing"))


def select_all(sources: Sources, seed: int, sizes: Sequence[int], workers: int) -> int:
    """The second stage, of a seed."""
    there = selections(sources)
    todo = [ask for ask in asks(sources.read(), seed, sizes) if ask not in there]
    return run(todo, functools.partial(select, sources=sources), told_found, workers, sources.beside("selections"))


def try_all(sources: Sources, workers: int) -> int:
    """The third stage."""
    config = sources.read()
    now = pool_of(sources, len(config["corpora"])).manifest.digest
    done: set[Trial] = {row.job for row in read_rows(sources.beside("trials"), Tried) if row.pool == now}
    todo = [trial for trial in trials(config) if trial not in done]
    return run(todo, functools.partial(attempt, sources=sources), told_trial, workers, sources.beside("trials"))


def cost_all(sources: Sources) -> int:
    """The fourth stage: once, unless its file is removed."""
    path = sources.beside("cost").with_suffix(".json")
    if not path.exists():
        path.write_text(json.dumps(measured(sources, sources.read()["cost"]["repeats"]), indent=1) + "\n")
    return 0


def measure_all(
    sources: Sources, way: str, seed: int, sizes: Sequence[int], depths: Sequence[int], workers: int
) -> int:
    """The last two stages, of a seed."""
    there, config = selections(sources), sources.read()
    wanted = {job: source_of(job, sources, there) for job in jobs(config, way, seed, sizes, depths)}
    done = {(row.job, row.source) for row in read_rows(sources.out, Row)}
    todo = [job for job, source in wanted.items() if (job, source) not in done]
    return run(todo, functools.partial(measure, sources=sources), told_row, workers, sources.out)


def fresh(sources: Sources) -> list[Row]:
    """The rows that were made from what is there now, the last of each cell; all, where nothing is there."""
    if not (sources.work / "pool").exists():
        return list({row.job: row for row in read_rows(sources.out, Row)}.values())
    there = selections(sources)
    rows = [row for row in read_rows(sources.out, Row) if row.source == source_of(row.job, sources, there)]
    return list({row.job: row for row in rows}.values())


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder of train.parquet and test.parquet per data set")
    parser.add_argument("--ancestor", type=Path, help="safetensors file of timm's deit_tiny_patch16_224")
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "continual.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "continual", help="where learngenes are kept")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: all, %(default)s")
    parser.add_argument("--sizes", help="of the pool, 0: the anchor; default: all; the rest is added by another call")
    parser.add_argument("--depths", help="of the descendants; default: those of the settings")
    parser.add_argument("--seeds", help="default: those of the settings")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each; default: 1")
    parser.add_argument("--out", type=Path, default=RESULTS / "continual.csv")
    parser.add_argument("--summarise", action="store_true", help="only summarise what is beside --out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or summarise what is there."""
    args = arguments(argv)
    config = yaml.safe_load(args.config.read_text())
    none = Path()
    sources = Sources(
        data=args.data or none, ancestor=args.ancestor or none, work=args.work, config=args.config, out=args.out
    )
    if args.summarise:
        from _continual_summary import write_summary

        print(write_summary(fresh(sources), sources, config))
        return 0
    if args.data is None or args.ancestor is None:
        raise SystemExit("--data and --ancestor are missing: the folder of the data sets, and DeiT-Tiny's weights")
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        raise SystemExit(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    seeds = [int(text) for text in args.seeds.split(",")] if args.seeds else config["seeds"]
    sizes = [int(text) for text in args.sizes.split(",")] if args.sizes else list(range(len(config["corpora"]) + 1))
    known = sorted({depth for way in config["ways"].values() for depth in way["depths"]})
    depths = [int(text) for text in args.depths.split(",")] if args.depths else known
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed = grow_all(sources, sizes) if "growing" in stages else 0
    for seed in seeds if "selections" in stages else ():
        failed += select_all(sources, seed, sizes, args.workers)
    failed += try_all(sources, args.workers) if "trials" in stages else 0
    failed += cost_all(sources) if "cost" in stages else 0
    for way in [stage for stage in STAGES[-2:] if stage in stages]:
        for seed in seeds:
            failed += measure_all(sources, way, seed, sizes, depths, args.workers)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
