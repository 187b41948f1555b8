"""What an auxiliary learns from, how it is trained, and what that cost: shared by lets, tleg, sws and ldr.

The loss is ``distil`` tau^2 KL(teacher || auxiliary) + ``labels`` CE. The sum is divided by the number of images; the
released code of LeTs, TLEG and SWS divides by the classes too, which changes nothing but the size of the loss (our
reading). The teacher is the ancestor, or another model beside it, of whatever architecture; the ancestor gives the
auxiliary what its settings leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub.data import Images
from learngene_hub.errors import DataError, SettingsError, ShapeError
from learngene_hub.methods._distillation import Distillation
from learngene_hub.shape import Preprocessing, ViTShape
from learngene_hub.teacher import Answers, Teacher
from learngene_hub.training import (
    Batches,
    Recipe,
    StateDir,
    Step,
    distillation_loss,
    fit,
    image_batches,
    logits_of,
    state_digest,
)

Watch = Callable[[Iterator[Step]], Iterator[Step]]
_LAYOUTS = {"avg": (False, "avg"), "token": (True, "token")}  # class token, pool
_MLP_RATIO = 4.0


@dataclass
class Lesson:
    """What the auxiliary learns from: the images, their labels, and what the teacher says of them."""

    settings: Distillation
    native: ViTShape  # of the auxiliary
    images: Images  # of all data sets
    answers: Answers
    preprocessing: Preprocessing
    said: Tensor | None = None  # (N, classes) logits, where the teacher sees each image once
    teacher: Mapping[str, str] = field(default_factory=dict)  # name and sha256 of one that is not the ancestor

    def ask(self, state: StateDir | None) -> None:
        """Asks the teacher about every image, where the settings say that it sees them once.

        Raises:
            StoreError: its cache or ``state`` cannot be read or written.
        """
        if self.settings.distil and self.settings.teacher == "once":
            self.said = self.answers.of_all(state)

    def batches(self, recipe: Recipe) -> tuple[Batches, int]:
        """Batches for ``fit``, and how many make an epoch; where the teacher saw the images once, each image's label
        is its own number."""
        images = self.images
        if self.said is not None:
            count = len(images)
            numbers = torch.arange(count, device=images.labels.device)
            images = Images(images.pixels, numbers, tuple(map(str, range(count))), images.name)
        return image_batches(images, recipe, self.preprocessing)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """distil tau^2 KL(teacher || auxiliary) + labels CE, the mean over the batch."""
        x, y = batch
        logits, total = logits_of(model(x)), torch.zeros((), device=x.device)
        settings = self.settings
        if settings.distil:
            total = total + settings.distil * distillation_loss(logits, self._taught(x, y), settings.temperature)
        if settings.labels:
            truth = y if self.said is None else self.images.labels.to(x.device)[y]
            smooth = nn.functional.cross_entropy(logits, truth, label_smoothing=settings.label_smoothing)
            total = total + settings.labels * smooth
        return total

    def _taught(self, x: Tensor, y: Tensor) -> Tensor:
        if self.said is None:
            return self.answers.of_batch(x)
        self.said = self.said.to(x.device)
        return self.said[y]


def prepare(
    settings: Distillation,
    ancestor: nn.Module,
    data: Mapping[str, Images],
    *,
    depth: int,
    method: str,
    preprocessing: Preprocessing,
    teacher: Teacher | None,
) -> Lesson:
    """The lesson of an auxiliary of ``depth`` blocks (0: the ancestor's), checked; the teacher was not asked yet.

    Raises:
        SettingsError: no data, settings that the data do not allow, a teacher without logits or, where ``labels`` are
            asked, of other classes than the data's, or a cache for a teacher that is asked about each batch.
        DataError: no images, images of different sizes, or of other channels than the teacher's.
        ShapeError: there is no such ViT; or the ancestor is no plain one, where something is to be its own.
    """
    require_ancestor(settings, ancestor, depth)
    images = pooled(data, labelled=settings.labels > 0, method=method)
    native = auxiliary_shape(settings, ancestor, images, depth)
    if teacher is not None and teacher.cache is not None and settings.teacher == "live":
        raise SettingsError("a teacher cache asked with teacher 'live', which sees every batch anew: 'once' would work")
    role = "ancestor" if teacher is None or teacher.model is ancestor else "teacher"
    answers = Answers(
        teacher or Teacher(ancestor), data, size=settings.teacher_size, preprocessing=preprocessing,
        precision=settings.precision, role=role,
    )  # fmt: skip
    if settings.labels:
        _require_labels(data, answers)
    known = {} if role == "ancestor" or teacher is None else teacher_facts(teacher)
    return Lesson(settings, replace(native, classes=answers.classes), images, answers, preprocessing, teacher=known)


def teacher_facts(teacher: Teacher) -> dict[str, str]:
    """What is told of a teacher beside the ancestor."""
    return {"name": teacher.name, "sha256": state_digest(teacher.model)}


def require_ancestor(settings: Distillation, ancestor: nn.Module, depth: int) -> None:
    """Nothing, where the ancestor has what the settings leave to it.

    Raises:
        ShapeError: it is no plain ViT, and something is to be its own.
    """
    open_ones = _open(settings, depth)
    try:
        if open_ones or settings.start == "ancestor":
            ViTShape.of(ancestor)
    except ShapeError as error:
        asked = [*open_ones, *(["start"] if settings.start == "ancestor" else [])]
        raise ShapeError(f"{', '.join(asked)} of the ancestor asked: {error}; or give them") from error


def _open(settings: Distillation, depth: int) -> list[str]:
    """The sizes that are the ancestor's, whatever it is."""
    sizes = {"depth": depth} | {name: getattr(settings, name) for name in ("width", "head_dim", "patch")}
    return [*(name for name, size in sizes.items() if not size), *(["layout"] if settings.layout == "ancestor" else [])]


def auxiliary_shape(settings: Distillation, ancestor: nn.Module, images: Images, depth: int) -> ViTShape:
    """The auxiliary of ``depth`` blocks for these images, for now with one class.

    Raises:
        SettingsError: crops that are moved further than the images reach.
        ShapeError: there is no such ViT; or the ancestor is no plain one, where something is to be its own.
    """
    try:
        own: ViTShape | None = ViTShape.of(ancestor)
    except ShapeError:
        own = None
    asked = {name: getattr(settings, name) for name in ("width", "head_dim", "mlp_ratio", "patch")} | {"depth": depth}
    sizes: dict[str, Any] = {name: size or getattr(own, name, _MLP_RATIO) for name, size in asked.items()}
    token, pool = _LAYOUTS.get(settings.layout) or (own.class_token, own.pool)  # type: ignore[union-attr]
    _, channels, side, _ = images.pixels.shape
    if sizes["width"] % sizes["head_dim"]:
        raise ShapeError(
            f"width {sizes['width']} asked; the heads are {sizes['head_dim']} wide: a multiple of head_dim "
            f"{sizes['head_dim']} would work"
        )
    if settings.crop_padding >= side:
        raise SettingsError(f"crop_padding {settings.crop_padding} asked; it is below the image size {side}")
    return ViTShape(
        **sizes, heads=sizes["width"] // sizes["head_dim"], class_token=token, pool=pool, image_size=side,
        in_chans=channels, classes=1,
    )  # fmt: skip


def pooled(data: Mapping[str, Images], *, labelled: bool, method: str) -> Images:
    """All images of all data sets as one set; where there are several, with labels if ``labelled``, and of one kind.

    Raises:
        SettingsError: no data sets.
        DataError: an empty one, or images of different sizes or channels.
    """
    if not data:
        raise SettingsError(f"no data sets asked; {method} needs at least one, for a teacher's predictions on it")
    if empty := [name for name, images in data.items() if not len(images)]:
        raise DataError(f"{empty[0]} is empty; {method} needs images")
    sizes = {name: list(images.pixels.shape[1:]) for name, images in data.items()}
    if len({tuple(size) for size in sizes.values()}) > 1:
        raise DataError(f"images of shapes {sizes} asked; load all with one size and as many channels")
    if len(data) == 1:
        return next(iter(data.values()))
    pixels = torch.cat([images.pixels for images in data.values()])
    if not labelled or len({images.classes for images in data.values()}) > 1:
        return Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("any",), "+".join(data))
    labels = torch.cat([images.labels for images in data.values()])
    return Images(pixels, labels, next(iter(data.values())).classes, "+".join(data))


