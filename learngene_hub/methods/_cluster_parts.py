"""The tensors of a learngene of cluster: what is kept of an ancestor, how heads grow from it, what a file may hold.

Legend: D width, H heads of the ancestor, c centroids of a layer, d head_dim. timm's ``qkv`` holds the rows of all q
heads, then of all k heads, then of all v heads; ``proj`` has the columns of the heads in their order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learngene_hub import transforms
from learngene_hub.errors import ArtefactError
from learngene_hub.methods._cluster_groups import FfnGroup
from learngene_hub.methods._cluster_maps import FFN_KEYS, full, map_shapes
from learngene_hub.shape import ViTShape

NORM_KEYS = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
_FFN_NAME = re.compile(r"ffn\.(\d{1,4})-(\d{1,4})\.(\d{1,4})\.")


def condense(
    parts: Mapping[str, Tensor], native: ViTShape, centroids: Sequence[Sequence[int]], groups: Sequence[FfnGroup]
) -> dict[str, Tensor]:
    """What is kept of the ancestor's ``parts``: the heads ``centroids`` of each layer, one FFN of each group."""
    kept = {name: tensor for name, tensor in parts.items() if not name.startswith("block.")}
    for layer, heads in enumerate(centroids):
        block = {key: parts[f"block.{layer}.{key}"] for key in transforms.BLOCK_KEYS}
        part = {key: block[key] for key in NORM_KEYS} | take_heads(block, heads, native.head_dim)
        kept |= {f"block.{layer}.{key}": tensor for key, tensor in part.items()}
    for group in groups:
        kept |= {f"{ffn_name(group)}.{key}": parts[f"block.{group.kept}.{key}"] for key in FFN_KEYS}
    return kept


def ffn_name(group: FfnGroup) -> str:
    """``ffn.FIRST-LAST.KEPT``: the layers of a group, and the one whose FFN it is."""
    return f"ffn.{group.name}.{group.kept}"


def take_heads(block: Mapping[str, Tensor], heads: Sequence[int], head_dim: int) -> dict[str, Tensor]:
    """The attention of a block with these of its heads alone, in this order, repeated where they are.

    ``qkv`` (3 H d, D) and its bias become (3 c d, D), ``proj`` (D, H d) becomes (D, c d), its bias stays.
    """
    chosen, width = torch.as_tensor(heads, device=block["attn.qkv.weight"].device), len(block["attn.proj.bias"])
    return {
        "attn.qkv.weight": block["attn.qkv.weight"].view(3, -1, head_dim, width)[:, chosen].reshape(-1, width),
        "attn.qkv.bias": block["attn.qkv.bias"].view(3, -1, head_dim)[:, chosen].reshape(-1),
        "attn.proj.weight": block["attn.proj.weight"].view(width, -1, head_dim)[:, chosen].reshape(width, -1),
        "attn.proj.bias": block["attn.proj.bias"],
    }


def grow_heads(block: Mapping[str, Tensor], count: int, head_dim: int) -> dict[str, Tensor]:
    """The attention of ``count`` heads from the c stored ones: head i is centroid i mod c, and its columns of ``proj``
    are that centroid's over the number of its copies."""
    stored = block["attn.proj.weight"].shape[1] // head_dim
    index = torch.arange(count, device=block["attn.proj.weight"].device) % stored
    grown = take_heads(block, index.tolist(), head_dim)
    if count > stored:
        copies = torch.bincount(index, minlength=stored)[index].repeat_interleave(head_dim)
        grown["attn.proj.weight"] = full(grown["attn.proj.weight"]) / copies
    return grown


def stored_groups(names: Mapping[str, object]) -> list[FfnGroup]:
    """The groups of layers that the names of tensors tell, the first layers first."""
    found = {match.groups() for name in names if (match := _FFN_NAME.match(name))}
    return sorted(FfnGroup(*map(int, numbers)) for numbers in found)


def stored_shapes(
    native: ViTShape, counts: Sequence[int], groups: Sequence[FfnGroup], *, maps: bool = False
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, with ``counts`` centroids in the layers; ``maps``: and those of the groups."""
    whole, width = transforms.expected_shapes(native, set(range(native.depth))), native.width
    want = {name: shape for name, shape in whole.items() if not name.startswith("block.")}
    for layer, count in enumerate(counts):
        inner = count * native.head_dim
        want |= {f"block.{layer}.{key}": whole[f"block.{layer}.{key}"] for key in NORM_KEYS}
        want |= {f"block.{layer}.attn.qkv.weight": (3 * inner, width), f"block.{layer}.attn.qkv.bias": (3 * inner,)}
        want |= {f"block.{layer}.attn.proj.weight": (width, inner), f"block.{layer}.attn.proj.bias": (width,)}
    for group in groups:
        want |= {f"{ffn_name(group)}.{key}": whole[f"block.{group.kept}.{key}"] for key in FFN_KEYS}
        want |= map_shapes(group) if maps and len(group) > 1 else {}
    return want


def check_stored(shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
    """Refuse tensors that no learngene of this native shape has.

    Raises:
        ArtefactError: a tensor is missing, unknown, or of another shape; or the groups are not all layers, each once.
    """
    if not isinstance(native, ViTShape):
        raise ArtefactError(f"a native shape of kind {native.kind} given; one of cluster is a plain ViT")
    groups = stored_groups(shapes)
    ends = [(group.first, group.last) for group in groups]
    follows = [first for first, _ in ends] == [0, *(last + 1 for _, last in ends[:-1])]
    if not follows or ends[-1][1] != native.depth - 1 or not all(group.kept in group for group in groups):
        raise ArtefactError(
            f"FFNs of the layers {str(ends)[:80]}; all of 0 to {native.depth - 1} are needed, each once"
        )
    counts = []
    for layer in range(native.depth):
        rows, *rest = (*shapes.get(f"block.{layer}.attn.qkv.bias", ()), 0)
        count = rows // (3 * native.head_dim)
        if rest != [0] or rows != 3 * native.head_dim * count or not 1 <= count <= native.heads:
            raise ArtefactError(
                f"block.{layer}.attn.qkv.bias has {rows} rows; q, k and v of 1 to {native.heads} heads of "
                f"{native.head_dim} are legal"
            )
        counts.append(count)
    want = stored_shapes(native, counts, groups, maps=any(name.startswith("psi.") for name in shapes))
    if missing := sorted(want.keys() - shapes.keys()):
        raise ArtefactError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(shapes.keys() - want.keys()):
        raise ArtefactError(f"{len(unknown)} unknown tensors, the first is {unknown[0]}")
    for name, shape in shapes.items():
        if tuple(shape) != want[name]:
            raise ArtefactError(f"tensor {name} is {list(shape)}; the native shape {native} needs {list(want[name])}")
