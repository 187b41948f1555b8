"""The commands that train or look at images: extract, finetune, evaluate."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import (
    DataOption,
    DepthOption,
    DeviceOption,
    DtypeOption,
    LimitOption,
    PrecisionOption,
    SeedOption,
    SkipOption,
    WidthOption,
    YesOption,
    read_settings,
    require_dtype,
    require_new,
)
from learngene_hub._output import Output

if TYPE_CHECKING:
    from learngene_hub.data import Images
    from learngene_hub.descendant import Descendant
    from learngene_hub.shape import ViTShape

GROWN_SIZE = 64  # pixels of a model that finetune grows itself, where --size is left out
STATE = "training-state"  # folder inside --out that an interrupted run leaves and --resume reads

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder that expand or finetune wrote.")]


def extract(
    out: Output,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="One of `learngene methods`.")],
    ancestor: Annotated[str, typer.Argument(metavar="ANCESTOR", help="A folder of a plain timm ViT, or its Hub id.")],
    data: Annotated[list[str], typer.Option("--data", help="A data set to extract with; repeat it for more.")],
    path: Annotated[Path, typer.Option("--out", help="The folder, or NAME.safetensors file, to write.")],
    config: Annotated[Path | None, typer.Option("--config", help="The method's settings: a JSON or YAML file.")] = None,
    pairs: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; repeat it.")
    ] = None,
    widening: Annotated[
        list[str] | None,
        typer.Option("--widen", metavar="KEY=VALUE", help="Add the width stage, with one of its settings; repeat it."),
    ] = None,
    dtype: DtypeOption = "float32",
    size: Annotated[int, typer.Option("--size", help="Side of the images, pixels.")] = GROWN_SIZE,
    split: Annotated[str, typer.Option("--split", help="The split of each data set to use.")] = "train",
    limit: LimitOption = None,
    ancestor_license: Annotated[str, typer.Option("--ancestor-license", help="SPDX, such as Apache-2.0.")] = "",
    skip_unreadable: SkipOption = False,
    yes: YesOption = False,
) -> None:
    """Make a learngene from a pre-trained ancestor.

    \b
    learngene extract lsamd timm/deit_tiny_patch16_224.fb_in1k --data signdigits --data photos/ --size 64 \\
        --set epochs=10 --widen widths=[64,128] --widen rows=128 --dtype float16 --out my-learngene
    """
    from learngene_hub import factory, methods
    from learngene_hub.data import load_images
    from learngene_hub.training import show_progress
    from learngene_hub.widening import Widening, widen

    settings = read_settings(config, pairs or [])
    stage = Widening.from_dict(read_settings(None, widening)) if widening else None
    number = require_dtype(dtype)
    methods.get_method(method, settings)  # refuses a wrong setting before anything is read
    require_new(out, path, yes=yes)
    from learngene_hub.descendant import Descendant
    from learngene_hub.shape import ViTShape

    model = Descendant.from_pretrained(ancestor)
    if stage:
        stage.require(ViTShape.of(model.timm_model))
    images: dict[str, Images] = {}
    for source in data:
        found = load_images(source, split=split, size=size, limit=limit, skip_unreadable=skip_unreadable)
        if found.name in images:
            raise errors.SettingsError(f"--data {source} asked; a data set named {found.name} is there already")
        images[found.name] = found
    began = time.perf_counter()
    learngene = factory.extract(
        method,
        model.timm_model,
        images,
        settings=settings,
        facts={"name": Path(ancestor).name, "source": ancestor, "license": ancestor_license},
        preprocessing=model.preprocessing,
        watch=show_progress,
    )
    if stage:
        learngene = widen(learngene, images, stage, watch=show_progress)
    learngene = learngene.to(number)
    if path.suffix == ".safetensors":
        learngene.save(path)
    else:
        path = learngene.save_pretrained(path)
    facts = {
        "path": str(path),
        "method": method,
        "reach": str(learngene.reach),
        "params": learngene.params,
        "bytes": path.stat().st_size,
        "sha256": learngene.digest,
        "seconds": time.perf_counter() - began,
    }
    out.facts(facts, key="path")
    out.note(f"Next: learngene show {path} --depth 12")


def finetune(
    out: Output,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder that expand wrote, or a learngene to grow now.")
    ],
    data: DataOption,
    folder: Annotated[Path, typer.Option("--out", help="The folder to write the trained model to.")],
    depth: DepthOption = None,
    width: WidthOption = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Side of the images, pixels, of a model grown now [64].")
    ] = None,
    train_split: Annotated[str, typer.Option("--train-split", help="The split to train on.")] = "train",
    test_split: Annotated[str, typer.Option("--test-split", help="The split to test on; '' for none.")] = "test",
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the training images.")] = 3,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 3e-4,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per update.")] = 64,
    seed: SeedOption = 0,
    precision: PrecisionOption = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    device: DeviceOption = None,
    limit: LimitOption = None,
    skip_unreadable: SkipOption = False,
    log: Annotated[
        Path | None, typer.Option("--log", help="Write each step: FILE.csv, or a TensorBoard folder.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    yes: YesOption = False,
) -> None:
    """Train a descendant on labelled images.

    Tells the accuracy after each epoch, and writes a folder that plain transformers loads.

    \b
    learngene finetune grown --data signdigits --out trained
    learngene finetune lsamd-base --depth 7 --width 320 --data photos/ --test-split val --out trained --epochs 10
    learngene finetune grown --data signdigits --out trained --resume
    """
    from learngene_hub import factory
    from learngene_hub.training import Recipe, log_steps, show_progress

    recipe = Recipe(epochs=epochs, lr=lr, batch_size=batch_size, precision=precision, compile=compile, seed=seed)
    state = folder / STATE
    if not (resume and state.is_dir()):
        require_new(out, folder, yes=yes)
        shutil.rmtree(state, ignore_errors=True)
    splits = [train_split, *([test_split] if test_split else [])]
    grown, images = _model_and_images(
        model,
        data,
        splits,
        depth=depth,
        width=width,
        size=size,
        seed=seed,
        limit=limit,
        skip_unreadable=skip_unreadable,
    )
    steps = factory.finetune(
        grown.timm_model,
        images[0],
        recipe=recipe,
        preprocessing=grown.preprocessing,
        state_dir=str(state),
        device=device,
    )
    history: dict[str, dict[str, float]] = {}
    began = time.perf_counter()
    for step in log_steps(show_progress(steps), log) if log else show_progress(steps):
        if step.epoch_done:
            reached = history[str(step.epoch + 1)] = {"loss": step.loss}
            if test_split:
                found = factory.evaluate(grown.timm_model, images[1], preprocessing=grown.preprocessing)
                reached["accuracy"] = found.accuracy
            out.note(f"epoch {step.epoch + 1} of {epochs}: " + ", ".join(f"{k} {v:.4g}" for k, v in reached.items()))
    grown.save_pretrained(folder)
    shutil.rmtree(state, ignore_errors=True)
    facts: dict[str, Any] = {
        "path": str(folder),
        "model": model,
        "data": data,
        "images": len(images[0]),
        "params": sum(parameter.numel() for parameter in grown.timm_model.parameters()),
        "epochs": history,
        "seconds": time.perf_counter() - began,
    }
    out.facts(facts, key="path")
    out.note(f"Next: learngene evaluate {folder} --data {data}")


def _model_and_images(
    model: str,
    data: str,
    splits: Sequence[str],
    *,
    depth: int | None,
    width: int | None,
    size: int | None,
    seed: int,
    limit: int | None,
    skip_unreadable: bool,
) -> tuple[Descendant, list[Images]]:
    """A saved model, or one grown now for the classes of the data, and the splits at its size.

    Raises:
        ShapeError: a size is asked of a model that has one already.
    """
    from learngene_hub.data import load_images
    from learngene_hub.descendant import Descendant
    from learngene_hub.shape import ViTShape

    if (Path(model) / "config.json").is_file():
        grown = Descendant.from_pretrained(model)
        shape = ViTShape.of(grown.timm_model)
        asked = {"--depth": (depth, shape.depth), "--width": (width, shape.width), "--size": (size, shape.image_size)}
        for name, (wanted, there) in asked.items():
            if wanted not in (None, there):
                raise errors.ShapeError(
                    f"{name} {wanted} asked; {model} has {there} already: leave it out, or expand anew"
                )
        return grown, [_images(data, split, shape, limit, skip_unreadable) for split in splits]
    pixels = size or GROWN_SIZE
    images = [
        load_images(data, split=split, size=pixels, limit=limit, skip_unreadable=skip_unreadable) for split in splits
    ]
    classes = images[0].classes
    grown = Descendant.from_learngene(
        model,
        depth=depth,
        width=width,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        image_size=pixels,
        seed=seed,
    )
    return grown, images


def _images(data: str, split: str, shape: ViTShape, limit: int | None, skip_unreadable: bool) -> Images:
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
    if not (Path(model) / "config.json").is_file():
        raise errors.StoreError(f"{model} is not a saved descendant; a folder that expand or finetune wrote would work")
    from learngene_hub import factory
    from learngene_hub.descendant import Descendant
    from learngene_hub.shape import ViTShape

    grown = Descendant.from_pretrained(model)
    images = _images(data, split, ViTShape.of(grown.timm_model), limit, skip_unreadable)
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
