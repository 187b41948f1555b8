"""The learned methods beside the training-free ones and scratch, on cifar100 from a DeiT-Tiny ancestor.

    python benchmarks/learned.py --data DIR --ancestor deit_tiny.safetensors
    python benchmarks/learned.py --summarise

DIR holds cifar100/train.parquet and test.parquet; the ancestor is a safetensors file of timm's deit_tiny_patch16_224.
All settings stand in learned.yaml. Three stages, each of which is skipped where its result is there, so that a second
call goes on: the ancestor is finetuned on cifar100; every arm makes a learngene of it, one per seed; every (arm, shape,
seed) is one run and one row of results/learned.csv. Jobs go seed by seed, so that a partial run is balanced.

Whatever the arm, a ViT gets a fresh head, and the seed gives one order of the images and one head. Arms whose name ends
with ``+head`` keep the classifier that they can inherit. ``_learned_summary.py`` makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
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
from _runs import precision_here, read_rows, run
from safetensors.torch import load_file, save_file
from torch import nn

from learngene_hub.data import Augment, Images, load_images
from learngene_hub.factory import evaluate, expand, extract, finetune
from learngene_hub.learngene import Learngene
from learngene_hub.shape import ViTShape
from learngene_hub.training import Recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EPOCHS = (0, 1, 2, 5, 10, 20)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a worker finds what it needs."""

    data: Path  # holds one folder per data set
    ancestor: Path
    work: Path  # what the first two stages make
    config: Path

    def read(self) -> dict[str, Any]:
        """The settings."""
        return yaml.safe_load(self.config.read_text())

    def stored(self, arm: str, seed: int) -> Path:
        """The learngene of an arm."""
        return self.work / f"{arm.removesuffix('+head')}-{seed}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell of the comparison."""

    arm: str
    shape: str  # DEPTHxWIDTH
    seed: int


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """What a run of a job gave; a line of the CSV. Empty: not asked of this arm."""

    epoch_0: float  # test accuracy after so many epochs, per cent
    epoch_1: float
    epoch_2: float
    epoch_5: float
    epoch_10: float
    epoch_20: float
    params: int
    flops: int  # of one image's forward, two per multiply-add
    stored_bytes: int  # of the learngene in float16; 0: none
    extraction_images: int  # seen by the auxiliary
    extraction_flops: int  # of the auxiliary's and the teacher's forwards on them
    extraction_seconds: float
    seconds: float  # of growing, training and testing
    digest: str  # sha256 of the learngene; of the finetuned ancestor's file for random
    machine: str

    @property
    def job(self) -> Job:
        """The cell that this row fills."""
        return Job(arm=self.arm, shape=self.shape, seed=self.seed)


@lru_cache(maxsize=8)
def images_of(sources: Sources, split: str, limit: int) -> Images:
    """``limit`` images of a split, drawn with seed 0: the same ones for whoever asks for as many."""
    config = sources.read()
    return load_images(sources.data / config["data"], split=split, size=config["image_size"], limit=limit)


def recipe(stage: dict[str, Any], *, epochs: int, lr: float, seed: int) -> Recipe:
    """How the ancestor and every ViT is trained."""
    return Recipe(
        epochs=epochs,
        lr=lr,
        batch_size=stage["batch_size"],
        schedule=stage.get("schedule", "one-cycle"),
        label_smoothing=stage.get("label_smoothing", 0.0),
        precision=stage["precision"],
        augment=Augment(flip=True, crop_padding=stage["crop_padding"]),
        seed=seed,
    )


def make_ancestor(sources: Sources) -> None:
    """Finetune DeiT-Tiny on the data set, once; float16, with what it took and what it reaches beside it."""
    file, config = sources.work / "ancestor.safetensors", sources.read()
    if file.exists():
        return
    stage = config["ancestor"] | {"precision": precision_here(config["ancestor"]["precision"])}
    train, test = images_of(sources, "train", stage["images"]), images_of(sources, "test", stage["test"])
    bare = extract("net2net", open_ancestor(str(sources.ancestor)), {})
    model = expand(bare, num_labels=len(train.classes), image_size=config["image_size"])
    accuracies, seconds = [], 0.0
    for step in finetune(model, train, recipe=recipe(stage, epochs=stage["epochs"], lr=stage["lr"], seed=0)):
        if step.epoch_done:
            accuracies.append(evaluate(model, test, precision=stage["precision"]).accuracy)
            seconds = step.seconds
            print(f"ancestor, epoch {step.epoch + 1}: {accuracies[-1]:.1f}", flush=True)
    facts = {"accuracy": accuracies, "images_seen": stage["images"] * stage["epochs"], "seconds": round(seconds, 1)}
    facts |= {"precision": stage["precision"]}
    sources.work.mkdir(parents=True, exist_ok=True)
    (sources.work / "ancestor.json").write_text(json.dumps(facts, indent=1) + "\n")
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, file)


