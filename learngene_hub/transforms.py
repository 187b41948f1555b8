"""Tensor algebra that two or more methods share: which blocks a depth takes, and how a width is reached.

Width. A ViT has three kinds of axis that grow with its width: the residual stream (D channels), the heads (H of
head_dim units each) and the hidden units of every MLP (M = mlp_ratio * D). Each is mapped by an index: unit ``i`` of
the wider axis takes native unit ``i mod n``, and what reads a unit that has ``c`` copies reads ``1 / c`` of each.
LayerNorm is the only thing that is not linear in the residual stream, and the three forms differ in how they treat it:

``copy``      channels are copied as they are. Exact at integer multiples of the native width (Net2Net's widening, Chen
              et al., ICLR 2016, arXiv:1511.05641, for a residual stream); in between, LayerNorm sees some channels
              twice.
``balanced``  copy ``i`` of a channel with ``c`` copies is scaled by ``s = sqrt(D' / (D c))`` and the gain of LayerNorm
              divided by ``s``, so that the variance over the D' channels is the native one at every width; only the
              mean over channels is off. The same as ``copy`` at integer multiples, where s = 1. (Our reading.)
``exact``     new channels are silent: everything written to the stream is centred over its channels (LayerNorm does not
              see a constant), new channels are written as zeros, gains are scaled by sqrt(D / D'), so the descendant
              computes the ancestor's function at every width from the native one up. Compare LEMON (ICLR 2024).

Below the native width the channels, heads and hidden units with the highest scores are kept, in their native order; the
scores are part of the artefact, so a narrower choice is always a subset of a wider one.

Legend of the suffixes: D channels, M hidden units, O rows and I columns of a matrix, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learngene_hub._parts import check_parts as check_parts
from learngene_hub._parts import expected_shapes as expected_shapes
from learngene_hub._parts import stored_positions as stored_positions
from learngene_hub.errors import SettingsError
from learngene_hub.shape import ViTShape

FORMS = ("copy", "balanced", "exact")

# The names of timm's VisionTransformer (timm 1.0, vision_transformer.py), inside a block and outside.
BLOCK_KEYS = tuple(
    f"{module}.{kind}"
    for module in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
)
STEM_KEYS = ("cls_token", "patch_embed.proj.bias", "patch_embed.proj.weight", "pos_embed")
HEAD_KEYS = ("head.bias", "head.weight")
WRITES = ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")  # what adds to the residual stream
REPEATS = ("copy", "share", "identity")


def even_positions(depth: int, count: int) -> tuple[int, ...]:
    """``count`` positions spread evenly over ``depth`` blocks, both ends included: round(j (depth-1) / (count-1)).

    Halves round up; one position is the first. With ``count > depth`` positions repeat.
    """
    if count == 1:
        return (0,)
    gaps = count - 1
    return tuple((2 * j * (depth - 1) + gaps) // (2 * gaps) for j in range(count))


def nearest_positions(kept: tuple[int, ...], depth: int, count: int) -> tuple[int, ...]:
    """For each of ``count`` blocks the member of ``kept`` nearest to its relative place among ``depth`` ancestor
    blocks.

    Block j stands at p = j (depth-1) / (count-1); a tie goes to the smaller index, so the result never decreases.
    """
    gaps = max(count - 1, 1)
    return tuple(min(kept, key=lambda k: (abs(k * gaps - j * (depth - 1)), k)) for j in range(count))


def relative_positions(kept: tuple[int, ...], depth: int, count: int) -> tuple[int, ...]:
    """For each of ``kept`` among ``depth`` ancestor blocks its own place among ``count``: round(k (count-1) /
    (depth-1)).

    Halves round up; a place that is taken moves on, and back from the end where none is left, so that order is kept.
    """
    gaps, places = max(depth - 1, 1), []
    for rank, k in enumerate(kept):
        place = (2 * k * (count - 1) + gaps) // (2 * gaps)
        places.append(min(max(place, places[-1] + 1 if places else 0), count - len(kept) + rank))
    return tuple(places)


@dataclass(frozen=True)
class Units:
    """One axis resized by copying or choosing whole units: unit i is native unit ``index[i]``, read with "
    "``read[i]``."""

    index: Tensor  # (n',) int64
    read: Tensor | None  # (n',) float: 1 / copies; None: all 1
    unchanged: bool  # n' == n: nothing is touched, to the last bit


