"""Auto-Learngene on CNNs: stages of a VGG or ResNet, and a small network of the same family walked stage by stage.

The pseudo descendant and every descendant are of one skeleton: each stage has half of the ancestor's convolutions (of a
ResNet: residual blocks), rounded up. Of VGG16 these are 1, 1, 2, 2, 2, which is the VGG9 of the authors' code; of
ResNet18 1, 1, 1, 1 (theirs is a ResNet12 whose file is missing, so this is our reading). A kept stage takes the first
of the ancestor's, in the last stage of a VGG the last ones, as the authors' list does; every other stage is fresh, with
the same channels. A ResNet's stem is inherited like a ViT's (our reading). A deeper descendant has fresh layers at the
top of its last stage (our addition, as with ViTs). The head of a VGG has two hidden layers of 1024, as published for
images of 32 px; what the ancestor's has is not inherited.

Source: arXiv:2305.02279 (see ``auto.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._conv import Conv, ConvShape
from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._auto_features import ResNetFeatures, VGGFeatures
from learngene_hub.methods._auto_search import Pair, drawn
from learngene_hub.shape import Reach

if TYPE_CHECKING:
    from learngene_hub.methods.auto import Auto

_HEAD = 1024  # units of each hidden layer of a VGG's head
_STEM = -1  # the stage number of a ResNet's stem


@dataclass(frozen=True)
class Convs:
    """What the method does with an ancestor that is a CNN. Its units are stages, and its groups are the same."""

    method: Auto
    native: ConvShape

    @property
    def kind(self) -> str:
        return f"{self.native.family} of {self.native.depth} {'convolutions' if self._vgg else 'residual blocks'}"

    @property
    def _vgg(self) -> bool:
        return self.native.family == "vgg"

    @property
    def units(self) -> int:
        return len(self.native.stages)

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Each stage is a group."""
        return tuple((stage,) for stage in range(self.units))

    def keep(self) -> int:
        """Stages kept where the settings do not say: all but the weakest, as of VGG16."""
        return max(1, self.units - 1)

    def similar(self) -> tuple[int, int]:
        """(M, N), stages of the ancestor and of the pseudo descendant."""
        return self.units, self.units

    def taken(self, stage: int) -> range:
        """The ancestor's positions, within the stage, of the skeleton's layers."""
        have = len(self.native.stages[stage])
        count = -(-have // 2)
        last = self._vgg and stage == self.units - 1
        return range(have - count, have) if last and self._feeds(stage) else range(count)

    def _feeds(self, stage: int) -> bool:
        """Whether the stage before gives what a later layer of this one reads."""
        before = self.native.stages[stage - 1][-1] if stage else self.native.in_chans
        return before == self.native.stages[stage][0]

    def skeleton(self, depth: int, *, image_size: int, in_chans: int, classes: int) -> ConvShape:
        """The small network, with fresh layers at the top of its last stage up to ``depth``.

        Raises:
            ShapeError: the ancestor has a stage of unequal widths, or the images are too small.
        """
        for place, stage in enumerate(self.native.stages):
            if len(set(stage)) > 1:
                raise ShapeError(f"stage {place} of {list(stage)} channels given; auto takes stages of one width each")
        stages = [tuple(self.native.stages[stage][i] for i in self.taken(stage)) for stage in range(self.units)]
        stages[-1] += (self.native.width,) * (depth - self.least)
        head = _HEAD if self._vgg else 0
        return ConvShape(
            family=self.native.family, stages=tuple(stages), head_hidden=head, head_kernel=int(self._vgg),
            image_size=image_size, in_chans=in_chans, classes=classes,
        )  # fmt: skip

    @property
    def least(self) -> int:
        """Layers of the skeleton."""
        return sum(len(self.taken(stage)) for stage in range(self.units))

    def pair(self, ancestor: nn.Module, size: int, classes: int) -> Pair:
        """The ancestor, and a pseudo descendant that is the skeleton.

        Raises:
            SettingsError: a depth of it is asked, which the skeleton fixes.
            ShapeError: there is no skeleton, or not for images of this size.
        """
        if self.method.pseudo_depth:
            raise SettingsError(f"pseudo_depth {self.method.pseudo_depth} asked of a CNN; 0, half of it, would work")
        shape = self.skeleton(self.least, image_size=size, in_chans=self.native.in_chans, classes=classes)
        features = VGGFeatures if self._vgg else ResNetFeatures
        return Pair(
            ancestor=features(copy.deepcopy(ancestor).cpu().float()).eval().requires_grad_(False),
            pseudo=features(drawn(shape.build, self.method.seed)),
            flops=(replace(self.native, image_size=size).flops(), shape.flops()),
            steps=5,
            match=1.0,
        )

    def parts(self, ancestor: nn.Module, kept: Sequence[int]) -> dict[str, Tensor]:
        """A ResNet's stem and what the skeleton takes of the stages ``kept``, as a learngene holds them."""
        state = ancestor.state_dict()
        names = self._stored(kept)
        return {name: state[there].detach().cpu().float().clone() for name, (there, _) in names.items()}

    def _stored(self, kept: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in a learngene -> name in the ancestor, and size."""
        found = {}
        for conv in self.native.convs():
            if conv.stage == _STEM:
                found |= _entries(conv, "stem")
            elif conv.stage in kept and conv.block in self.taken(conv.stage):
                found |= _entries(conv, f"block.{conv.stage}.{conv.block}")
        return found

    def expected(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what a learngene holds whose stages are those of ``names``.

        Raises:
            ArtefactError: no stage at all, or one that the ancestor does not have.
        """
        kept = transforms.stored_positions(names)
        if not kept or not set(kept) <= set(range(self.units)):
            raise ArtefactError(f"stages {list(kept)}; the ancestor's are 0 to {self.units - 1}")
        return {name: size for name, (_, size) in self._stored(kept).items()}

    def reach(self, kept: Sequence[int]) -> Reach:
        """From the skeleton to the ancestor's own depth, at its width."""
        width = self.native.width
        return Reach(depths=(self.least, self.native.depth), widths=(width, width, 1))

    def plan(
        self, learngene: Learngene, *, depth: int | None, width: int | None, heads: int | tuple[int, ...] | None,
        num_labels: int | None, image_size: int | None, in_chans: int,
    ) -> ConvShape:  # fmt: skip
        """The CNN of these sizes; the skeleton where no depth is asked.

        Raises:
            ShapeError: heads, a width other than the ancestor's, or a depth out of reach.
        """
        if heads is not None:
            raise ShapeError(f"heads {heads} asked; this learngene grows a {self.native.family}, which has none")
        if width not in (None, self.native.width):
            raise ShapeError(
                f"width {width} asked; auto keeps a CNN's channels: width {self.native.width} would work, and a "
                "learngene of heuristic can grow other channels before its gene (--set front=[32,64,128])"
            )
        if self.native.depth < (depth or 0) <= 2 * self.native.depth:
            raise ShapeError(
                f"depth {depth} asked; auto reaches a CNN's own depth: {self.native.depth} would work, and a "
                f"learngene of heuristic can grow up to {2 * self.native.depth}"
            )
        learngene.reach.require(depth or self.least, self.native.width)
        return self.skeleton(
            depth or self.least,
            image_size=image_size or self.native.image_size,
            in_chans=in_chans,
            classes=self.native.classes if num_labels is None else num_labels,
        )

    def expand(self, learngene: Learngene, shape: ConvShape) -> dict[str, Tensor | None]:
        """The kept stages in their places; None: the other stages, what is deeper than the skeleton, the head.

        Raises:
            ShapeError: ``shape`` is not what ``plan`` gives for some depth, image size, channels and classes.
        """
        asked = {name: getattr(shape, name) for name in ("image_size", "in_chans", "classes")}
        if not isinstance(shape, ConvShape) or shape.depth < self.least or shape != self.skeleton(shape.depth, **asked):
            would = self.skeleton(max(shape.depth, self.least), **asked)
            raise ShapeError(f"{shape} asked; this learngene is of {self.native}, and at that depth grows {would}")
        state: dict[str, Tensor | None] = dict.fromkeys(shape.keys())
        for conv in shape.convs():
            stem = conv.stage == _STEM
            taken = self.taken(conv.stage) if not stem else range(1)
            if conv.block >= len(taken):
                continue
            prefix = "stem" if stem else f"block.{conv.stage}.{taken[conv.block]}"
            for name, (there, _) in _entries(conv, prefix).items():
                if name in learngene.tensors:
                    state[there] = _for_channels(learngene.tensors[name], conv, there)
        return state


def _entries(conv: Conv, prefix: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in a learngene -> name in the model and size, of a convolution and its BatchNorm."""
    place = ("shortcut" if conv.shortcut else conv.name.rpartition(".")[2]) if conv.name.startswith("layer") else "conv"
    parts = {conv.name: place, conv.norm: f"{place}.norm"}
    found = {}
    for name, size in conv.sizes().items():
        module, _, kind = name.rpartition(".")
        found[f"{prefix}.{parts[module]}.{kind}"] = name, size
    return found


def _for_channels(tensor: Tensor, conv: Conv, name: str) -> Tensor:
    """The kernel of the first convolution at the model's input channels; anything else as it is."""
    first = name == f"{conv.name}.weight" and tensor.shape[1] != conv.inputs
    return transforms.adapt_channels(tensor, conv.inputs) if first else tensor