def finetuned(sources: Sources) -> nn.Module:
    """The finetuned ancestor, in float32."""
    config = sources.read()
    state = {name: tensor.float() for name, tensor in load_file(sources.work / "ancestor.safetensors").items()}
    shape = replace(
        ViTShape.of(open_ancestor(str(sources.ancestor))),
        image_size=config["image_size"],
        classes=len(state["head.bias"]),
    )
    model = shape.build()
    model.load_state_dict(state, strict=True)
    return model.eval()


def make_learngene(job: Job, sources: Sources) -> str:
    """Extract an arm's learngene with the job's seed, in float16; its digest."""
    config, file = sources.read(), sources.stored(job.arm, job.seed)
    arm = config["arms"][job.arm]
    settings = dict(arm.get("settings", {}))
    data: dict[str, Images] = {}
    if "epochs" in settings:  # it is trained
        settings["seed"] = job.seed
        data = {config["data"]: images_of(sources, "train", config["extraction"]["images"])}
    facts = {
        "name": f"{ANCESTOR} finetuned on {config['data']}",
        "license": "Apache-2.0",
        "source": f"timm names, file sha256 {file_digest(str(sources.ancestor))}, then benchmarks/learned.py",
    }
    state = file.with_suffix(".state")
    learngene = extract(arm["method"], finetuned(sources), data, settings=settings, facts=facts, state_dir=state)
    notes = {"command": "python benchmarks/learned.py --data DIR --ancestor FILE", "machine": machine("cpu")}
    notes |= {"terms": {config["data"]: config["terms"]}}
    learngene = replace(learngene.to(torch.float16), provenance={**learngene.provenance, **notes})
    digest = learngene.save(file)
    shutil.rmtree(state)
    return digest


@lru_cache(maxsize=4)
def open_learngene(path: Path) -> Learngene:
    """The learngene of this file, once per process."""
    return Learngene.load(path)


