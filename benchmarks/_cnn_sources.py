"""What cnn.py compares, made: the ancestors (its first stage) and the learngenes (its second)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from _arms import file_digest
from advantages import of_classes
from safetensors.torch import load_file, save_file
from torch import nn

from learngene_hub._conv import ConvShape
from learngene_hub.data import Augment, Images, load_images, seed_of
from learngene_hub.factory import evaluate, extract, finetune
from learngene_hub.learngene import Learngene
from learngene_hub.methods.heuristic import grow_collective
from learngene_hub.training import Recipe, Step

OPEN, NOVEL = 16, 20  # classes of the search and of the tasks; the others are the ancestors'


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a worker finds what it needs."""

    data: Path  # holds one folder per data set
    work: Path  # what the first two stages make
    config: Path

    def read(self) -> dict[str, Any]:
        """The settings."""
        return read_config(self.config)

    def ancestor(self, name: str) -> Path:
        """The weights of a trained ancestor; what it took stands beside them as JSON."""
        return self.work / f"ancestor-{name}.safetensors"

    def learngene(self, arm: str) -> Path:
        """The learngene of an arm."""
        return self.work / f"{arm}.safetensors"

    def images(self, name: str, split: str, limit: int | None = None) -> Images:
        """``limit`` images of a split, drawn with seed 0; None: all."""
        return _load(self.data / name, split, self.read()["image_size"], limit)


@lru_cache(maxsize=1)
def read_config(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@lru_cache(maxsize=4)
def _load(folder: Path, split: str, size: int, limit: int | None) -> Images:
    return load_images(folder, split=split, size=size, limit=limit)


def split_classes(count: int) -> tuple[list[int], list[int], list[int]]:
    """(base, open-world, novel) classes, no two of which share one.

    Raises:
        SystemExit: there are too few.
    """
    if count < OPEN + NOVEL + 2:
        raise SystemExit(f"a set of {count} classes given; {OPEN + NOVEL + 2} are the least")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order[OPEN : count - NOVEL], order[:OPEN], order[count - NOVEL :]


def make_ancestor(name: str, sources: Sources) -> None:
    """Train an ancestor on the base classes, once; beside it what it took and what it reaches."""
    config, file = sources.read(), sources.ancestor(name)
    if file.exists():
        return
    classes = split_classes(len(sources.images(config["data"], "train").classes))[0]
    train, test = (of_classes(sources.images(config["data"], split), classes, None, 0) for split in ("train", "test"))
    stage = config["ancestors"][name]
    print(f"{name}: {len(train):,} images of {len(classes)} classes", flush=True)
    model, facts = _grown(stage, train, config) if "tasks" in stage else _trained(stage, train, config)
    shape = ConvShape.of(model)
    facts |= {
        "accuracy": round(evaluate(model, test, precision=config["precision"]).accuracy, 2),
        "shape": shape.to_dict(),
        "params": shape.params(),
    }
    sources.work.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
    print(f"{name}: {facts['accuracy']:.1f} % after {facts['seconds']:.0f} s", flush=True)


def recipe(stage: dict[str, Any], precision: str) -> Recipe:
    """How an ancestor is trained: AdamW, random crops and flips."""
    return Recipe(**stage["recipe"], precision=precision, augment=Augment(flip=True, crop_padding=4))


def _trained(stage: dict[str, Any], train: Images, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A network of this shape that has learned all classes at once."""
    shape = ConvShape.from_dict(
        {key: value for key, value in stage.items() if key != "recipe"}
        | {"kind": "conv", "image_size": config["image_size"], "classes": len(train.classes)}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("ancestor", str(shape)))
        model = shape.build()
    *_, step = _show(finetune(model, train, recipe=recipe(stage, config["precision"])))
    return model, {
        "images_seen": step.images,
        "flops": step.images * shape.flops(),
        "seconds": round(step.seconds, 1),
    }


def _grown(stage: dict[str, Any], train: Images, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The collective, widened before each task but the first; and the curve of each of its convolutions."""
    settings = {key: value for key, value in stage.items() if key != "recipe"}
    stream = grow_collective(
        {config["data"]: train}, **settings, recipe=recipe(stage, config["precision"]), watch=_show
    )
    curve = [[round(float(share), 5) for share in task] for task in stream.curve.tasks()]
    return stream.model, {
        "images_seen": stream.images_seen,
        "flops": stream.flops,
        "seconds": round(stream.seconds, 1),
        "calmness": curve,  # task, convolution
    }


def _show(steps: Iterator[Step]) -> Iterator[Step]:
    for step in steps:
        if step.epoch_done:
            print(f"  epoch {step.epoch + 1}: loss {step.loss:.3f}, {step.seconds:.0f} s", flush=True)
        yield step


@lru_cache(maxsize=4)
def open_ancestor(file: Path) -> nn.Module:
    """A trained ancestor."""
    model = ConvShape.from_dict(json.loads(file.with_suffix(".json").read_text())["shape"]).build()
    model.load_state_dict(load_file(file), strict=True)
    return model.eval()


def make_learngene(arm: str, sources: Sources) -> None:
    """Extract an arm's learngene, once."""
    config, file = sources.read(), sources.learngene(arm)
    if file.exists():
        return
    about, ancestor = config["arms"][arm], sources.ancestor(config["arms"][arm]["ancestor"])
    settings, data = about["settings"], {}
    searched = about["method"] == "auto" and "layers" not in settings
    if searched or settings.get("fisher"):
        train = sources.images(config["data"], "train")
        base, opened, _ = split_classes(len(train.classes))
        per_class = config["search" if searched else "fisher"]["per_class"]
        data = {config["data"]: of_classes(train, opened if searched else base, per_class, 0)}
    facts = {"name": ancestor.stem, "sha256": file_digest(str(ancestor)), "license": "Apache-2.0"}
    facts["source"] = "benchmarks/cnn.py"
    learngene = extract(about["method"], open_ancestor(ancestor), data, settings=settings, facts=facts, watch=_show)
    learngene.save(file)
    print(f"{arm}: {learngene.provenance['kept']} of {learngene.shape}, {learngene.params:,} numbers", flush=True)


@lru_cache(maxsize=16)
def open_learngene(path: Path) -> Learngene:
    """The learngene of this file, once per process."""
    return Learngene.load(path)


def write_facts(out: Path, sources: Sources) -> None:
    """Beside the rows: what the ancestors took, and what the searches found."""
    config = sources.read()
    facts: dict[str, Any] = {"ancestors": {}, "learngenes": {}}
    for name in config["ancestors"]:
        if sources.ancestor(name).exists():
            facts["ancestors"][name] = json.loads(sources.ancestor(name).with_suffix(".json").read_text())
    for arm, about in config["arms"].items():
        if "method" in about and sources.learngene(arm).exists():
            learngene = open_learngene(sources.learngene(arm))
            similar = learngene.tensors.get("search.similarity")
            facts["learngenes"][arm] = {"kept": learngene.provenance["kept"], "digest": learngene.digest} | (
                {} if similar is None else {"similarity": [[round(x, 4) for x in row] for row in similar.tolist()]}
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.stem}_sources.json").write_text(json.dumps(facts, indent=1) + "\n")
