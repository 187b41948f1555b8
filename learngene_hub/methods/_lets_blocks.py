"""LeTs' blocks, all of them at once: a few batched products where one for each tensor would be hundreds.

An auxiliary is expanded at every update, so this is a part of each step of its training, and products of single tensors
are too small for two threads. Heads and hidden units are widened layer by layer, because every layer has maps of its
own. Along the stream, whose map all layers share, widening and mixing commute: layers are mixed while they are narrow.

Shapes: L learngene layers, which are the pairs of G groups; R rows of coefficients of each group; P parts of a tensor
that are mixed by coefficients of their own; B blocks. s channels of the learngene's stream; n units, e new ones.

Source: see ``lets.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learngene_hub import transforms
from learngene_hub.learngene import Learngene
from learngene_hub.methods._lets_maps import MODULES, PAIR, Axis, Growth, full, layers_of

Place = tuple[int, int]  # a group, and a row of coefficients
VECTORS = {  # what has the units of the stream: its module, and whose coefficients mix it
    "norm1.weight": ("norm1", "weight"),
    "norm1.bias": ("norm1", "bias"),
    "attn.proj.bias": ("proj", "bias"),
    "norm2.weight": ("norm2", "weight"),
    "norm2.bias": ("norm2", "bias"),
    "mlp.fc2.bias": ("fc2", "bias"),
}
TRANSPOSED = ("attn.proj.weight", "mlp.fc2.weight")  # the stream's units are their rows: widened as their transposes


def grown_blocks(growth: Growth, learngene: Learngene, places: Sequence[Place]) -> dict[Place, dict[str, Tensor]]:
    """Each of these places, no two of them alike -> its block of the growth's shape, under timm's names."""
    mixing = Mixing(learngene, places)
    stored = {key: _stacked(learngene, key, mixing.groups) for key in transforms.BLOCK_KEYS}
    narrow = _attention(growth, mixing, stored) | _mlp(growth, mixing, stored)
    vectors = mixing(torch.stack([stored[key] for key in VECTORS], dim=1), list(VECTORS.values()))  # (B, 6, s)
    grown: dict[str, Sequence[Tensor]] = {
        key: each.unbind() for key, each in zip(VECTORS, growth.stream.units(vectors).unbind(1), strict=True)
    }
    for key, each in narrow.items():
        if key.endswith("bias"):
            grown[key] = each.unbind()
        elif key in TRANSPOSED:
            grown[key] = [tensor.mT for tensor in growth.stream.units_of_blocks(each)]
        else:
            grown[key] = growth.stream.units_of_blocks(growth.stream.shared(each))
    return mixing.parted({key: grown[key] for key in transforms.BLOCK_KEYS})


def _attention(growth: Growth, mixing: Mixing, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """qkv (B, 3(n + e), s), its bias (B, 3(n + e)) and the transpose of proj (B, n + e, s): more heads, s as it was."""
    heads, values = [], []
    for group in mixing.groups:
        units = growth.head_rows(group)
        for layer in layers_of(group):
            heads += [growth.axis(f"{part}.{layer}", units) for part in "qkv"]
            values.append(heads[-1])
    weight, bias, proj = (stored[f"attn.{key}"] for key in ("qkv.weight", "qkv.bias", "proj.weight"))
    layers, width = len(weight), weight.shape[-1]
    both = torch.cat([weight.view(3 * layers, -1, width), bias.view(3 * layers, -1, 1)], dim=-1)
    weight, bias = Axis.stack(heads).make_each(both).unflatten(0, (layers, 3)).split([width, 1], dim=-1)
    return {
        "attn.qkv.weight": mixing(weight, [(part, "weight") for part in "qkv"]).flatten(1, 2),
        "attn.qkv.bias": mixing(bias, [(part, "bias") for part in "qkv"]).flatten(1),
        "attn.proj.weight": mixing.one(Axis.stack(values).read(proj).mT, "proj"),
    }


def _mlp(growth: Growth, mixing: Mixing, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fc1 (B, n + e, s), its bias (B, n + e) and the transpose of fc2 (B, n + e, s): more hidden units, s as it was.

    All that belongs to a hidden unit is a row of one product, because F is the largest factor here.
    """
    rows = {group: growth.hidden_rows(group) for group in mixing.groups}
    hidden = Axis.stack([growth.axis(f"hidden.{layer}", rows[g]) for g in rows for layer in layers_of(g)])
    fc1, bias, fc2 = (stored[f"mlp.{key}"] for key in ("fc1.weight", "fc1.bias", "fc2.weight"))
    width = fc1.shape[-1]
    both = torch.cat([fc1, bias[..., None], hidden.shared(fc2).mT], dim=-1)
    fc1, bias, fc2 = hidden.make_each(both).split([width, 1, width], dim=-1)
    return {
        "mlp.fc1.weight": mixing.one(fc1, "fc1"),
        "mlp.fc1.bias": mixing.one(bias, "fc1", "bias").flatten(1),
        "mlp.fc2.weight": mixing.one(fc2, "fc2"),
    }


