"""What continual.py compares, before any task: the ancestor, the pool, and what else could have been made of the data.

``base``         the ancestor, used to 64 px; the anchor of the pool and the start of all others
``pool``         an entry of the corpus, with the anchor frozen
``retrain``      the base finetuned on all corpora so far, at as many passes of images as the pool has spent on them
``sequential``   the one before finetuned on the corpus: old data is not seen again
``last``         the base finetuned on the corpus alone

For the first corpus the last three are one model. Each is kept as a learngene of net2net, so that one rule of depth
holds for all. A row tells what it took, and how much of each corpus a linear probe reads off its features: the head is
fitted anew to images of that corpus that growing saw, and read on others, so that what falls are the features, not a
head that is out of date. The row of an entry tells of it alone, at weight 1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from _arms import ANCESTOR, file_digest, machine, open_ancestor
from _continual_data import Sources, corpus, images_of, joined, per_class, recipe
from _runs import read_rows

from learngene_hub._pool_amounts import Head, fitted_heads
from learngene_hub._pool_features import features
from learngene_hub.data import Images
from learngene_hub.factory import expand, extract, finetune, grow
from learngene_hub.learngene import Learngene
from learngene_hub.pool import Pool
from learngene_hub.shape import ViTShape

BASE, POOL, STORED = "base", "pool", ("retrain", "sequential", "last")


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Something that is made of the first ``size`` corpora."""

    arm: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Grown(Growth):
    """What it took; a line of the CSV."""

    images_seen: int  # in this training, passes counted
    flops: int  # of the forwards on them
    seconds: float  # of this training
    loss: float  # of its last update
    probes: str  # JSON: corpus -> accuracy of a linear probe on its held-out images, per cent
    digest: str  # sha256 of the learngene, or of the entry
    source: str  # what it was made from: settings and the ancestor, in 16 hex digits
    machine: str

    @property
    def job(self) -> Growth:
        """What this row is about."""
        return Growth(arm=self.arm, size=self.size)


def growths(sizes: int) -> list[Growth]:
    """Everything that is made, each after what it needs."""
    wanted = [Growth(arm=BASE, size=0)]
    for size in range(1, sizes + 1):
        arms = ("last",) if size == 1 else STORED  # of one corpus they are one
        wanted += [Growth(arm=arm, size=size) for arm in (POOL, *arms)]
    return wanted


def stored(sources: Sources, arm: str, size: int) -> Path:
    """The learngene of an arm that is one file."""
    name = BASE if arm == BASE else f"{'last' if size == 1 else arm}-{size}"
    return sources.work / f"{name}.safetensors"


@lru_cache(maxsize=4)
def open_learngene(path: Path) -> Learngene:
    """The learngene of this file, once per process."""
    return Learngene.load(path)


@lru_cache(maxsize=2)
def _opened(folder: Path, manifest: str) -> Pool:
    """The pool of this folder while its manifest is this text."""
    del manifest
    return Pool.load(folder)


def pool_of(sources: Sources, size: int) -> Pool:
    """The pool as it was when it had ``size`` entries."""
    folder = sources.work / "pool"
    pool = _opened(folder, (folder / "pool.json").read_text())
    return replace(pool, manifest=replace(pool.manifest, entries=pool.manifest.entries[:size]))


def source_of(sources: Sources, arm: str) -> str:
    """16 hex digits of all that an arm depends on."""
    config = sources.read()
    keys = ["image_size", "precision", "ancestor"]
    if arm != BASE:
        keys += ["corpora", "superclasses", "corpus", "pool" if arm == POOL else "finetuning"]
    told = [config[key] for key in keys] + [file_digest(str(sources.ancestor))]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def missing(sources: Sources, sizes: int) -> list[Growth]:
    """What is to be made, in order: what has no row of these settings or no file, and all that stands on it."""
    found = list[Growth]()
    rows = read_rows(sources.beside("growing"), Grown)
    done = {row.job for row in rows if row.source == source_of(sources, row.arm)}
    pool = sources.work / "pool"
    names = Pool.load(pool).names if pool.exists() else ()
    for job in growths(sizes):
        there = len(names) >= job.size if job.arm == POOL else stored(sources, job.arm, job.size).exists()
        under = {POOL: [POOL], "sequential": ["sequential", "last"][: 2 if job.size == 2 else 1]}.get(job.arm, [])
        before = Growth(arm=BASE, size=0) in found or any(o.arm in under and o.size < job.size for o in found)
        if job not in done or not there or before:
            found.append(job)
    return found


