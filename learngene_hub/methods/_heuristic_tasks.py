"""A sequence of tasks, and the model that learns them one after the other while its gradients are measured.

A task is a few classes drawn at random. All tasks share one classifier with an output for every class of the data, and
each trains the outputs of its own classes alone: cross-entropy over those logits, nothing else of the classifier moves.
So no two classes ever share an output. (In the released code the folders of each task are labelled 0 to 4 anew, so that
all tasks train the same five outputs; and a softmax stands before the cross-entropy, which then cannot fall below
ln(e + C - 1) - 1.)

Two uses. ``measure``: a copy of a given ancestor learns K such tasks, briefly, for the sake of the statistic (our
reading for ancestors that come without a task stream); the ancestor itself is left alone. ``grow_collective``: the
paper's collective model, a narrow VGG that is widened by one layer before each task but the first.

Published: 21 tasks of 5 of 64 classes, 100 epochs each, SGD of lr .001, momentum .9, decay 5e-4, batches of 64, random
crops and mirroring. Here ``training.fit`` trains, which is AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngene_hub._conv import ConvShape
from learngene_hub.data import Augment, Images, seed_of
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.methods._heuristic_calm import Curve, Meter
from learngene_hub.methods._heuristic_widen import widen
from learngene_hub.shape import IMAGENET, Preprocessing
from learngene_hub.training import Loss, Recipe, Step, fit, image_batches, logits_of, parameter_groups

Watch = Callable[[Iterator[Step]], Iterator[Step]]
Weights = Callable[[nn.Module], list[list[nn.Parameter]]]  # of each unit of a model its weights

# The collective of the released code: channels before the first task, stage by stage, and what is widened before each
# later one, (convolution from 0, channels more). It ends with the channels of VGG16.
START = ((64, 64), (64, 64), (128, 128, 128), (256, 256, 256), (256, 256, 256))
ORDER = tuple((layer, 64) for layer in (2, 3, 4, 4, 5, 5, 6, 6)) + tuple(
    (layer, 128) for layer in (7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12)
)


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Which tasks, and how each of them is trained."""

    count: int
    classes: int  # of a task
    recipe: Recipe

    def draw(self, images: Images) -> list[Tensor]:
        """The classes of each task, ascending, (k,) each; of those that have images.

        Raises:
            SettingsError: there are fewer classes than a task has, or a task has fewer than two.
        """
        there = torch.unique(images.labels.cpu())
        if not 2 <= self.classes <= len(there):
            raise SettingsError(
                f"tasks of {self.classes} classes asked; the data has {len(there)}: 2 to {len(there)} would work"
            )
        drawn = []
        for task in range(self.count):
            generator = torch.Generator().manual_seed(seed_of("task", self.recipe.seed, task))
            drawn.append(there[torch.randperm(len(there), generator=generator)[: self.classes]].sort().values)
        return drawn


def together(data: Mapping[str, Images]) -> Images:
    """All images as one data set, with classes of its own for each of them.

    Raises:
        DataError: there are none, or they are of different sizes or channels.
    """
    sets = [images for images in data.values() if len(images)]
    if not sets:
        raise DataError("no images given; tasks are drawn from the classes of the data")
    sizes = {tuple(images.pixels.shape[1:]) for images in sets}
    if len(sizes) > 1:
        raise DataError(f"images of sizes {sorted(sizes)} given; tasks need images of one size")
    labels, classes = [], []
    for images in sets:
        labels.append(images.labels.cpu() + len(classes))
        classes += [f"{images.name}/{name}" for name in images.classes]
    pixels = torch.cat([images.pixels.cpu() for images in sets])
    return Images(pixels, torch.cat(labels), tuple(classes), "+".join(images.name for images in sets))


def own_outputs_loss(classes: Tensor) -> Loss:
    """Cross-entropy over the logits of ``classes`` (k,), ascending; labels are those of the whole data."""

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = batch
        chosen = classes.to(labels.device)
        return F.cross_entropy(logits_of(model(pixels))[:, chosen], torch.searchsorted(chosen, labels))

    return loss


@dataclass
class Stream:
    """What learning a sequence of tasks gives: the model, the curve, and what it cost."""

    model: nn.Module
    curve: Curve
    tasks: list[list[str]]  # the names of each task's classes
    steps: int = 0
    images_seen: int = 0
    flops: int = 0  # images seen times the FLOPs of one
    seconds: float = 0.0


