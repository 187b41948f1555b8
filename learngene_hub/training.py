"""fit: the one training loop, and the losses that several methods share.

    for step in fit(model, batches, loss, recipe=recipe, steps_per_epoch=n):
        ...                                  # after every update; the caller may look, act, or stop

One update: `accumulate` micro-batches, forward and backward each, gradients averaged over the processes, AdamW. What
draws from torch's global generators meanwhile (drop path, a data loader) draws from (seed, step), so a run continued
from `state_dir` is the uninterrupted run, and the caller's own random numbers are as if nothing had been trained.

The work of an update stands in `_fit.py`, the state of a run in `_state.py`, `Step` and its followers in `_steps.py`;
the public names are those here.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngene_hub._check import is_number
from learngene_hub._fit import PRECISIONS, Run
from learngene_hub._fit import learning as learning
from learngene_hub._fit import plain_attention as plain_attention
from learngene_hub._processes import process as process
from learngene_hub._state import StateDir as StateDir
from learngene_hub._state import Stateful as Stateful
from learngene_hub._state import images_digest as images_digest
from learngene_hub._state import state_digest as state_digest
from learngene_hub._steps import Step as Step
from learngene_hub._steps import log_steps as log_steps
from learngene_hub._steps import show_progress as show_progress
from learngene_hub.data import Augment, Images, normalise, seed_of, shuffled_indices
from learngene_hub.errors import DataError, SettingsError

if TYPE_CHECKING:
    from learngene_hub.shape import Preprocessing

Batches = Callable[[int], Iterable[Any]]
Loss = Callable[[Any, Any], Tensor]
SCHEDULES = ("one-cycle", "cosine", "constant")
STEM = r"(?:^|\.)(?:patch_embed\.|cls_token$|pos_embed$|norm_pre\.)"  # of timm's VisionTransformer
FEW_IMAGES = 1000  # below it a default training is a longer one
AFTER = -1  # the layer of what follows the blocks
NEVER_DECAYED = ("pos_embed", "cls_token")  # timm's VisionTransformer.no_weight_decay, beside all 1-D tensors


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Counts are of images, updates and passes over the data; every share is of 1."""

    epochs: int = 3
    lr: float = 3e-4  # peak learning rate
    batch_size: int = 64  # images per update, over all processes and micro-batches
    weight_decay: float = 0.05  # of tensors of two and more dimensions
    schedule: str = "one-cycle"  # "one-cycle" (torch's OneCycleLR, betas left alone), "cosine" to 0, "constant"
    warmup: float = 0.3  # share of all updates in which the rate rises; "constant" has none
    layer_decay: float = 1.0  # factor of the rate from each block of a ViT to the one before it; the head has all of it
    label_smoothing: float = 0.0
    clip: float | None = None  # largest norm of the whole gradient
    accumulate: int = 1  # micro-batches per update
    precision: str = "fp32"  # "fp32", "bf16", "fp16" (weights stay float32)
    compile: bool = False  # torch.compile
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, about a third slower
    augment: Augment = Augment()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            _require(type(value) is int and value >= 1, f"{name} is a whole number of at least 1, not {value!r}")
        _require(type(self.seed) is int and self.seed >= 0, f"seed is a whole number of at least 0, not {self.seed!r}")
        _require(is_number(self.lr) and self.lr > 0, f"lr is above 0, not {self.lr!r}")
        _require(
            is_number(self.weight_decay) and self.weight_decay >= 0,
            f"weight_decay is at least 0, not {self.weight_decay!r}",
        )
        _require(
            is_number(self.warmup) and 0 <= self.warmup < 1,
            f"warmup is a share of all steps from 0 to below 1, not {self.warmup!r}",
        )
        _require(
            is_number(self.layer_decay) and 0 < self.layer_decay <= 1,
            f"layer_decay is a factor above 0 and at most 1, not {self.layer_decay!r}",
        )
        _require(
            is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1,
            f"label_smoothing is from 0 to below 1, not {self.label_smoothing!r}",
        )
        _require(
            self.clip is None or (is_number(self.clip) and self.clip > 0),
            f"clip is a norm above 0 or None, not {self.clip!r}",
        )
        _require(self.schedule in SCHEDULES, f"schedule {self.schedule!r}; known: {', '.join(SCHEDULES)}")
        _require(self.precision in PRECISIONS, f"precision {self.precision!r}; known: {', '.join(PRECISIONS)}")

    def rate(self, step: int, of: int) -> float:
        """Share of the peak learning rate that update `step` (from 1) of `of` uses."""
        done, rising = step - 1, self.warmup * of
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cosine":
            rising = round(rising)
            return step / rising if done < rising else 0.5 + 0.5 * math.cos(math.pi * (done - rising) / (of - rising))
        top, last = rising - 1, of - 1  # OneCycleLR: 1/25 -> 1 -> 1/250000 along two half cosines
        if done <= top:
            return _half_cosine(1 / 25, 1.0, done / top if top else 1.0)
        return _half_cosine(1.0, 1 / 25e4, (done - top) / (last - top))


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    recipe: Recipe,
    steps_per_epoch: int,
    groups: Sequence[dict[str, Any]] | None = None,
    state_dir: str | Path | StateDir | None = None,
    save_every: int | None = None,
    extra: Stateful | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Step]:
    """Trains `model` in place; yields a `Step` after each update. It learns inside ``torch.no_grad`` too.

    Gradients are cleared when the next update begins, so those of the update just made can be read between steps, and
    gradients that the caller left behind do no harm. Parameters outside the groups get gradients but no update.

    Args:
        batches: `batches(epoch)` gives at least steps_per_epoch * recipe.accumulate batches, of any structure of
            tensors; they are moved to the device. Of several processes each gives its own share (see `image_batches`).
        loss: `loss(model, batch)` is the mean over the batch, a scalar with gradient.
        groups: AdamW's parameter groups; "lr" and "weight_decay" default to the recipe's, and the schedule multiplies
            each group's lr. None: `parameter_groups(model, recipe)`. Parameters need not belong to `model`.
        state_dir: folder of the state of the run, which is continued if there is one. The state is written, whole or
            not at all, every `save_every` updates (None: at each epoch's end, or as a `StateDir` says) and at the end,
            before that step is yielded, and again after it if the caller changed parameters.
        extra: what the caller changes between the steps beside parameters, such as another optimiser. It is saved in
            the same file, so the two always agree; the state is then written only after a step, when the caller asks
            for the next one.
        device: where to train; None: what accelerate finds.

    Raises:
        SettingsError: steps, groups, precision or device make no sense, or `state_dir` holds a different run.
        TrainingError: a loss is not finite; the weights are still those before that update.
        DataError: `batches` ran out.
        StoreError: the state cannot be read or written.
    """
    _require(steps_per_epoch >= 1, f"steps_per_epoch is at least 1, not {steps_per_epoch}")
    _require(save_every is None or save_every >= 1, f"save_every is at least 1 or None, not {save_every}")
    chosen = parameter_groups(model, recipe) if groups is None else groups
    run = Run(model, loss, recipe, steps_per_epoch, chosen, StateDir.of(state_dir), extra, device)
    return _updates(run, batches, save_every)