def map_units(native: int, count: int, score: Tensor | None = None) -> Units:
    """The map of an axis from ``native`` to ``count`` units: cyclic copies above, the best by ``score`` (n,) below.

    Without a score the leading units are kept. Equal scores keep the lower index.
    """
    if count < native and score is not None:
        best = torch.sort(score.float(), descending=True, stable=True).indices[:count]
        index = torch.sort(best).values
    else:
        index = torch.arange(count) % native
    read = 1.0 / torch.bincount(index, minlength=native)[index] if count > native else None
    return Units(index=index, read=read, unchanged=count == native)


def head_units(heads: Units, head_dim: int) -> Units:
    """The same map, said of single units: head ``h`` is units ``h head_dim .. (h+1) head_dim - 1``."""
    inner = torch.arange(head_dim)
    index = (heads.index[:, None] * head_dim + inner).flatten()
    read = None if heads.read is None else heads.read.repeat_interleave(head_dim)
    return Units(index=index, read=read, unchanged=heads.unchanged)


@dataclass(frozen=True)
class Stream:
    """The residual stream resized: factors per channel (D',) of what is written, normalised and read; None: all 1."""

    index: Tensor  # (D',) int64: the native channel of each channel
    write: Tensor | None  # (D',) factor of everything written to the stream
    gain: Tensor | None  # (D',) factor of LayerNorm gains
    bias: Tensor | None  # (D',) factor of LayerNorm biases
    read: Tensor | None  # (D',) factor of what is read after LayerNorm
    centre: bool  # subtract the mean over native channels from everything written
    unchanged: bool
    rows: Tensor | None = (
        None  # (D', D) learned rows A in place of whole channels: x' = A x, read with A's pseudo-inverse
    )


def map_stream(native: int, width: int, form: str = "copy", score: Tensor | None = None) -> Stream:
    """The map of the residual stream from ``native`` to ``width`` channels in one of FORMS.

    Raises:
        SettingsError: an unknown form.
    """
    if form not in FORMS:
        raise SettingsError(f"unknown width form {form!r}; known forms: {', '.join(FORMS)}")
    units = map_units(native, width, score)
    if units.read is None or form == "copy":
        return Stream(units.index, None, None, None, units.read, False, units.unchanged)
    if form == "balanced":
        scale = (units.read * width / native).sqrt()
        return Stream(units.index, scale, 1.0 / scale, None, units.read, False, False)
    old = (torch.arange(width) < native).float()
    return Stream(units.index, old, torch.full((width,), (native / width) ** 0.5), old, None, True, False)


def write_rows(w_O: Tensor, stream: Stream) -> Tensor:
    """A tensor whose first axis writes to the stream, (D, ...) -> (D', ...)."""
    if stream.unchanged:
        return w_O
    if stream.rows is not None:
        return torch.tensordot(stream.rows, w_O.float(), dims=1)
    if stream.centre:
        w_O = _full(w_O) - _full(w_O).mean(0, keepdim=True)
    return _times(w_O.index_select(0, stream.index.to(w_O.device)), stream.write, 0)


def read_columns(w_OI: Tensor, axis: Stream | Units) -> Tensor:
    """A matrix whose second axis reads a resized axis, (O, n) -> (O, n')."""
    if axis.unchanged:
        return w_OI
    if isinstance(axis, Stream) and axis.rows is not None:
        return w_OI.float() @ left_inverse(axis.rows)
    return _times(w_OI.index_select(1, axis.index.to(w_OI.device)), axis.read, 1)


def left_inverse(rows: Tensor) -> Tensor:
    """The pseudo-inverse (D, D') of rows A (D', D), in float32.

    Computed in float64: in float32 its last bits depend on where in memory a process happens to put its matrices.
    """
    return torch.linalg.pinv(rows.double()).float()


def take_rows(w_O: Tensor, units: Units) -> Tensor:
    """A tensor whose first axis makes resized units, (n, ...) -> (n', ...)."""
    return w_O if units.unchanged else w_O.index_select(0, units.index.to(w_O.device))


def resize_norm(part: Mapping[str, Tensor], stream: Stream) -> dict[str, Tensor]:
    """LayerNorm's ``weight`` and ``bias``, (D,) -> (D',)."""
    if stream.unchanged:
        return dict(part)
    index = stream.index.to(part["weight"].device)
    factors = {"weight": stream.gain, "bias": stream.bias}
    return {key: _times(part[key].index_select(0, index), factor, 0) for key, factor in factors.items()}


