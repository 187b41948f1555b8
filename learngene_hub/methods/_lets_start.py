"""LeTs' initial values: of the learngene, of its width maps F and of its depth maps G.

Source: see ``lets.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub.data import seed_of
from learngene_hub.errors import ShapeError
from learngene_hub.methods._lets_maps import PAIR, Groups, tensor_shapes
from learngene_hub.methods._whole import parts_of
from learngene_hub.shape import ViTShape

if TYPE_CHECKING:
    from learngene_hub.methods.lets import Lets


def initial_tensors(
    method: Lets, native: ViTShape, small: ViTShape, ancestor: nn.Module | None = None
) -> dict[str, Tensor]:
    """The learngene and its maps before training, in the order of their names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("lets", method.seed, "learngene"))
        made = {name: tensor.detach().clone() for name, tensor in small.build().state_dict().items()}
    generator = torch.Generator().manual_seed(seed_of("lets", method.seed, "maps"))
    made["pos_embed"] = torch.empty(1, native.tokens, native.width)
    nn.init.trunc_normal_(made["pos_embed"], std=0.02, generator=generator)
    tensors = {_stored_name(name): tensor for name, tensor in made.items()}
    if method.start == "ancestor" and ancestor is not None:
        tensors |= ancestral_tensors(ancestor, native, small)
    if method.scheme == "preserving":
        tensors["stem.pos_embed"] = tensors["stem.pos_embed"][..., torch.arange(native.width) % small.width]
    groups = Groups.of(native.depth, small.depth)
    for name, shape in sorted(tensor_shapes(native, small).items()):
        if name.startswith("map."):
            tensors[name] = initial_rows(method, shape, generator)
        elif name.startswith("depth."):
            tensors[name] = initial_coefficients(method, groups, shape, generator)
    return dict(sorted(tensors.items()))


def _stored_name(name: str) -> str:
    """A learngene's name of a tensor that timm's model has."""
    if name.startswith("blocks."):
        return name.replace("blocks.", "block.", 1)
    if name.startswith(("norm.", "fc_norm.")):
        return f"tail.norm.{name.rsplit('.', 1)[-1]}"
    return name if name.startswith("head.") else f"stem.{name}"


def initial_rows(method: Lets, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """F (e, n) as ``scheme`` says: uniform with rows of sum 1, one old unit per row (with noise), or cyclic copies."""
    extra, units = shape
    if method.scheme == "rand":
        rows = torch.rand(extra, units, generator=generator)
        return rows / rows.sum(-1, keepdim=True)
    copied = torch.arange(extra) % units
    if method.scheme != "preserving":
        copied = torch.randint(units, (extra,), generator=generator)
    rows = torch.zeros(extra, units)
    if method.scheme == "sel_noisy":
        rows.uniform_(0.0, method.noise, generator=generator)
    rows[torch.arange(extra), copied] = 1.0
    return rows


def initial_coefficients(method: Lets, groups: Groups, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """G (rows, modules, 2): noise, and 1 at the layer of the pair that a row begins with, over its sum."""
    mixed = torch.rand(shape, generator=generator) * method.noise
    for row in range(groups.rows):
        turn = row % groups.per_group if method.depth_scheme == "alternate" else groups.first_layer(row)
        mixed[row, :, turn % PAIR] = 1.0
    return mixed / mixed.sum(-1, keepdim=True)


def ancestral_tensors(ancestor: nn.Module, native: ViTShape, small: ViTShape) -> dict[str, Tensor]:
    """The learngene's first weights out of a plain ViT: evenly spaced (or repeated) blocks, leading (or copied) units.

    Raises:
        ShapeError: the ancestor is no plain ViT, or of another patch, layout, head_dim or mlp_ratio.
    """
    own = ViTShape.of(ancestor)
    for name in ("patch", "class_token", "pool", "head_dim"):
        have, asked = getattr(own, name), getattr(native, name)
        if have != asked:
            raise ShapeError(f"start 'ancestor' asked with {name} {asked}; the ancestor's is {have}, which would work")
    if small.hidden != int(small.width * own.mlp_ratio):
        raise ShapeError(f"start 'ancestor' asked with mlp_ratio {small.mlp_ratio}; the ancestor's is {own.mlp_ratio}")
    parts = parts_of(ancestor, own)
    stem = {name.removeprefix("stem."): tensor for name, tensor in parts.items() if name.startswith("stem.")}
    resize, wide = (transforms.Resize.of({}, own, shape, "copy") for shape in (small, native))
    grown = resize.stem(stem)
    grown["patch_embed.proj.weight"] = transforms.adapt_channels(grown["patch_embed.proj.weight"], native.in_chans)
    side = native.image_size // native.patch
    positions = wide.stem({"pos_embed": stem["pos_embed"]})["pos_embed"]
    grown["pos_embed"] = transforms.resample_positions(positions, side, int(native.class_token))
    tensors = {f"stem.{name}": tensor for name, tensor in grown.items()}
    places = transforms.even_positions(own.depth, small.depth)
    for layer, place in enumerate(places):
        block = {key: parts[f"block.{place}.{key}"] for key in transforms.BLOCK_KEYS}
        tensors |= {f"block.{layer}.{key}": tensor for key, tensor in resize.block(block, place).items()}
    norm = resize.norm({kind: parts[f"tail.norm.{kind}"] for kind in ("weight", "bias")})
    tensors |= {f"tail.norm.{kind}": tensor for kind, tensor in norm.items()}
    if own.classes != native.classes:  # a teacher beside the ancestor has others: the head stays random
        return tensors
    state = {name: tensor.detach().cpu().float().clone() for name, tensor in ancestor.state_dict().items()}
    head = transforms.read_columns(state["head.weight"], resize.stream)
    return tensors | {"head.weight": head, "head.bias": state["head.bias"]}
