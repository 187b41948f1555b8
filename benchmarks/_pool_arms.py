"""The arms of pool.py: what each makes of the ancestor. What they cost stands in ``_pool_cost.py``."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import learned
import torch
import yaml
from _arms import ANCESTOR, file_digest, machine
from _pool_cost import Arm, Cost, cost_of, passes, shapes_of
from torch import Tensor, nn

from learngene_hub.data import Augment, Images, seed_of
from learngene_hub.factory import expand, extract, finetune, plan
from learngene_hub.learngene import Learngene
from learngene_hub.methods._stitch_growth import accuracies
from learngene_hub.methods._stitch_net import fresh, resized
from learngene_hub.methods._stitch_training import Lesson, make_lesson, pool_loss
from learngene_hub.methods._stitch_training import run as train
from learngene_hub.methods.learngene_pool import Auxiliary
from learngene_hub.methods.sn_net import stitch
from learngene_hub.shape import IMAGENET, Shape, ViTShape
from learngene_hub.teacher import Teacher
from learngene_hub.training import Recipe, StateDir, logits_of, state_digest


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a worker finds what it needs."""

    data: Path  # holds one folder per data set
    ancestor: Path
    work: Path  # pools are kept here
    learned: Path  # holds the finetuned ancestor
    config: Path

    def read(self) -> dict[str, Any]:
        """The settings."""
        return yaml.safe_load(self.config.read_text())

    @property
    def finetuned(self) -> Path:
        """The weights of the finetuned ancestor."""
        return self.learned / "ancestor.safetensors"

    @property
    def of_learned(self) -> learned.Sources:
        """The same for learned.py, with its own settings."""
        settings = Path(learned.__file__).with_name(self.read().get("ancestor_settings", "learned.yaml"))
        return learned.Sources(data=self.data, ancestor=self.ancestor, work=self.learned, config=settings)

    def make_ancestor(self) -> None:
        """Finetune it, where that was not done yet."""
        learned.make_ancestor(self.of_learned)

    def images(self, split: str) -> Images:
        """The images of the comparison."""
        return learned.images_of(self.of_learned, split, self.read()[split])

    def stored(self, arm: str, seed: int) -> Path:
        """The pool of an arm."""
        return self.work / f"{arm}-{seed}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network that an arm gives."""

    shape: Shape
    model: Callable[[], nn.Module]
    number: int = -1  # of the route in its pool
    held_out: float = math.nan  # accuracy, per cent


@dataclass(frozen=True, kw_only=True)
class Made:
    """What an arm gives, and what it took."""

    networks: Sequence[Network]
    cost: Cost
    stored_bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Bench:
    """An arm, and all that it is made from."""

    arm: Arm
    sources: Sources
    ancestor: nn.Module = field(repr=False)

    @property
    def own(self) -> ViTShape:
        """The ancestor's shape."""
        return ViTShape.of(self.ancestor)

    @property
    def data(self) -> dict[str, Images]:
        """All images of the training."""
        return {self.arm.config["data"]: self.sources.images("train")}

    @property
    def kept(self) -> Images:
        """Those that are learned from: the ones that a pool of this seed learns from."""
        (images,) = self.data.values()
        generator = torch.Generator().manual_seed(self.arm.seed)
        return images.split(self.arm.config["common"]["held_out"], generator)[0]

    @property
    def facts(self) -> dict[str, str]:
        """Of the ancestor, for a learngene."""
        return {
            "name": f"{ANCESTOR} finetuned on {self.arm.config['data']}",
            "sha256": state_digest(self.ancestor),
            "license": "Apache-2.0",
            "source": f"timm names, file sha256 {file_digest(str(self.sources.ancestor))}, then benchmarks/learned.py",
        }

    @property
    def cost(self) -> Cost:
        """Of the arm."""
        return cost_of(self.arm, self.own)


def make(config: dict[str, Any], name: str, seed: int, sources: Sources) -> Made:
    """One arm with one seed."""
    bench = Bench(
        arm=Arm(config=config, name=name, seed=seed), sources=sources, ancestor=learned.finetuned(sources.of_learned)
    )
    kinds = {"pool": make_pool, "scratch": make_scratch, "sn-net": make_sn_net, "alone": make_alone}
    return {**kinds, "net2net": make_net2net}[bench.arm.told["kind"]](bench)


def make_pool(bench: Bench) -> Made:
    """learngene-pool. Arms that differ in the second stage alone share the state of the first."""
    first = {
        key: value for key, value in bench.arm.settings.items() if key not in ("init", "init_images", "epochs", "lr")
    }
    identity = {"ancestor": bench.facts["sha256"], "images": bench.arm.config["train"], "settings": json.dumps(first)}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    state = StateDir(bench.sources.work / f"first-{name}.state", identity)
    shutil.rmtree(state.path / "pool", ignore_errors=True)
    learngene = bench.arm.pool.extract(
        bench.ancestor, bench.data, facts=bench.facts, preprocessing=IMAGENET, state_dir=state
    )
    return keep(bench, learngene)


