"""A descendant of continual.py: what it is grown from, its selection, a linear probe of it and its finetuning.

An arm says what a ViT of a depth begins with, when ``size`` corpora have arrived:

``anchor``                        the base: nothing was learned from any corpus
``pool``                          what TALS selects from few labelled images of the task; the anchor, where it abstains
``pool-sure``                     the same, but it may not abstain
``pool-shares``                   TALS without labels, which may not abstain: half of the shares
``soup``, ``logme``               rules of ``Pool.select`` to compare it with
``single-NAME``                   one entry, whole; the best of them on the test images is the oracle
``retrain, sequential, last``     see ``_continual_growth.py``

All start with the head of the linear probe, which is fitted to the features that the ViT has at its start: 200 images
are too few for a fresh head and the blocks at once. Then everything is finetuned.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from _arms import machine
from _continual_data import Sources, recipe, task
from _continual_growth import BASE, STORED, open_learngene, pool_of, probe, stored
from _runs import read_rows
from torch import nn

from learngene_hub._pool_amounts import Head
from learngene_hub.factory import evaluate, expand, finetune
from learngene_hub.learngene import Learngene

ANCHOR, SINGLE = "anchor", "single-"
SURE = 1e6  # times the distance at which TALS abstains: never
RULES: Mapping[str, dict[str, Any]] = {
    "pool": {"rule": "tals"},
    "pool-sure": {"rule": "tals", "tolerance": SURE},
    "pool-shares": {"rule": "tals", "tolerance": SURE, "unlabelled": True},
    "soup": {"rule": "soup"},
    "logme": {"rule": "logme"},
}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A selection that is to be made."""

    arm: str
    size: int  # entries of the pool
    set: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Found(Ask):
    """A selection; a line of the CSV."""

    weights: str  # JSON: entry -> weight
    shares: str  # JSON: entry -> share of the task's images, of those selected
    abstained: int
    residual: float
    threshold: float
    scores: str  # JSON, as of ``Selection``
    images: int
    seconds: float
    pool: str  # digest of the manifest
    machine: str

    @property
    def job(self) -> Ask:
        """What was asked."""
        return Ask(arm=self.arm, size=self.size, set=self.set, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell of the comparison."""

    way: str  # "probe": the linear probe alone; "tune": and finetuning
    arm: str
    size: int  # corpora that have arrived
    depth: int
    set: str
    seed: int  # of the task's images and of their order


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """What a run of a job gave; a line of the CSV."""

    probe: float  # test accuracy of the linear probe at the start, per cent
    tuned: float  # after finetuning; nan of the way "probe"
    seconds: float
    start: str  # digest of the weights at the start, in 16 hex digits
    source: str  # settings, and what it was grown from, in twice 8 hex digits
    machine: str

    @property
    def job(self) -> Job:
        """The cell that this row fills."""
        return Job(way=self.way, arm=self.arm, size=self.size, depth=self.depth, set=self.set, seed=self.seed)


def select(ask: Ask, sources: Sources) -> Found:
    """What a rule selects for a task."""
    pool = pool_of(sources, ask.size)
    alike = selections(sources).get(replace(ask, arm="pool")) if ask.arm == "pool-sure" else None
    if alike is not None and not alike.abstained:
        return replace(alike, arm=ask.arm)  # it did not abstain, so that asking it not to would change nothing
    few, _ = task(sources, ask.set, ask.seed)
    found = pool.select(few, seed=ask.seed, **RULES[ask.arm])
    return Found(
        **asdict(ask),
        weights=json.dumps({one.name: one.weight for one in found.entries}),
        shares=json.dumps({one.name: one.share for one in found.entries}),
        abstained=int(found.abstained),
        residual=found.residual,
        threshold=found.threshold,
        scores=json.dumps(dict(found.scores)),
        images=found.images,
        seconds=found.seconds,
        pool=pool.manifest.digest,
        machine=machine("cpu"),
    )


def selections(sources: Sources) -> dict[Ask, Found]:
    """Those that were made from the pool as it is."""
    if not (sources.work / "pool").exists():
        return {}
    sizes = len(pool_of(sources, len(sources.read()["corpora"])))
    now = {size: pool_of(sources, size).manifest.digest for size in range(1, sizes + 1)}
    rows = read_rows(sources.beside("selections"), Found)
    return {row.job: row for row in rows if row.pool == now.get(row.size)}


def weights_of(job: Job, found: Mapping[Ask, Found]) -> dict[str, float] | None:
    """Entry -> weight; None: this arm needs no pool, or its selection is not there."""
    if job.arm.startswith(SINGLE):
        return {job.arm.removeprefix(SINGLE): 1.0}
    row = found.get(Ask(arm=job.arm, size=job.size, set=job.set, seed=job.seed))
    return json.loads(row.weights) if row else None


def settings_of(config: dict[str, Any], name: str) -> str:
    """8 hex digits of how a descendant is trained and tested on a data set."""
    told = [config[key] for key in ("image_size", "precision", "few", "tuning")] + [config["sets"].get(name)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]


def source_of(job: Job, sources: Sources, found: Mapping[Ask, Found]) -> str:
    """What a row of this job depends on: settings, "-", what it is grown from; "" where that is not there."""
    weights = weights_of(job, found)
    if job.arm in (ANCHOR, *STORED) or weights == {}:
        path = stored(sources, *((job.arm, job.size) if job.arm in STORED else (BASE, 0)))
        made = open_learngene(path).digest if path.exists() else ""
    elif weights is not None and (sources.work / "pool").exists():
        rows = {row.name: row.sha256 for row in pool_of(sources, job.size).manifest.entries}
        made = json.dumps([[rows[name], weight] for name, weight in weights.items() if name in rows])
    else:
        made = ""
    if not made:
        return ""
    return f"{settings_of(sources.read(), job.set)}-{hashlib.sha256(made.encode()).hexdigest()[:8]}"


def learngene_of(job: Job, sources: Sources, found: Mapping[Ask, Found]) -> Learngene:
    """What a run is grown from."""
    if job.arm in STORED:
        return open_learngene(stored(sources, job.arm, job.size))
    weights = {} if job.arm == ANCHOR else weights_of(job, found)
    if weights is None:
        raise SystemExit(f"{job}: no selection was made for it")
    if not weights:
        return open_learngene(stored(sources, BASE, 0))
    return pool_of(sources, job.size).merge(weights)


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of a model's names and weights."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def with_head(model: nn.Module, head: Head) -> nn.Module:
    """The model with the head of a probe, whose bringing to mean 0 and deviation 1 goes into the weights."""
    weight_DC = head.scale_D[:, None] * head.weight_DC
    layer = model.get_submodule("head")
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(weight_DC.T)
        layer.bias.copy_(head.bias_C - head.mean_D @ weight_DC)
    return model


def twin_of(rows: Sequence[Row], job: Job, start: str, source: str) -> Row | None:
    """A run that began with the same weights, by the same settings, on the same images in the same order."""
    key = (job.way, job.depth, job.set, job.seed, start, source.partition("-")[0])
    alike = (
        row for row in rows if (row.way, row.depth, row.set, row.seed, row.start, row.source.partition("-")[0]) == key
    )
    return next(alike, None)


def measure(job: Job, sources: Sources) -> Row:
    """One run of one job."""
    began, config, found = time.perf_counter(), sources.read(), selections(sources)
    few, test = task(sources, job.set, job.seed)
    learngene = learngene_of(job, sources, found)
    size = {"image_size": config["image_size"], "num_labels": len(few.classes), "seed": job.seed}
    model = expand(learngene, depth=job.depth, width=192, **size)
    start, source = weights_digest(model), source_of(job, sources, found)
    twin = twin_of(read_rows(sources.out, Row), job, start, source)
    accuracies: dict[str, Any] = (
        {} if twin is None else {"probe": twin.probe, "tuned": twin.tuned, "seconds": twin.seconds}
    )
    if twin is None:
        head, reads = probe(learngene, job.depth, few, test)
        tuned = float("nan")
        if job.way == "tune":
            chosen = recipe(config["tuning"], precision=config["precision"], seed=job.seed)
            for _ in finetune(with_head(model, head), few, recipe=chosen):
                pass
            tuned = round(evaluate(model, test, precision=config["precision"]).accuracy, 4)
        accuracies = {"probe": round(reads, 4), "tuned": tuned, "seconds": round(time.perf_counter() - began, 2)}
    return Row(**asdict(job), **accuracies, start=start, source=source, machine=machine("cpu"))


def told_row(job: Job, row: Row) -> str:
    """A line on stdout."""
    return (
        f"{job.way} {job.arm} of {job.size} {job.depth}x192 {job.set} seed {job.seed}: "
        f"{row.probe:.1f} {row.tuned:.1f} in {row.seconds:.1f} s"
    )


def told_found(ask: Ask, row: Found) -> str:
    """A line on stdout."""
    what = "abstained" if row.abstained else row.weights
    return f"{ask.arm} of {ask.size} {ask.set} seed {ask.seed}: {what} {row.residual:.3f} > {row.threshold:.3f}?"
