"""The verbs: extract a learngene, expand it into a descendant, finetune that, evaluate it.

``expand`` asks a method for the whole state dict of the descendant and compares its names with the model's: nothing is
silently missed, and nothing is left over. The model is built on the meta device, so that each tensor is allocated once.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from learngene_hub._first_head import HEADS as HEADS
from learngene_hub._first_head import fit_head as fit_head
from learngene_hub._first_head import is_untouched as is_untouched
from learngene_hub._growth import MAX_PARAMS as MAX_PARAMS
from learngene_hub._growth import expand as expand
from learngene_hub._growth import grow as grow
from learngene_hub._growth import grown_state as grown_state
from learngene_hub._growth import plan as plan
from learngene_hub._growth import with_settings as with_settings
from learngene_hub._sizing import Prefer as Prefer
from learngene_hub.data import Images, ordered_batches
from learngene_hub.errors import ArtefactError, DataError, SettingsError, StoreError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import (
    BUILT_IN,
    Constrainable,
    Method,
    get_method,
    is_constrainable,
    is_resumable,
    is_taught,
)
from learngene_hub.shape import IMAGENET, Preprocessing
from learngene_hub.teacher import Teacher
from learngene_hub.training import (
    Recipe,
    StateDir,
    Step,
    classification_loss,
    fit,
    image_batches,
    images_digest,
    learning,
)
from learngene_hub.training import state_digest as state_digest

SEARCH, FOUND = "search", "found.safetensors"  # inside extract's state_dir: a method's own state, and what it found


@learning()
def extract(
    method: str | Method,
    ancestor: nn.Module,
    data: Mapping[str, Images],
    *,
    settings: Mapping[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
    preprocessing: Preprocessing = IMAGENET,
    watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
    state_dir: str | Path | None = None,
    teacher: Teacher | nn.Module | None = None,
    teacher_cache: str | Path | None = None,
) -> Learngene:
    """The learngene that ``method`` (a name, or a method with its settings) finds in ``ancestor`` with ``data``.

    Args:
        ancestor: a timm ViT, pre-trained; a method that learns from predictions alone takes any model with logits.
        data: name -> images; what a method needs of them stands in its own docstring.
        settings: of a method that is given by name.
        facts: ``name``, ``sha256``, ``license`` and ``source`` of the ancestor; the sha256 is computed where it is
            left out.
        watch: is handed the steps of the training and passes them on: a progress bar, a log.
        state_dir: a folder of this extraction alone, in which an interrupted one goes on: from its last state, where
            the method keeps one (``methods.Resumable``), and with the learngene, once that was found. The state is
            written about once a minute, in less than a hundredth of the time. Remove the folder afterwards.
        teacher: what an auxiliary learns from, where that is not the ancestor: any module images -> logits, of a method
            that takes one (``methods.Taught``).
        teacher_cache: a folder that keeps what the teacher (or the ancestor, as its own) says of each data set, for
            every extraction that asks the same.

    Raises:
        SettingsError: no such method, a setting out of its range, data that the method cannot use, a teacher that it
            does not take, or ``state_dir`` is of another extraction.
        ShapeError: the ancestor is not of the family that the method needs.
        StoreError: ``state_dir`` or ``teacher_cache`` cannot be read or written.
    """
    if not isinstance(method, str) and settings:
        raise SettingsError(
            "settings asked beside a method object, which has its own; give a name, or the object alone"
        )
    chosen = get_method(method, settings) if isinstance(method, str) else method
    known = {"name": "", "sha256": "", "license": "", "source": ""} | dict(facts or {})
    given = known["sha256"]
    known["sha256"] = given or state_digest(ancestor)
    more = _taught(chosen, ancestor, teacher, teacher_cache)
    if state_dir is None:
        return chosen.extract(ancestor, data, facts=known, preprocessing=preprocessing, watch=watch, **more)
    identity = {"method": chosen.name} | _settings(chosen, settings) | {f"ancestor's {k}": v for k, v in known.items()}
    identity["ancestor's weights"] = state_digest(ancestor) if given else known["sha256"]
    identity |= {"preprocessing": repr(preprocessing)} | data_identity(data)
    if more and more["teacher"].model is not ancestor:
        identity["teacher's weights"] = state_digest(more["teacher"].model)
    kept = StateDir(Path(state_dir), identity, timed=True)

    def search() -> Learngene:
        inner = {"state_dir": replace(kept, path=kept.path / SEARCH)} if is_resumable(chosen) else {}
        return chosen.extract(ancestor, data, facts=known, preprocessing=preprocessing, watch=watch, **more, **inner)

    return _found_once(kept, search)


def _taught(
    method: Method, ancestor: nn.Module, teacher: Teacher | nn.Module | None, cache: str | Path | None
) -> dict[str, Teacher]:
    """The keyword ``teacher`` of a method's ``extract``, where one is asked for.

    Raises:
        SettingsError: the method takes none.
    """
    if teacher is None and cache is None:
        return {}
    if not is_taught(method):
        known = ", ".join(name for name, kind in BUILT_IN.items() if is_taught(kind))
        raise SettingsError(f"a teacher or its cache asked; {method.name} takes none: {known} do")
    chosen = teacher if isinstance(teacher, Teacher) else Teacher(ancestor if teacher is None else teacher)
    return {"teacher": chosen if cache is None else replace(chosen, cache=cache)}


def _settings(method: Method, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """A method's settings as plain values, each under a name that a person understands."""
    values = vars(method) if is_dataclass(method) else settings or {}
    return {f"setting {name}": json.loads(json.dumps(value, default=str)) for name, value in values.items()}


