"""TLEG: every block on one line through the space of weights, expanded from two sets of a block's shape.

Learngene = a base A and a slope B, each of the shape of one whole block, with the stem and the last norm. Block l of L,
counted from 0, is theta_l = A + (l / L) B, every tensor alike: Linear weights and biases, LayerNorm gains and biases.
The index runs from 0 to L - 1 over L, so that the last block never reaches A + B. A descendant of depth L' evaluates
the same line at l / L'; no block is ever copied.

A and B are trained inside an auxiliary of L blocks, from random weights, by distillation alone. The published start is
kept: Linear weights of both from a normal of 0.02, the gains of A at 1 and those of B at 0, every bias 0.

Source: Xia et al., "Transformer as Linear Expansion of Learngene", AAAI 2024, arXiv:2312.05614, and
its released code. Published: auxiliaries of 12 blocks 384 or 768 wide, without class token; a teacher LeViT-384; 150 or
100 epochs at batch 512. Here the ancestor teaches, unless a teacher is given, and what the settings leave open of the
auxiliary is the ancestor's. The paper varies depth alone; width comes from the shared width transform
(``transforms.py``), without a stage of its own, and is our addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import require_int
from learngene_hub.errors import SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _auxiliary
from learngene_hub.methods._one_lesson import OneLesson
from learngene_hub.methods._whole import assemble, require_same
from learngene_hub.shape import Preprocessing, ViTShape


@dataclass(frozen=True, kw_only=True)
class Tleg(OneLesson):
    """The settings of TLEG: those of the distillation, and the auxiliary's depth."""

    name: ClassVar[str] = "tleg"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.05614"
    note: ClassVar[str] = "Widths other than the auxiliary's are an addition of this project; the paper varies depth."
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "base", "slope", "tail", "head"})
    growth: ClassVar[frozenset[str]] = frozenset({"form", "head"})

    depth: int = 0  # blocks of the auxiliary; 0: the ancestor's

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("depth", self.depth, at_least=0, error=SettingsError)

    def begin(
        self, native: ViTShape, ancestor: nn.Module | None, facts: Mapping[str, Any], preprocessing: Preprocessing
    ) -> _auxiliary.Auxiliary:
        """The auxiliary of shape ``native`` before training; the ancestor is asked where ``start`` says so."""
        outer, (base, slope) = _auxiliary.random_parts(native, 2, self.seed)
        slope = {key: tensor * 0.0 if tensor.dim() == 1 else tensor for key, tensor in slope.items()}
        if self.start == "ancestor":  # its middle block at every depth (our addition)
            outer, (base,) = _auxiliary.ancestor_parts(ancestor, native, [0.5], self.seed)
            slope = {key: tensor * 0.0 for key, tensor in slope.items()}
        parts, head = _auxiliary.without_head(outer)
        tensors = parts | _auxiliary.prefixed("base", base) | _auxiliary.prefixed("slope", slope)
        blank = _auxiliary.blank(self.name, self, tensors, native, facts, preprocessing)
        return _auxiliary.Auxiliary(blank, self.expand, native, head, drop_path=self.drop_path)

    def expand(self, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        """Every parameter of a ViT of ``shape``; None: the head, where it is not inherited.

        Raises:
            ShapeError: something other than depth, width, image size, input channels or classes differs.
        """
        native = learngene.shape
        require_same(native, shape, self.name)
        resize = transforms.Resize.of({}, native, shape, self.form)
        # Resizing is linear in a block's tensors, so that the two are resized and not each of the blocks.
        parts = [resize.block(learngene.group(name), 0) for name in ("base", "slope")]
        line = [[1.0, place / shape.depth] for place in range(shape.depth)]
        blocks = _auxiliary.compose(parts, torch.tensor(line, dtype=torch.float64))
        norm = resize.norm({kind: learngene.tensors[f"tail.norm.{kind}"] for kind in ("weight", "bias")})
        state = assemble(shape, resize.stem(learngene.group("stem")), blocks, norm)
        return state | _auxiliary.inherited_head(learngene, shape, resize, self.head)

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        _auxiliary.check_stored(shapes, native, ("base", "slope"))