def resize_stem(stem: Mapping[str, Tensor], stream: Stream) -> dict[str, Tensor]:
    """The stem (patch embedding, class token, positions) at another width.

    Shapes: ``patch_embed.proj.weight`` (D, C, p, p), its bias (D,), ``cls_token`` (1, 1, D), ``pos_embed`` (1, P, D).
    """
    tokens = {name: stem[name] for name in ("cls_token", "pos_embed") if name in stem}
    rows = {name: tensor for name, tensor in stem.items() if name not in tokens}
    resized = {name: write_rows(tensor, stream) for name, tensor in rows.items()}
    return resized | {name: _write_last(tensor, stream) for name, tensor in tokens.items()}


def resize_block(
    block: Mapping[str, Tensor], stream: Stream, heads: Units, hidden: Units, head_dim: int
) -> dict[str, Tensor]:
    """The twelve tensors of one block at another width: (D, H, M) -> (D', H', M').

    timm's ``qkv`` holds the rows of all q heads, then all k heads, then all v heads.
    """
    inner = head_units(heads, head_dim)
    norms = {
        f"{name}.{key}": tensor
        for name in ("norm1", "norm2")
        for key, tensor in resize_norm({k: block[f"{name}.{k}"] for k in ("weight", "bias")}, stream).items()
    }
    return norms | {
        "attn.qkv.weight": read_columns(_take_qkv(block["attn.qkv.weight"], inner), stream),
        "attn.qkv.bias": _take_qkv(block["attn.qkv.bias"], inner),
        "attn.proj.weight": write_rows(read_columns(block["attn.proj.weight"], inner), stream),
        "attn.proj.bias": write_rows(block["attn.proj.bias"], stream),
        "mlp.fc1.weight": take_rows(read_columns(block["mlp.fc1.weight"], stream), hidden),
        "mlp.fc1.bias": take_rows(block["mlp.fc1.bias"], hidden),
        "mlp.fc2.weight": write_rows(read_columns(block["mlp.fc2.weight"], hidden), stream),
        "mlp.fc2.bias": write_rows(block["mlp.fc2.bias"], stream),
    }


