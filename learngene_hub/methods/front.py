"""FRONT: what two sizes of a model share are the low frequencies of its weights, over layers, outputs and inputs.

The blocks' tensors of one name are stacked over the L layers. Each layer's tensor is brought to mean 0 and deviation
1, W = m + s Z, and Z is taken to the frequencies of a discrete cosine transform along the layers, the outputs and (a
matrix) the inputs. Along an axis of n entries, with c_0 = sqrt(1/n) and c_k = sqrt(2/n),

    X_k = c_k sum_i Z_i cos(pi k (2 i + 1) / (2 n)),

the first min(n, n') are kept, zeros are appended up to n', and the inverse of size n' gives n' entries: a low-pass and
a smooth interpolation, one matrix per axis. Then W' = m + s Z'. Stem and last norm: the same, along their channels
alone. At the native shape this is the ancestor. The head stays fresh; no data, no training.

Learngene = Z and the statistics (m, s). With ``keep`` below 1 the frequencies from keep n on are dropped from each axis
of units, with ``layers`` those along the layers; the others are stored as the fewer samples that have them.

``scale`` is the amplitude at another size, a factor per changed axis on top of the orthonormal transform above:

    orthonormal   1             energy is kept: appended zeros add none, and numbers without order keep their deviation
    released      sqrt(n / n')  the code's transform, not normalised: a smaller axis gets larger numbers
    ratio         sqrt(n' / n)  on axes of units: a constant stays that constant; along the layers as "released"
    amplitude     sqrt(n' / n)  on every axis (our addition)

Source: Shen, Feng, Xie, Lv, Geng, "Breaking the Scale Barrier: One-Shot Knowledge Transfer via Frequency Transform",
ICML 2026, arXiv:2603.07523 (as "One-for-All Model Initialization with Frequency-Domain Knowledge"). Only its abstract,
reviews and the released code, github.com/LUcy0505/FRONT, could be read. From the code: the stacks, the statistics, the
transforms, "released" and (its use_ratio) "ratio", ``attention="joint"`` (qkv is one axis of 3 n outputs),
``statistics="first"`` (layer j has m and s of the ancestor's layer j, layers after the last have the last's), ``keep``
and ``layers`` (its keep_ratio and select_n). Our reading where the code mixes unlike things: it transforms the kernel's
outputs and colours as one axis, its pixels as another, and the position embeddings over the tokens too; here only the
channels are transformed (the position embeddings of another image size are resampled, as everywhere in this package).
In the code all layers beyond the ancestor's last share one tensor; here each has its own. FRONT+ (training with a
spectral regulariser) is not here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import is_number, require_int
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._whole import assemble, parts_of, require_choice, require_same, untrained
from learngene_hub.shape import Preprocessing, Reach, ViTShape
from learngene_hub.training import Step

_Matrix = Callable[[int, int], Tensor]
SCALES = ("orthonormal", "released", "ratio", "amplitude")


@dataclass(frozen=True, kw_only=True)
class Front:
    """The settings of FRONT; ``keep`` and ``layers`` are of extraction, the others of both."""

    name: ClassVar[str] = "front"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.07523"
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "stack", "tail", "stat"})
    growth: ClassVar[frozenset[str]] = frozenset({"scale", "attention", "statistics"})

    scale: str = "released"  # the amplitude at another size: orthonormal, released, ratio, amplitude
    attention: str = "joint"  # outputs of qkv: one axis; "split": one each of q, k, v; "heads": whole heads (additions)
    statistics: str = "first"  # of layer j: the ancestor's layer j; "even": those at its relative place (addition)
    keep: float = 1.0  # share of the frequencies stored of each axis of units
    layers: int = 0  # frequencies stored along the layers; 0: all

    def __post_init__(self) -> None:
        require_choice("scale", self.scale, SCALES)
        require_choice("attention", self.attention, ("joint", "split", "heads"))
        require_choice("statistics", self.statistics, ("first", "even"))
        if not (is_number(self.keep) and 0 < self.keep <= 1):
            raise SettingsError(f"keep {self.keep!r} asked; it is a share, above 0 and at most 1")
        require_int("layers", self.layers, at_least=0, error=SettingsError)

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
    ) -> Learngene:
        """The learngene of ``ancestor``.

        ``data`` is not looked at and may be empty. Nothing is trained, so ``watch`` is never called.

        Raises:
            ShapeError: the ancestor is no plain ViT.
            SettingsError: more frequencies along the layers than it has layers.
        """
        began = time.perf_counter()
        native = ViTShape.of(ancestor)
        if self.layers > native.depth:
            raise SettingsError(
                f"layers {self.layers} asked; the ancestor has {native.depth}: {native.depth} would work"
            )
        tensors: dict[str, Tensor] = {}
        for name, tensor in _stacked(parts_of(ancestor, native), native).items():
            normal, statistics = _normalised(tensor, stacked=name.startswith("stack."))
            tensors[name] = self._low(name, normal, native)
            tensors[f"stat.{name}"] = statistics
        step = native.head_dim
        reach = Reach(depths=(1, 2 * native.depth), widths=(step, 4 * native.width, step))
        return untrained(
            self.name, asdict(self), tensors, native=native, reach=reach, facts=facts, preprocessing=preprocessing,
            began=began,
        )  # fmt: skip

    def _low(self, name: str, normal: Tensor, native: ViTShape) -> Tensor:
        """The stored part of a normalised tensor: as many samples per axis as frequencies are kept."""
        if name.startswith("stack."):
            normal = _resized(normal, 0, _Axis(native.depth, self.layers or native.depth))
        for dim, axis in self._axes(name, native, native).items():
            normal = _resized(normal, dim, replace(axis, size=max(1, int(axis.native * self.keep))))
        return normal

    def expand(self, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        """Every parameter of a ViT of ``shape``; None: the head.

        Raises:
            ShapeError: something other than depth, width, image size, input channels or classes differs.
        """
        native = learngene.shape
        require_same(native, shape, self.name)
        matrix = cache(resize_matrix)  # many tensors share an axis; what is cached goes with this call
        state = {
            name: self._grown(name, tensor, learngene.tensors[f"stat.{name}"], native, shape, matrix)
            for name, tensor in learngene.tensors.items()
            if not name.startswith("stat.")
        }
        parts = {group: _group(state, group) for group in ("stem", "stack", "tail")}
        blocks = [{key: tensor[place] for key, tensor in parts["stack"].items()} for place in range(shape.depth)]
        return assemble(shape, parts["stem"], blocks, _group(parts["tail"], "norm"))

    def _grown(
        self, name: str, tensor: Tensor, statistics: Tensor, native: ViTShape, shape: ViTShape, matrix: _Matrix
    ) -> Tensor:
        """One stored tensor at the sizes of ``shape``."""
        tensor, statistics = tensor.float(), statistics.float()
        if name.startswith("stack."):
            factor = _factor("released" if self.scale == "ratio" else self.scale, native.depth, shape.depth)
            tensor = _resized(tensor, 0, _Axis(native.depth, shape.depth), factor, matrix)
            statistics = _statistics_at(statistics, shape.depth, self.statistics)
        for dim, axis in self._axes(name, native, shape).items():
            tensor = _resized(tensor, dim, axis, _factor(self.scale, axis.native, axis.size), matrix)
        mean, deviation = statistics.unbind(-1)
        ones = (1,) * (tensor.dim() - mean.dim())
        return tensor * deviation.reshape(*deviation.shape, *ones) + mean.reshape(*mean.shape, *ones)

    def _axes(self, name: str, native: ViTShape, shape: ViTShape) -> dict[int, _Axis]:
        """The axes of units of a tensor, dimension -> axis."""
        group, _, rest = name.partition(".")
        module, _, kind = rest.rpartition(".")
        stream = _Axis(native.width, shape.width)
        if group != "stack":
            return {-1 if rest in ("cls_token", "pos_embed") else 0: stream}
        inner, rows = stream, _Axis(3 * native.width, 3 * shape.width)
        if self.attention == "split":
            rows = replace(stream, outer=3)
        elif self.attention == "heads":
            inner = _Axis(native.heads, shape.heads, inner=native.head_dim)
            rows = replace(inner, outer=3)
        hidden = _Axis(native.hidden, shape.hidden)
        outputs, inputs = {
            "attn.qkv": (rows, stream),
            "attn.proj": (stream, inner),
            "mlp.fc1": (hidden, stream),
            "mlp.fc2": (stream, hidden),
        }.get(module, (stream, stream))
        matrix = kind == "weight" and not module.startswith("norm")
        return {1: outputs, 2: inputs} if matrix else {1: outputs}

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or larger than the ancestor's.
        """
        want = _expected(native)
        if missing := sorted(want.keys() - shapes.keys()):
            raise ArtefactError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
        if unknown := sorted(shapes.keys() - want.keys()):
            raise ArtefactError(f"{len(unknown)} unknown tensors, the first is {unknown[0]}")
        for name, most in want.items():
            have = tuple(shapes[name])
            fixed = range(len(most)) if name.startswith("stat.") else _fixed(name)
            fits = len(have) == len(most) and all(1 <= n <= m for n, m in zip(have, most, strict=True))
            if not fits or any(have[dim] != most[dim] for dim in fixed):
                raise ArtefactError(f"tensor {name} is {list(have)}; the native shape {native} has {list(most)}")