class Mixing:
    """The pairs of learngene layers of some groups, mixed as the rows of coefficients of some places say."""

    def __init__(self, learngene: Learngene, places: Sequence[Place]) -> None:
        self.groups = sorted({group for group, _ in places})
        rows = [[row for at, row in places if at == group] for group in self.groups]
        most = max(len(each) for each in rows)
        self._places = [(group, row) for group, each in zip(self.groups, rows, strict=True) for row in each]
        # A group with fewer rows than another repeats one; what is made of it is left out again.
        self._kept = [place * most + i for place, each in enumerate(rows) for i in range(len(each))]
        index = torch.tensor([each + each[:1] * (most - len(each)) for each in rows])
        coefficients = {kind: full(learngene.tensors[f"depth.{kind}"]) for kind in ("weight", "bias")}
        self._coefficients = {kind: c[index.to(c.device)] for kind, c in coefficients.items()}  # (G, R, 8, 2)

    def __call__(self, w: Tensor, parts: Sequence[tuple[str, str]]) -> Tensor:
        """Layers ``w`` (L, P, ...), a (module, "weight" or "bias") for each of the P parts -> (B, P, ...)."""
        c = torch.stack([self._coefficients[kind][:, :, MODULES.index(name)] for name, kind in parts], dim=1)
        groups, count, rows = c.shape[:3]  # c is (G, P, R, 2)
        pairs = w.reshape(groups, PAIR, count, -1).transpose(1, 2).reshape(groups * count, PAIR, -1)
        mixed = torch.bmm(c.flatten(0, 1), pairs).view(groups, count, rows, -1)
        mixed = mixed.transpose(1, 2).reshape(groups * rows, *w.shape[1:])
        return mixed if len(self._kept) == len(mixed) else mixed[self._kept]

    def one(self, w: Tensor, name: str, kind: str = "weight") -> Tensor:
        """Layers ``w`` (L, ...) of one part -> (B, ...)."""
        return self(w[:, None], [(name, kind)])[:, 0]

    def parted(self, grown: Mapping[str, Sequence[Tensor]]) -> dict[Place, dict[str, Tensor]]:
        """B tensors under each name -> the block of each place."""
        blocks: dict[Place, dict[str, Tensor]] = {place: {} for place in self._places}
        for key, each in grown.items():
            for place, tensor in zip(self._places, each, strict=True):
                # Without gradients each block has memory of its own.
                own = tensor if tensor.requires_grad else tensor.clone(memory_format=torch.contiguous_format)
                blocks[place][key] = own
        return blocks


def _stacked(learngene: Learngene, key: str, groups: Sequence[int]) -> Tensor:
    """(L, ...): this tensor of the layers of these groups."""
    return full(
        torch.stack([learngene.tensors[f"block.{layer}.{key}"] for group in groups for layer in layers_of(group)])
    )