def learn(
    model: nn.Module,
    images: Images,
    tasks: Tasks,
    weights: Weights,
    meter: Meter,
    units: Sequence[str],
    *,
    preprocessing: Preprocessing,
    watch: Watch,
    flops: Callable[[nn.Module], int],
    before: Callable[[int, nn.Module], nn.Module] = lambda task, model: model,
) -> Stream:
    """Trains ``model`` in place on one task after the other; ``before`` each it may be exchanged."""
    drawn = tasks.draw(images)  # refused before anything is trained
    stream = Stream(model, Curve(0.0, torch.zeros(0), ()), [[images.classes[i] for i in c] for c in drawn])
    for task, classes in enumerate(drawn):
        stream.model = model = before(task, stream.model)
        chosen = images.subset(torch.isin(images.labels, classes).nonzero()[:, 0])
        recipe = replace(tasks.recipe, seed=seed_of("training", tasks.recipe.seed, task))
        batches, per_epoch = image_batches(chosen, recipe, preprocessing)
        groups = _groups(model, recipe)
        steps = fit(
            model, batches, own_outputs_loss(classes), recipe=recipe, steps_per_epoch=per_epoch, groups=groups
        )  # fmt: skip
        step = None
        for step in watch(steps):
            meter.add(weights(model), epoch_done=step.epoch_done)
        if step is not None:
            stream.steps, stream.images_seen = stream.steps + step.step, stream.images_seen + step.images
            stream.flops, stream.seconds = stream.flops + step.images * flops(model), stream.seconds + step.seconds
    stream.curve = Curve.of(meter, tasks.recipe.epochs, units)
    model.zero_grad(set_to_none=True)
    return stream


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The usual groups, but that the classifier does not decay: outputs of other tasks' classes stay as they are."""
    head = {id(p) for p in model.get_classifier().parameters()}  # type: ignore[operator]
    groups = []
    for group in parameter_groups(model, recipe):
        inside = [p for p in group["params"] if id(p) in head]
        outside = [p for p in group["params"] if id(p) not in head]
        groups += [group | {"params": outside}] if outside else []
        groups += [group | {"name": "classifier", "params": inside, "weight_decay": 0.0}] if inside else []
    return groups


def grow_collective(
    data: Mapping[str, Images],
    *,
    tasks: int = 21,
    classes_per_task: int = 5,
    start: Sequence[Sequence[int]] = START,
    order: Sequence[tuple[int, int]] = ORDER,
    head_hidden: int = 1024,
    split: str = "uneven",
    recipe: Recipe | None = None,
    sigma: float = 0.0,
    preprocessing: Preprocessing = IMAGENET,
    watch: Watch = iter,
) -> Stream:
    """The paper's collective model, an ancestor for ``Heuristic.extract``, and the curves measured on the way.

    A VGG of ``start`` channels whose head sees all of the last features; before task t its convolution
    ``order[t - 1][0]`` gets that many channels more. ``recipe`` is of each task; left out, it is the published one as
    far as ``fit`` has it. ``split``: see ``_heuristic_widen.py``. The classifier has an output for every class.

    Raises:
        SettingsError: fewer classes in the data than in a task, or numbers out of their range.
        DataError: no images, or images of different sizes.
        ShapeError: images too small for the stages, or a layer that is not there.
    """
    images = together(data)
    augment = Augment(flip=True, crop_padding=4)
    recipe = recipe or Recipe(epochs=100, lr=1e-3, weight_decay=5e-4, schedule="constant", augment=augment)
    side = images.pixels.shape[-1]
    plain = ConvShape(
        family="vgg", stages=tuple(map(tuple, start)), image_size=side, in_chans=images.pixels.shape[1],
        classes=len(images.classes),
    )  # fmt: skip
    shape = replace(plain, head_hidden=head_hidden, head_kernel=plain.side) if head_hidden else plain
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("collective", recipe.seed))
        model = shape.build(preprocessing=preprocessing)

    def before(task: int, model: nn.Module) -> nn.Module:
        if not 1 <= task <= len(order):
            return model
        layer, more = order[task - 1]
        generator = torch.Generator().manual_seed(seed_of("widen", recipe.seed, task))
        return widen(model, layer, ConvShape.of(model).convs()[layer].outputs + more, generator, split=split)

    names = [conv.name for conv in shape.convs()]
    return learn(
        model, images, Tasks(count=tasks, classes=classes_per_task, recipe=recipe),
        lambda model: [[model.get_parameter(f"{name}.weight")] for name in names],
        Meter(seed=recipe.seed, sigma=sigma), names, preprocessing=preprocessing, watch=watch,
        flops=lambda model: ConvShape.of(model).flops(), before=before,
    )  # fmt: skip