@dataclass(frozen=True)
class _Axis:
    """An axis of (outer, n, inner) entries of which only the n change: q, k, v; units or heads; units of a head."""

    native: int
    size: int
    outer: int = 1
    inner: int = 1


def dct_matrix(size: int, count: int) -> Tensor:
    """The first ``count`` rows of the orthonormal DCT-II, (count, size) float64: c_k cos(pi k (2 i + 1) / (2 size))."""
    k, i = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * k * (2 * i + 1) / (2 * size)) * math.sqrt(2 / size)
    matrix[0] = math.sqrt(1 / size)
    return matrix


def resize_matrix(stored: int, size: int) -> Tensor:
    """What takes ``stored`` entries to ``size`` of the same low frequencies, (size, stored) float64."""
    count = min(stored, size)
    return dct_matrix(size, count).T @ dct_matrix(stored, count)


def _factor(scale: str, native: int, size: int) -> float:
    """The amplitude of an axis brought from ``native`` to ``size`` entries."""
    return math.sqrt({"orthonormal": 1.0, "released": native / size}.get(scale, size / native))


def _resized(tensor: Tensor, dim: int, axis: _Axis, factor: float = 1.0, matrix: _Matrix = resize_matrix) -> Tensor:
    """``tensor`` with the axis ``dim`` brought to its size by ``matrix``.

    Raises:
        SettingsError: what is stored is no such axis: it was extracted with another setting.
    """
    dim %= tensor.dim()
    stored, rest = divmod(tensor.shape[dim], axis.outer * axis.inner)
    if rest or not stored:
        raise SettingsError(
            f"an axis of {tensor.shape[dim]} stored entries is not {axis.outer} x n x {axis.inner} of them"
        )
    if stored == axis.native == axis.size:
        return tensor  # nothing changes, to the last bit
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    linear = (matrix(stored, axis.size) * factor).to(tensor)
    split = tensor.reshape(*before, axis.outer, stored, axis.inner, *after)
    moved = torch.tensordot(linear, split.movedim(dim + 1, 0), dims=1).movedim(0, dim + 1)
    return moved.reshape(*before, axis.outer * axis.size * axis.inner, *after)