def make(job: Growth, sources: Sources) -> Grown:
    """Train it, store it, and read off what it knows of the corpora."""
    began = time.perf_counter()
    told = _entry(job, sources) if job.arm == POOL else _model(job, sources)
    seconds, names = time.perf_counter() - began, list(sources.read()["corpora"])
    if job.arm == POOL:
        pool = pool_of(sources, job.size)
        learngene, digest = pool.merge({names[job.size - 1]: 1.0}), pool.row(names[job.size - 1]).sha256
    else:
        learngene = open_learngene(stored(sources, job.arm, job.size))
        digest = learngene.digest
    probes = json.dumps({name: round(corpus_probe(learngene, sources, name), 3) for name in names})
    return Grown(
        arm=job.arm, size=job.size, **told, seconds=round(seconds, 2), probes=probes, digest=digest,
        source=source_of(sources, job.arm), machine=machine("cpu"),
    )  # fmt: skip


def _entry(job: Growth, sources: Sources) -> dict[str, Any]:
    """Adds the entry of a corpus to the pool; what the training took."""
    config, folder = sources.read(), sources.work / "pool"
    if job.size == 1:
        _cleared(folder)
        Pool.create(
            folder, open_learngene(stored(sources, BASE, 0)), entry=config["pool"]["entry"],
            components=config["pool"]["components"], image_size=config["image_size"],
        )  # fmt: skip
    pool = pool_of(sources, job.size - 1)
    if len(Pool.load(folder)) != len(pool):
        raise SystemExit(f"{folder} has more entries than rows tell of; without the folder it is made again")
    images = corpus(sources, list(config["corpora"])[job.size - 1], "train")
    chosen = recipe(config["pool"], precision=config["precision"], seed=config["pool"]["seed"])
    pool = pool.add(images, recipe=chosen)
    made = pool.read(images.name).provenance
    return {"images_seen": made["images_seen"], "flops": made["flops"], "loss": made["loss"][-1]}


def _cleared(folder: Path) -> None:
    """Removes a pool that other settings made."""
    if folder.exists():
        shutil.rmtree(folder)


def _model(job: Growth, sources: Sources) -> dict[str, Any]:
    """Trains a whole ViT and stores it as a learngene; what the training took."""
    config = sources.read()
    stage, images = config["ancestor" if job.arm == BASE else "finetuning"], _data(job, sources)
    shape = {"num_labels": len(images.classes), "image_size": config["image_size"], "seed": stage["seed"]}
    model = expand(_start(job, sources), depth=12, width=192, **shape)
    last = None
    for step in finetune(model, images, recipe=recipe(stage, precision=config["precision"], seed=stage["seed"])):
        last = step
    if last is None:
        raise SystemExit(f"{job}: nothing was trained")
    facts = {"name": ANCESTOR, "license": "Apache-2.0", "source": f"finetuned by continual.py as {job.arm}"}
    learngene, file = extract("net2net", model, {}, facts=facts), stored(sources, job.arm, job.size)
    file.parent.mkdir(parents=True, exist_ok=True)
    learngene.save(file)
    open_learngene.cache_clear()
    return {"images_seen": last.images, "flops": last.images * ViTShape.of(model).flops(), "loss": round(last.loss, 5)}


def _start(job: Growth, sources: Sources) -> Learngene:
    """What a whole ViT is finetuned from."""
    if job.arm == BASE:
        facts = {"name": ANCESTOR, "license": "Apache-2.0", "source": file_digest(str(sources.ancestor))}
        return extract("net2net", open_ancestor(str(sources.ancestor)), {}, facts=facts)
    if job.arm == "sequential":
        return open_learngene(stored(sources, "sequential", job.size - 1))
    return open_learngene(stored(sources, BASE, 0))


def _data(job: Growth, sources: Sources) -> Images:
    """The images that a whole ViT is finetuned on."""
    config = sources.read()
    if job.arm == BASE:
        stage = config["ancestor"]
        return images_of(sources.data / stage["data"], "train", config["image_size"], stage["images"])
    names = list(config["corpora"])[: job.size]
    if job.arm == "retrain":
        return joined([corpus(sources, name, "train") for name in names], "all so far")
    return corpus(sources, names[-1], "train")


def probe(learngene: Learngene, depth: int, few: Images, test: Images) -> tuple[Head, float]:
    """(the head fitted to the features of few images at this depth, its accuracy on others in per cent)."""
    shape = replace(learngene.shape, depth=depth, image_size=few.pixels.shape[-1], classes=0)
    model = grow(learngene, shape).eval()
    seen = features(model, few, learngene)
    (head,) = fitted_heads(seen, few.labels, len(few.classes), torch.ones(1, len(few)))
    right = head(features(model, test, learngene)).argmax(1) == test.labels
    return head, 100 * float(right.float().mean())


def corpus_probe(learngene: Learngene, sources: Sources, name: str) -> float:
    """How much of a corpus a linear probe reads off the features of the native depth, per cent."""
    few = per_class(corpus(sources, name, "train"), sources.read()["probe"], 0)
    return probe(learngene, learngene.shape.depth, few, corpus(sources, name, "test"))[1]


def told(job: Growth, row: Grown) -> str:
    """A line on stdout."""
    return f"{job.arm} of {job.size}: loss {row.loss:.2f} {row.probes} in {row.seconds:.0f} s"
