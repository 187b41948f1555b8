"""Descendant: a timm model grown from a learngene, as a ``transformers`` model; the only importer of transformers.

What it saves is timm's own layout, so the folder of a plain ViT or a ResNet needs no learngene_hub to be read again:

- ``config.json``: ``architecture``, ``model_args``, ``pretrained_cfg``, ``num_classes`` and ``label_names`` as timm has
  them; the few keys of transformers; and ``learngene``, where it came from, which both pass over;
- ``model.safetensors``: timm's weight names, without prefix.

The folder of a network that timm has not (``architectures.py``: other heads, stitched widths, VGGs of other sizes) is
read by ``Descendant.from_pretrained``, and by transformers and timm themselves after ``import
learngene_hub.descendant``. Without that, timm says "Unknown model (learngene_...)" and transformers that its version
of timm does not support that architecture.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification
from transformers.models.timm_wrapper import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)

import learngene_hub.architectures  # noqa: F401  # timm finds them by name
from learngene_hub._folder import FLOATS, publish
from learngene_hub._folder import write_weights as write_weights
from learngene_hub._version import __version__
from learngene_hub.errors import SettingsError, ShapeError, StoreError
from learngene_hub.factory import Prefer, grow, plan, with_settings
from learngene_hub.shape import Preprocessing, Shape, shape_of

if TYPE_CHECKING:
    from learngene_hub.hub import Pushed
    from learngene_hub.pool import Pool, Selection

_PLAIN_CLASS = "TimmWrapperForImageClassification"  # what reads the folder where learngene_hub is not installed


class DescendantConfig(TimmWrapperConfig):
    """timm's facts about a descendant, and the learngene it came from."""

    learngene: dict[str, Any] | None = None  # name, digest, commit, licence, ancestor, method, native shape, version

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> DescendantConfig:
        """As the parent's, without the number of classes among ``model_args``.

        Newer versions of timm repeat it there, and the parent would then hand it to timm twice, which is refused.
        """
        own, given = dict(config_dict), config_dict.get("model_args")
        if isinstance(given, Mapping):
            own["model_args"] = {key: value for key, value in given.items() if key != "num_classes"}
        return super().from_dict(own, **kwargs)


