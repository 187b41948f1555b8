"""Mean attention distance: how far, in pixels, each head of each layer looks on real images.

Of an attention matrix after softmax, the rows and columns of the class token are dropped and nothing is normalised
again; patches i and j are patch side x Euclidean distance of their places on the grid apart. Summed over keys, averaged
over queries and images (Dosovitskiy et al., ICLR 2021, appendix D.7, whose use for heads is Cluster-Learngene's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub.data import Images, ordered_batches
from learngene_hub.shape import Preprocessing, ViTShape

BATCH = 32  # images per forward; a layer of 12 heads and 197 tokens then takes 60 MB


def seen_at(ancestor: nn.Module, size: int) -> nn.Module:
    """A float32 copy of the ancestor for images of ``size`` pixels, frozen and in eval mode, on the ancestor's device.

    Its position embeddings are resampled; at its own size it is the ancestor, number for number.

    Raises:
        ShapeError: the ancestor is no plain ViT, or the size is no multiple of its patch.
    """
    shape = replace(ViTShape.of(ancestor), image_size=size)
    state = {name: tensor.detach().float().clone() for name, tensor in ancestor.state_dict().items()}
    side = shape.image_size // shape.patch
    state["pos_embed"] = transforms.resample_positions(state["pos_embed"], side, int(shape.class_token))
    model = shape.build()
    model.load_state_dict(state)
    return model.to(state["pos_embed"].device).eval().requires_grad_(False)


def patch_distances(side: int, patch: int) -> Tensor:
    """Pixels between the centres of all pairs of patches of a side x side grid: (side^2, side^2), float64."""
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    return patch * (place[:, None] - place[None]).square().sum(-1).sqrt()


def resized(x: Tensor, size: int) -> Tensor:
    """Normalised images (B, C, S, S) at ``size`` pixels, bicubic with antialiasing; those of that size as they are."""
    if x.shape[-1] == size:
        return x
    return nn.functional.interpolate(x, size=(size, size), mode="bicubic", antialias=True)


@torch.no_grad()
def attention_distances(model: nn.Module, images: Images, preprocessing: Preprocessing) -> Tensor:
    """The mean attention distance of every head of ``model``, a plain ViT in eval mode: (layers, heads), float64.

    Raises:
        ShapeError: no plain ViT.
    """
    shape = ViTShape.of(model)
    device = next(model.parameters()).device
    far_PP = patch_distances(shape.image_size // shape.patch, shape.patch).to(device, torch.float32)
    total = torch.zeros(shape.depth, shape.heads, dtype=torch.float64, device=device)

    def add(layer: int, qkv: Tensor) -> None:
        q, k, _ = qkv.unflatten(-1, (3, shape.heads, shape.head_dim)).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        weights = (q @ k.transpose(-2, -1) * shape.head_dim**-0.5).softmax(-1)  # over all tokens
        patches = weights[..., -shape.patches :, -shape.patches :]  # (B, H, P, P): a class token comes first
        total[layer] += (patches * far_PP).sum(-1).double().sum((0, 2))

    with _listening(model, add):
        for x, _ in ordered_batches(images, BATCH, preprocessing, device):
            model(resized(x, shape.image_size))
    return (total / (len(images) * shape.patches)).cpu()


@contextmanager
def _listening(model: nn.Module, add: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Every forward meanwhile hands the number of each layer and its q, k and v (B, N, 3 D) to ``add``."""
    hooks = [
        block.attn.qkv.register_forward_hook(lambda _module, _given, qkv, layer=layer: add(layer, qkv))
        for layer, block in enumerate(model.blocks)  # type: ignore[arg-type]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
