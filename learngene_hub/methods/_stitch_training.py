"""How a pool is trained: one route per update, every process its own, and all routes measured afterwards.

An update draws one route and trains that path alone; the other parameters have no gradient. Of several processes each
draws for itself, so that one update averages as many paths, and ``fit`` averages the gradient of every parameter that
any of them used. Source: Pan, Cai, Zhuang, arXiv:2302.06586, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub.data import Images, ordered_batches
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._lesson import Log, Watch, pooled
from learngene_hub.methods._stitch_growth import reach_of, table_of, tensors_of
from learngene_hub.methods._stitch_measure import measure
from learngene_hub.methods._stitch_net import StitchNet, least_squares
from learngene_hub.methods._stitch_settings import Stitching
from learngene_hub.methods._stitching import Route, cost_groups
from learngene_hub.shape import Preprocessing, ViTShape
from learngene_hub.teacher import Answers, Teacher
from learngene_hub.training import Recipe, StateDir, distillation_loss, fit, image_batches, logits_of


@dataclass(frozen=True)
class Lesson:
    """What a pool learns from, and what it is measured on."""

    images: Images
    held: Images  # for the table; all images, where none is held out
    measured_on: str
    teacher: Answers | None  # None: the labels alone
    names: Mapping[str, int]  # data set -> images
    preprocessing: Preprocessing
    told: Mapping[str, str]  # of a teacher that is not the ancestor: its name and sha256

    @property
    def size(self) -> int:
        return self.images.pixels.shape[-1]

    def said(self, x: Tensor) -> Tensor:
        """The teacher's logits (B, classes) of a batch, without gradient."""
        assert self.teacher is not None
        return self.teacher.of_batch(x)


def make_lesson(
    settings: Stitching,
    teacher: Teacher,
    data: Mapping[str, Images],
    own: ViTShape,
    preprocessing: Preprocessing,
    method: str,
    told: Mapping[str, str] | None = None,
) -> Lesson:
    """The lesson of a pool whose instances have the classes and channels of ``own``.

    Raises:
        SettingsError: no data, labels or a teacher of other classes, or too few images to hold some out.
        DataError: images that cannot be used together, or none.
    """
    images = pooled(data, labelled=settings.labelled, method=method)
    classes, (_, channels, side, _) = own.classes, images.pixels.shape
    if channels != own.in_chans:
        raise DataError(f"images of {channels} channels asked; the pool takes {own.in_chans}")
    if settings.crop_padding >= side:
        raise SettingsError(f"crop_padding {settings.crop_padding} asked; it is below the image size {side}")
    if teacher.cache is not None:
        raise SettingsError(
            f"a teacher cache asked; {method} asks its teacher about each batch as it is: none would work"
        )
    if settings.labelled and len(images.classes) != classes:
        raise SettingsError(
            f"{images.name} has {len(images.classes)} classes, the pool {classes}; {settings.unlabelled}, the "
            f"teacher's predictions alone, would work, or an ancestor finetuned on {images.name}"
        )
    answers = None
    if settings.distil:
        answers = Answers(
            teacher, data, size=settings.teacher_size, preprocessing=preprocessing, precision=settings.precision
        )
        if answers.classes != classes:
            raise SettingsError(
                f"a teacher of {answers.classes} classes given, the pool has {classes}; one of {classes}, or distil=0, "
                f"would work"
            )
    kept, held = images, images
    if settings.held_out:
        kept, held = images.split(settings.held_out, torch.Generator().manual_seed(settings.seed))
    what = "labels" if settings.labelled else "agreement with the teacher"
    where = f"{len(held)} images held out" if settings.held_out else f"the {len(held)} images learned from"
    names = {name: len(each) for name, each in data.items()}
    return Lesson(kept, held, f"{what}, on {where}", answers, names, preprocessing, told or {})


def taught(settings: Stitching, logits: Tensor, teacher: Tensor) -> Tensor:
    """How far logits (B, C) are from the teacher's: tau^2 KL(teacher || student), or CE with the class it names."""
    if not settings.soft:
        return nn.functional.cross_entropy(logits, teacher.argmax(-1))
    loss = distillation_loss(logits, teacher, settings.temperature)
    return loss / logits.shape[-1] if settings.reduction == "published" else loss