@dataclass(frozen=True)
class Resize:
    """The whole map from a native shape to another width, with what was learned for it.

    ``learned`` holds the tensors of the group ``width`` of a learngene, each optional:
    ``stream`` (D,), ``heads`` (L, H), ``hidden`` (L, M): scores, higher is kept longer below the native width;
    ``rows`` (N, D): learned rows below the native width, of which width w takes the leading w: x' = A x;
    ``gain.w``, ``bias.w`` (2 L + 1, w): LayerNorm parameters learned for width w, by position (2 i: norm1 of block i,
    2 i + 1: norm2, last: the last norm).
    """

    native: ViTShape
    shape: ViTShape
    stream: Stream
    learned: Mapping[str, Tensor]

    @classmethod
    def of(cls, learned: Mapping[str, Tensor], native: ViTShape, shape: ViTShape, form: str) -> Resize:
        """The map from ``native`` to ``shape``'s width."""
        return cls(native, shape, _stream(learned, native.width, shape.width, form), learned)

    def stem(self, stem: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stem at the new width."""
        return resize_stem(stem, self.stream)

    def block(self, block: Mapping[str, Tensor], position: int) -> dict[str, Tensor]:
        """The block that stood at ``position`` of the ancestor, at the new width."""
        heads = map_units(self.native.heads, self.shape.heads, self._score("heads", position))
        hidden = map_units(self.native.hidden, self.shape.hidden, self._score("hidden", position))
        resized = resize_block(block, self.stream, heads, hidden, self.native.head_dim)
        for offset, name in enumerate(("norm1", "norm2")):
            resized |= {f"{name}.{key}": tensor for key, tensor in self._norm(2 * position + offset).items()}
        return resized

    def norm(self, norm: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The last norm at the new width."""
        return resize_norm(norm, self.stream) | self._norm(2 * self.native.depth)

    def _score(self, name: str, position: int) -> Tensor | None:
        return self.learned[name][position] if name in self.learned else None

    def _norm(self, row: int) -> dict[str, Tensor]:
        """The learned parameters of one norm at this width, if there are any."""
        names = {"weight": f"gain.{self.shape.width}", "bias": f"bias.{self.shape.width}"}
        return {key: self.learned[name][row] for key, name in names.items() if name in self.learned}


def _stream(learned: Mapping[str, Tensor], native: int, width: int, form: str) -> Stream:
    """The stream's map: the learned rows where there are any for a width below the native one, else whole channels."""
    stream = map_stream(native, width, form, learned.get("stream"))
    rows = learned.get("rows")
    if width >= native or rows is None or width > rows.shape[0]:
        return stream
    score = learned.get("stream")
    order = stream.index if score is None else torch.sort(score.float(), descending=True, stable=True).indices[:width]
    return replace(stream, rows=rows[:width].float(), index=order)  # rows stand best first, and so do their norms


def share_update(block: Mapping[str, Tensor], copies: int) -> dict[str, Tensor]:
    """A block that writes 1 / copies of what it writes: ``copies`` of it in a row add about one block's update.

    Source: our reading of copy-and-divide along depth; to first order, z + n (f(z) / n) = z + f(z).
    """
    if copies == 1:
        return dict(block)
    return {name: _full(tensor) / copies if name in WRITES else tensor for name, tensor in block.items()}


def repeated(block: Mapping[str, Tensor], positions: Sequence[int | None], place: int, how: str) -> dict[str, Tensor]:
    """What stands at ``place`` of a descendant with the blocks of ``positions``, some of which occur more than once.

    ``how`` is one of REPEATS: "copy", the block as it is; "share", each of its copies writes its share of the block's
    update; "identity", the first alone writes, so that the descendant computes what it would without the others.

    Source: "identity": Chen et al., "Net2Net", ICLR 2016, section 2 (Net2DeeperNet); the others are our reading.
    """
    if how == "share":
        return share_update(block, positions.count(positions[place]))
    if how == "identity" and positions.index(positions[place]) != place:
        return {name: tensor * 0.0 if name in WRITES else tensor for name, tensor in block.items()}
    return dict(block)


def resample_positions(pos_embed: Tensor, side: int, prefix: int) -> Tensor:
    """Position embeddings (1, prefix + n*n, D) at a grid of side x side patches, bicubic with antialiasing.

    The ``prefix`` positions of class tokens are kept. The same as timm's ``resample_abs_pos_embed``.
    """
    old = round((pos_embed.shape[1] - prefix) ** 0.5)
    if old == side:
        return pos_embed
    head, grid = _full(pos_embed[:, :prefix]), _full(pos_embed[:, prefix:])
    image = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, size=(side, side), mode="bicubic", antialias=True)
    grid = image.permute(0, 2, 3, 1).reshape(1, side * side, -1)
    return torch.cat([head, grid], dim=1)


def adapt_channels(kernel: Tensor, in_chans: int) -> Tensor:
    """A patch embedding's kernel (D, C, p, p) for another number of input channels.

    One channel gets the sum over the old ones; more are the old ones in turn, scaled so that the sum over equal
    channels is kept. The same as timm's ``adapt_input_conv``.
    """
    old = kernel.shape[1]
    if in_chans == old:
        return kernel
    if in_chans == 1:
        return _full(kernel).sum(1, keepdim=True)
    turn = torch.arange(in_chans, device=kernel.device) % old
    return _full(kernel).index_select(1, turn) * (old / in_chans)


def _full(tensor: Tensor) -> Tensor:
    """At least float32: products of stored float16 numbers are not rounded to float16 again."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _times(tensor: Tensor, factor: Tensor | None, axis: int) -> Tensor:
    """``tensor`` times one factor per index of ``axis``; as it is without factors."""
    if factor is None:
        return tensor
    tensor = _full(tensor)
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return tensor * factor.to(tensor).reshape(shape)


def _write_last(t_PD: Tensor, stream: Stream) -> Tensor:
    """A tensor whose last axis writes to the stream, (..., D) -> (..., D')."""
    if stream.unchanged:
        return t_PD
    if stream.rows is not None:
        return t_PD.float() @ stream.rows.T
    if stream.centre:
        t_PD = _full(t_PD) - _full(t_PD).mean(-1, keepdim=True)
    return _times(t_PD.index_select(-1, stream.index.to(t_PD.device)), stream.write, -1)


def _take_qkv(w_O: Tensor, inner: Units) -> Tensor:
    """The rows of q, k and v for the chosen head units: (3 H d, ...) -> (3 H' d, ...)."""
    if inner.unchanged:
        return w_O
    rows = w_O.shape[0] // 3
    index = torch.cat([inner.index + part * rows for part in range(3)])
    return w_O.index_select(0, index.to(w_O.device))
