"""Net2Net: the ancestor's own blocks and units, copied so that the larger model computes what the ancestor computes.

Learngene = the ancestor's stem, all its L blocks and its last norm, untouched; no data, no training. A descendant
takes evenly spaced blocks, and unit i of a wider axis is native unit i mod n, where what reads a unit of c copies reads
1/c of each (``transforms.py`` has the formulas and the three forms). At the native depth that is exact at integer
multiples of the native width, and with the form "exact" at every width above it. Below it the leading units are kept
(our reading: the paper only grows), or those with the highest scores where a width stage (``widening.py``) measured
them.

Depth up to L: ``select``. Beyond L: block j takes the ancestor's block nearest to j (L-1) / (L'-1), so some occur more
than once, and ``repeat`` says what a repeated block writes. "identity" is the paper's own rule for depth: what is
inserted adds nothing at first, which in a residual block means attn.proj and mlp.fc2 of zeros.

Source: Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016, arXiv:1511.05641.
It has fully connected and convolutional layers and draws the unit to copy at random; cyclic copies of heads, hidden
units and channels of a residual stream are our reading. Its noise on the copies, which keeps two copies from learning
the same for ever, is here ``tilt``, which leaves the function as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import is_number
from learngene_hub.data import Images
from learngene_hub.errors import SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._whole import assemble, check_whole, parts_of, require_choice, require_same, untrained
from learngene_hub.shape import Preprocessing, Reach, ViTShape
from learngene_hub.training import Step


@dataclass(frozen=True, kw_only=True)
class Net2Net:
    """The settings of net2net, all of them of growth."""

    name: ClassVar[str] = "net2net"
    paper: ClassVar[str] = "https://arxiv.org/abs/1511.05641"
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "block", "tail", "width"})
    growth: ClassVar[frozenset[str]] = frozenset({"form", "select", "repeat", "tilt"})

    form: str = "copy"  # of the width transform: copy, balanced, exact
    select: str = "even"  # the blocks of a smaller depth: evenly spaced, or the "first"
    repeat: str = "identity"  # of a block's copies the first alone writes; "share": each its part; "copy": all of it
    tilt: float = 0.0  # how unevenly the copies of a head or hidden unit share what is read of it; the sum stays 1

    def __post_init__(self) -> None:
        require_choice("form", self.form, transforms.FORMS)
        require_choice("select", self.select, ("even", "first"))
        require_choice("repeat", self.repeat, transforms.REPEATS)
        if not (is_number(self.tilt) and 0 <= self.tilt < 1):
            raise SettingsError(f"tilt {self.tilt!r} asked; it is a share, at least 0 and below 1")

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
        reach = Reach(depths=(1, 2 * native.depth), widths=(step, 4 * native.width, step))
        return untrained(
            self.name, asdict(self), parts_of(ancestor, native), native=native, reach=reach, facts=facts,
            preprocessing=preprocessing, began=began,
        )  # fmt: skip

    def positions(self, native: int, depth: int) -> tuple[int, ...]:
        """The ancestor's position, of ``native``, of each block of a descendant."""
        if depth > native:
            return transforms.nearest_positions(tuple(range(native)), native, depth)
        return tuple(range(depth)) if self.select == "first" else transforms.even_positions(native, depth)

    def expand(self, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        """Every parameter of a ViT of ``shape``; None: the head. At the native shape every tensor is the stored one.

        Raises:
            ShapeError: something other than depth, width, image size, input channels or classes differs.
        """
        native = learngene.shape
        require_same(native, shape, self.name)
        resize = transforms.Resize.of(learngene.group("width"), native, shape, self.form)
        positions = self.positions(native.depth, shape.depth)
        resized = {i: self._tilted(resize.block(learngene.group(f"block.{i}"), i), native, shape) for i in positions}
        blocks = [transforms.repeated(resized[i], positions, place, self.repeat) for place, i in enumerate(positions)]
        norm = resize.norm({kind: learngene.tensors[f"tail.norm.{kind}"] for kind in ("weight", "bias")})
        return assemble(shape, resize.stem(learngene.group("stem")), blocks, norm)

    def _tilted(self, block: dict[str, Tensor], native: ViTShape, shape: ViTShape) -> dict[str, Tensor]:
        """The block with uneven shares of the copies of each head and each hidden unit."""
        if not self.tilt or shape.width <= native.width:
            return block
        heads = _tilt(native.heads, shape.heads, self.tilt).repeat_interleave(shape.head_dim)
        factors = {"attn.proj.weight": heads, "mlp.fc2.weight": _tilt(native.hidden, shape.hidden, self.tilt)}
        return block | {key: block[key] * factor.to(block[key]) for key, factor in factors.items()}

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        check_whole(shapes, native, self.groups)


def _tilt(native: int, count: int, tilt: float) -> Tensor:
    """One factor per unit, (count,): 1 + tilt (2 r / (c-1) - 1) for copy r of a unit's c, which average 1."""
    unit, rank = torch.arange(count) % native, torch.arange(count) // native
    copies = torch.bincount(unit, minlength=native)[unit]
    return torch.where(copies > 1, 1 + tilt * (2 * rank / (copies - 1).clamp(min=1) - 1), 1.0)
