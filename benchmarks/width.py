"""Which way to another width finetunes best: the forms, learned norms and rows, and what to keep below the native one.

    python benchmarks/width.py --data DIR --learngene lsamd-base
    python benchmarks/width.py --summarise

Everything is grown from one learngene (the arms of ``_arms.py``) and finetuned with the recipe of ``transfer.py`` on
images that neither the extraction nor ``transfer.py`` uses, so that what is chosen here is judged there. Two variants
of the learngene are made first: norms learned at the widths above the native one, and rows and norms at those below,
each with ``Widening``, on images of the data sets that the extraction used. Resumes like ``transfer.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from _arms import Row, Sources, open_learngene
from _runs import read_rows
from transfer import RESULTS, jobs, missing, run

from learngene_hub import load_images
from learngene_hub.training import show_progress
from learngene_hub.widening import Widening, widen

ROOT = Path(__file__).resolve().parent.parent
SETS = ("mnist", "cifar10")
LIMIT = 2000  # training images of each
ABOVE = ("12x256", "7x320")
TWICE = ("12x384",)
BELOW = ("6x64", "4x128")
ARMS_ABOVE = (
    "lsamd-base", "base-balanced", "base-exact", "base-stirred", "base-tilted", "base-norms", "base-fast",
    "base-exact-fast",
)  # fmt: skip
ARMS_TWICE = ("lsamd-base", "base-tilted")
ARMS_BELOW = ("lsamd-base", "base-leading", "base-spaced", "base-weights", "base-scores", "base-rows")
VARIANTS = {  # name -> what is learned on top of the scores
    "norms": Widening(widths=(256, 320), steps_per_epoch=400, score_images=400, precision="bf16"),
    "rows": Widening(widths=(64, 128), rows=128, steps_per_epoch=800, score_images=400, precision="bf16"),
}


def make_variants(name: str, data: Path, folder: Path) -> None:
    """Write the variants of the learngene ``name`` that ``folder`` lacks; it is that learngene's own."""
    config = yaml.safe_load((ROOT / "benchmarks" / "lsamd_base.yaml").read_text())
    wanted = {key: stage for key, stage in VARIANTS.items() if not (folder / f"{key}.safetensors").exists()}
    if not wanted:
        return
    images = {
        each: load_images(data / each, size=config["image_size"], limit=config["width_images"])
        for each in config["data"]
    }
    learngene = open_learngene(name).to(torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    for key, stage in wanted.items():
        made = widen(learngene, images, stage, watch=show_progress)
        made.to(torch.float16).save(folder / f"{key}.safetensors")
        print(key, made.provenance["width"]["loss"], flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder of parquet files (train, test) per data set")
    parser.add_argument("--learngene", default="lsamd-base", help="path or name; default: lsamd-base")
    parser.add_argument("--seeds", default="0,1", help="default: 0,1")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; default: 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "width.csv")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "width", help="where the variants are kept")
    parser.add_argument("--summarise", action="store_true", help="only summarise the rows of --out, beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or summarise what is there."""
    args = arguments(argv)
    if args.summarise:
        from _summary import write_summary

        print(write_summary(read_rows(args.out, Row), args.out.with_suffix(""), base="lsamd-base", picture=False))
        return 0
    if args.data is None:
        raise SystemExit("--data is missing: the folder with one folder per data set")
    folder = args.work / open_learngene(args.learngene).digest[:12]
    make_variants(args.learngene, args.data, folder)
    sources = Sources(data=str(args.data), learngene=args.learngene, variants=str(folder), limit=LIMIT)
    wanted = [
        job
        for seed in args.seeds.split(",")
        for arms, shapes in ((ARMS_BELOW, BELOW), (ARMS_ABOVE, ABOVE), (ARMS_TWICE, TWICE))
        for job in jobs(arms, shapes, SETS, [int(seed)], "bf16")
    ]
    digests = {arm: sources.digest(arm) for arm in {*ARMS_ABOVE, *ARMS_BELOW}}
    todo = missing(wanted, read_rows(args.out, Row), digests)
    print(f"{len(wanted)} runs, {len(wanted) - len(todo)} there already", flush=True)
    return 1 if run(todo, sources, args.out, args.workers) else 0


if __name__ == "__main__":
    sys.exit(main())
