"""Weight selection: a smaller model starts from a subset of a larger one's layers, and of each axis of its tensors.

Learngene = the ancestor's stem, all its blocks and its last norm, untouched; no data, no training. A descendant is
never deeper or wider than the ancestor. It takes L' of the L blocks and, of an axis of n entries, the m entries

    uniform       i (n / m), or, where m does not divide n, round(i (n-1) / (m-1)), halves to even
    consecutive   0 .. m-1
    random        m drawn without replacement, in ascending order

Selected numbers are not rescaled. There is one set of entries per kind of axis (channels of the residual stream, units
of the heads, hidden units), the same for every tensor and layer: the paper finds that the kinds of selection do about
equally well as long as they are consistent in this way, and clearly worse without it. "consecutive" from entry 0 on is
our reading.

Source: Xu, Chen, Vishniakov, Yin, Shen, Darrell, Liu, Liu, "Initializing Models with Larger Ones", ICLR 2024,
arXiv:2311.18823 (abstract, and reviews of the rest), and its released code, github.com/OscarXZQ/weight-selection:
"uniform", "first" layers, the classifier left out. That code selects on every axis of every tensor by itself; the two
differ only for qkv where m does not divide n: there it is one axis of 3 n entries, here each of q, k and v is selected
alike (our reading). It selects single units across heads, so that a new head holds parts of several; ``heads="whole"``
keeps heads together (our addition). Another image size or number of input channels is resampled, as everywhere in this
package (our addition).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import require_int
from learngene_hub.data import Images
from learngene_hub.errors import SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._whole import assemble, check_whole, parts_of, require_choice, require_same, untrained
from learngene_hub.shape import Preprocessing, Reach, ViTShape
from learngene_hub.training import Step

_AXES = ("layers", "stream", "heads", "hidden")  # each draws its own random entries


@dataclass(frozen=True, kw_only=True)
class WeightSelection:
    """The settings of weight selection, all of them of growth."""

    name: ClassVar[str] = "weight-selection"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.18823"
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "block", "tail"})
    growth: ClassVar[frozenset[str]] = frozenset({"elements", "layers", "heads", "seed"})

    elements: str = "uniform"  # the entries of an axis: uniform, consecutive, random
    layers: str = "first"  # the blocks: the first, "uniform" (evenly spaced), or "random"
    heads: str = "units"  # the units of the heads: single "units" as in the released code, or "whole" heads
    seed: int = 0  # of the random choices

    def __post_init__(self) -> None:
        require_choice("elements", self.elements, ("uniform", "consecutive", "random"))
        require_choice("layers", self.layers, ("first", "uniform", "random"))
        require_choice("heads", self.heads, ("units", "whole"))
        require_int("seed", self.seed, at_least=0, error=SettingsError)

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
        """
        began = time.perf_counter()
        native = ViTShape.of(ancestor)
        step = native.head_dim
        reach = Reach(depths=(1, native.depth), widths=(step, native.width, step))
        return untrained(
            self.name, asdict(self), parts_of(ancestor, native), native=native, reach=reach, facts=facts,
            preprocessing=preprocessing, began=began,
        )  # fmt: skip

    def positions(self, native: int, depth: int) -> tuple[int, ...]:
        """The ancestor's position, of ``native``, of each block of a descendant, ascending."""
        if self.layers == "first":
            return tuple(range(depth))
        if self.layers == "uniform":
            return transforms.even_positions(native, depth)
        return tuple(self._drawn("layers", native, depth).tolist())

    def expand(self, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        """Every parameter of a ViT of ``shape``; None: the head. At the native shape every tensor is the stored one.

        Raises:
            ShapeError: deeper or wider than the ancestor, or something other than depth, width, image size, input
                channels or classes differs.
        """
        native = learngene.shape
        require_same(native, shape, self.name)
        for name in ("depth", "width"):
            have, asked = getattr(native, name), getattr(shape, name)
            if asked > have:
                raise ShapeError(f"{name} {asked} asked; {self.name} only makes smaller models: {have} would work")
        chosen = self._units("stream", native.width, shape.width)
        stream = transforms.Stream(chosen.index, None, None, None, None, False, chosen.unchanged)
        hidden = self._units("hidden", native.hidden, shape.hidden)
        heads = self._units("heads", native.width, shape.width)
        if self.heads == "whole":
            heads = transforms.head_units(self._units("heads", native.heads, shape.heads), native.head_dim)
        blocks = [
            transforms.resize_block(learngene.group(f"block.{i}"), stream, heads, hidden, 1)  # heads are single units
            for i in self.positions(native.depth, shape.depth)
        ]
        norm = {kind: learngene.tensors[f"tail.norm.{kind}"] for kind in ("weight", "bias")}
        stem = transforms.resize_stem(learngene.group("stem"), stream)
        return assemble(shape, stem, blocks, transforms.resize_norm(norm, stream))

    def _units(self, axis: str, native: int, count: int) -> transforms.Units:
        """The selected entries of an axis of ``native``."""
        if self.elements == "random":
            index = self._drawn(axis, native, count)
        elif self.elements == "consecutive":
            index = torch.arange(count)
        else:
            index = uniform_entries(native, count)
        return transforms.Units(index=index, read=None, unchanged=count == native)

    def _drawn(self, axis: str, native: int, count: int) -> Tensor:
        """``count`` of ``native`` entries in ascending order, by the seed and the axis alone."""
        generator = torch.Generator().manual_seed(len(_AXES) * self.seed + _AXES.index(axis))
        return torch.sort(torch.randperm(native, generator=generator)[:count]).values

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        check_whole(shapes, native, self.groups)


def uniform_entries(native: int, count: int) -> Tensor:
    """``count`` evenly spaced entries of ``native``, (count,) int64: every (n/m)-th, or else with both ends."""
    if native % count == 0:
        return torch.arange(count) * (native // count)
    return torch.tensor([round(Fraction(i * (native - 1), count - 1)) for i in range(count)])