def _updates(run: Run, batches: Batches, save_every: int | None) -> Iterator[Step]:
    """The loop of `fit`."""
    run.load()
    with run.checkpointing(), plain_attention(run.model, run.device):
        for epoch in range(run.step // run.steps_per_epoch, run.recipe.epochs):
            stream = run.stream(batches, epoch)
            for _ in range(run.step % run.steps_per_epoch, run.steps_per_epoch):
                started = time.perf_counter()
                loss = run.update(stream, epoch)
                run.seconds += time.perf_counter() - started
                due = run.due(save_every)
                if due and run.extra is None:
                    run.save()
                versions = run.versions() if due else None
                yield _report(run, loss, epoch)
                if due and (run.extra is not None or run.versions() != versions):
                    run.save()


def _report(run: Run, loss: float, epoch: int) -> Step:
    return Step(
        step=run.step,
        epoch=epoch,
        of=run.of,
        loss=loss,
        lr=run.recipe.lr * run.recipe.rate(run.step, run.of),
        images=run.images,
        seconds=run.seconds,
        epoch_done=run.step % run.steps_per_epoch == 0,
    )


def parameter_groups(model: nn.Module, recipe: Recipe, *, lr: float | None = None) -> list[dict[str, Any]]:
    """AdamW groups "decay" and "no-decay" of what is trainable: 1-D tensors, pos_embed and cls_token do not decay.

    An empty group is left out. `lr` is the peak of both, None the recipe's. With a `layer_decay` below 1 there are two
    groups for each block, whose rate is `lr` times layer_decay ** (L + 1 - i) for block i of L, from 1: 0 is the stem,
    L + 1 what follows the blocks (as BEiT is finetuned: Bao et al., ICLR 2022, arXiv:2106.08254).

    Raises:
        SettingsError: a `layer_decay` for a model that is no ViT.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    peak = recipe.lr if lr is None else lr
    if recipe.layer_decay == 1.0:
        return _decay_groups(named, recipe, peak)
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, p in named:
        layers.setdefault(_layer(name), []).append((name, p))
    top = max(layers) + 1  # of what follows the blocks
    _require(top > 1, f"layer_decay {recipe.layer_decay} asked of a {type(model).__name__}, which has no blocks")
    groups = []
    for layer, members in sorted(layers.items(), key=lambda item: item[0] if item[0] != AFTER else top):
        rate = peak * recipe.layer_decay ** (0 if layer == AFTER else top - layer)
        groups += [
            group | {"name": f"{group['name']}-{'after' if layer == AFTER else layer}"}
            for group in _decay_groups(members, recipe, rate)
        ]
    return groups


def _decay_groups(named: Sequence[tuple[str, nn.Parameter]], recipe: Recipe, peak: float) -> list[dict[str, Any]]:
    plain = [p for name, p in named if p.ndim < 2 or name.rsplit(".", 1)[-1] in NEVER_DECAYED]
    kept = {id(p) for p in plain}
    groups = [
        {"name": "decay", "params": [p for _, p in named if id(p) not in kept], "weight_decay": recipe.weight_decay},
        {"name": "no-decay", "params": plain, "weight_decay": 0.0},
    ]
    return [group | {"lr": peak} for group in groups if group["params"]]


def _layer(name: str) -> int:
    """The layer of a ViT's parameter: 0 of the stem, i + 1 of blocks.i, AFTER of the rest."""
    if (found := re.search(r"(?:^|\.)blocks\.(\d+)\.", name)) is not None:
        return int(found[1]) + 1
    return 0 if re.search(STEM, name) else AFTER


def image_batches(
    images: Images, recipe: Recipe, preprocessing: Preprocessing, *, device: torch.device | str | None = None
) -> tuple[Batches, int]:
    """(batches, steps per epoch) for `fit`: shuffled, augmented, normalised pixels with labels, or with mixed targets.

    A batch is made where the pixels are, or on `device`; keep small data sets on the GPU with `images.to(device)`.
    Every update takes recipe.batch_size images (all of them, if there are fewer), and the rest of an epoch is dropped.
    Several processes take disjoint parts of an update. Each batch depends on (seed, epoch, its position) alone.

    Raises:
        DataError: there are no images.
        SettingsError: the batch does not divide by accumulate times the number of processes.
    """
    if not len(images):
        raise DataError(f"{images.name} holds no images to train on")
    size = min(recipe.batch_size, len(images))

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        rank, world = process()
        parts = world * recipe.accumulate
        usable = size - size % parts if size == len(images) < recipe.batch_size else size
        if usable == 0 or usable % parts:
            raise SettingsError(
                f"{usable} images per update do not divide into {recipe.accumulate} micro-batches x {world} processes"
                f"; a batch_size that is a multiple of {parts}, and at most {len(images)}, works"
            )
        order = shuffled_indices(
            len(images), usable, seed=recipe.seed, epoch=epoch, rank=rank, world=world, accumulate=recipe.accumulate
        )
        for position, chosen in enumerate(order):
            generator = torch.Generator().manual_seed(seed_of("augment", recipe.seed, epoch, position, rank))
            yield _batch(images, chosen, recipe.augment, preprocessing, generator, device)

    return batches, len(images) // size


def _batch(
    images: Images,
    chosen: Tensor,
    augment: Augment,
    preprocessing: Preprocessing,
    generator: torch.Generator,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor]:
    chosen = chosen.to(images.pixels.device)
    pixels, labels = images.pixels[chosen], images.labels[chosen]
    if device is not None:
        pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    if augment == Augment():
        return normalise(pixels, preprocessing), labels
    changed = augment(pixels.to(torch.float32).div_(255), generator)
    changed, targets = augment.mix(changed, labels, len(images.classes), generator)
    return normalise(changed, preprocessing), targets


def logits_of(output: Any) -> Tensor:
    """The logits (B, classes), in float32, of a timm model's output or of a transformers one."""
    return (output if isinstance(output, Tensor) else output.logits).float()


def classification_loss(recipe: Recipe) -> Loss:
    """Cross-entropy over (pixels, labels) batches, or over mixed targets, with the recipe's label smoothing."""

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, targets = batch
        return F.cross_entropy(logits_of(model(pixels)), targets, label_smoothing=recipe.label_smoothing)

    return loss


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 * KL(teacher || student) of the softened predictions (B, classes), mean over the batch.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2. The factor keeps gradients of one size at any temperature.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)


def default_epochs(images: int) -> int:
    """Passes over so many training images that `learngene finetune` makes where none are asked.

    Of `lsamd-base` at 6x192 (benchmarks/results/epochs.csv, batches of 64): a few hundred images want about ten passes,
    and thousands little more than three.
    """
    return 10 if images < FEW_IMAGES else 3


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))