def _normalised(tensor: Tensor, *, stacked: bool) -> tuple[Tensor, Tensor]:
    """Z of W = m + s Z, and (m, s): one pair per layer of a stack, (L, 2), else one, (2,)."""
    flat = tensor.flatten(1) if stacked else tensor.flatten()
    mean, deviation = flat.mean(-1), flat.std(-1, correction=min(1, flat.shape[-1] - 1)) + 1e-8
    ones = (1,) * (tensor.dim() - mean.dim())
    normal = (tensor - mean.reshape(*mean.shape, *ones)) / deviation.reshape(*deviation.shape, *ones)
    return normal, torch.stack([mean, deviation], -1)


def _statistics_at(statistics: Tensor, depth: int, rule: str) -> Tensor:
    """(m, s) of each layer of a descendant, (L, 2) -> (depth, 2); between two layers "even" goes straight."""
    last = len(statistics) - 1
    if rule == "first":
        return statistics[torch.arange(depth).clamp(max=last)]
    place = torch.arange(depth, dtype=torch.float64) * last / max(depth - 1, 1)
    low = place.floor().long()
    part = (place - low).to(statistics)[:, None]
    return (1 - part) * statistics[low] + part * statistics[(low + 1).clamp(max=last)]


def _stacked(parts: Mapping[str, Tensor], native: ViTShape) -> dict[str, Tensor]:
    """The blocks' tensors of one name stacked over the layers, (L, ...), and the rest as it is."""
    rest = {name: tensor for name, tensor in parts.items() if not name.startswith("block.")}
    layers = range(native.depth)
    return rest | {
        f"stack.{key}": torch.stack([parts[f"block.{i}.{key}"] for i in layers]) for key in transforms.BLOCK_KEYS
    }


def _group(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def _fixed(name: str) -> tuple[int, ...]:
    """The dimensions of a stored tensor that are always the ancestor's."""
    return {"stem.patch_embed.proj.weight": (1, 2, 3), "stem.pos_embed": (0, 1), "stem.cls_token": (0, 1)}.get(name, ())


def _expected(native: ViTShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a learngene that keeps all frequencies."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in transforms.expected_shapes(native, {0}).items():
        block = name.startswith("block.0.")
        stored = name.replace("block.0.", "stack.", 1)
        shapes[stored] = (native.depth, *shape) if block else shape
        shapes[f"stat.{stored}"] = (native.depth, 2) if block else (2,)
    return shapes