def _require_labels(data: Mapping[str, Images], answers: Answers) -> None:
    """Refuse a loss on labels that are not the teacher's classes, or of different classes (SettingsError)."""
    for name, images in data.items():
        if len(images.classes) != answers.classes:
            raise SettingsError(
                f"{name} has {len(images.classes)} classes, the {answers.role} {answers.classes}; labels=0, the "
                f"distillation alone, would work, or {answers.a_role} finetuned on {name}"
            )
    if len({images.classes for images in data.values()}) > 1:
        raise SettingsError(f"data sets of different classes asked, {', '.join(data)}; labels=0 or one set would work")


@dataclass
class Log:
    """What one training run did."""

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of each epoch, the mean
    total: float = 0.0  # of the losses of this epoch so far
    count: int = 0

    def add(self, step: Step) -> None:
        """Takes note of an update."""
        self.steps, self.images, self.seconds = step.step, step.images, step.seconds
        self.total, self.count = self.total + step.loss, self.count + 1
        if step.epoch_done:
            self.losses.append(round(self.total / self.count, 5))
            self.total, self.count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def train(
    auxiliary: nn.Module,
    lesson: Lesson,
    recipe: Recipe,
    watch: Watch,
    state: StateDir | None,
    groups: Sequence[dict[str, Any]] | None = None,
) -> Log:
    """Trains every parameter of ``auxiliary``, in AdamW's ``groups``; with ``state`` it goes on where it stopped."""
    batches, per_epoch = lesson.batches(recipe)
    log = Log()
    steps = fit(
        auxiliary, batches, lesson.loss, recipe=recipe, steps_per_epoch=per_epoch, groups=groups, state_dir=state,
        extra=log,
    )  # fmt: skip
    for step in watch(steps):
        log.add(step)
    return log


def report(lesson: Lesson, logs: Sequence[Log]) -> dict[str, Any]:
    """The provenance of what was trained in these runs, one after the other.

    Counted, whatever machine it ran on: ``images_seen``, images that the auxiliary was trained on, each as often as it
    was; ``flops``, those times the FLOPs of one forward of the auxiliary (its backward, about twice as many again, the
    expansion and the optimiser are not counted); ``teacher_flops``, images that the teacher was asked about times the
    FLOPs of one forward of it, also where its answers were read from a cache. ``seconds`` are those of the updates.
    """
    seen = sum(log.images for log in logs)
    asked = seen if lesson.said is None else len(lesson.images)
    told: dict[str, Any] = {
        "data": {name: {"images": len(images)} for name, images in lesson.answers.data.items()},
        "image_size": lesson.native.image_size,
        "steps": sum(log.steps for log in logs),
        "images_seen": seen,
        "flops": seen * lesson.native.flops(),
        "teacher_flops": asked * lesson.answers.flops if lesson.settings.distil else 0,
        "seconds": round(sum(log.seconds for log in logs), 3),
        "loss": [loss for log in logs for loss in log.losses],  # of each epoch, the mean
    }
    return told | ({"teacher": dict(lesson.teacher)} if lesson.teacher else {})
