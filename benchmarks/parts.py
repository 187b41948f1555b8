"""The methods that inherit parts of a pre-trained ViT (auto, heuristic, cluster), each beside what it must beat.

    python benchmarks/parts.py --data DIR --ancestor deit_tiny.safetensors
    python benchmarks/parts.py --summarise

DIR holds one folder of train.parquet and test.parquet for each data set; the ancestor is a safetensors file of timm's
deit_tiny_patch16_224. All settings stand in parts.yaml: the arms, and the tables that say which arms meet at which
shape. Two stages, each of which is skipped where its result is there, so that a second call goes on: an arm makes a
learngene, one per seed; every (arm, shape, set, seed) is one run and one row of results/parts.csv. Jobs go seed by
seed.

What each method must beat, at the same place, with the same stem, norm, recipe and images:

auto        its search must beat as many blocks that nobody searched for: drawn at random (one draw per seed), the first
            (which is also one of the two published lists), the other published list, the last, evenly spaced ones. All
            inherit the stem, stand at the bottom, and have a fresh last norm, as auto's rule has it.
heuristic   its choice of the last, or the calmest, blocks must beat any other three: random, the first, evenly spaced
            ones. All stand at the end, behind random blocks, and inherit the last norm. Two rows of arms: the stem
            fresh, as the method says, and (+stem) the ancestor's.
cluster     the heads that it keeps must beat random ones, as many in each layer (plain copies of the FFNs on both
            sides); its trained maps must beat plain copies; at a smaller depth its layers must beat the ancestor's
            own; and it must beat whole blocks that take as many bytes, evenly spaced and repeated. All inherit the
            stem and the last norm.
all         the whole ancestor, pre-trained and finetuned (net2net: at a smaller depth evenly spaced blocks, with the
            last norm), and scratch, at a higher rate.

Every ViT gets a fresh head. The seed draws the extraction, the random choices, the fresh parts and the order of the
images. Runs that begin with the same weights to the last bit would give the same line, so the line is taken over: where
a search finds the first blocks, say. ``_parts_summary.py`` makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from _arms import ANCESTOR, file_digest, machine, open_ancestor, parse_shape
from _parts_arms import few_classes, prepared, with_random_heads
from _runs import read_rows, run
from learned import recipe
from torch import nn

from learngene_hub.data import Images, load_images
from learngene_hub.factory import evaluate, expand, extract, finetune, with_settings
from learngene_hub.learngene import Learngene
from learngene_hub.shape import ViTShape

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EPOCHS = (1, 2, 4)
SCRATCH = "scratch"


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a worker finds what it needs."""

    data: Path  # holds one folder per data set
    ancestor: Path
    work: Path  # where learngenes are kept
    config: Path
    out: Path  # the rows

    def read(self) -> dict[str, Any]:
        """The settings."""
        return yaml.safe_load(self.config.read_text())

    def stored(self, arm: str, seed: int) -> Path:
        """The learngene of an arm that makes one."""
        return self.work / f"{arm}-{seed}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell of the comparison."""

    arm: str
    shape: str  # DEPTHxWIDTH
    set: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """What a run of a job gave; a line of the CSV."""

    epoch_1: float  # test accuracy after so many epochs, per cent
    epoch_2: float
    epoch_4: float
    params: int
    flops: int  # of one image's forward, two per multiply-add
    stored_bytes: int  # in float16, of what this arm needs of its learngene; 0: none
    extraction_images: int  # seen in trainings, passes counted
    extraction_flops: int  # of the forwards on them, and of the ancestor's
    extraction_seconds: float
    seconds: float  # of growing, training and testing
    kept: str  # the ancestor's blocks, or the number of heads of each of its layers
    start: str  # digest of the weights at the start
    digest: str  # sha256 of the learngene; of the ancestor's file for scratch
    machine: str

    @property
    def job(self) -> Job:
        """The cell that this row fills."""
        return Job(arm=self.arm, shape=self.shape, set=self.set, seed=self.seed)


@lru_cache(maxsize=8)
def images_of(sources: Sources, name: str, split: str, limit: int) -> Images:
    """``limit`` images of a split (0: all), drawn with seed 0: the same ones for whoever asks for as many."""
    return load_images(sources.data / name, split=split, size=sources.read()["image_size"], limit=limit or None)


def maker(config: dict[str, Any], arm: str) -> str:
    """The arm whose learngene an arm is grown from: most often itself."""
    return config["arms"].get(arm, {}).get("of", arm)


