"""How well each route of a pool does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from learngene_hub.data import Images, ordered_batches
from learngene_hub.errors import DataError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._stitch_growth import net_of, routes_in, table_of
from learngene_hub.methods._stitch_net import StitchNet
from learngene_hub.shape import Preprocessing


@torch.no_grad()
def measure(
    net: StitchNet,
    images: Images,
    preprocessing: Preprocessing,
    truth: Callable[[Tensor, Tensor], Tensor],
    batch_size: int = 128,
) -> dict[int, float]:
    """Per cent of ``images`` on which each route names the class ``truth(x, y)`` (B,) of a batch."""
    training, place = net.training, next(net.parameters()).device
    right = dict.fromkeys(net.routes, 0)
    net.eval()
    try:
        for x, y in ordered_batches(images, batch_size, preprocessing, place):
            true = truth(x, y)
            for number in right:
                right[number] += int((net(x, number).argmax(-1) == true).sum())
    finally:
        net.train(training)
    return {number: 100.0 * count / len(images) for number, count in right.items()}


def measured(learngene: Learngene, images: Images, *, nearest: bool, device: torch.device | str) -> Learngene:
    """See ``Stitching.measured``."""
    native = learngene.shape
    wanted, have = (native.in_chans, native.image_size, native.image_size), tuple(images.pixels.shape[1:])
    if have != wanted or len(images.classes) != native.classes or not len(images):
        raise DataError(
            f"{len(images)} images {list(have)} of {len(images.classes)} classes given; the pool takes {list(wanted)} "
            f"of {native.classes}"
        )
    net = net_of(learngene, nearest=nearest).to(device)
    found = measure(net, images, learngene.preprocessing, lambda x, y: y)
    instances, routes = routes_in(learngene, nearest=nearest)
    table = {"routes": table_of(routes, instances, found), "measured": f"labels, on {len(images)} of {images.name}"}
    return replace(learngene, provenance={**learngene.provenance, **table})
