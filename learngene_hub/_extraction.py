"""The command extract: a learngene from a pre-trained ancestor."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import (
    DtypeOption,
    LimitOption,
    SkipOption,
    YesOption,
    read_settings,
    require_dtype,
    tell_skipped,
)
from learngene_hub._output import Output
from learngene_hub._resume import (
    IMAGE_SIZE,
    OldSizeOption,
    ResumeOption,
    claim,
    interruptible,
    is_finished,
    one_size,
    state_of,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from learngene_hub.data import Images
    from learngene_hub.learngene import Learngene
    from learngene_hub.methods import Method
    from learngene_hub.shape import Preprocessing
    from learngene_hub.teacher import Teacher
    from learngene_hub.training import Step
    from learngene_hub.widening import Widening

HUB = "hf-hub:"  # timm's prefix of a Hub repository
MUCH_LARGER = 2  # times the ancestor's parameters: what is told before so much is trained
COST = ("steps", "images_seen", "flops", "teacher_flops")  # of the provenance: what is told of the cost
MODEL = "a folder that timm saved, ORG/REPO or hf-hub:ORG/REPO on the Hub, or a name of timm's"


MethodArgument = Annotated[str, typer.Argument(metavar="METHOD", help="One of `learngene methods`.")]
AncestorArgument = Annotated[str, typer.Argument(metavar="ANCESTOR", help=f"A timm model: {MODEL}.")]
OutOption = Annotated[Path, typer.Option("--out", help="The folder, or NAME.safetensors file, to write.")]
DataSetsOption = Annotated[
    list[str] | None,
    typer.Option("--data", help="A data set to extract with; repeat it for more. Some methods need none."),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="The method's settings: a JSON or YAML file.")]
SettingOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; repeat it.")]
WideningOption = Annotated[
    list[str] | None,
    typer.Option("--widen", metavar="KEY=VALUE", help="Add the width stage, with one of its settings; repeat it."),
]
PixelsOption = Annotated[int | None, typer.Option("--image-size", help="Side of the images, pixels [64].")]
SplitOption = Annotated[str, typer.Option("--split", help="The split of each data set to use.")]
AncestorWeightsOption = Annotated[
    Path | None, typer.Option("--ancestor-weights", help="A .safetensors file, for an ANCESTOR named as timm does.")
]
TeacherOption = Annotated[
    str | None, typer.Option("--teacher", help="Learn from this model's predictions, not the ancestor's.")
]
TeacherWeightsOption = Annotated[
    Path | None, typer.Option("--teacher-weights", help="A .safetensors file, for a --teacher named as timm does.")
]
TeacherCacheOption = Annotated[
    Path | None, typer.Option("--teacher-cache", help="Keep what the teacher says here; other runs read it.")
]
AncestorLicenseOption = Annotated[str, typer.Option("--ancestor-license", help="SPDX, such as Apache-2.0.")]


def extract(
    out: Output,
    method: MethodArgument,
    ancestor: AncestorArgument,
    path: OutOption,
    data: DataSetsOption = None,
    config: ConfigOption = None,
    pairs: SettingOption = None,
    widening: WideningOption = None,
    dtype: DtypeOption = "float32",
    image_size: PixelsOption = None,
    size: OldSizeOption = None,
    split: SplitOption = "train",
    limit: LimitOption = None,
    ancestor_weights: AncestorWeightsOption = None,
    teacher: TeacherOption = None,
    teacher_weights: TeacherWeightsOption = None,
    teacher_cache: TeacherCacheOption = None,
    ancestor_license: AncestorLicenseOption = "",
    skip_unreadable: SkipOption = False,
    resume: ResumeOption = False,
    yes: YesOption = False,
) -> None:
    """Make a learngene from a pre-trained ancestor.

    An interrupted extraction goes on with the same command and --resume; about a minute of it is lost. ANCESTOR and
    --teacher are a folder, ORG/REPO or hf-hub:ORG/REPO, or timm's name of a model; a CNN where the method allows it.

    \b
    learngene extract lsamd timm/deit_tiny_patch16_224.fb_in1k --data signdigits --data photos/ --image-size 64 \\
        --set epochs=10 --widen widths=[64,128] --widen rows=128 --dtype float16 --out my-learngene
    learngene extract lsamd ancestor --data signdigits --data photos/ --out my-learngene --resume
    learngene extract tleg deit_tiny_patch16_224 --teacher regnety_016.tv2_in1k --data photos/ --out my-learngene
    """
    settings = read_settings(config, pairs or [])
    stage, number, asked = _asked(method, settings, widening, dtype)
    _require_teachable(asked, teacher, teacher_weights, teacher_cache)
    pixels = one_size(image_size, size) or IMAGE_SIZE
    state = state_of(path)
    if resume and is_finished(_file(path), state):
        _tell_finished(out, _file(path), asked)
        return
    claim(out, path, state, resume=resume, yes=yes)
    with interruptible(out, state):
        chosen = load_model(ancestor, ancestor_weights, "--ancestor-weights")
        _require_begin(asked, stage, chosen)
        taught = _taught(teacher, teacher_weights, teacher_cache, chosen)
        images = _data_sets(data or [], split=split, size=pixels, limit=limit, skip_unreadable=skip_unreadable)
        for each in images.values():
            tell_skipped(out, each)
        _tell_auxiliary(out, asked, chosen.model, images)
        began = time.perf_counter()
        facts = {"name": chosen.name, "source": chosen.source, "license": ancestor_license}
        learngene = _extracted(out, method, settings, chosen, images, facts, stage, state, taught).to(number)
        file = _stored(learngene, path)
    shutil.rmtree(state, ignore_errors=True)
    _tell_made(out, learngene, file, chosen.model, time.perf_counter() - began)


def _asked(
    method: str, settings: Mapping[str, Any], widening: Sequence[str] | None, dtype: str
) -> tuple[Widening | None, torch.dtype, Method]:
    """The width stage, the dtype and the method that were asked for, before anything is read.

    Raises:
        SettingsError: one of them is none, or they do not go together.
    """
    from learngene_hub import methods
    from learngene_hub.widening import Widening, require_group

    stage = Widening.from_dict(read_settings(None, widening)) if widening else None
    number, asked = require_dtype(dtype), methods.get_method(method, settings)
    if stage:
        require_group(asked)
    return stage, number, asked


def _require_begin(asked: Method, stage: Widening | None, chosen: Chosen) -> None:
    """Refuse an ancestor that the method, or the width stage, cannot begin with (ShapeError, SettingsError)."""
    from learngene_hub import methods
    from learngene_hub.shape import ViTShape

    methods.require_ancestor(asked, chosen.model)
    if stage:
        stage.require(ViTShape.of(chosen.model))


def _tell_made(out: Output, learngene: Learngene, file: Path, ancestor: nn.Module, seconds: float) -> None:
    """What is told of an extraction that is done."""
    out.facts(_told(learngene, file, seconds), key="path")
    if learngene.provenance.get("flops"):
        out.note(
            "Each of flops counts forward passes alone; backward passes of training take about twice as many again"
        )
    own = sum(parameter.numel() for parameter in ancestor.parameters())
    if learngene.params > own:
        out.note(f"It is larger than its ancestor, which has {own:,} parameters; smaller settings store less")
    out.note(f"Next: learngene show {file} --depth {learngene.shape.depth}")


def _tell_auxiliary(out: Output, asked: Method, ancestor: nn.Module, images: Mapping[str, Images]) -> None:
    """Says, before anything is trained, that what a method trains is much larger than the ancestor."""
    shape_of_it = getattr(asked, "auxiliary", None)
    if shape_of_it is None or not images:
        return
    shape = shape_of_it(ancestor, next(iter(images.values())))
    own = sum(parameter.numel() for parameter in ancestor.parameters())
    if shape.params() > MUCH_LARGER * own:
        deep = "depth=N" if hasattr(asked, "depth") else "stages=[N,N]"
        out.note(
            f"{asked.name} trains an auxiliary of {shape}: {shape.params():,} parameters, {shape.params() / own:.0f} "
            f"times the ancestor's {own:,}; --set {deep} --set width=N trains another, N=0 a ViT ancestor's own"
        )


def _told(learngene: Learngene, file: Path, seconds: float) -> dict[str, Any]:
    """What is told of an extraction: where it is, what it can grow, and what it cost."""
    cost = {name: learngene.provenance[name] for name in COST if name in learngene.provenance}
    return {
        "path": str(file),
        "method": learngene.method,
        "reach": str(learngene.reach),
        "params": learngene.params,
        "bytes": file.stat().st_size,
        "sha256": learngene.digest,
        **cost,
        "seconds": seconds,
    }


def _tell_finished(out: Output, file: Path, asked: Method) -> None:
    """What is told instead of an extraction that is done already.

    Raises:
        SettingsError: what is there was made by another method, or with other settings.
    """
    from learngene_hub import methods
    from learngene_hub.learngene import Learngene

    learngene = Learngene.load(file)
    made = methods.get_method(learngene.method, learngene.settings)
    if is_dataclass(asked) and made != asked:
        raise errors.SettingsError(
            f"{file} is a finished extraction of {made.name} with other settings; --yes without --resume starts afresh"
        )
    out.facts(_told(learngene, file, float(learngene.provenance.get("seconds", 0.0))), key="path")
    out.note(f"{file} is finished already; nothing is left to resume")


def _require_teachable(asked: Method, teacher: str | None, weights: Path | None, cache: Path | None) -> None:
    """Refuse options of a teacher for a method that takes none.

    Raises:
        SettingsError: the method takes none, or weights of no teacher are asked.
    """
    from learngene_hub import methods

    if weights and not teacher:
        raise errors.SettingsError(f"--teacher-weights {weights} asked without --teacher, timm's name of their model")
    if (teacher or cache) and not methods.is_taught(asked):
        known = ", ".join(name for name, kind in methods.BUILT_IN.items() if methods.is_taught(kind))
        option = f"--teacher {teacher}" if teacher else f"--teacher-cache {cache}"
        raise errors.SettingsError(f"{option} asked; {asked.name} takes no teacher: {known} do")


@dataclass(frozen=True, eq=False)
class Chosen:
    """A model that somebody named: an ancestor, or a teacher."""

    model: nn.Module
    preprocessing: Preprocessing
    name: str
    source: str  # where it came from: org/repo, or ./ and the name of a folder or file


def load_model(source: str, weights: Path | None = None, option: str = "--ancestor-weights") -> Chosen:
    """The timm model of a folder, of a Hub repository, or of a name; ``weights`` (of ``option``) belong to a name.

    Raises:
        StoreError: there is none, or it cannot be read.
        SettingsError: weights of something that is no name of timm's.
    """
    from learngene_hub import _ancestors

    place = source.removeprefix(HUB)
    folder = place == source and Path(source).exists()
    named = place == source and not folder and _ancestors.is_named(source)
    if weights is not None and not named:
        raise errors.SettingsError(f"{option} {weights} asked with {source}; weights belong to a name of timm's")
    if named:
        model, preprocessing = _ancestors.load_named(source, weights)
        known = source.removeprefix(_ancestors.PREFIX)
        origin = f"./{weights.name}" if weights else _ancestors.origin(model, known)
        return Chosen(model, preprocessing, known, origin)
    if not folder and "/" not in place:
        near = " or ".join(_ancestors.similar_names(place))
        hint = f"; did you mean {near}?" if near else f"; of a timm ViT or another timm model: {MODEL} would work"
        raise errors.StoreError(f"no folder {source!r}, and timm has no model of that name{hint}")
    return _saved(place, f"./{Path(place).resolve().name}" if folder else place)


def _saved(place: str, source: str) -> Chosen:
    """The model of a folder or of a Hub repository, in timm's layout."""
    from learngene_hub.descendant import Descendant

    try:
        found = Descendant.from_pretrained(place)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = "a folder that timm's save_for_hf or `learngene expand` wrote would work"
        raise errors.StoreError(
            f"{place} cannot be read as a timm ViT or other timm model ({reason}); {hint}"
        ) from error
    return Chosen(found.timm_model, found.preprocessing, Path(place).name, source)


