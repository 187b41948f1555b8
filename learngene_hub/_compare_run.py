"""One run of a comparison: grow, give a head, train, test. Private to ``comparison.py``."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from learngene_hub._compare_make import cost_of, digest_of, drawn, learngene_of
from learngene_hub._compare_plan import Data, Plan, Start, parse_shape
from learngene_hub._compare_row import Job, Row
from learngene_hub._first_head import fit_head
from learngene_hub._jobs import read_rows
from learngene_hub._mimetic import write_mimetic
from learngene_hub.data import Images, load_images
from learngene_hub.errors import ShapeError
from learngene_hub.factory import evaluate, expand, finetune, with_settings
from learngene_hub.shape import IMAGENET, Preprocessing, ViTShape, shape_of
from learngene_hub.training import state_digest

VERSIONS = ("learngene-hub", "torch", "timm")


def key_of(plan: Plan, job: Job) -> tuple[Job, str, str]:
    """``Row.key`` of a run of ``job`` made now."""
    data = next(each for each in plan.data if each.name == job.data)
    return job, plan.identity(plan.start(job.start), data), digest_of(plan, job)


def require_data(data: Sequence[Data]) -> None:
    """Look at one image of each split, so that data that is not there is told before the first run.

    Raises:
        DataError: a split is not there, or its first image cannot be read.
    """
    for each in data:
        for split in ("train", "test"):
            load_images(each.source, split=split, limit=1)


def measure(given: tuple[Job, str], plan: Plan, out: Path) -> Row:
    """One run of one job on one device.

    What another start began with to the last bit (net2net and the whole ancestor at the ancestor's own size, say) would
    train to the same: where such a run is in ``out``, with the same data, seed and recipe, it is this one's as well.

    Raises:
        ShapeError: the start has no descendant of that shape.
    """
    job, device = given
    began, start = time.perf_counter(), plan.start(job.start)
    data = next(each for each in plan.data if each.name == job.data)
    train = _images(data, plan, "train")
    test = _images(data, plan, "test").numbered(train.classes)
    model, preprocessing, facts = _begun(job, plan, start, len(train.classes))
    recipe, begun = plan.recipe_of(start, job.seed, len(train)), state_digest(model)[:16]
    twin = _twin(out, begun, plan.identity(start, data), job)
    if twin is not None:
        return replace(twin, **asdict(job), **facts, digest=digest_of(plan, job), same_as=twin.same_as or twin.start)
    looked = fit_head(model, train, how=plan.head_of(start), preprocessing=preprocessing, device=device, seed=job.seed)
    tested = plan.epochs_tested(start, recipe.epochs)
    reached = {0: evaluate(model, test, preprocessing=preprocessing, device=device).accuracy}
    seen, seconds = 0, 0.0
    for step in finetune(model, train, recipe=recipe, preprocessing=preprocessing, device=device):
        seen, seconds = step.images, step.seconds
        if step.epoch_done and step.epoch + 1 in tested:
            reached[step.epoch + 1] = evaluate(model, test, preprocessing=preprocessing).accuracy
    shape = shape_of(model)
    return Row(
        **asdict(job),
        **facts,
        depth=shape.depth,
        width=shape.width,
        classes=len(train.classes),
        images=len(train),
        tested=len(test),
        epochs=" ".join(map(str, reached)),
        accuracies=" ".join(f"{accuracy:.4f}" for accuracy in reached.values()),
        accuracy=round(reached[max(reached)], 4),
        params=shape.params(),
        flops=shape.flops(),
        images_seen=seen,
        train_flops=float(shape.flops()) * (3 * seen + looked),
        seconds=round(seconds, 2),
        wall_seconds=round(time.perf_counter() - began, 2),
        digest=digest_of(plan, job),
        begun=begun,
        same_as="",
        recipe=plan.identity(start, data),
        precision=recipe.precision,
        versions=" ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS),
        machine=machine(device),
    )


def _twin(out: Path, begun: str, identity: str, job: Job) -> Row | None:
    """A run in ``out`` that began with the same weights and went on in the same way."""
    alike = (begun, identity, job.data, job.seed)
    for row in read_rows(out, Row):
        if (row.begun, row.recipe, row.data, row.seed) == alike:
            return row
    return None


def _begun(job: Job, plan: Plan, start: Start, classes: int) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    """The model at its start, what it expects of pixels, and what the row says of where it is from.

    Raises:
        ShapeError: there is no descendant of that shape.
    """
    if start.is_fresh:
        depth, width = parse_shape(job.shape)
        shape = ViTShape(
            depth=depth, width=width, heads=width // plan.head_dim, image_size=plan.image_size, classes=classes
        )
        model = drawn(shape, job.seed)
        if start.kind == "mimetic":
            write_mimetic(model, seed=job.seed)
        facts = {"kind": start.kind, "stored_bytes": 0}
        return (
            model,
            IMAGENET,
            facts | dict.fromkeys(("extraction_images", "extraction_flops", "extraction_seconds"), 0.0),
        )
    learngene, nbytes = learngene_of(plan, job)
    if start.kind == "learngene":
        learngene = with_settings(learngene, start.settings)
    native = job.shape == "native"
    depth, width = (learngene.shape.depth, learngene.shape.width) if native else parse_shape(job.shape)
    model = expand(
        learngene, depth=depth, width=width, num_labels=classes, image_size=plan.image_size, seed=job.seed
    )  # a learngene of fixed sizes raises where this is none of them
    shape = shape_of(model)
    if (shape.depth, shape.width) != (depth, width):
        raise ShapeError(f"{start.name} has no {job.shape}; it grew {shape}")
    return model, learngene.preprocessing, {"kind": start.kind, "stored_bytes": nbytes, **cost_of(learngene, start)}


def _images(data: Data, plan: Plan, split: str) -> Images:
    if split == "test":
        return _read(data.source, "test", plan.image_size, plan.tested)
    if data.per_class is None:
        return _read(data.source, "train", plan.image_size, data.images)
    return _of_each_class(_read(data.source, "train", plan.image_size, None), data.per_class)


@lru_cache(maxsize=16)
def _read(source: str, split: str, size: int, limit: int | None) -> Images:
    """A split, decoded once per process; all of it where it has no more than ``limit`` images."""
    return load_images(source, split=split, size=size, limit=limit)


def _of_each_class(images: Images, count: int) -> Images:
    """The first ``count`` of each class in an order drawn with seed 0, fewer where there are fewer."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    labels = images.labels[order]
    kept = torch.cat([order[labels == c][:count] for c in labels.unique()])
    return images.subset(kept.sort().values)


def machine(device: str) -> str:
    """What ran, in words: the GPU's name, or the processor's and the threads used."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} thread(s)"


def processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
