"""Auto-Learngene on ViTs: groups of blocks, the pseudo descendant, and kept blocks at the bottom of a descendant.

Source: arXiv:2305.02279 (see ``auto.py``). That kept blocks stand at the bottom, right after the inherited stem, is our
reading; so is the width transform for widths other than the ancestor's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub.errors import SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._auto_features import ViTFeatures, block_groups
from learngene_hub.methods._auto_search import Pair, drawn
from learngene_hub.methods._plain_plan import plan_plain
from learngene_hub.methods._whole import assemble, last_norm, parts_of, require_same
from learngene_hub.shape import Reach, ViTShape

if TYPE_CHECKING:
    from learngene_hub.methods.auto import Auto


@dataclass(frozen=True)
class ViTs:
    """What the method does with an ancestor that is a plain ViT. Its units are blocks, its groups some of them."""

    method: Auto
    native: ViTShape

    @property
    def kind(self) -> str:
        return f"vit of {self.native.depth} blocks"

    @property
    def units(self) -> int:
        return self.native.depth

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The blocks of each group."""
        return block_groups(self.native.depth, self.method.group)

    def keep(self) -> int:
        """Groups kept where the settings do not say: half, as published (3 of 6)."""
        return max(1, len(self.groups()) // 2)

    def similar(self) -> tuple[int, int]:
        """(M, N), groups of the ancestor and of the pseudo descendant."""
        return len(self.groups()), len(block_groups(self._pseudo_depth(), self.method.group))

    def _pseudo_depth(self) -> int:
        return self.method.pseudo_depth or max(1, self.native.depth // 2)

    def pair(self, ancestor: nn.Module, size: int, classes: int) -> Pair:
        """The ancestor, and a pseudo descendant of its width and, unless the settings say otherwise, half its depth.

        Raises:
            SettingsError: an image size that the patches do not divide, or more blocks than the ancestor has.
        """
        native, depth = self.native, self._pseudo_depth()
        if size % native.patch:
            raise SettingsError(
                f"images of {size} px asked; the ancestor's patch is {native.patch}: a multiple would work"
            )
        if depth > native.depth:
            raise SettingsError(f"pseudo_depth {depth} asked; the ancestor has {native.depth} blocks: at most as many")
        own = replace(native, image_size=size)
        state = {name: tensor.detach().cpu().float().clone() for name, tensor in ancestor.state_dict().items()}
        side, prefix = size // native.patch, int(native.class_token)
        state["pos_embed"] = transforms.resample_positions(state["pos_embed"], side, prefix)
        copy = own.build()
        copy.load_state_dict(state)
        shape = replace(own, depth=depth, classes=classes)
        ends = [
            [group[-1] for group in block_groups(count, self.method.group)] for count in (native.depth, depth)
        ]  # fmt: skip
        return Pair(
            ancestor=ViTFeatures(copy, ends[0]).eval().requires_grad_(False),
            pseudo=ViTFeatures(drawn(shape.build, self.method.seed), ends[1]),
            flops=(own.flops(), shape.flops()),
            steps=2,
            match=0.1,
        )

    def parts(self, ancestor: nn.Module, kept: Sequence[int]) -> dict[str, Tensor]:
        """The stem and the blocks ``kept``, as a learngene holds them."""
        names = ("stem.", *(f"block.{place}." for place in kept))
        return {name: tensor for name, tensor in parts_of(ancestor, self.native).items() if name.startswith(names)}

    def expected(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what a learngene holds whose blocks are those of ``names``.

        Raises:
            ArtefactError: no block at all, or one that the ancestor does not have.
        """
        want = transforms.expected_shapes(self.native, set(transforms.stored_positions(names)))
        return {name: shape for name, shape in want.items() if not name.startswith("tail.")}

    def reach(self, kept: Sequence[int]) -> Reach:
        """From the kept blocks to twice the ancestor's, and the widths that whole heads allow up to four times its."""
        step = self.native.head_dim
        return Reach(depths=(len(kept), 2 * self.native.depth), widths=(step, 4 * self.native.width, step))

    def plan(
        self, learngene: Learngene, *, depth: int | None, width: int | None, heads: int | tuple[int, ...] | None,
        num_labels: int | None, image_size: int | None, in_chans: int,
    ) -> ViTShape:  # fmt: skip
        """The plain ViT of these sizes."""
        return plan_plain(
            learngene, depth=depth, width=width, heads=heads, num_labels=num_labels, image_size=image_size,
            in_chans=in_chans,
        )  # fmt: skip

    def expand(self, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        """The kept blocks at the bottom, in the ancestor's order; None: all above, the last norm, the head.

        Raises:
            ShapeError: fewer blocks than are kept, or something other than depth, width, image size, input channels or
                classes differs.
        """
        if not isinstance(shape, ViTShape):
            raise ShapeError(f"a {type(shape).__name__} asked; this learngene is of a plain ViT, and grows those alone")
        require_same(self.native, shape, self.method.name)
        kept = transforms.stored_positions(learngene.tensors)
        if shape.depth < len(kept):
            raise ShapeError(
                f"depth {shape.depth} asked; this learngene is {len(kept)} blocks that stay together: {len(kept)} is "
                "the least that works, and net2net or lsamd reach smaller depths"
            )
        resize = transforms.Resize.of({}, self.native, shape, self.method.form)
        blocks = [resize.block(learngene.group(f"block.{place}"), place) for place in kept]
        state = assemble(shape, resize.stem(learngene.group("stem")), blocks, {})
        above = range(len(kept), shape.depth)
        fresh = [f"blocks.{place}.{key}" for place in above for key in transforms.BLOCK_KEYS]
        return state | dict.fromkeys([*fresh, *(f"{last_norm(shape)}.{kind}" for kind in ("weight", "bias"))])