def make_scratch(bench: Bench) -> Made:
    """Instances trained from scratch with labels, then stitched as sn-net stitches anchors that are there."""
    method, recipe = bench.arm.sn_net, bench.arm.sn_net.recipe(first=True)

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=recipe.label_smoothing)

    anchors, lesson = [], lesson_of(bench)
    for number, shape in bench.arm.pool.instances(bench.own).items():
        anchors.append(fresh(shape, seed_of("instance", bench.arm.seed, number)))
        train(anchors[-1], loss, recipe, lesson, iter, None)
    learngene = stitch(
        anchors, bench.data, method=method, teacher=Teacher(bench.ancestor, name="the ancestor"), facts=bench.facts
    )
    return keep(bench, learngene)


def make_sn_net(bench: Bench) -> Made:
    """sn-net of the ancestor."""
    learngene = extract(bench.arm.sn_net, bench.ancestor, bench.data, facts=bench.facts)
    return keep(bench, learngene)


def keep(bench: Bench, learngene: Learngene) -> Made:
    """Store a pool in float16; its routes, as a user grows them."""
    arm = bench.arm
    notes = {"command": "python benchmarks/pool.py --data DIR --ancestor FILE", "machine": machine("cpu")}
    notes |= {"terms": {arm.config["data"]: arm.config["terms"]}}
    learngene = replace(learngene.to(torch.float16), provenance={**learngene.provenance, **notes})
    digest = learngene.save(bench.sources.stored(arm.name, arm.seed))
    networks = networks_of(learngene, straight=arm.told.get("tested") == "straight")
    return Made(networks=networks, cost=bench.cost, stored_bytes=2 * learngene.params, digest=digest)


def networks_of(learngene: Learngene, *, straight: bool) -> list[Network]:
    """The routes of a pool, each grown by itself; ``straight``: those of as many blocks as its instances alone."""
    table = accuracies(learngene)
    found = []
    for number in table:
        settings = {"route": number}
        shape = plan(learngene, settings=settings)
        if not straight or shape.depth == learngene.shape.depth:  # type: ignore[union-attr]
            grow = functools.partial(expand, learngene, settings=settings)
            found.append(Network(shape=shape, model=grow, number=number, held_out=table[number]))
    return found


def lesson_of(bench: Bench) -> Lesson:
    """What the instances learn from."""
    return make_lesson(bench.arm.pool, Teacher(bench.ancestor), bench.data, bench.own, IMAGENET, bench.arm.name)


def make_alone(bench: Bench) -> Made:
    """One instance, distilled as for the pool, then trained with the pool's loss."""
    method, number, lesson = bench.arm.pool, bench.arm.told["instance"], lesson_of(bench)
    shapes = method.instances(bench.own)
    student = Auxiliary(method, shapes[number], bench.own, number, method._places(number, shapes))
    first, second = method.recipe(first=True), method.recipe(first=False)
    seen = resized(bench.ancestor, lesson.size).requires_grad_(False)
    train(student, student.lesson(method, seen, first), first, lesson, iter, None)

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return pool_loss(method, lesson, logits_of(model(batch[0])), *batch, second.label_smoothing)

    train(student.vit, loss, second, lesson, iter, None)
    return singles(bench, [student.vit])


def make_net2net(bench: Bench) -> Made:
    """ViTs cut out of the ancestor, with what its classifier reads of them, tuned with labels."""
    bare, found = extract("net2net", bench.ancestor, {}), []
    for shape in shapes_of(bench.arm, bench.own):
        model = expand(
            bare, depth=shape.depth, width=shape.width, num_labels=shape.classes, image_size=shape.image_size
        )
        learned.head_of_net2net(model, bench.ancestor)
        epochs, images = passes(bench.arm, shape, bench.own)
        for _ in finetune(model, bench.kept.subset(range(images)), recipe=tuning(bench.arm, epochs)):
            pass
        found.append(model)
    return singles(bench, found)


def tuning(arm: Arm, epochs: int) -> Recipe:
    """Of the ViTs that are tuned by themselves."""
    common = arm.config["common"]
    return Recipe(
        epochs=epochs, lr=arm.told["lr"], batch_size=common["batch_size"], weight_decay=common["weight_decay"],
        schedule="cosine", warmup=common["warmup"], label_smoothing=common["label_smoothing"], seed=arm.seed,
        precision=common["precision"], augment=Augment(flip=True, crop_padding=common["crop_padding"]),
    )  # fmt: skip


def singles(bench: Bench, models: Sequence[nn.Module]) -> Made:
    """Networks by themselves."""
    networks = [Network(shape=ViTShape.of(model), model=functools.partial(_itself, model)) for model in models]
    digest = hashlib.sha256("".join(state_digest(model) for model in models).encode()).hexdigest()
    params = sum(network.shape.params() for network in networks)
    return Made(networks=networks, cost=bench.cost, stored_bytes=2 * params, digest=digest)


def _itself(model: nn.Module) -> nn.Module:
    return model