def pool_loss(settings: Stitching, lesson: Lesson, logits: Tensor, x: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """labels CE(y) + distil L(teacher), the mean over a batch x (B, C, S, S) of labels (B,) or targets (B, classes)."""
    total = torch.zeros((), device=logits.device)
    if settings.labels:
        total = total + settings.labels * nn.functional.cross_entropy(logits, y, label_smoothing=smoothing)
    if settings.distil:
        total = total + settings.distil * taught(settings, logits, lesson.said(x))
    return total


@dataclass(frozen=True)
class Draws:
    """Which route the next update trains: a group uniformly, then a route of it uniformly."""

    groups: Sequence[Sequence[int]]

    @classmethod
    def of(cls, settings: Stitching, routes: Sequence[Route], instances: Mapping[int, ViTShape]) -> Draws:
        """All routes in one group, or in groups of like cost."""
        if settings.sampling == "uniform":
            return cls([[route.id for route in routes]])
        costs = {route.id: route.shape(instances).flops() / 2 for route in routes}
        return cls(cost_groups(costs, settings.flops_gap))

    def share(self, number: int) -> float:
        """How often a route is drawn, of 1."""
        return sum(group.count(number) / len(group) for group in self.groups) / len(self.groups)

    def next(self, generator: torch.Generator | None = None) -> int:
        """A route. Without a generator it is drawn from torch's, which ``fit`` seeds for each process and micro-batch:
        a run that goes on draws what the uninterrupted one draws, and the caller's random numbers are left alone."""
        group = self.groups[_below(len(self.groups), generator)]
        return group[_below(len(group), generator)]


def _below(count: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(count, (), generator=generator))


def start_stitches(settings: Stitching, net: StitchNet, lesson: Lesson) -> None:
    """Least squares over one batch of images, drawn with the seed, as they are."""
    order = torch.randperm(len(lesson.images), generator=torch.Generator().manual_seed(settings.seed))
    chosen = lesson.images.subset(order[: settings.init_images])
    x, _ = next(ordered_batches(chosen, len(chosen), lesson.preprocessing))
    least_squares(net, x)


def train_pool(
    settings: Stitching, net: StitchNet, draws: Draws, lesson: Lesson, watch: Watch, state: StateDir | None
) -> Log:
    """Trains the pool, one route per update; with ``state`` it goes on where it was interrupted."""
    recipe = settings.recipe(first=False)
    if settings.tune == "stitches":
        net.train_stitches_alone()

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        logits = logits_of(model(x, draws.next()))
        return pool_loss(settings, lesson, logits, x, y, recipe.label_smoothing)

    return run(net, loss, recipe, lesson, watch, state)


def run(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    recipe: Recipe,
    lesson: Lesson,
    watch: Watch,
    state: StateDir | None,
) -> Log:
    """One run of ``fit`` on the lesson's images."""
    batches, per_epoch = image_batches(lesson.images, recipe, lesson.preprocessing)
    log = Log()
    for step in watch(fit(model, batches, loss, recipe=recipe, steps_per_epoch=per_epoch, state_dir=state, extra=log)):
        log.add(step)
    return log


def finish(
    settings: Stitching,
    name: str,
    net: StitchNet,
    draws: Draws,
    lesson: Lesson,
    logs: Mapping[str, Sequence[Log]],  # stage -> its runs
    first_flops: tuple[int, int],
    facts: Mapping[str, Any],
) -> Learngene:
    """The learngene of a trained pool, every route measured. ``first_flops``: of the first stage, those of the
    instances and those of the teacher."""
    instances = {int(number): ViTShape.of(vit) for number, vit in net.instances.items()}
    routes = tuple(net.routes.values())

    def truth(x: Tensor, y: Tensor) -> Tensor:
        return y if settings.labelled else lesson.said(x).argmax(-1)

    found = measure(net, lesson.held, lesson.preprocessing, truth)
    runs = [log for each in logs.values() for log in each]
    pool_seen = sum(log.images for log in logs["pool"])
    mean = sum(draws.share(route.id) * route.shape(instances).flops() for route in routes)
    pool_flops = round(pool_seen * mean)  # of the routes that were to be expected
    return Learngene(
        tensors=tensors_of(net),
        method=name,
        settings={key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()},
        shape=instances[max(instances)],
        reach=reach_of(instances, routes),
        ancestor=dict(facts),
        preprocessing=lesson.preprocessing,
        license=str(facts.get("license", "")),
        provenance={
            "data": {key: {"images": count} for key, count in lesson.names.items()},
            "image_size": lesson.size,
            "instances": {str(number): str(shape) for number, shape in instances.items()},
            "steps": sum(log.steps for log in runs),
            "images_seen": sum(log.images for log in runs),
            "flops": first_flops[0] + pool_flops,  # of training: images seen times the FLOPs of one
            "teacher_flops": first_flops[1] + (pool_seen * lesson.teacher.flops if lesson.teacher else 0),
            "seconds": round(sum(log.seconds for log in runs), 3),
            "loss": {stage: [loss for log in each for loss in log.losses] for stage, each in logs.items()},
            **({"teacher": dict(lesson.told)} if lesson.told else {}),
            "measured": lesson.measured_on,
            "routes": table_of(routes, instances, found),
        },
    )
