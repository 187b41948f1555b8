"""The command ``evaluate``, and what commands on a saved descendant share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import DataOption, DeviceOption, LimitOption, PrecisionOption, SkipOption, tell_skipped
from learngene_hub._output import Output

if TYPE_CHECKING:
    from learngene_hub.data import Images
    from learngene_hub.descendant import Descendant
    from learngene_hub.shape import Shape

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder that expand or finetune wrote.")]


def images_for(shape: Shape, data: str, split: str, limit: int | None, skip_unreadable: bool) -> Images:
    """One split at the size and channels that a model was grown for."""
    from learngene_hub.data import load_images

    return load_images(
        data,
        split=split,
        size=shape.image_size,
        in_chans=shape.in_chans,
        limit=limit,
        skip_unreadable=skip_unreadable,
    )


def saved(model: str) -> Descendant:
    """The descendant in this folder.

    Raises:
        StoreError: it holds none.
    """
    if not (Path(model) / "config.json").is_file():
        raise errors.StoreError(f"{model} is not a saved descendant; a folder that expand or finetune wrote would work")
    from learngene_hub.descendant import Descendant

    return Descendant.from_pretrained(model)


def class_names(grown: Descendant) -> tuple[str, ...] | None:
    """What a model calls its classes; None where it has no names for them, LABEL_0 and so on."""
    said: Any = grown.config.id2label or {}
    names = tuple(str(said[number]) for number in sorted(said))
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def as_the_model_counts(images: Images, names: tuple[str, ...] | None, model: str) -> Images:
    """The images with the model's numbers of their classes, where both have names for them.

    Raises:
        ShapeError: the data has a class that the model does not know.
    """
    if names is None or all(name.isdecimal() for name in images.classes):
        return images
    try:
        return images.numbered(names)
    except errors.DataError as error:
        raise errors.ShapeError(
            f"{model} knows other classes: {error}; finetune with --head means gives it a new head for them"
        ) from error


def evaluate(
    out: Output,
    model: ModelArgument,
    data: DataOption,
    split: Annotated[str, typer.Option("--split", help="The split to test on.")] = "test",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time.")] = 256,
    precision: PrecisionOption = "fp32",
    device: DeviceOption = None,
    limit: LimitOption = None,
    skip_unreadable: SkipOption = False,
) -> None:
    """Accuracy and loss of a saved descendant on images.

    \b
    learngene evaluate trained --data signdigits
    learngene evaluate trained --data photos/ --split val --json
    """
    grown = saved(model)
    from learngene_hub import factory
    from learngene_hub.shape import shape_of

    images = images_for(shape_of(grown.timm_model), data, split, limit, skip_unreadable)
    images = as_the_model_counts(images, class_names(grown), model)
    tell_skipped(out, images)
    found = factory.evaluate(
        grown.timm_model,
        images,
        preprocessing=grown.preprocessing,
        batch_size=batch_size,
        device=device,
        precision=precision,
    )
    facts = {
        "model": model,
        "data": data,
        "split": split,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "images": found.count,
        "seconds": found.seconds,
    }
    out.facts(facts, key="accuracy")
