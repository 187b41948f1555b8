"""LeTs' algebra: width maps, depth mixing, and the rows of both that a descendant takes.

E(F) = [I ; F] is the identity of the learngene's n units on top of the F (e, n) of the new ones. What a layer makes is
multiplied by E(F), what it reads by E(F)^T, so old units stay untouched and new ones are linear combinations of them.

Source: see ``lets.py``, whose settings say which rows are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learngene_hub import transforms
from learngene_hub.data import seed_of
from learngene_hub.errors import ShapeError
from learngene_hub.shape import ViTShape

if TYPE_CHECKING:
    from learngene_hub.methods.lets import Lets

MODULES = ("norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2")  # each is mixed by coefficients of its own
PAIR = 2  # learngene layers that one group mixes, and auxiliary layers that share a row of coefficients


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


class _UnitsOfBlocks(torch.autograd.Function):
    """[w, w F^T] of each block: w (B, m, s) and F (e, s) -> B tensors (m, s + e).

    Written where it belongs, with gradients taken from where they are: what ``torch.cat`` and ``unbind`` would do, but
    for three copies of all weights of a ViT at every update.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(w, rows)
        blocks, made, units = w.shape
        wide = w.new_empty(blocks, made, units + len(rows))
        wide[..., :units] = w
        torch.mm(w.reshape(-1, units), rows.T, out=wide.view(-1, wide.shape[-1])[:, units:])
        return wide.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *wide: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, rows = ctx.saved_tensors
        back, to_rows = torch.empty_like(w), torch.zeros_like(rows)
        for block, narrow, gradient in zip(back, w, wide, strict=True):
            kept, new = gradient.split([w.shape[-1], len(rows)], dim=-1)
            torch.addmm(kept, new, rows, out=block)
            to_rows.addmm_(new.T, narrow)
        return back, to_rows


@dataclass(frozen=True)
class Axis:
    """An axis of n units widened by e: ``rows`` F, (e, n), or (L, e, n) for L tensors with a map each; None for e = 0.
    ``share`` (n,), or (L, 1, n), is what is read of a unit."""

    rows: Tensor | None
    share: Tensor | None = None

    @classmethod
    def stack(cls, axes: Sequence[Axis]) -> Axis:
        """One axis for a stack of tensors; all of them are widened by as much."""
        rows = [axis.rows for axis in axes if axis.rows is not None]
        shares = [axis.share for axis in axes if axis.share is not None]
        return cls(torch.stack(rows) if rows else None, torch.stack(shares)[:, None] if shares else None)

    def make(self, w_O: Tensor) -> Tensor:
        """E(F) w, (n, ...) -> (n + e, ...), of one tensor."""
        w_O = full(w_O)
        if self.rows is None:
            return w_O
        made = self.rows @ w_O.reshape(len(w_O), -1)
        return torch.cat([w_O, made.reshape(-1, *w_O.shape[1:])])

    def make_each(self, w_LOI: Tensor) -> Tensor:
        """E(F) w, (L, n, m) -> (L, n + e, m)."""
        if self.rows is None:
            return w_LOI
        return torch.cat([w_LOI, torch.bmm(self.rows.expand(len(w_LOI), -1, -1), w_LOI)], dim=1)

    def read(self, w_I: Tensor) -> Tensor:
        """w E(F)^T, (..., n) -> (..., n + e)."""
        return self.units(self.shared(full(w_I)))

    def shared(self, w_I: Tensor) -> Tensor:
        """Of each unit (..., n) what is read of it."""
        return w_I if self.rows is None or self.share is None else w_I * self.share.to(w_I)

    def units(self, w: Tensor) -> Tensor:
        """E(F) along the last axis, (..., n) -> (..., n + e): of what is made, not read."""
        return w if self.rows is None else torch.cat([w, w @ self.rows.mT], dim=-1)

    def units_of_blocks(self, w: Tensor) -> Sequence[Tensor]:
        """The same of each of B blocks, (B, m, n) -> B tensors (m, n + e); ``rows`` is (e, n)."""
        return w.unbind() if self.rows is None else _UnitsOfBlocks.apply(w, self.rows)


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
        return self.axis("stream", self.stream_rows)

    @cached_property
    def classifier(self) -> Axis:
        return self.axis("head", self.stream_rows)

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

    def axis(self, name: str, index: Tensor) -> Axis:
        """That of the map ``name`` with these of its rows."""
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


def full(tensor: Tensor) -> Tensor:
    """At least float32: products of stored float16 numbers are not rounded to float16 again."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(device: torch.device) -> torch.autocast:
    """Nothing is rounded to a lower precision inside."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


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