def extraction_data(arm: dict[str, Any], sources: Sources) -> dict[str, Images]:
    """What the arm's extraction sees."""
    if "data" not in arm:
        return {}
    images = images_of(sources, arm["data"], "train", arm.get("limit", 0))
    return {arm["data"]: few_classes(images, arm["classes"], arm["per_class"]) if "classes" in arm else images}


def make_learngene(job: Job, sources: Sources) -> str:
    """Extract an arm's learngene with the job's seed, in float16; its digest."""
    config = sources.read()
    arm = config["arms"][job.arm]
    ancestor, settings, blocks = prepared(arm, open_ancestor(str(sources.ancestor)), job.seed)
    data = extraction_data(arm, sources)
    if data:
        settings["seed"] = job.seed
    sha256 = file_digest(str(sources.ancestor))
    facts = {"name": ANCESTOR, "license": "Apache-2.0", "source": f"timm names, file sha256 {sha256}"}
    learngene = extract(arm["method"], ancestor, data, settings=settings, facts=facts)
    if arm.get("heads") == "random":
        learngene = with_random_heads(learngene, ancestor, job.seed)
    notes: dict[str, Any] = {"command": "python benchmarks/parts.py --data DIR --ancestor FILE"}
    notes |= {"machine": machine("cpu"), "terms": {name: config["terms"][name] for name in data}}
    notes |= {"ancestor_blocks": blocks} if blocks else {}
    learngene = replace(learngene.to(torch.float16), provenance={**learngene.provenance, **notes})
    file = sources.stored(job.arm, job.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    return learngene.save(file)


@lru_cache(maxsize=4)
def open_learngene(path: Path) -> Learngene:
    """The learngene of this file, once per process."""
    return Learngene.load(path)


def learngene_of(job: Job, sources: Sources) -> Learngene | None:
    """What a run is grown from, with the arm's settings of growth; None: nothing."""
    config = sources.read()
    if job.arm == SCRATCH:
        return None
    stored = open_learngene(sources.stored(maker(config, job.arm), job.seed))
    return with_settings(stored, config["arms"][job.arm].get("grow"))


def initialise(job: Job, sources: Sources, classes: int) -> nn.Module:
    """The ViT at the start of a run."""
    (depth, width), side = parse_shape(job.shape), sources.read()["image_size"]
    learngene = learngene_of(job, sources)
    if learngene is not None:
        return expand(learngene, depth=depth, width=width, num_labels=classes, image_size=side, seed=job.seed)
    shape = ViTShape(depth=depth, width=width, heads=width // 64, image_size=side, classes=classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return shape.build()


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of a model's names and weights."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def kept_of(learngene: Learngene | None) -> str:
    """What of the ancestor it holds, in words: its blocks, or how many heads of each layer."""
    if learngene is None:
        return ""
    told = learngene.provenance
    if "centroids" in told:
        return "heads " + " ".join(str(len(heads)) for heads in told["centroids"])
    if blocks := told.get("ancestor_blocks"):
        return " ".join(map(str, blocks))
    if "kept" in told:
        return " ".join(str(block).removeprefix("blocks.") for block in told["kept"])
    return "all"


def stored_bytes(learngene: Learngene) -> int:
    """In float16, of what is needed to grow it with its settings: without a stem that it leaves fresh."""
    fresh = learngene.settings.get("stem") == "fresh"
    return 2 * sum(t.numel() for name, t in learngene.tensors.items() if not (fresh and name.startswith("stem.")))


def measure(job: Job, sources: Sources) -> Row:
    """One run of one job."""
    began, config = time.perf_counter(), sources.read()
    stage, limits = config["tuning"], config["sets"][job.set]
    train = images_of(sources, job.set, "train", limits["train"])
    test = images_of(sources, job.set, "test", limits["test"])
    model = initialise(job, sources, len(train.classes))
    start, learngene = weights_digest(model), learngene_of(job, sources)
    lr = stage["scratch_lr" if learngene is None else "lr"]
    made, shape = {} if learngene is None else learngene.provenance, ViTShape.of(model)
    twin = twin_of(read_rows(sources.out, Row), job, start)
    reached = {} if twin is None else {epoch: getattr(twin, f"epoch_{epoch}") for epoch in EPOCHS}
    if twin is None:
        for step in finetune(model, train, recipe=recipe(stage, epochs=max(EPOCHS), lr=lr, seed=job.seed)):
            if step.epoch_done and step.epoch + 1 in EPOCHS:
                reached[step.epoch + 1] = evaluate(model, test, precision=stage["precision"]).accuracy
    return Row(
        **asdict(job),
        **{f"epoch_{epoch}": round(reached[epoch], 4) for epoch in EPOCHS},
        params=shape.params(),
        flops=shape.flops(),
        stored_bytes=0 if learngene is None else stored_bytes(learngene),
        extraction_images=made.get("images_seen", 0),
        extraction_flops=made.get("flops", 0) + made.get("teacher_flops", 0),
        extraction_seconds=made.get("seconds", 0.0),
        seconds=round(time.perf_counter() - began, 2) if twin is None else twin.seconds,
        kept=kept_of(learngene),
        start=start,
        digest=digest_of(job, sources),
        machine=machine("cpu"),
    )


def twin_of(rows: Sequence[Row], job: Job, start: str) -> Row | None:
    """A run that began with the same weights, on the same images in the same order; None where there is none.

    Scratch has a rate of its own, and no twin.
    """
    alike = [row for row in rows if (row.shape, row.set, row.seed, row.start) == (job.shape, job.set, job.seed, start)]
    return next((row for row in alike if SCRATCH not in (row.arm, job.arm)), None)


def digest_of(job: Job, sources: Sources) -> str:
    """What a row of this job is made from now; "" where it is not there."""
    if job.arm == SCRATCH:
        return file_digest(str(sources.ancestor))
    path = sources.stored(maker(sources.read(), job.arm), job.seed)
    return open_learngene(path).digest if path.exists() else ""


def jobs(config: dict[str, Any], tables: Sequence[str], seed: int) -> list[Job]:
    """Every run of a seed that one of the tables needs, each once."""
    wanted = [
        Job(arm=arm, shape=table["shape"], set=name, seed=seed)
        for table in (config["tables"][title] for title in tables)
        for name in table.get("sets", config["sets"])
        for arm in table["arms"]
    ]
    return sorted(dict.fromkeys(wanted), key=lambda job: list(config["sets"]).index(job.set))


def told_learngene(job: Job, digest: str) -> str:
    """A line of the first stage."""
    return f"{job.arm} seed {job.seed}: {digest[:12]}"


def told_row(job: Job, row: Row) -> str:
    """A line of the second stage."""
    told = " ".join(f"{getattr(row, f'epoch_{epoch}'):.1f}" for epoch in EPOCHS)
    return f"{job.arm} {job.shape} {job.set} seed {job.seed}: {told} in {row.seconds:.0f} s"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder of train.parquet and test.parquet per data set")
    parser.add_argument("--ancestor", type=Path, help="safetensors file of timm's deit_tiny_patch16_224")
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "parts.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "parts", help="where learngenes are kept")
    parser.add_argument("--tables", help="of those of the settings, with semicolons between; default: all")
    parser.add_argument("--sets", help="default: those of the settings")
    parser.add_argument("--seeds", help="default: those of the settings")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; default: 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "parts.csv")
    parser.add_argument("--summarise", action="store_true", help="only summarise the rows of --out, beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or summarise what is there."""
    args = arguments(argv)
    config = yaml.safe_load(args.config.read_text())
    if args.summarise:
        from _parts_summary import write_summary

        print(write_summary(read_rows(args.out, Row), args.out.with_suffix(""), config))
        return 0
    if args.data is None or args.ancestor is None:
        raise SystemExit("--data and --ancestor are missing: the folder of the data sets, and DeiT-Tiny's weights")
    tables = args.tables.split(";") if args.tables else list(config["tables"])
    if unknown := set(tables) - set(config["tables"]):
        raise SystemExit(f"no table {', '.join(sorted(unknown))}; there are {', '.join(config['tables'])}")
    sources = Sources(data=args.data, ancestor=args.ancestor, work=args.work, config=args.config, out=args.out)
    failed, sets = 0, args.sets.split(",") if args.sets else list(config["sets"])
    for seed in [int(text) for text in args.seeds.split(",")] if args.seeds else config["seeds"]:
        wanted = [job for job in jobs(config, tables, seed) if job.set in sets]
        arms = dict.fromkeys(maker(config, job.arm) for job in wanted if job.arm != SCRATCH)
        makers = [Job(arm=arm, shape="", set="", seed=seed) for arm in arms if not sources.stored(arm, seed).exists()]
        failed += run(makers, functools.partial(make_learngene, sources=sources), told_learngene, args.workers, None)
        done = {row.job for row in read_rows(args.out, Row) if row.digest == digest_of(row.job, sources)}
        todo = [job for job in wanted if job not in done]
        failed += run(todo, functools.partial(measure, sources=sources), told_row, args.workers, args.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