def data_identity(data: Mapping[str, Images]) -> dict[str, str]:
    """What data sets are, for a ``StateDir``; their order counts."""
    return {"data": ", ".join(data)} | {f"data {name}": images_digest(images)[:12] for name, images in data.items()}


def _found_once(kept: StateDir, search: Callable[[], Learngene]) -> Learngene:
    """What ``search`` finds, or found before it was interrupted later."""
    path = kept.path / FOUND

    def store() -> dict[str, str]:
        learngene = search()
        kept.path.mkdir(parents=True, exist_ok=True)
        return {"sha256": learngene.save(path)}

    promised = kept.once(FOUND, store)
    shutil.rmtree(kept.path / SEARCH, ignore_errors=True)
    try:
        learngene = Learngene.load(path, sha256=promised["sha256"])
        # Tensors of a file lie at any address; give each aligned memory of its own, as a fresh find has.
        return replace(learngene, tensors={name: tensor.clone() for name, tensor in learngene.tensors.items()})
    except (ArtefactError, StoreError) as error:
        raise StoreError(f"{path} is damaged; remove {kept.path} to start afresh") from error


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model does on labelled images."""

    accuracy: float  # per cent
    loss: float  # mean cross-entropy, nats
    count: int  # images
    seconds: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    *,
    preprocessing: Preprocessing = IMAGENET,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    precision: str = "fp32",
) -> Evaluation:
    """Accuracy and loss of ``model`` (images -> logits, or -> an object with ``logits``) on ``images``.

    The model is put into eval mode for this and back afterwards.

    Raises:
        DataError: there are no images, or more classes than the model has outputs.
        SettingsError: an unknown precision.
    """
    if precision not in ("fp32", "bf16"):
        raise SettingsError(f"precision {precision!r} asked; there are fp32, bf16")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SettingsError(f"batch_size {batch_size!r} asked; 1 is the least that works")
    if not len(images):
        raise DataError(f"{images.name} is empty; evaluation needs at least one image")
    require_size(model, images)
    place = torch.device(device) if device is not None else next(model.parameters()).device
    training, began = model.training, time.perf_counter()
    model.eval().to(place)
    right, loss = 0, 0.0
    try:
        for x, y in ordered_batches(images, batch_size, preprocessing, place):
            with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = _logits(model, x).float()
            require_labels(logits.shape[-1], images)
            right += int((logits.argmax(-1) == y).sum())
            loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
    finally:
        model.train(training)
    count = len(images)
    return Evaluation(
        accuracy=100.0 * right / count, loss=loss / count, count=count, seconds=time.perf_counter() - began
    )


def require_size(model: nn.Module, images: Images) -> None:
    """Nothing, where a timm model (or the one in a wrapper) takes images of this size, or does not say.

    Raises:
        DataError: it takes others.
    """
    inner = getattr(model, "timm_model", model)
    wanted = getattr(getattr(inner, "patch_embed", None), "img_size", None) or _fixed_size(inner)
    have = tuple(images.pixels.shape[-2:])
    if wanted is not None and tuple(wanted) != have:
        raise DataError(
            f"{images.name} has images of {have[0]} px; the model takes {wanted[0]}: image_size={have[0]} would work"
        )


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) that a timm model without patches says it needs; None where any size works, as for most CNNs."""
    said = getattr(model, "pretrained_cfg", None)
    if not isinstance(said, Mapping) or not said.get("fixed_input_size") or len(said.get("input_size") or ()) != 3:
        return None
    return said["input_size"][1], said["input_size"][2]


