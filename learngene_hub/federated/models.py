"""The network that every client begins with, without a byte sent: drawn from a shared seed, or grown from an ancestor.

A ViT of any depth from a pre-trained ancestor comes from its learngene; an ancestor by timm's name is taken as a
learngene of net2net, which changes nothing at its own depth. A VGG is VGG-11 with batch norm and a linear classifier,
the network whose sizes explain the paper's 9.04 MB.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub._conv import ConvShape
from learngene_hub.data import Images, normalise, ordered_batches
from learngene_hub.errors import SettingsError
from learngene_hub.federated.settings import Federation
from learngene_hub.learngene import Learngene
from learngene_hub.methods._gene_fl_layers import layer_entries, quarter
from learngene_hub.shape import IMAGENET, Preprocessing, ViTShape

VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_SMALL = {"depth": 6, "width": 96, "heads": 3, "patch": 8}  # a random ViT's numbers, where none are asked
_BATCH = 64  # images at a time, where nothing depends on it


@lru_cache(maxsize=2)
def ancestor_of(name: str, weights: str) -> Learngene | None:
    """The learngene that clients begin with; None without an ancestor.

    Raises:
        LearngeneError: as ``hub.pull``, or timm's weights cannot be had.
    """
    from learngene_hub import _ancestors
    from learngene_hub.hub import pull

    if not name:
        return None
    if not _ancestors.is_named(name):
        if weights:
            raise SettingsError(f"ancestor_weights asked with {name}; weights belong to a name of timm's")
        return pull(name)
    model, preprocessing = _ancestors.load_named(name, Path(weights) if weights else None)
    known = name.removeprefix(_ancestors.PREFIX)
    facts = {"name": known, "source": f"./{Path(weights).name}" if weights else _ancestors.origin(model, known)}
    return factory.extract("net2net", model, {}, facts=facts, preprocessing=preprocessing)


def preprocessing_of(settings: Federation) -> Preprocessing:
    """What the networks of this run expect of pixels."""
    ancestor = ancestor_of(settings.ancestor, settings.ancestor_weights)
    return IMAGENET if ancestor is None else ancestor.preprocessing


def native_shape(settings: Federation, classes: int) -> Any:
    """The shape that learngenes of this run are native to.

    Raises:
        ShapeError: there is no such network, or the ancestor cannot grow it.
        SettingsError: an ancestor asked for a VGG, or more layers to send than there are.
    """
    ancestor = ancestor_of(settings.ancestor, settings.ancestor_weights)
    size = settings.image_size
    if settings.family == "vgg":
        if ancestor is not None or settings.depth_list():
            raise SettingsError("an ancestor or depths asked of a VGG; here it begins at random, and all are VGG-11")
        shape: Any = ConvShape(family="vgg", stages=VGG11, image_size=size, classes=classes)
    elif ancestor is not None:
        asked = {"depth": settings.depth or None, "width": settings.width or None, "heads": settings.heads or None}
        shape = factory.plan(ancestor, **asked, num_labels=classes, image_size=size)  # type: ignore[arg-type]
    else:
        given: dict[str, Any] = {name: getattr(settings, name) or small for name, small in _SMALL.items()}
        if not settings.heads and given["width"] % given["heads"]:
            given["heads"] = 1
        shape = ViTShape(**given, image_size=size, classes=classes)
    count = len(layer_entries(shape))
    if settings.blocks > count:
        raise SettingsError(f"blocks {settings.blocks} asked; the network has {count} layers: {count} would work")
    return shape


def client_shape(settings: Federation, native: Any, client: int) -> Any:
    """The shape of one client's network.

    Raises:
        SettingsError: it has fewer blocks than are sent.
    """
    depths = settings.depth_list()
    if not depths:
        return native
    depth = depths[client % len(depths)]
    if settings.strategy not in ("gene-fl", "early", "late", "local") or settings.share == "everything":
        raise SettingsError(f"depths asked with {settings.strategy}, which averages whole models: one depth would work")
    if depth < count_of(settings, native):
        raise SettingsError(f"depth {depth} asked of a client; {count_of(settings, native)} blocks are sent")
    return replace(native, depth=depth)


def count_of(settings: Federation, native: Any) -> int:
    """How many layers a learngene of this run has; 0 of local training."""
    return 0 if settings.strategy == "local" else settings.blocks or quarter(native)


def initial_model(settings: Federation, shape: Any) -> nn.Module:
    """A fresh copy of the first model of this shape, the same at every client, in eval mode."""
    return copy.deepcopy(_first_model(settings.ancestor, settings.ancestor_weights, settings.seed, shape))


@lru_cache(maxsize=2)  # clients of one process ask for it several times per round, of one or two shapes
def _first_model(name: str, weights: str, seed: int, shape: Any) -> nn.Module:
    ancestor = ancestor_of(name, weights)
    if ancestor is not None:
        return factory.grow(ancestor, shape, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shape.build().eval()


def sent_names(shape: Any, blocks: Sequence[int] | None) -> tuple[str, ...]:
    """The tensors of the state dict that are sent: those of the layers ``blocks``, or (None) all numbers that are not
    counters."""
    if blocks is not None:
        entries = layer_entries(shape)
        return tuple(name for i in blocks for name in entries[i].values())
    return tuple(sorted(name for name in shape.keys() if not name.endswith("num_batches_tracked")))


@torch.no_grad()
def features(encoder: nn.Module, images: Images, preprocessing: Preprocessing) -> Tensor:
    """(N, D) features of a frozen encoder: its last tokens (of a ViT) or places (of a VGG), averaged."""
    found = []
    for x, _ in ordered_batches(images, _BATCH, preprocessing):
        seen = encoder.forward_features(x)  # type: ignore[operator]
        found.append(seen.mean(1) if seen.ndim == 3 else seen.mean((2, 3)))
    return torch.cat(found).float()


def pixels_of(images: Images, preprocessing: Preprocessing) -> Tensor:
    """(N, C S S) normalised raw pixels."""
    return normalise(images.pixels, preprocessing).flatten(1)


def without_norms(shape: ConvShape) -> int:
    """Parameters of the same VGG without BatchNorm, as the original VGG-11 is: two per channel fewer."""
    return shape.params() - sum(2 * conv.outputs for conv in shape.convs())
