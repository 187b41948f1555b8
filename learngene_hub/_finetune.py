"""The command ``finetune``."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import (
    MIXTURE,
    DataOption,
    DepthOption,
    DeviceOption,
    GrowthOption,
    HeadsOption,
    LimitOption,
    PrecisionOption,
    SeedOption,
    SkipOption,
    WidthOption,
    YesOption,
    read_heads,
    read_settings,
    tell_left_out,
    tell_pool,
    tell_skipped,
)
from learngene_hub._output import Output, text
from learngene_hub._resume import (
    IMAGE_SIZE,
    OldSizeOption,
    ResumeOption,
    claim,
    interruptible,
    is_begun,
    is_finished,
    one_size,
    state_of,
)
from learngene_hub._workshop import as_the_model_counts, class_names, images_for

if TYPE_CHECKING:
    from torch import nn

    from learngene_hub.data import Images
    from learngene_hub.descendant import Descendant
    from learngene_hub.learngene import Learngene
    from learngene_hub.shape import Preprocessing
    from learngene_hub.training import Recipe, Step

GrownArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder that expand wrote, or a learngene to grow now.")
]
FolderOption = Annotated[Path, typer.Option("--out", help="The folder to write the trained model to.")]
PixelsOption = Annotated[
    int | None,
    typer.Option("--image-size", help="Side of the images, pixels, of a model grown now [64; a pool's own]."),
]
ConstrainedOption = Annotated[
    bool, typer.Option("--constrained", help="Train a learngene's components, not the blocks: ldr alone.")
]
TrainSplitOption = Annotated[str, typer.Option("--train-split", help="The split to train on.")]
TestSplitOption = Annotated[str, typer.Option("--test-split", help="The split to test on; '' for none.")]
EpochsOption = Annotated[
    int | None, typer.Option("--epochs", help="Passes over the training images [3; 10 of fewer than 1,000 images].")
]
RateOption = Annotated[float, typer.Option("--lr", help="Peak learning rate.")]
HeadOption = Annotated[
    str,
    typer.Option(
        "--head",
        help="How the classifier begins: fresh; means or whitened, from the class means of the model's own features; "
        "auto: means where it was never trained, else as it is.",
    ),
]
DecayOption = Annotated[
    float, typer.Option("--layer-decay", help="Factor of the rate from each block to the one before it; 1: one rate.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Images per update.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Use torch.compile.")]
LogOption = Annotated[Path | None, typer.Option("--log", help="Write each step: FILE.csv, or a TensorBoard folder.")]


def finetune(
    out: Output,
    model: GrownArgument,
    data: DataOption,
    folder: FolderOption,
    depth: DepthOption = None,
    width: WidthOption = None,
    heads: HeadsOption = None,
    image_size: PixelsOption = None,
    size: OldSizeOption = None,
    settings: GrowthOption = None,
    constrained: ConstrainedOption = False,
    train_split: TrainSplitOption = "train",
    test_split: TestSplitOption = "test",
    epochs: EpochsOption = None,
    lr: RateOption = 3e-4,
    batch_size: BatchOption = 64,
    head: HeadOption = "auto",
    layer_decay: DecayOption = 1.0,
    seed: SeedOption = 0,
    precision: PrecisionOption = "fp32",
    compile: CompileOption = False,
    device: DeviceOption = None,
    limit: LimitOption = None,
    skip_unreadable: SkipOption = False,
    log: LogOption = None,
    resume: ResumeOption = False,
    yes: YesOption = False,
) -> None:
    """Train a descendant on labelled images.

    Tells the accuracy after each epoch, and writes a folder that plain transformers loads.

    \b
    learngene finetune grown --data signdigits --out trained
    learngene finetune lsamd-base --depth 7 --width 320 --data photos/ --test-split val --out trained --epochs 10
    learngene finetune grown --data signdigits --out trained --resume
    learngene finetune my-ldr --depth 12 --set components=4 --constrained --data photos/ --out trained
    """
    from learngene_hub.factory import state_digest
    from learngene_hub.training import Recipe, default_epochs, process

    recipe = Recipe(
        epochs=1 if epochs is None else epochs, lr=lr, batch_size=batch_size, precision=precision, compile=compile,
        seed=seed, layer_decay=layer_decay,
    )  # fmt: skip
    _require_head(head, constrained)
    pixels, growth = one_size(image_size, size), read_settings(None, settings or [])
    state = state_of(folder)
    if resume and is_finished(folder / "model.safetensors", state):
        out.facts({"path": str(folder), "model": model, "data": data}, key="path")
        out.note(f"{folder} is finished already; nothing is left to resume")
        return
    if not (Path(model) / "config.json").is_file():
        tell_pool(out, model, MIXTURE)
    claim(out, folder, state, resume=resume, yes=yes)
    splits = [train_split, *([test_split] if test_split else [])]
    with interruptible(out, state):
        learngene = _of_components(model) if constrained else None
        grown, images = _model_and_images(
            model, data, splits, depth=depth, width=width, heads=read_heads(heads), size=pixels, settings=growth,
            seed=seed, limit=limit, skip_unreadable=skip_unreadable, new_head=head in ("means", "whitened"),
        )  # fmt: skip
        for each in images:
            tell_skipped(out, each)
        tell_left_out(out, images[0], batch_size)
        if epochs is None:
            recipe = replace(recipe, epochs=default_epochs(len(images[0])))
        began = time.perf_counter()
        tuned = _tuned(learngene, grown, growth, seed) if learngene else grown.timm_model
        identity = {"weights at the start": state_digest(tuned), "head": head}
        if not learngene and not is_begun(state):  # a run that goes on has its head
            _begin_head(out, grown, images[0], head, seed=seed, device=device)
        history = _trained(
            out, tuned, images, recipe, identity, preprocessing=grown.preprocessing, state=state, device=device,
            log=log,
        )  # fmt: skip
        if learngene:
            grown.timm_model.load_state_dict(tuned.materialise().state_dict())  # type: ignore[operator]
        first = process()[0] == 0  # of several processes of a launcher one tells and writes
        grown.save_pretrained(folder, is_main_process=first)
    if not first:
        return
    shutil.rmtree(state, ignore_errors=True)
    facts: dict[str, Any] = {"path": str(folder), "model": model, "data": data, "images": len(images[0])}
    _tell_tuned(out, facts | _sizes(grown, tuned) | {"epochs": history}, test_split, time.perf_counter() - began)


def _require_head(head: str, constrained: bool) -> None:
    """Refuse a head that there is not, or that a training of components cannot begin with (SettingsError)."""
    from learngene_hub.factory import HEADS

    if head not in ("auto", *HEADS):
        raise errors.SettingsError(f"--head {head} asked; there are auto, {', '.join(HEADS)}")
    if constrained and head not in ("auto", "fresh"):
        raise errors.SettingsError(f"--head {head} asked with --constrained, which begins with a fresh head")


def _begin_head(out: Output, grown: Descendant, images: Images, head: str, *, seed: int, device: str | None) -> None:
    """Write the head that was asked for, and say so where one was written."""
    from learngene_hub.factory import fit_head, is_untouched

    how = ("means" if is_untouched(grown.timm_model) else "fresh") if head == "auto" else head
    count = fit_head(grown.timm_model, images, how=how, preprocessing=grown.preprocessing, device=device, seed=seed)
    if count and _is_first():
        out.note(f"The head begins with the class means of {count} images ({how}); --head fresh leaves it as it is")


def _sizes(grown: Descendant, tuned: nn.Module) -> dict[str, int]:
    """Parameters of the model, and of what was trained in its place."""
    models = {"params": grown.timm_model, "trained_params": tuned}
    return {name: sum(parameter.numel() for parameter in each.parameters()) for name, each in models.items()}


def _tell_tuned(out: Output, facts: Mapping[str, Any], test_split: str, seconds: float) -> None:
    """What is told of a training that is done, and the command that tests it."""
    out.facts({**facts, "seconds": seconds}, key="path")
    split = "" if test_split in ("", "test") else f" --split {shlex.quote(test_split)}"
    out.note(f"Next: learngene evaluate {shlex.quote(facts['path'])} --data {shlex.quote(facts['data'])}{split}")


def _of_components(model: str) -> Learngene:
    """The learngene of this name, whose components can be trained.

    Raises:
        SettingsError: it is a model that was grown already, or of a method without components.
    """
    from learngene_hub import factory
    from learngene_hub.hub import fetch

    if (Path(model) / "config.json").is_file():
        raise errors.SettingsError(f"--constrained asked; {model} is grown already: its learngene would work")
    learngene, _ = fetch(model)
    factory.require_constrainable(learngene)
    return learngene


def _tuned(learngene: Learngene, grown: Descendant, growth: Mapping[str, Any], seed: int) -> nn.Module:
    """What is trained in place of ``grown``: a model of the same function, whose parameters are components."""
    from learngene_hub import factory
    from learngene_hub.shape import shape_of

    shape = shape_of(grown.timm_model)
    return factory.constrain(
        learngene,
        depth=shape.depth,
        width=shape.width,
        num_labels=shape.classes,
        image_size=shape.image_size,
        in_chans=shape.in_chans,
        seed=seed,
        settings=growth,
    )


def _trained(
    out: Output,
    model: nn.Module,
    images: Sequence[Images],
    recipe: Recipe,
    identity: Mapping[str, str],
    *,
    preprocessing: Preprocessing,
    state: Path,
    device: str | None,
    log: Path | None,
) -> dict[str, dict[str, float]]:
    """Trains on the first images; of each epoch the mean loss over its updates, and the accuracy on the second images
    after it, if there are any; of "0" the accuracy before the first update."""
    from learngene_hub import factory
    from learngene_hub.training import StateDir, process

    steps = factory.finetune(
        model,
        images[0],
        recipe=recipe,
        preprocessing=preprocessing,
        state_dir=StateDir(state, identity),
        device=device,
    )
    history: dict[str, dict[str, float]] = {}
    if len(images) > 1 and _is_first() and not is_begun(state):
        found = factory.evaluate(model, images[1], preprocessing=preprocessing, device=device)
        history["0"] = {"accuracy": found.accuracy}
        out.note(f"before training: accuracy {text('accuracy', found.accuracy)}")
    losses: list[float] = []
    for step in _followed(steps, log):
        losses.append(step.loss)
        if step.epoch_done and process()[0] == 0:
            reached = history[str(step.epoch + 1)] = {"loss": fmean(losses)}
            losses.clear()
            if len(images) > 1:
                found = factory.evaluate(model, images[1], preprocessing=preprocessing)
                reached["accuracy"] = found.accuracy
            told = ", ".join(f"{key} {text(key, value)}" for key, value in reached.items())
            out.note(f"epoch {step.epoch + 1} of {recipe.epochs}: {told}")
    return history


def _is_first() -> bool:
    """Whether this process is the one that tells, also before the first update joins those of a launcher."""
    return os.environ.get("RANK", "0") == "0"


def _followed(steps: Iterator[Step], log: Path | None) -> Iterator[Step]:
    """The steps under a progress bar and with a log; of several processes in the first alone."""
    from learngene_hub.training import log_steps, process, show_progress

    begun = [step for step in [next(steps, None)] if step]  # the first update joins the processes of a launcher
    every = chain(begun, steps)
    if process()[0] > 0:
        return every
    return log_steps(show_progress(every), log) if log else show_progress(every)


def _model_and_images(
    model: str,
    data: str,
    splits: Sequence[str],
    *,
    depth: int | None,
    width: int | None,
    heads: int | tuple[int, ...] | None,
    size: int | None,
    settings: Mapping[str, Any],
    seed: int,
    limit: int | None,
    skip_unreadable: bool,
    new_head: bool,
) -> tuple[Descendant, list[Images]]:
    """A saved model, or one grown now for the classes of the data, and the splits at its size, their labels counted as
    the model counts them. A model without names for its classes, or with a new head, takes those of the data.

    Raises:
        ShapeError: a size or a growth setting is asked of a model that is grown already, or it has other classes.
        DataError: the second split has a class that the first has not.
    """
    from learngene_hub.data import load_images
    from learngene_hub.descendant import Descendant
    from learngene_hub.hub import pull
    from learngene_hub.shape import shape_of

    if (Path(model) / "config.json").is_file():
        grown = Descendant.from_pretrained(model)
        shape = shape_of(grown.timm_model)
        asked = {"depth": depth, "width": width, "heads": heads, "image-size": size}
        if settings:
            raise errors.ShapeError(f"--set {min(settings)} asked; {model} is grown already: expand anew with it")
        for name, wanted in asked.items():
            there = getattr(shape, name.replace("-", "_"), None)
            if wanted not in (None, there):
                raise errors.ShapeError(
                    f"--{name} {wanted} asked; {model} has {there} already: leave it out, or expand anew"
                )
        images = [images_for(shape, data, split, limit, skip_unreadable) for split in splits]
        names = None if new_head else class_names(grown)
        images = [as_the_model_counts(each, names, model) for each in images]
        if len(images[0].classes) != shape.classes:
            raise errors.ShapeError(
                f"{data} has {len(images[0].classes)} classes, {model} has {shape.classes} outputs; expand with "
                f"--num-labels {len(images[0].classes)} would work"
            )
        classes = images[0].classes
        if names is None and not all(name.isdecimal() for name in classes):
            grown.config.id2label = dict(enumerate(classes))
            grown.config.label2id = {name: number for number, name in enumerate(classes)}
        return grown, [each.numbered(classes) for each in images]
    pixels = size or pull(model).pool_size or IMAGE_SIZE
    images = [
        load_images(data, split=split, size=pixels, limit=limit, skip_unreadable=skip_unreadable) for split in splits
    ]
    classes = images[0].classes
    grown = Descendant.from_learngene(
        model,
        depth=depth,
        width=width,
        heads=heads,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        image_size=pixels,
        seed=seed,
        settings=settings,
    )
    return grown, [each.numbered(classes) for each in images]
