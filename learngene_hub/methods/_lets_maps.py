"""LeTs' algebra: width maps, depth mixing, and the rows of both that a descendant takes.

E(F) = [I ; F] is the identity of the learngene's n units on top of the F (e, n) of the new ones. What a layer makes is
multiplied by E(F), what it reads by E(F)^T, so old units stay untouched and new ones are linear combinations of them.

Source: see ``lets.py``, whose settings say which rows are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learngene_hub import transforms
from learngene_hub.data import seed_of
from learngene_hub.errors import ShapeError
from learngene_hub.shape import ViTShape

if TYPE_CHECKING:
    from learngene_hub.learngene import Learngene
    from learngene_hub.methods.lets import Lets

MODULES = ("norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2")  # each is mixed by coefficients of its own
PAIR = 2  # learngene layers that one group mixes, and auxiliary layers that share a row of coefficients

Parts = dict[str, tuple[Tensor, Tensor]]  # module -> weight, bias


@dataclass(frozen=True)
class Groups:
    """The auxiliary's layers in groups of equal size, one for each pair of learngene layers."""

    count: int
    size: int  # auxiliary layers per group

    @classmethod
    def of(cls, depth: int, small: int) -> Groups:
        """Those of an auxiliary of ``depth`` and a learngene of ``small`` layers.

        Raises:
            ShapeError: the learngene's layers do not pair up, or the auxiliary's do not divide among the pairs.
        """
        if small < PAIR or small % PAIR:
            near = " or ".join(str(n) for n in (small - 1, small + 1) if n >= PAIR)
            raise ShapeError(f"learngene_depth {small} asked; layers are mixed in pairs: {near} would work")
        pairs = small // PAIR
        if depth < pairs or depth % pairs:
            near = " or ".join(str(n) for n in (depth // pairs * pairs, depth // pairs * pairs + pairs) if n)
            raise ShapeError(
                f"auxiliary depth {depth} asked; it divides among the {pairs} pairs of learngene layers: "
                f"depth {near} would work"
            )
        return cls(pairs, depth // pairs)

    @property
    def per_group(self) -> int:
        """Rows of coefficients of one group."""
        return -(-self.size // PAIR)

    @property
    def rows(self) -> int:
        """Rows of coefficients."""
        return self.count * self.per_group

    def first_layer(self, row: int) -> int:
        """The first auxiliary layer that uses a row: its published name (0, 2, ..., 14)."""
        return row // self.per_group * self.size + row % self.per_group * PAIR

    def places(self, depth: int) -> tuple[tuple[int, int], ...]:
        """(group, row of coefficients) of each layer of a descendant.

        Every group gets a layer, the rest goes to the middle groups first, in turn where two are as near. A group's n
        layers spread evenly over its rows, the earlier rows taking what is left over; n below the number of rows take
        evenly spaced ones. At depth 12 of 16 these are the published lists; the rule for other depths is our reading.
        """
        counts, left = [1] * self.count, depth - self.count
        far = sorted({abs(2 * group - self.count + 1) for group in range(self.count)})
        for distance in far:
            ring = [group for group in range(self.count) if abs(2 * group - self.count + 1) == distance]
            while left and counts[ring[-1]] < self.size:
                for group in ring[: min(left, len(ring))]:
                    counts[group] += 1
                    left -= 1
        return tuple((g, g * self.per_group + row) for g in range(self.count) for row in self._rows(counts[g]))

    def _rows(self, count: int) -> list[int]:
        """The row within its group of each of ``count`` layers."""
        if count < self.per_group:
            return list(transforms.even_positions(self.per_group, count))
        shares = [count // self.per_group + (row < count % self.per_group) for row in range(self.per_group)]
        return [row for row, share in enumerate(shares) for _ in range(share)]

    def listed(self, layers: Sequence[int], coefficients: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(group, row of coefficients) of each layer from two lists in the published form.

        Raises:
            ShapeError: a layer that the auxiliary does not have, or one that no row of coefficients begins with.
        """
        rows = {self.first_layer(row): row for row in range(self.rows)}
        last = self.count * self.size - 1
        if odd := [layer for layer in layers if not 0 <= layer <= last]:
            raise ShapeError(f"layer_map with {odd[0]} asked; the auxiliary's layers are 0 to {last}")
        if odd := [row for row in coefficients if row not in rows]:
            known = ", ".join(str(first) for first in rows)
            raise ShapeError(f"coefficients with {odd[0]} asked; the rows of coefficients are {known}")
        return tuple((layer // self.size, rows[first]) for layer, first in zip(layers, coefficients, strict=True))


@dataclass(frozen=True)
class Axis:
    """One axis of n units widened by e: ``rows`` F (e, n), None for e = 0; ``share`` (n,) of what is read of a unit."""

    rows: Tensor | None
    share: Tensor | None = None

    def make(self, w_O: Tensor) -> Tensor:
        """E(F) w, (n, ...) -> (n + e, ...)."""
        w_O = full(w_O)
        if self.rows is None:
            return w_O
        made = self.rows @ w_O.reshape(len(w_O), -1)
        return torch.cat([w_O, made.reshape(-1, *w_O.shape[1:])])

    def read(self, w_I: Tensor) -> Tensor:
        """w E(F)^T, (..., n) -> (..., n + e)."""
        w_I = full(w_I)
        if self.rows is None:
            return w_I
        if self.share is not None:
            w_I = w_I * self.share.to(w_I)
        return torch.cat([w_I, w_I @ self.rows.T], dim=-1)


@dataclass(frozen=True)
class Growth:
    """A learngene's tensors on their way to one shape: the axes widened, layer by layer and group by group."""

    method: Lets
    maps: Mapping[str, Tensor]  # the learngene's group "map"
    native: ViTShape  # the auxiliary
    small: ViTShape  # the learngene
    shape: ViTShape

    @cached_property
    def stream_rows(self) -> Tensor:
        """The rows of everything that is a unit of the residual stream: one set, also for the classifier."""
        extra, asked = (wide.width - self.small.width for wide in (self.native, self.shape))
        return choose(self.method, "stream", extra, asked, lambda: self._norms(["stream"]))

    @cached_property
    def stream(self) -> Axis:
        return self._axis("stream", self.stream_rows)

    @cached_property
    def classifier(self) -> Axis:
        return self._axis("head", self.stream_rows)

    def head_rows(self, group: int) -> Tensor:
        """The rows of q, k and v in one group: whole heads."""
        inner = self.small.head_dim
        extra, asked = (wide.heads - self.small.heads for wide in (self.native, self.shape))
        names = [f"{part}.{layer}" for part in "qkv" for layer in layers_of(group)]
        heads = choose(
            self.method, f"heads.{group}", extra, asked, lambda: self._norms(names).reshape(extra, inner).sum(1)
        )
        return (heads[:, None] * inner + torch.arange(inner)).flatten()

    def hidden_rows(self, group: int) -> Tensor:
        """The rows of the hidden units in one group."""
        extra, asked = (wide.hidden - self.small.hidden for wide in (self.native, self.shape))
        names = [f"hidden.{layer}" for layer in layers_of(group)]
        return choose(self.method, f"hidden.{group}", extra, asked, lambda: self._norms(names))

    def _norms(self, names: Sequence[str]) -> Tensor:
        """The norms of the rows of these maps, summed."""
        order = 1 if self.method.norm == "l1" else 2
        return torch.stack([self.maps[name].detach().float().norm(order, dim=1) for name in names]).sum(0).cpu()

    def _axis(self, name: str, index: Tensor) -> Axis:
        rows = self.maps.get(name)
        if rows is None or not len(index):
            return Axis(None)
        taken = rows if len(index) == len(rows) else rows.index_select(0, index.to(rows.device))
        share = None
        if self.method.scheme == "preserving":  # unit i of the new ones began as a copy of unit i mod n
            share = 1.0 / (1 + torch.bincount(index % rows.shape[1], minlength=rows.shape[1]))
        return Axis(full(taken), share)

    def positions(self, pos_embed: Tensor) -> Tensor:
        """Position embeddings (1, T, D_a) at the asked width: the learngene's channels, then the chosen rows'."""
        if len(self.stream_rows) == self.native.width - self.small.width:
            return pos_embed
        index = torch.cat([torch.arange(self.small.width), self.small.width + self.stream_rows])
        return pos_embed.index_select(-1, index.to(pos_embed.device))

    def blocks(self, learngene: Learngene, group: int, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """Blocks under timm's names, one for each of these rows of coefficients of the group.

        Widening and mixing commute along the stream, whose map all layers share. So the pair is mixed while it is
        narrow there; the rows part before they are widened, so that the way back stacks narrow gradients too.
        """
        weight, bias = (learngene.tensors[f"depth.{kind}"][list(rows)] for kind in ("weight", "bias"))
        mixed = mix_layers(self._pair(learngene, group), weight, bias)
        parted = {name: tuple(zip(*parts, strict=True)) for name, parts in mixed.items()}
        return [self._block({name: each[row] for name, each in parted.items()}) for row in range(len(rows))]

    def _block(self, parts: Parts) -> dict[str, Tensor]:
        """A block under timm's names, its stream widened."""
        make, read = self.stream.make, self.stream.read
        return {
            "norm1.weight": make(parts["norm1"][0]),
            "norm1.bias": make(parts["norm1"][1]),
            "attn.qkv.weight": read(torch.cat([parts[name][0] for name in "qkv"])),
            "attn.qkv.bias": torch.cat([parts[name][1] for name in "qkv"]),
            "attn.proj.weight": make(parts["proj"][0]),
            "attn.proj.bias": make(parts["proj"][1]),
            "norm2.weight": make(parts["norm2"][0]),
            "norm2.bias": make(parts["norm2"][1]),
            "mlp.fc1.weight": read(parts["fc1"][0]),
            "mlp.fc1.bias": parts["fc1"][1],
            "mlp.fc2.weight": make(parts["fc2"][0]),
            "mlp.fc2.bias": make(parts["fc2"][1]),
        }

    def _pair(self, learngene: Learngene, group: int) -> tuple[Parts, Parts]:
        """The two learngene layers of one group, their heads and hidden units widened."""
        heads, hidden = self.head_rows(group), self.hidden_rows(group)
        first, second = (
            widen_layer(
                learngene.group(f"block.{layer}"),
                (self._axis(f"q.{layer}", heads), self._axis(f"k.{layer}", heads), self._axis(f"v.{layer}", heads)),
                self._axis(f"hidden.{layer}", hidden),
            )
            for layer in layers_of(group)
        )
        return first, second


def layers_of(group: int) -> tuple[int, int]:
    """The learngene layers that a group mixes."""
    return PAIR * group, PAIR * group + 1


def choose(method: Lets, axis: str, total: int, count: int, score: Callable[[], Tensor]) -> Tensor:
    """``count`` of ``total`` rows in ascending order, (count,) int64, as the setting ``select`` says.

    Step-wise is our reading: from row ``first`` on every ``stride``-th, around the end, then from the next row on.
    """
    if method.select == "continuous" or count in (0, total):
        return torch.arange(count)
    if method.select == "step":
        turns = torch.cat([torch.arange(start, total, method.stride) for start in range(min(method.stride, total))])
        order = (turns + method.first) % total
    elif method.select == "random":
        generator = torch.Generator().manual_seed(seed_of("lets", method.select_seed, axis))
        order = torch.randperm(total, generator=generator)
    else:
        order = torch.sort(score(), descending=method.keep == "top", stable=True).indices
    return torch.sort(order[:count]).values


def widen_layer(block: Mapping[str, Tensor], attention: tuple[Axis, Axis, Axis], hidden: Axis) -> Parts:
    """One learngene layer with more heads and hidden units, q, k and v apart; its stream is as it was."""
    parts = {name: (block[f"{name}.weight"], block[f"{name}.bias"]) for name in ("norm1", "norm2")}
    qkv = zip("qkv", attention, block["attn.qkv.weight"].chunk(3), block["attn.qkv.bias"].chunk(3), strict=True)
    parts |= {name: (axis.make(weight), axis.make(bias)) for name, axis, weight, bias in qkv}
    parts["proj"] = (attention[2].read(block["attn.proj.weight"]), block["attn.proj.bias"])
    parts["fc1"] = (hidden.make(block["mlp.fc1.weight"]), hidden.make(block["mlp.fc1.bias"]))
    parts["fc2"] = (hidden.read(block["mlp.fc2.weight"]), block["mlp.fc2.bias"])
    return parts


def mix_layers(pair: tuple[Parts, Parts], weight: Tensor, bias: Tensor) -> Parts:
    """Module -> its weights and biases, (R, ...) each: the pair weighted by R rows of coefficients, ``weight`` and
    ``bias`` (R, 8, 2)."""
    return {
        name: (_mixed(pair, name, 0, full(weight)[:, place]), _mixed(pair, name, 1, full(bias)[:, place]))
        for place, name in enumerate(MODULES)
    }


def _mixed(pair: tuple[Parts, Parts], name: str, kind: int, coefficients: Tensor) -> Tensor:
    """(R, ...) of one module: coefficients (R, 2) times its two tensors."""
    first, second = (full(parts[name][kind]) for parts in pair)
    both = torch.stack([first.flatten(), second.flatten()])
    return (coefficients @ both).view(-1, *first.shape)


def full(tensor: Tensor) -> Tensor:
    """At least float32: products of stored float16 numbers are not rounded to float16 again."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def narrow(native: ViTShape, depth: int, width: int) -> ViTShape:
    """The learngene's own shape inside an auxiliary of ``native``.

    Raises:
        ShapeError: wider than the auxiliary, or not of whole heads.
    """
    step = native.head_dim
    if width % step or not step <= width <= native.width:
        raise ShapeError(
            f"learngene_width {width} asked; it is a multiple of head_dim {step} up to the auxiliary's {native.width}"
        )
    return replace(native, depth=depth, width=width, heads=width // step)


def tensor_shapes(native: ViTShape, small: ViTShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a learngene of ``small`` trained inside an auxiliary of ``native``.

    Raises:
        ShapeError: their depths do not fit each other.
    """
    groups, extra = Groups.of(native.depth, small.depth), native.width - small.width
    shapes = transforms.expected_shapes(small, set(range(small.depth)))
    shapes |= {"stem.pos_embed": (1, native.tokens, native.width)}
    shapes |= {"head.weight": (native.classes, small.width), "head.bias": (native.classes,)}
    shapes |= {f"depth.{kind}": (groups.rows, len(MODULES), PAIR) for kind in ("weight", "bias")}
    maps = {name: (extra, small.width) for name in ("stream", "head")}
    maps |= {f"{part}.{layer}": (extra, small.width) for part in "qkv" for layer in range(small.depth)}
    wide = (native.hidden - small.hidden, small.hidden)
    maps |= {f"hidden.{layer}": wide for layer in range(small.depth)}
    return shapes | {f"map.{name}": shape for name, shape in maps.items() if shape[0]}
