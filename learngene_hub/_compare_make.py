"""The learngenes of a comparison: those that are named, and those that are made of its ancestor first.

What is made lies in ``plan.work`` in float16 under a name that holds a digest of everything it was made from, so that
another plan makes its own. Private to ``comparison.py``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub import _ancestors
from learngene_hub._compare_plan import TAUGHT, Plan, Start, parse_shape
from learngene_hub._compare_row import Job
from learngene_hub.data import Augment, Images, load_images
from learngene_hub.descendant import Descendant
from learngene_hub.errors import DataError, StoreError
from learngene_hub.factory import expand, extract
from learngene_hub.hub import locate, pull
from learngene_hub.learngene import Learngene
from learngene_hub.shape import Preprocessing, ViTShape
from learngene_hub.teacher import Answers, Teacher
from learngene_hub.training import Batches, Recipe, distillation_loss, fit, image_batches, logits_of

RATES = {"distilled": 1e-3, "adapted": 2e-4}  # peaks, of what begins at random and of the ancestor
DISTILLED = Recipe(batch_size=64, schedule="cosine", warmup=0.1, augment=Augment(flip=True, crop_padding=6))

COSMETIC = ("name", "recipe", "head", "extraction_flops")  # of a start: nothing that its learngene is made of


@dataclass(frozen=True, eq=False)
class Making:
    """A learngene to be made."""

    start: Start
    shape: str = ""  # of what is distilled; "" of what grows to any
    seed: int = 0  # of what is distilled or trained

    def path(self, plan: Plan) -> Path:
        """Where it lies once it is made."""
        made_of = {key: value for key, value in asdict(self.start).items() if key not in COSMETIC and value}
        said = {"start": made_of, "shape": self.shape, "seed": self.seed}
        said |= {"ancestor": plan.ancestor, "weights": plan.ancestor_weights, "size": plan.image_size}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:12]
        safe = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in self.start.name)
        return Path(plan.work) / f"{safe}{'-' if self.shape else ''}{self.shape}-{digest}.safetensors"


def making_of(plan: Plan, start: Start, shape: str) -> Making | None:
    """What is made for a run of ``start`` at ``shape``; None where nothing has to be."""
    if start.kind in ("learngene", "random", "mimetic"):
        return None
    if start.kind == "full":
        return Making(replace(start, kind="method", source="net2net"))
    return Making(start, shape=shape) if start.kind == "distilled" else Making(start)


def required(plan: Plan) -> list[Making]:
    """What the plan's runs are grown from and is not there yet, each once.

    Raises:
        RegistryError, StoreError: a learngene that is named, or the ancestor's weights, are not there.
    """
    for start in plan.starts:
        if start.kind == "learngene":
            locate(start.source)
    if plan.ancestor_weights and not Path(plan.ancestor_weights).is_file():
        raise StoreError(f"no file {plan.ancestor_weights}; the weights of {plan.ancestor} would work")
    makings = [making_of(plan, plan.start(job.start), job.shape) for job in plan.jobs()]
    by_path = {making.path(plan): making for making in makings if making}
    return [making for path, making in sorted(by_path.items()) if not path.exists()]


def make(making: Making, plan: Plan, device: str) -> str:
    """Make a learngene and keep it; its digest."""
    model, preprocessing, facts = open_ancestor(plan.ancestor or "", plan.ancestor_weights)
    start = making.start
    if start.blocks:
        whole = extract("net2net", model, {}, facts=facts, preprocessing=preprocessing)
        model = expand(whole, depth=start.blocks).eval()
    data = {name: load_images(source, size=plan.image_size, limit=start.limit) for name, source in start.data.items()}
    if start.kind in TAUGHT:
        found = _distilled(making, plan, model, data, preprocessing, facts, device)
    else:
        settings = dict(start.settings)
        found = extract(start.source, model, data, settings=settings, facts=facts, preprocessing=preprocessing)
    path = making.path(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    return found.to(torch.float16).save(path)


def digest_of(plan: Plan, job: Job) -> str:
    """The sha256 of what a run of ``job`` grows from; "" where that is nothing, or not there."""
    start = plan.start(job.start)
    making = making_of(plan, start, job.shape)
    if making is None:
        return _digest(str(locate(start.source).path)) if start.kind == "learngene" else ""
    path = making.path(plan)
    return _digest(str(path)) if path.exists() else ""


@lru_cache(maxsize=64)
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def learngene_of(plan: Plan, job: Job) -> tuple[Learngene, int]:
    """What a run grows from, and its bytes as stored."""
    making = making_of(plan, plan.start(job.start), job.shape)
    path = str(making.path(plan)) if making else plan.start(job.start).source
    return _open(path), (Path(path) if making else locate(path).path).stat().st_size


@lru_cache(maxsize=16)
def _open(name: str) -> Learngene:
    """The learngene of a path or a name, once per process."""
    return pull(name)


@lru_cache(maxsize=2)
def open_ancestor(name: str, weights: str | None) -> tuple[nn.Module, Preprocessing, dict[str, str]]:
    """The ancestor in float32, what it expects of pixels, and what is said of it."""
    if Path(name).is_dir():
        found = Descendant.from_pretrained(name)
        return found.timm_model.float().eval(), found.preprocessing, {"name": Path(name).name}
    model, preprocessing = _ancestors.load_named(name, Path(weights) if weights else None)
    return model.float().eval(), preprocessing, {"name": name}


def cost_of(learngene: Learngene, start: Start) -> dict[str, float]:
    """What the extraction took: images seen, FLOPs with backward passes, seconds; nan where nobody knows."""
    said, unknown = learngene.provenance, float("nan")
    flops = start.extraction_flops
    if flops is None:
        flops = 3.0 * said["flops"] + said.get("teacher_flops", 0) if "flops" in said else unknown
    return {
        "extraction_images": float(said.get("images_seen", unknown)),
        "extraction_flops": float(flops),
        "extraction_seconds": float(said.get("wall_seconds", said.get("seconds", unknown))),
    }


# The rivals that the ancestor teaches ---------------------------------------------------------------------------------


def _distilled(
    making: Making,
    plan: Plan,
    ancestor: nn.Module,
    data: dict[str, Images],
    preprocessing: Preprocessing,
    facts: dict[str, str],
    device: str,
) -> Learngene:
    """A random ViT of one shape, or the ancestor itself at the plan's image size, that has learned what the ancestor
    says of ``data``, as a learngene of net2net.

    It may compute start.flops / start.sizes: its part of the teacher's forwards, made once for all sizes, and its own
    training.
    """
    start, began = making.start, time.perf_counter()
    images, native = _joined(data), ViTShape.of(ancestor)
    teacher = Teacher(ancestor.to(device), preprocessing, cache=Path(plan.work) / "said")
    answers = Answers(teacher, data, size=start.teacher_size, preprocessing=preprocessing, role="ancestor")
    said_NC, teacher_flops = answers.of_all(), answers.flops * len(images) / start.sizes
    model = _pupil(making, plan, ancestor, native)
    shape = ViTShape.of(model)
    updates = int((start.flops / start.sizes - teacher_flops) / (3 * shape.flops() * DISTILLED.batch_size))
    if updates < 1:
        raise DataError(f"start {start.name}: {start.flops:.3g} FLOPs for {start.sizes} sizes leave none to learn with")
    recipe = replace(DISTILLED, epochs=1, seed=making.seed, lr=RATES[start.kind])
    batches = _numbered(images, recipe, preprocessing)

    def loss(student: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, numbers = batch
        return distillation_loss(logits_of(student(x)), said_NC.to(x.device)[numbers])

    for _ in fit(model, batches, loss, recipe=recipe, steps_per_epoch=updates, device=device):
        pass
    learngene = extract("net2net", model.cpu(), {}, facts=facts, preprocessing=preprocessing)
    seen = updates * recipe.batch_size
    made = {"data": {name: len(each) for name, each in data.items()}, "steps": updates, "images_seen": seen}
    made |= {"flops": seen * shape.flops(), "teacher_flops": int(teacher_flops)}
    return replace(learngene, provenance={**made, "seconds": round(time.perf_counter() - began, 3)})


def _pupil(making: Making, plan: Plan, ancestor: nn.Module, native: ViTShape) -> Any:
    """What the ancestor teaches, with its classifier's outputs."""
    if making.start.kind == "distilled":
        depth, width = parse_shape(making.shape)
        heads = width // native.head_dim
        return drawn(replace(native, depth=depth, width=width, heads=heads, image_size=plan.image_size), making.seed)
    whole = extract("net2net", ancestor, {}, facts={})
    model: Any = expand(whole, num_labels=native.classes, image_size=plan.image_size)
    with torch.no_grad():
        model.head.load_state_dict(ancestor.head.state_dict())  # type: ignore[union-attr]  # timm's
    return model


def _numbered(images: Images, recipe: Recipe, preprocessing: Preprocessing) -> Batches:
    """Batches without end, shuffled anew each time around, whose labels are the images' own numbers."""
    numbered = Images(images.pixels, torch.arange(len(images)), tuple(map(str, range(len(images)))), images.name)
    batches, _ = image_batches(numbered, recipe, preprocessing)

    def endless(epoch: int) -> Iterator[Any]:
        for turn in count(epoch):
            yield from batches(turn)

    return endless


def _joined(data: dict[str, Images]) -> Images:
    """All images of all data sets, with one label."""
    pixels = torch.cat([each.pixels for each in data.values()])
    return Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("any",), "+".join(data))


def drawn(shape: ViTShape, seed: int) -> nn.Module:
    """timm's ViT of this shape, drawn with ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shape.build()
