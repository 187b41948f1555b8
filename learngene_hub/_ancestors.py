"""Pre-trained models by the names that timm gives them: ancestors and teachers of any architecture.

Their weights come from the Hub, through timm's own reader, or from a safetensors file on this machine.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learngene_hub.errors import SettingsError, StoreError
from learngene_hub.shape import IMAGENET, Preprocessing

if TYPE_CHECKING:
    from torch import nn

PREFIX = "timm/"  # of timm's own repositories on the Hub


def is_named(name: str) -> bool:
    """Whether timm has an architecture of this name, with or without ``timm/`` and a tag such as ``.fb_in1k``."""
    import timm

    return timm.is_model(name.removeprefix(PREFIX))


def similar_names(name: str) -> list[str]:
    """timm's names that are nearest to one that it does not have; none where nothing is near."""
    import timm

    return difflib.get_close_matches(name.removeprefix(PREFIX), timm.list_models(), n=2, cutoff=0.8)


def load_named(name: str, weights: Path | None = None) -> tuple[nn.Module, Preprocessing]:
    """timm's model of this name in eval mode, and what it expects of pixels.

    Args:
        weights: a safetensors file of it, with as many classes as its classifier has; None: timm's, from the Hub.

    Raises:
        SettingsError: timm has no model of this name.
        StoreError: its weights cannot be downloaded, or are not in the file.
    """
    import timm
    import torch

    known = name.removeprefix(PREFIX)
    if not is_named(name):
        raise SettingsError(f"timm has no model named {known!r}{_hint(known)}")
    with torch.random.fork_rng(devices=[]):
        try:
            if weights is not None:
                return _with_weights(known, weights)
            model = timm.create_model(known, pretrained=True).eval()
        except (SettingsError, StoreError):
            raise
        except Exception as error:  # whatever timm, the Hub's client and the network raise
            reason = " ".join(str(error).split())[:160]
            raise StoreError(
                f"the weights of {known} cannot be had from the Hub ({reason}); a .safetensors file of them, by "
                f"--ancestor-weights or --teacher-weights, or a folder that timm saved, would work"
            ) from error
    return model, preprocessing_of(model)


def origin(model: nn.Module, name: str) -> str:
    """Where timm's weights of a model come from, as ``org/repo`` on the Hub; its name, where timm does not say."""
    return str((getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id") or name)


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """What timm says that a model expects of pixels; ImageNet's mean and deviation where it says nothing."""
    said: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    known = {key: said[key] for key in ("mean", "std", "interpolation", "crop_pct") if said.get(key) is not None}
    return Preprocessing.from_dict(IMAGENET.to_dict() | known)


def _with_weights(name: str, weights: Path) -> tuple[nn.Module, Preprocessing]:
    """The model with the weights of a file, all of them and no others."""
    import timm
    from timm.models import load_checkpoint, load_state_dict

    if weights.suffix != ".safetensors" or not weights.is_file():
        raise StoreError(f"no file {weights}; a .safetensors file with the weights of {name} would work")
    try:
        model = timm.create_model(name, pretrained=False, num_classes=_classes(name, load_state_dict(str(weights))))
        load_checkpoint(model, str(weights), strict=True)
    except Exception as error:  # whatever safetensors, timm and torch raise
        reason = " ".join(str(error).split())[:160]
        raise StoreError(f"{weights} does not hold the weights of {name} ({reason})") from error
    return model.eval(), preprocessing_of(model)


def _classes(name: str, state: dict[str, Any]) -> int | None:
    """The outputs of the classifier in a state dict; None, timm's own number, where it has none."""
    import timm

    said = timm.get_pretrained_cfg(name)
    classifier = said.classifier if said is not None else None
    last = classifier[0] if isinstance(classifier, (list, tuple)) else classifier
    found = state.get(f"{last}.weight")
    return None if found is None else len(found)


def _hint(name: str) -> str:
    near = similar_names(name)
    return f"; did you mean {' or '.join(near)}?" if near else "; `timm.list_models()` lists them"
