"""What a pool's anchor sees in images: the features that keys are made of. Private to ``pool.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from learngene_hub.data import Images, ordered_batches
from learngene_hub.errors import DataError
from learngene_hub.factory import grow
from learngene_hub.learngene import Learngene
from learngene_hub.methods._adaptive_key import Space
from learngene_hub.shape import ViTShape

BATCH = 64  # images at a time; fixed, so that the same images give the same key


def require_images(images: Images, anchor: Learngene, space: Space) -> None:
    """Nothing, where the images are of the size and the channels of a pool.

    Raises:
        DataError: they are not, or there are none.
    """
    wanted = (anchor.shape.in_chans, space.image_size, space.image_size)
    have = tuple(images.pixels.shape[1:])
    if not len(images):
        raise DataError(f"{images.name} holds no images; one at least would work")
    if have != wanted:
        told = " x ".join(map(str, have))
        raise DataError(
            f"{images.name} has images of {told}; this pool's are {' x '.join(map(str, wanted))} (channels, pixels): "
            f"loaded with size={space.image_size}, in_chans={anchor.shape.in_chans} they would work"
        )


def seeing(anchor: Learngene, space: Space) -> nn.Module:
    """The descendant of the anchor's native shape without a head, for images of the space's size: (B, C, S, S) ->
    (B, D)."""
    shape: ViTShape = replace(anchor.shape, classes=0, image_size=space.image_size)
    return grow(anchor, shape)


@torch.no_grad()
def features(model: nn.Module, images: Images, anchor: Learngene, state: Mapping[str, Tensor] | None = None) -> Tensor:
    """(n, D) last pooled features of all images, as they are; of ``state`` in place of the model's own weights."""
    return torch.cat(list(_batches(model, images, anchor, state)))


def _batches(
    model: nn.Module, images: Images, anchor: Learngene, state: Mapping[str, Tensor] | None
) -> Iterator[Tensor]:
    place = next(model.parameters()).device
    for x, _ in ordered_batches(images, BATCH, anchor.preprocessing, place):
        seen = model(x) if state is None else torch.func.functional_call(model, dict(state), (x,))
        yield seen.float().cpu()


def directions(features_ND: Tensor) -> Tensor:
    """Features scaled to length 1: phi."""
    return nn.functional.normalize(features_ND, dim=1)
