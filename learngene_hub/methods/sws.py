"""SWS: a few blocks, each of them shared by all blocks of one stage of the auxiliary.

Learngene = one block per stage, with the stem and the last norm. In the auxiliary, stage s has ``stages[s]`` blocks in
a row, and all of them are the same block; it is trained so from random weights, by distillation alone. A descendant
takes for each of its blocks the block of one stage, in the order of the stages, and the copies go their own ways from
there.

How many blocks each stage gets: at the auxiliary's depth what it had there, so that the descendant is the auxiliary.
At other depths as even as possible, the earlier stages taking what is left over (our reading; for 12 blocks it is the
published list 0 0 0 1 1 1 2 2 3 3 4 4). Fewer blocks than stages take evenly spaced stages, the first and the last of
them included (our reading). ``layers`` gives any other list.

Source: Xia et al., "Exploring Learngene via Stage-wise Weight Sharing for Initializing Variable-sized Models",
IJCAI 2024, arXiv:2404.16897, and its released code. Published: auxiliaries of 16 blocks in stages of 3, 3, 4, 3, 3,
without class token; a teacher LeViT-384; 150 or 100 epochs at batch 512. The released small auxiliary has 12 heads, its
descendants 6: here the head_dim never changes; the ancestor teaches, unless a teacher is given, and what the settings
leave open of the auxiliary is the ancestor's. The paper varies depth alone; width comes from the shared width
transform (``transforms.py``), without a stage of its own, and is our addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import require_int
from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _auxiliary
from learngene_hub.methods._one_lesson import OneLesson
from learngene_hub.methods._whole import assemble, require_same
from learngene_hub.shape import Preprocessing, ViTShape


@dataclass(frozen=True, kw_only=True)
class Sws(OneLesson):
    """The settings of SWS: those of the distillation, and which stage each block belongs to."""

    name: ClassVar[str] = "sws"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.16897"
    note: ClassVar[str] = (
        "Widths other than the auxiliary's, and depths other than 12 and the auxiliary's, are this project's reading."
    )
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "stage", "tail", "head"})
    growth: ClassVar[frozenset[str]] = frozenset({"form", "head", "layers"})

    warmup: float = 1 / 30  # 5 of 150 epochs
    stages: tuple[int, ...] = (3, 3, 4, 3, 3)  # blocks of each stage; the auxiliary's depth is their sum
    # Growth.
    layers: tuple[int, ...] = ()  # the stage of each block of a descendant, from 0; empty: the rule above

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stages", "layers"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise SettingsError(f"{name} {getattr(self, name)!r:.60} asked; it is a list of whole numbers")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for count in self.stages:
            require_int("blocks of a stage", count, at_least=1, error=SettingsError)
        for stage in self.layers:
            require_int("stage", stage, at_least=0, error=SettingsError)
        if not self.stages:
            raise SettingsError("no stages asked; stages=[3,3,4,3,3] would work")
        if self.layers != tuple(sorted(self.layers)) or any(stage >= len(self.stages) for stage in self.layers):
            raise SettingsError(
                f"layers {list(self.layers)} asked; they never fall, and are at most {len(self.stages) - 1}"
            )

    @property
    def blocks(self) -> int:
        """Blocks of the auxiliary."""
        return sum(self.stages)

    def begin(
        self, native: ViTShape, ancestor: nn.Module | None, facts: Mapping[str, Any], preprocessing: Preprocessing
    ) -> _auxiliary.Auxiliary:
        """The auxiliary of shape ``native`` before training; the ancestor is asked where ``start`` says so."""
        outer, blocks = _auxiliary.random_parts(native, len(self.stages), self.seed)
        if self.start == "ancestor":  # at each stage its block of the same relative place (our addition)
            outer, blocks = _auxiliary.ancestor_parts(ancestor, native, _middles(self.stages), self.seed)
        tensors, head = _auxiliary.without_head(outer)
        for stage, block in enumerate(blocks):
            tensors |= _auxiliary.prefixed(f"stage.{stage}", block)
        blank = _auxiliary.blank(self.name, self, tensors, native, facts, preprocessing)
        shared = replace(self, layers=())  # a descendant's list is none of the auxiliary's
        return _auxiliary.Auxiliary(blank, shared.expand, native, head, drop_path=self.drop_path)

    def positions(self, depth: int) -> tuple[int, ...]:
        """The stage of each block of a descendant.

        Raises:
            ShapeError: ``layers`` was given for another depth.
        """
        if self.layers and len(self.layers) != depth:
            raise ShapeError(f"depth {depth} asked; layers gives the stages of {len(self.layers)} blocks")
        return self.layers or spread(self.stages, depth)

    def expand(self, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        """Every parameter of a ViT of ``shape``; None: the head, where it is not inherited. Blocks of one stage are one
        and the same tensor.

        Raises:
            ShapeError: something other than depth, width, image size, input channels or classes differs, or ``layers``
                was given for another depth.
            SettingsError: the settings have another number of stages than the learngene.
        """
        native = learngene.shape
        require_same(native, shape, self.name)
        resize = transforms.Resize.of({}, native, shape, self.form)
        positions, stored = self.positions(shape.depth), _auxiliary.numbers_of(learngene.tensors, "stage")
        if len(stored) != len(self.stages):
            raise SettingsError(f"{len(self.stages)} stages asked; this learngene has {len(stored)}")
        resized = {stage: resize.block(learngene.group(f"stage.{stage}"), 0) for stage in dict.fromkeys(positions)}
        norm = resize.norm({kind: learngene.tensors[f"tail.norm.{kind}"] for kind in ("weight", "bias")})
        stem = resize.stem(learngene.group("stem"))
        state = assemble(shape, stem, [resized[stage] for stage in positions], norm)
        return state | _auxiliary.inherited_head(learngene, shape, resize, self.head)

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        stored = _auxiliary.numbers_of(shapes, "stage")
        if not stored or stored != list(range(len(stored))) or len(stored) > native.depth:
            raise ArtefactError(f"stages {stored}; they are 0, 1 and so on, and at most {native.depth}")
        _auxiliary.check_stored(shapes, native, [f"stage.{stage}" for stage in stored])


def spread(stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The stage of each of ``depth`` blocks, of an auxiliary with these stages."""
    if depth < len(stages):
        return transforms.even_positions(len(stages), depth)
    each, more = divmod(depth, len(stages))
    counts = stages if depth == sum(stages) else [each + int(stage < more) for stage in range(len(stages))]
    return tuple(stage for stage, count in enumerate(counts) for _ in range(count))


def _middles(stages: tuple[int, ...]) -> list[float]:
    """The relative place of each stage's middle among the auxiliary's blocks, 0 the first block and 1 the last."""
    last = max(sum(stages) - 1, 1)
    return [(sum(stages[:stage]) + (count - 1) / 2) / last for stage, count in enumerate(stages)]