def initialise(job: Job, sources: Sources, classes: int) -> nn.Module:
    """The ViT at the start of a run."""
    config = sources.read()
    depth, width = parse_shape(job.shape)
    if job.arm == "random":
        heads, side = width // config["head_dim"], config["image_size"]
        shape = ViTShape(depth=depth, width=width, heads=heads, image_size=side, classes=classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            return shape.build()
    learngene = open_learngene(sources.stored(job.arm, job.seed))
    if "head" in learngene.settings:
        head = "inherit" if job.arm.endswith("+head") else "fresh"
        learngene = replace(learngene, settings={**learngene.settings, "head": head})
    model = expand(
        learngene, depth=depth, width=width, num_labels=classes, image_size=config["image_size"], seed=job.seed
    )
    if job.arm == "net2net+head":
        head_of_net2net(model, finetuned(sources))
    return model


@torch.no_grad()
def head_of_net2net(model: nn.Module, ancestor: nn.Module) -> None:
    """Give it the ancestor's classifier: the leading columns, as net2net keeps the leading units below its width."""
    width = model.head.weight.shape[1]  # type: ignore[union-attr]
    model.head.weight.copy_(ancestor.head.weight[:, :width])  # type: ignore[union-attr]
    model.head.bias.copy_(ancestor.head.bias)  # type: ignore[union-attr]


def measure(job: Job, sources: Sources) -> Row:
    """One run of one job."""
    began, config = time.perf_counter(), sources.read()
    stage = config["tuning"]
    train, test = images_of(sources, "train", stage["images"]), images_of(sources, "test", stage["test"])
    model = initialise(job, sources, len(train.classes))
    scratch = job.arm == "random"
    told = stage["random_epochs"] if scratch else stage["epochs"]
    reached = {0: evaluate(model, test, precision=stage["precision"]).accuracy}
    how = recipe(stage, epochs=max(told), lr=stage["random_lr" if scratch else "lr"], seed=job.seed)
    for step in finetune(model, train, recipe=how):
        if step.epoch_done and step.epoch + 1 in told:
            reached[step.epoch + 1] = evaluate(model, test, precision=stage["precision"]).accuracy
    learngene = None if scratch else open_learngene(sources.stored(job.arm, job.seed))
    made = {} if learngene is None else learngene.provenance
    shape = ViTShape.of(model)
    return Row(
        **asdict(job),
        **{f"epoch_{epoch}": round(reached.get(epoch, math.nan), 4) for epoch in EPOCHS},
        params=shape.params(),
        flops=shape.flops(),
        stored_bytes=2 * learngene.params if learngene else 0,
        extraction_images=made.get("images_seen", 0),
        extraction_flops=made.get("flops", 0) + made.get("teacher_flops", 0),
        extraction_seconds=made.get("seconds", 0.0),
        seconds=round(time.perf_counter() - began, 2),
        digest=learngene.digest if learngene else file_digest(str(sources.work / "ancestor.safetensors")),
        machine=machine("cpu"),
    )


def told_learngene(job: Job, digest: str) -> str:
    """A line of the second stage."""
    return f"{job.arm} seed {job.seed}: {digest[:12]}"


def told_row(job: Job, row: Row) -> str:
    """A line of the third stage."""
    reached = [getattr(row, f"epoch_{epoch}") for epoch in EPOCHS]
    told = " ".join(f"{accuracy:.1f}" for accuracy in reached if not math.isnan(accuracy))
    return f"{job.arm} {job.shape} seed {job.seed}: {told} in {row.seconds:.0f} s"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of cifar100/train.parquet and test.parquet")
    parser.add_argument("--ancestor", type=Path, help="safetensors file of timm's deit_tiny_patch16_224")
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "learned.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "learned", help="where learngenes are kept")
    parser.add_argument("--arms", help="of those of the settings; default: all")
    parser.add_argument("--seeds", help="default: those of the settings")
    parser.add_argument("--shapes", help="default: those of the settings")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; default: 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "learned.csv")
    parser.add_argument("--summarise", action="store_true", help="only summarise the rows of --out, beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or summarise what is there."""
    args = arguments(argv)
    if args.summarise:
        from _learned_summary import write_summary

        config = yaml.safe_load(args.config.read_text())
        print(write_summary(read_rows(args.out, Row), args.out.with_suffix(""), config))
        return 0
    if args.data is None or args.ancestor is None:
        raise SystemExit("--data and --ancestor are missing: the folder of the data set, and DeiT-Tiny's weights")
    sources = Sources(data=args.data, ancestor=args.ancestor, work=args.work, config=args.config)
    config = sources.read()
    arms = args.arms.split(",") if args.arms else list(config["arms"])
    shapes = args.shapes.split(",") if args.shapes else config["shapes"]
    make_ancestor(sources)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(sources.work / "ancestor.json", args.out.with_name(f"{args.out.stem}_ancestor.json"))
    failed = 0
    for seed in [int(text) for text in args.seeds.split(",")] if args.seeds else config["seeds"]:
        there = [arm for arm in arms if seed in config["arms"][arm.removesuffix("+head")].get("seeds", [seed])]
        makers = [
            Job(arm=arm, shape="", seed=seed)
            for arm in dict.fromkeys(arm.removesuffix("+head") for arm in there)
            if arm != "random" and not sources.stored(arm, seed).exists()
        ]
        failed += run(makers, functools.partial(make_learngene, sources=sources), told_learngene, args.workers, None)
        done = {row.job for row in read_rows(args.out, Row) if row.digest == digest_of(row.job, sources)}
        todo = [Job(arm=arm, shape=shape, seed=seed) for shape in shapes for arm in there]
        todo = [job for job in todo if job not in done]
        failed += run(todo, functools.partial(measure, sources=sources), told_row, args.workers, args.out)
    return 1 if failed else 0


def digest_of(job: Job, sources: Sources) -> str:
    """What a row of this job is made from now; "" where it is not there."""
    if job.arm == "random":
        return file_digest(str(sources.work / "ancestor.safetensors"))
    path = sources.stored(job.arm, job.seed)
    return open_learngene(path).digest if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
