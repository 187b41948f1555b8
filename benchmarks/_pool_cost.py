"""An arm of pool.py: its settings, and what it costs.

FLOPs are counted, not timed: images seen times the FLOPs of one image's forward (``ViTShape.flops``), three times for
what learns (its backward is about two more), once for the teacher. The linear maps of the distillation, whose inputs
need no gradient, count twice. Of the least squares the forwards of the images and the normal equations count.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from _arms import parse_shape

from learngene_hub.methods._stitching import one_way
from learngene_hub.methods.learngene_pool import LearngenePool
from learngene_hub.methods.sn_net import SnNet
from learngene_hub.shape import ViTShape

LEARNS, MAPS = 3, 2  # FLOPs of a training step over those of its forward: of a network, of the maps


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of the training of an arm."""

    first_students: int = 0
    first_teacher: int = 0
    second_students: int = 0
    second_teacher: int = 0
    solving: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An arm of the settings, with a seed."""

    config: dict[str, Any]
    name: str
    seed: int = 0

    @property
    def told(self) -> dict[str, Any]:
        """What the settings say of it."""
        return self.config["arms"][self.name]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its method."""
        sizes = {} if self.told["kind"] == "sn-net" else self.config["pool"]
        return self.config["common"] | sizes | self.told.get("settings", {}) | {"seed": self.seed}

    @property
    def pool(self) -> LearngenePool:
        """The settings as those of learngene-pool."""
        return LearngenePool(**self.settings)

    @property
    def sn_net(self) -> SnNet:
        """The settings as those of sn-net."""
        own = {key: value for key, value in self.settings.items() if key != "depth"}
        return SnNet(**own)

    @property
    def kept(self) -> int:
        """Images that are learned from."""
        return self.config["train"] - round(self.config["train"] * self.config["common"]["held_out"])

    def seen(self, stage: str) -> int:
        """Images seen in a stage, "first_epochs" or "epochs", by each network that is trained in it."""
        batch = self.config["common"]["batch_size"]
        return self.settings[stage] * (self.kept // batch) * batch


def recipe_of(config: dict[str, Any], arm: str) -> str:
    """A digest of all settings that the rows of an arm follow from."""
    shared = {key: value for key, value in config.items() if key not in ("arms", "seeds", "terms", "reference")}
    told = {"shared": shared, "arm": config["arms"][arm]}
    if "shares" in config["arms"][arm]:  # its compute is that of the reference
        told["reference"] = config["arms"][config["reference"]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def cost_of(arm: Arm, own: ViTShape) -> Cost:
    """The FLOPs of an arm, for an ancestor of shape ``own`` at the size of the images."""
    kind = arm.told["kind"]
    if kind == "net2net":
        tuned = [(shape, *passes(arm, shape, own)) for shape in shapes_of(arm, own)]
        return Cost(second_students=sum(LEARNS * shape.flops() * epochs * images for shape, epochs, images in tuned))
    if kind == "sn-net":
        anchors = arm.sn_net.anchors(own)
        cut = [anchor for anchor in anchors if anchor != own]
        return _stitched_cost(arm, anchors, own) + _first(cut, arm, own, places=None, taught=True)
    instances = arm.pool.instances(own)
    places = {number: arm.pool._places(number, instances) for number in instances}
    if kind == "alone":
        number = arm.told["instance"]
        first = _first([instances[number]], arm, own, places=[places[number]], taught=True)
        learns, asked = LEARNS * instances[number].flops(), own.flops()
        return first + Cost(second_students=arm.seen("epochs") * learns, second_teacher=arm.seen("epochs") * asked)
    taught = kind == "pool"
    first = _first(list(instances.values()), arm, own, places=list(places.values()) if taught else None, taught=taught)
    return first + _stitched_cost(arm, list(instances.values()), own)


def _first(shapes: Sequence[ViTShape], arm: Arm, own: ViTShape, *, places: Sequence[int] | None, taught: bool) -> Cost:
    """Of the first stage of instances; ``places``: how many positions each is distilled at, None: it is not."""
    seen = arm.seen("first_epochs")
    students = sum(LEARNS * shape.flops() for shape in shapes)
    for shape, count in zip(shapes, places or [0] * len(shapes), strict=True):
        students += MAPS * 2 * count * 2 * own.tokens * own.width * shape.width  # two maps at each position
    return Cost(first_students=seen * students, first_teacher=seen * own.flops() * len(shapes) * taught)


def _stitched_cost(arm: Arm, shapes: Sequence[ViTShape], own: ViTShape) -> Cost:
    """Of the second stage, of two instances; and of the least squares before it."""
    instances, seen = dict(enumerate(shapes)), arm.seen("epochs")
    routes = one_way({number: shape.depth for number, shape in instances.items()}, nearest=True)
    students = sum(LEARNS * route.shape(instances).flops() for route in routes) / len(routes)
    solving = 0
    if arm.settings["init"] == "least-squares":
        rows, (front, end) = arm.settings["init_images"] * own.tokens, (shape.width for shape in shapes)
        solving = arm.settings["init_images"] * sum(shape.flops() for shape in shapes)
        solving += (len(routes) - 2) * 2 * rows * (front + 1) * (front + 1 + end)
    return Cost(second_students=round(seen * students), second_teacher=seen * own.flops(), solving=solving)


def shapes_of(arm: Arm, own: ViTShape) -> list[ViTShape]:
    """Of the single ViTs of an arm."""
    sizes = [parse_shape(text) for text in arm.told["shapes"]]
    return [replace(own, depth=depth, width=width, heads=width // own.head_dim) for depth, width in sizes]


def passes(arm: Arm, shape: ViTShape, own: ViTShape) -> tuple[int, int]:
    """(epochs, images) of a ViT that is tuned with one share of the reference's compute: as many different images as
    that reaches, all of them before any is seen twice."""
    budget = cost_of(Arm(config=arm.config, name=arm.config["reference"]), own).total / arm.told["shares"]
    batch, images = arm.config["common"]["batch_size"], budget / (LEARNS * shape.flops())
    epochs = math.ceil(images / arm.kept)
    return epochs, max(1, round(images / epochs / batch)) * batch