def require_labels(outputs: int, images: Images) -> None:
    """Nothing, where every label of ``images`` has an output.

    Raises:
        DataError: a label has none.
    """
    highest = int(images.labels.max()) if len(images) else 0
    if highest >= outputs:
        raise DataError(
            f"{images.name} has label {highest} of {len(images.classes)} classes; the model has {outputs} outputs: "
            f"num_labels={len(images.classes)} would work"
        )


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    said = model(x)
    return said if isinstance(said, Tensor) else said.logits


def finetune(
    model: nn.Module,
    images: Images,
    *,
    recipe: Recipe,
    preprocessing: Preprocessing = IMAGENET,
    state_dir: str | Path | StateDir | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Step]:
    """Train every parameter of ``model`` on labelled ``images``, yielding a Step after each update.

    The caller may evaluate between steps (``step.epoch_done``). With ``state_dir`` the run is saved after each epoch
    and resumes from there, on the same images; the weights that ``model`` then has do not matter.

    Raises:
        DataError: no images, or a label that the model has no output for.
        SettingsError: ``state_dir`` is of another run.
        TrainingError: the loss is not finite.
    """
    outputs = getattr(model, "num_classes", None) or getattr(model, "num_labels", None)
    require_size(model, images)
    if outputs:
        require_labels(outputs, images)
    batches, steps_per_epoch = image_batches(images, recipe, preprocessing)
    kept = StateDir.of(state_dir)
    if kept is not None:
        kept = replace(kept, identity={**kept.identity, **data_identity({"images": images})})
    return fit(
        model, batches, classification_loss(recipe), recipe=recipe, steps_per_epoch=steps_per_epoch,
        state_dir=kept, device=device,
    )  # fmt: skip


def constrain(
    learngene: Learngene,
    *,
    depth: int | None = None,
    width: int | None = None,
    num_labels: int | None = None,
    image_size: int | None = None,
    in_chans: int = 3,
    seed: int = 0,
    max_params: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A descendant as ``expand`` grows it, of which ``finetune`` trains the learngene's components and not the blocks.

    It has as many parameters at any depth. Once it is trained, its ``materialise()`` gives the plain timm model that it
    has become.

    Raises:
        SettingsError: the learngene's method has no components, or ``settings`` that it cannot be grown with.
        ShapeError, BudgetError: as ``expand``.
    """
    learngene = with_settings(learngene, settings)
    method = require_constrainable(learngene)
    shape = plan(
        learngene, depth=depth, width=width, num_labels=num_labels, image_size=image_size, in_chans=in_chans,
        max_params=max_params,
    )  # fmt: skip
    return cast(nn.Module, method.constrained(learngene, shape, seed=seed))


def require_constrainable(learngene: Learngene) -> Constrainable:
    """The learngene's method, where it can train components instead of blocks.

    Raises:
        SettingsError: it cannot.
    """
    method = get_method(learngene.method, learngene.settings)
    if not is_constrainable(method):
        known = ", ".join(name for name, kind in BUILT_IN.items() if is_constrainable(kind))
        raise SettingsError(f"a learngene of {learngene.method} given; constrained tuning is for {known}")
    return method