class Descendant(TimmWrapperForImageClassification):
    """An image classifier around a timm model, ``timm_model``; made by ``from_learngene`` or ``from_pretrained``.

    Takes ``pixel_values`` (images, channels, side, side) and, for a loss, ``labels`` (images,); gives ``logits``
    (images, classes). Works wherever transformers does: Trainer, pipeline, gradient checkpointing.
    """

    config_class = DescendantConfig
    config: DescendantConfig  # type: ignore[assignment]

    def __init__(self, config: DescendantConfig, timm_model: nn.Module | None = None) -> None:
        """Around ``timm_model``, neither copied nor initialised, or around a new one that ``config`` describes."""
        if timm_model is None:
            super().__init__(config)
            if isinstance(said := getattr(config, "pretrained_cfg", None), Mapping):
                self.timm_model.pretrained_cfg = dict(said)  # type: ignore[assignment]  # the image size of a CNN stands nowhere else
        else:
            super(TimmWrapperForImageClassification, self).__init__(config)  # past the parent's own building
            self.timm_model = timm_model
            self.num_labels = config.num_labels
            with torch.device("meta"):  # where transformers initialises nothing: the weights are there already
                self.post_init()
        self.loss_type = "ForImageClassification"  # transformers would read it off the name of the class

    @classmethod
    def from_learngene(
        cls,
        name_or_path_or_uri: str | os.PathLike[str] | Pool,
        *,
        selection: Selection | Mapping[str, float] | None = None,
        depth: int | None = None,
        width: int | None = None,
        heads: int | Sequence[int] | None = None,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        image_size: int | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        revision: str | None = None,
        max_params: float | None = None,
        max_flops: float | None = None,
        max_bytes: float | None = None,
        max_latency_ms: float | None = None,
        prefer: Prefer = "balanced",
        settings: Mapping[str, Any] | None = None,
    ) -> Descendant:
        """The model of these sizes grown from a learngene; a size left out is the native one.

        With one or more of ``max_...`` a depth and a width left out are chosen: of all shapes within the learngene's
        reach that keep every limit, the one that ``prefer`` takes. What is given stays.

        Args:
            name_or_path_or_uri: a name of the registry, a file or folder, or ``org/repo``; or a ``Pool``.
            selection: of a pool: what ``Pool.select`` found, or entries -> weights; the anchor alone where left out.
            image_size: in pixels; of a pool or a mixture, where left out, that at which its increments were trained.
            heads: of every block, or one number for each; other than width / head_dim only where the method grows such.
            id2label: class number -> name, for every class; ``num_labels`` may then be left out.
            drop_path_rate: of the last block in training; it rises linearly from 0 over the blocks.
            dtype: of the weights, float32 where left out.
            seed: of what the learngene does not hold, the head; the global random state is neither used nor changed.
            revision: of a Hub repository.
            max_params: the most parameters that it may have; 5e6 is a number too.
            max_flops: the most floating-point operations of one image's forward, two per multiply-add.
            max_bytes: the most bytes of the file of its weights, once saved, in ``dtype``.
            max_latency_ms: the most milliseconds of one image's forward (batch 1) in ``dtype`` on ``device``. They are
                measured here, which takes up to a minute the first time, and kept (``_latency.py``).
            prefer: "balanced": by the accuracy of measured descendants, which keeps the ancestor's width and gives up
                depth where the budget is small, and widens at the ancestor's depth where it is large; of a pool its
                most accurate descendant. "depth", "width": the deepest, the widest. Or a function of a ``Shape``, of
                which the largest is taken.
            settings: laid over those of the learngene for this call, such as ``{"components": 2}`` of ldr.

        Raises:
            ShapeError: no such network, one outside the learngene's reach, or labels that contradict each other.
            BudgetError: the depth and width asked, or everything within reach, is beyond a limit; no weights were
                allocated, and the message names the smallest.
            SettingsError: a dtype or device that cannot be used, an unknown ``prefer``, or settings that the
                learngene cannot be grown with.
            RegistryError, StoreError, ArtefactError: no such learngene, or one that cannot be read.
        """
        place, number = _device(device), _dtype(dtype)
        classes = _num_labels(num_labels, id2label)
        if selection is not None or not isinstance(name_or_path_or_uri, (str, os.PathLike)):
            from learngene_hub.hub import pull_pool

            pool = pull_pool(name_or_path_or_uri, revision=revision)
            learngene, name, commit = pool.merge(selection or {}), pool.name, pool.revision
        else:
            from learngene_hub.hub import fetch  # here: descendants stand above the Hub

            learngene, located = fetch(name_or_path_or_uri, revision=revision)
            name, commit = _name(name_or_path_or_uri), located.revision
        if classes is None and learngene.shape.classes == 0:
            raise ShapeError(
                "num_labels is left out; this learngene has no classes of its own: num_labels=10 would work"
            )
        changed = with_settings(learngene, settings)
        shape = plan(
            changed, depth=depth, width=width, heads=heads, num_labels=classes, image_size=image_size,
            in_chans=in_chans, max_params=max_params, max_flops=max_flops, max_bytes=max_bytes,
            max_latency_ms=max_latency_ms, prefer=prefer, dtype=number, device=place,
        )  # fmt: skip
        model = grow(changed, shape, drop_path_rate=drop_path_rate, dtype=number, device=place, seed=seed)
        return wrap(
            model,
            shape=shape,
            preprocessing=learngene.preprocessing,
            num_labels=classes,
            id2label=id2label,
            provenance={
                "name": name,
                "digest": learngene.digest,
                "revision": commit,
                "license": learngene.license,
                "ancestor": dict(learngene.ancestor),
                "method": learngene.method,
                "learngene_shape": learngene.shape.to_dict(),
                "version": __version__,
                **({"settings": dict(settings)} if settings else {}),
            },
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """What it expects of pixels."""
        said = self.config.pretrained_cfg
        return Preprocessing.from_dict({key: said[key] for key in ("mean", "std", "interpolation", "crop_pct")})

    def image_processor(self) -> TimmWrapperImageProcessor:
        """What turns images into ``pixel_values``: a ``pipeline`` around this object, not yet a folder, asks for it."""
        facts = self._facts()
        return TimmWrapperImageProcessor(facts["pretrained_cfg"], architecture=facts["architecture"])

    def save_pretrained(  # type: ignore[override]  # what the parent takes beyond this has no place in timm's layout
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
    ) -> None:
        """Write the folder described above; a new folder appears whole or not at all, in an old one file by file.

        A process that is killed may leave ``.NAME-<32 hex digits>``, which nothing reads and anyone may delete; killed
        between the two files of an old folder, new weights beside the old config, until it is saved again.

        Args:
            is_main_process: False writes nothing; for all processes but one of a distributed run.
            state_dict: written in place of the model's own, under the same names.
            push_to_hub: refused; the method ``push_to_hub`` does it.
            max_shard_size: of no effect; timm reads one file, so there is one. transformers passes it.

        Raises:
            SettingsError: push_to_hub is asked, or a state_dict with other names than the model's.
            StoreError: the folder cannot be written; nothing half-written is left.
        """
        del max_shard_size
        if push_to_hub:
            raise SettingsError(
                "push_to_hub=True asked; save_pretrained writes a folder: model.push_to_hub(...) does that"
            )
        if not is_main_process:
            return
        own = _plain_names(self.state_dict())
        state = own if state_dict is None else _plain_names(state_dict)
        if odd := sorted(own.keys() ^ state.keys()):
            raise SettingsError(
                f"a state_dict with other names given, {odd[0]} for one; the model's own names would work"
            )
        folder = Path(os.path.abspath(save_directory))
        new = not folder.exists()
        staged = (folder.parent if new else folder) / f".{folder.name}-{uuid.uuid4().hex}"
        try:
            staged.mkdir(parents=True)
            write_weights(state, staged / "model.safetensors")
            (staged / "config.json").write_text(json.dumps(self._facts(), indent=2, sort_keys=True) + "\n")
            publish(staged, folder, whole=new)
        except OSError as error:
            why = error.strerror or error
            raise StoreError(
                f"{folder} could not be written: {why}; a folder of your own, with space, would work"
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def push_to_hub(  # type: ignore[override]  # what the parent takes beyond this has no place in timm's layout
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        create_pr: bool = False,
        branch: str | None = None,
        message: str | None = None,
        license: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> Pushed:
        """This and a card, in a Hub repository, from where plain transformers and plain timm load it.

        See ``learngene_hub.hub.push_descendant``. ``commit_message`` and ``revision`` are what transformers calls
        ``message`` and ``branch``; a ``token`` that is True is the client's own, as None is.

        Raises:
            SettingsError: no licence, of its learngene or asked; two names for a branch; a token that is False.
            ArtefactError, StoreError: as ``push_descendant``.
        """
        from learngene_hub.hub import push_descendant

        if branch and revision and branch != revision:
            raise SettingsError(f"branch {branch!r} and revision {revision!r} asked; give one of them")
        if token is False:
            raise SettingsError("token=False asked; nobody may push without one: leave it out, after `hf auth login`")
        return push_descendant(
            self,
            repo_id,
            private=bool(private),
            create_pr=create_pr,
            branch=branch or revision,
            message=message or commit_message,
            license=license,
            token=None if token is True else token,
        )

    def _facts(self) -> dict[str, Any]:
        """The content of config.json. The sizes are read off the model, which may have changed since it was made."""
        facts = json.loads(self.config.to_json_string())
        if facts.get("learngene") is None:
            facts.pop("learngene", None)
        facts["architectures"] = [_PLAIN_CLASS]
        facts["dtype"] = str(self.dtype).removeprefix("torch.")
        try:
            shape = shape_of(self.timm_model)
        except ShapeError:
            return facts  # compiled, or of no kind that there is: what its config says
        said: Any = self.config.id2label or {}  # it may have been set since; what was read stays in label_names
        names = [str(said[number]) for number in sorted(said, key=int)] or facts["label_names"]
        if len(names) != shape.classes:
            names = [f"LABEL_{i}" for i in range(shape.classes)]
        return facts | _timm_facts(self.timm_model, shape, names, facts["pretrained_cfg"])


AutoModelForImageClassification.register(DescendantConfig, Descendant, exist_ok=True)  # pipeline knows its models by it


def wrap(
    timm_model: nn.Module,
    *,
    preprocessing: Preprocessing,
    shape: Shape | None = None,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Descendant:
    """A Descendant around a timm model that a shape describes, in eval mode: nothing is copied, nothing initialised.

    Args:
        shape: of the model, where it is known; else it is read off the model.
        provenance: JSON facts about the learngene it came from, kept under ``learngene`` in its config.

    Raises:
        ShapeError: a model of no known kind, one without a head, or labels that contradict each other or its head.
    """
    shape = shape_of(timm_model) if shape is None else shape
    classes = _num_labels(num_labels, id2label)
    if shape.classes == 0:
        raise ShapeError("a model without a head given; a Descendant classifies: one of at least 1 class would work")
    if classes is not None and classes != shape.classes:
        raise ShapeError(
            f"{classes} labels asked; the head has {shape.classes} outputs: {shape.classes} labels would work"
        )
    named = {int(number): name for number, name in (id2label or {}).items()}
    names = [named.get(i, f"LABEL_{i}") for i in range(shape.classes)]
    facts = _timm_facts(timm_model, shape, names, shape.pretrained_cfg(preprocessing))
    config = DescendantConfig.from_dict({**facts, "learngene": dict(provenance) if provenance else None})
    model = Descendant(config, timm_model).eval()
    config.dtype = model.dtype
    return model


def _timm_facts(model: nn.Module, shape: Shape, names: list[str], pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What timm writes into config.json beside a model of this shape."""
    rates = (getattr(m, "drop_prob", 0.0) for m in model.modules() if type(m).__name__ == "DropPath")
    drop_path = max(rates, default=0.0)  # it rises over the blocks
    pool = getattr(model, "global_pool", None)  # of a CNN a layer
    size = [shape.in_chans, shape.image_size, shape.image_size]
    return {
        "architecture": shape.architecture,
        "num_classes": shape.classes,
        "num_features": shape.width,
        **({"global_pool": pool} if isinstance(pool, str) else {}),
        "label_names": names,
        "model_args": shape.model_args() | ({"drop_path_rate": drop_path} if drop_path else {}),
        "pretrained_cfg": {**pretrained_cfg, "num_classes": shape.classes, "input_size": size},
    }


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under timm's names: without the wrapper's prefix, nor that of a compiled module."""
    return {name.removeprefix("timm_model.").replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


def _num_labels(num_labels: int | None, id2label: Mapping[int, str] | None) -> int | None:
    """The number of classes that was asked, None where it was left open.

    Raises:
        ShapeError: no number of classes, names that are not one per class, or more or fewer names than classes.
    """
    if num_labels is not None and (isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1):
        raise ShapeError(f"num_labels {num_labels!r} asked; a classifier has a whole number of at least 1")
    if id2label is None:
        return num_labels
    if not isinstance(id2label, Mapping) or not id2label or not all(isinstance(n, str) for n in id2label.values()):
        raise ShapeError(f"id2label {id2label!r} asked; it maps each class number to a name, as {{0: 'cat', 1: 'dog'}}")
    count = len(id2label)
    if num_labels is not None and num_labels != count:
        raise ShapeError(
            f"num_labels {num_labels} asked, id2label names {count} classes; leave num_labels out, or name all"
        )
    if {str(number) for number in id2label} != {str(i) for i in range(count)}:
        raise ShapeError(
            f"id2label numbers {', '.join(map(str, id2label))} asked; {count} classes are numbered 0 to {count - 1}"
        )
    return count


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    names = {str(known).removeprefix("torch."): known for known in FLOATS}
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in names:
        raise SettingsError(f"dtype {name} asked; there are {', '.join(names)}")
    return None if dtype is None else names[name]


def _device(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"device {device!r} asked; cpu or cuda would work") from error


def _name(name_or_path_or_uri: str | os.PathLike[str]) -> str:
    """What is kept of it: a name or uri whole, of a path on this machine the last part."""
    path = Path(name_or_path_or_uri)
    return path.name if path.exists() else str(name_or_path_or_uri)
