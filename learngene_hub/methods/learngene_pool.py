"""Learngene Pool: small models distilled from one ancestor, stitched where the maps of the distillation lead.

Learngene = the pool: two auxiliaries of n blocks each, narrow and wide (or three, one between), and n - 1 linear layers
for each pair of them. Its descendants are the auxiliaries alone and every route from the blocks of a narrow one into
those of a wider one (``_stitching.py``): 18 of them for n = 6, 27 for n = 9, of n to n + 2 blocks. They are of fixed
sizes and not trained further.

First stage, for each auxiliary S by itself, from random weights. At some positions p of its depth two linear maps take
the ancestor's tokens to its own: M_p those after a block, Q_p those that attention adds in it (before the residual).
    L = a CE(y) + (1 - a) (L_logit + sum_p MSE(F_p, M_p F^A_p) + sum_p MSE(A_p, Q_p A^A_p)),   a = ``first_labels``
where L_logit is the cross-entropy with the ancestor's softened prediction. The maps learn with the auxiliary. Positions
are the ends of thirds of the depth for the narrowest (blocks 1, 3, 5 of 6, and 3, 7, 11 of the ancestor's 12), and the
last block alone for the others. Second stage: each linear layer starts as the transpose of the mean M_p of its front
instance, and the pool is trained one route at a time, with labels CE + distil KL(ancestor || route), without mixing.

Source: Shi et al., "Building Variable-Sized Models via Learngene Pool", AAAI 2024, arXiv:2312.05743, its abstract and
its released code in two versions. Published: DeiT-B as the ancestor, auxiliaries of 6 or 9 blocks 192 and 768 wide (and
384, which no published pool uses), 100 and 50 epochs at batch 256. The sources disagree on the learning rate (5e-5 to
5e-4): here 2.5e-4 for the auxiliaries and 1e-4 for the pool. Our reading: soft losses are divided by the number of
images; the released code divides by the classes too, which leaves the ancestor's predictions next to nothing beside
the other terms (``reduction`` "published"). The ancestor sees the images at their own size, its positions resampled.

Numbers of routes are those of the published family of three: of two auxiliaries the second has number 2, and routes are
0, 2 and, for n = 6, 19 to 34.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learngene_hub._check import is_number, require_int
from learngene_hub.data import Images, seed_of
from learngene_hub.errors import SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._lesson import Log
from learngene_hub.methods._stitch_growth import GROUPS
from learngene_hub.methods._stitch_net import StitchNet, fresh, resized, transpose
from learngene_hub.methods._stitch_settings import Stitching
from learngene_hub.methods._stitch_training import Draws, Lesson, finish, make_lesson, run, start_stitches, train_pool
from learngene_hub.methods._stitching import one_way
from learngene_hub.shape import Preprocessing, ViTShape
from learngene_hub.teacher import Teacher
from learngene_hub.training import Recipe, StateDir, Step

Hidden = tuple[Tensor, list[Tensor], list[Tensor]]  # logits, tokens after blocks, tokens out of attention


@dataclass(frozen=True, kw_only=True)
class LearngenePool(Stitching):
    """The settings of Learngene Pool."""

    name: ClassVar[str] = "learngene-pool"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.05743"
    note: ClassVar[str] = "Descendants are of the fixed sizes of the pool's routes; other sizes are out of reach."
    groups: ClassVar[frozenset[str]] = GROUPS
    nearest: ClassVar[bool] = False
    unlabelled: ClassVar[str] = "labels=0 and first_labels=0"

    init: str = "transpose"
    label_smoothing: float = 0.1  # of the first stage
    depth: int = 0  # blocks of each auxiliary; 0: half of the ancestor's
    widths: tuple[int, ...] = ()  # of two or three auxiliaries, rising; none: a quarter and all of the ancestor's
    places: tuple[int, ...] = ()  # positions that each is distilled at, 1 to 3; none: 3 for the first, 1 for the others
    first_labels: float = 0.1  # share (a) of the labels in the first stage's loss; the rest is the ancestor's word

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("widths", "places"):
            numbers = getattr(self, name)
            if not isinstance(numbers, (list, tuple)):
                raise SettingsError(f"{name} {numbers!r:.60} asked; it is a list of numbers, such as [192, 768]")
            object.__setattr__(self, name, tuple(numbers))
            for number in numbers:
                require_int(name, number, at_least=1, error=SettingsError)
        require_int("depth", self.depth, at_least=0, error=SettingsError)
        if self.widths and not (2 <= len(self.widths) <= 3 and list(self.widths) == sorted(set(self.widths))):
            raise SettingsError(f"widths {list(self.widths)} asked; two or three that rise, such as [192, 768]")
        if self.places and (max(self.places) > 3 or len(self.places) != (len(self.widths) or 2)):
            raise SettingsError(f"places {list(self.places)} asked; a number from 1 to 3 for each auxiliary")
        if not (is_number(self.first_labels) and 0 <= self.first_labels < 1):
            raise SettingsError(f"first_labels {self.first_labels!r} asked; it is a share, at least 0 and below 1")

    @property
    def labelled(self) -> bool:
        """Whether the labels of the data count."""
        return self.labels > 0 or self.first_labels > 0

    def recipe(self, *, first: bool) -> Recipe:
        """As ``Stitching.recipe``; the second stage sees no mixed images and no smoothed labels."""
        recipe = super().recipe(first=first)
        if first:
            return recipe
        return replace(recipe, augment=replace(recipe.augment, mixup=0.0, cutmix=0.0), label_smoothing=0.0)

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
        state_dir: StateDir | None = None,
    ) -> Learngene:
        """The pool distilled from ``ancestor`` with all images of ``data``, of one size.

        The native shape is that of the widest auxiliary, at the size of the images. ``watch`` is called once for each
        auxiliary and once for the pool.

        Raises:
            SettingsError: no data, settings that the ancestor does not allow, or labels of other classes than its own.
            DataError: images of different sizes, of other channels than the ancestor's, or none.
            ShapeError: the ancestor is no plain ViT.
        """
        own = ViTShape.of(ancestor)
        shapes = self.instances(own)
        lesson = make_lesson(self, Teacher(ancestor), data, own, preprocessing, self.name)
        seen = resized(ancestor, lesson.size).requires_grad_(False)
        vits: dict[int, nn.Module] = {}
        maps, logs, flops = {}, [], 0
        for number, shape in shapes.items():
            shape = replace(shape, image_size=lesson.size)
            auxiliary = Auxiliary(self, shape, own, number, self._places(number, shapes))
            state = state_dir and replace(state_dir, path=state_dir.path / f"instance-{number}")
            recipe = self.recipe(first=True)
            logs.append(run(auxiliary, auxiliary.lesson(self, seen, recipe), recipe, lesson, watch, state))
            vits[number], maps[number] = auxiliary.vit, [layer.weight for layer in auxiliary.blocks]
            flops += logs[-1].images * shape.flops()
        asked = replace(own, image_size=lesson.size).flops() * sum(log.images for log in logs)
        return self._stitched(vits, maps, lesson, watch, state_dir, logs, (flops, asked), facts)

    def _stitched(
        self,
        vits: Mapping[int, nn.Module],
        maps: Mapping[int, Sequence[Tensor]],
        lesson: Lesson,
        watch: Callable[[Iterator[Step]], Iterator[Step]],
        state_dir: StateDir | None,
        logs: Sequence[Log],
        flops: tuple[int, int],
        facts: Mapping[str, Any],
    ) -> Learngene:
        """The second stage."""
        shapes = {number: ViTShape.of(vit) for number, vit in vits.items()}
        routes = one_way({number: shape.depth for number, shape in shapes.items()}, nearest=self.nearest)
        net = StitchNet(vits, routes, seed=seed_of("stitches", self.seed))
        if self.init == "transpose":
            transpose(net, maps)
        elif self.init == "least-squares":
            start_stitches(self, net, lesson)
        draws = Draws.of(self, routes, shapes)
        state = state_dir and replace(state_dir, path=state_dir.path / "pool")
        log = train_pool(self, net, draws, lesson, watch, state)
        return finish(self, self.name, net, draws, lesson, {"first": logs, "pool": [log]}, flops, facts)

    def instances(self, own: ViTShape) -> dict[int, ViTShape]:
        """The shape of each auxiliary, by its number, for an ancestor of shape ``own``.

        Raises:
            SettingsError: sizes that such an ancestor has no auxiliaries of.
        """
        if not own.classes:
            raise SettingsError(f"an ancestor without a classifier given; {self.name} learns from its logits")
        depth = self.depth or own.depth // 2
        widths = self.widths or tuple(heads * own.head_dim for heads in sorted({max(1, own.heads // 4), own.heads}))
        if len(widths) < 2:
            raise SettingsError(
                f"an ancestor of one head given; widths, such as [{own.width}, {2 * own.width}], would work"
            )
        if depth < 2:
            raise SettingsError(f"{depth} blocks asked for each auxiliary; 2 is the least that can be stitched")
        for width in widths:
            if width % own.head_dim:
                raise SettingsError(
                    f"width {width} asked; the ancestor's heads are {own.head_dim} wide: a multiple works"
                )
        numbers = (0, 2) if len(widths) == 2 else (0, 1, 2)
        found = {
            n: replace(own, depth=depth, width=w, heads=w // own.head_dim) for n, w in zip(numbers, widths, strict=True)
        }
        for number in found:
            if self._places(number, found) > min(depth, own.depth):
                raise SettingsError(
                    f"{self._places(number, found)} places asked; {min(depth, own.depth)} blocks have fewer"
                )
        return found

    def _places(self, number: int, shapes: Mapping[int, ViTShape]) -> int:
        """How many positions an auxiliary is distilled at."""
        if self.places:
            return self.places[list(shapes).index(number)]
        return 1 if number else min(3, shapes[number].depth)


class Auxiliary(nn.Module):
    """A small ViT, and the linear maps from the ancestor's tokens to its own, which learn with it."""

    def __init__(self, settings: LearngenePool, shape: ViTShape, own: ViTShape, number: int, places: int) -> None:
        super().__init__()
        seed = seed_of("instance", settings.seed, number)
        self.vit: Any = fresh(shape, seed, drop_path=settings.drop_path)
        self.at, self.ancestors = positions(shape.depth, places), positions(own.depth, places)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("maps", settings.seed, number))
            self.blocks, self.attentions = (
                nn.ModuleList(nn.Linear(own.width, shape.width) for _ in range(places)) for _ in range(2)
            )

    def forward(self, x: Tensor) -> Hidden:
        return hidden(self.vit, x, self.at)

    def lesson(self, settings: LearngenePool, ancestor: Any, recipe: Recipe) -> Callable[[Any, Any], Tensor]:
        """The loss of the first stage, over batches of images (B, C, S, S) and labels (B,) or targets (B, classes)."""

        def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            with torch.no_grad():
                told, told_blocks, told_attentions = hidden(ancestor.to(x.device), x, self.ancestors)
            logits, blocks, attentions = model(x)
            total = soft_cross_entropy(logits, told, settings.temperature, settings.reduction)
            for layers, ours, theirs in (
                (self.blocks, blocks, told_blocks),
                (self.attentions, attentions, told_attentions),
            ):
                for layer, own, told_tokens in zip(layers, ours, theirs, strict=True):
                    total = total + nn.functional.mse_loss(own, layer(told_tokens))
            total = (1 - settings.first_labels) * total
            if settings.first_labels:
                truth = nn.functional.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
                total = total + settings.first_labels * truth
            return total

        return loss


def positions(depth: int, count: int) -> list[int]:
    """The last blocks of ``count`` equal parts of the depth, halves rounded up: 1, 3, 5 of 6 and 3, 7, 11 of 12."""
    return [max(0, (2 * depth * part + count) // (2 * count) - 1) for part in range(1, count + 1)]


def hidden(vit: Any, x: Tensor, at: Sequence[int]) -> Hidden:
    """(logits, tokens after the blocks ``at``, what attention adds in them), each of the tokens (B, N, D)."""
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, given: Any, made: Tensor) -> None:
            kept[key] = made

        return hook

    hooks = [vit.blocks[i].register_forward_hook(keep(("block", i))) for i in set(at)]
    hooks += [vit.blocks[i].attn.register_forward_hook(keep(("attention", i))) for i in set(at)]
    try:
        logits = vit(x)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, [kept["block", i] for i in at], [kept["attention", i] for i in at]


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    """Cross-entropy (B, C) with the teacher's softened prediction: the mean over images, and "published" classes."""
    wanted = (teacher.float() / temperature).softmax(-1)
    each = -(wanted * (logits.float() / temperature).log_softmax(-1))
    return each.mean() if reduction == "published" else each.sum(-1).mean()