def _taught(teacher: str | None, weights: Path | None, cache: Path | None, ancestor: Chosen) -> Teacher | None:
    """The teacher that was asked for; the ancestor in its place, where only a cache was."""
    from learngene_hub.teacher import Teacher

    if teacher is None:
        return None if cache is None else Teacher(ancestor.model, cache=cache)
    chosen = load_model(teacher, weights, "--teacher-weights")
    return Teacher(chosen.model, preprocessing=chosen.preprocessing, name=chosen.name, cache=cache)


def _data_sets(
    sources: Sequence[str], *, split: str, size: int, limit: int | None, skip_unreadable: bool
) -> dict[str, Images]:
    """The images of each data set, by its name.

    Raises:
        SettingsError: two have one name.
    """
    from learngene_hub.data import load_images

    images: dict[str, Images] = {}
    for source in sources:
        found = load_images(source, split=split, size=size, limit=limit, skip_unreadable=skip_unreadable)
        if found.name in images:
            raise errors.SettingsError(f"--data {source} asked; a data set named {found.name} is there already")
        images[found.name] = found
    return images


def _extracted(
    out: Output,
    method: str,
    settings: Mapping[str, Any],
    ancestor: Chosen,
    images: Mapping[str, Images],
    facts: Mapping[str, str],
    stage: Widening | None,
    state: Path,
    teacher: Teacher | None,
) -> Learngene:
    """The learngene, after the width stage if there is one; each goes on from what it left in ``state``."""
    from learngene_hub import factory, training
    from learngene_hub.widening import widen

    def watch(steps: Iterator[Step]) -> Iterator[Step]:
        return training.show_progress(steps, label=method, tell=out.note)

    def watch_stage(steps: Iterator[Step]) -> Iterator[Step]:
        return training.show_progress(steps, label="width", tell=out.note)

    learngene = factory.extract(
        method,
        ancestor.model,
        images,
        settings=settings,
        facts=facts,
        preprocessing=ancestor.preprocessing,
        watch=watch,
        state_dir=state,
        teacher=teacher,
    )
    return learngene if stage is None else widen(learngene, images, stage, watch=watch_stage, state_dir=state / "width")


def _file(path: Path) -> Path:
    """The file that is written for ``path``: itself, or one in the folder ``path``."""
    from learngene_hub._format import FILE_NAME

    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _stored(learngene: Learngene, path: Path) -> Path:
    """The file written."""
    if path.suffix != ".safetensors":
        return learngene.save_pretrained(path)
    learngene.save(path)
    return path
