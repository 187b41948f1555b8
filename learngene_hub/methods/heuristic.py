"""Heuristic (vanilla) learngene: the last layers of the ancestor, whose gradients are calm, behind random new ones.

Learngene = ``last_k`` layers in a row: of a ViT blocks, with the last norm; of a CNN (timm's ``vgg*_bn`` and ResNets
of basic blocks) convolutions with their BatchNorms, running statistics too. A descendant has them at its end, as they
were, and random layers before them; nothing is frozen.

Which layers: the last three, as published ("last"). The paper saw on curves of rho, the share of a layer's weight
gradients above a threshold, that deep layers settle while tasks accumulate. With ``tasks`` above 0 a copy of the
ancestor learns so many small tasks of the data's classes, the curves are measured and stored in the provenance
(``benchmarks/calmness_plot.py`` draws them), and "calmest" chooses by them; see ``_heuristic_calm.py`` and
``_heuristic_tasks.py``. That a given ancestor gets tasks of this kind, and the score, are our reading. The paper's own
ancestor, a VGG that is widened from task to task, is grown by ``grow_collective``.

A ViT descendant of depth d: random stem and d - k random blocks, the gene, the last norm, a random head (our reading of
a method that was published for CNNs; later papers keep the ancestor's stem: ``stem="inherit"``). Other widths come from
the shared width transform and are our addition. A CNN descendant: a random front of stages of ``front`` channels, the
gene, and a head of two hidden layers of ``head_hidden`` units (of a VGG; see ``_conv.py`` and ``_heuristic_cut.py``).

While a descendant is trained, its inherited layers may be held near their first values by a quadratic term
(``anchored_loss`` with what ``anchor`` gives; the Fisher information is stored where ``fisher`` images were asked for).
It is off by default: in the released code it is always zero.

Source: Wang, Geng, Lin, Xia, Qi, Xu, "Learngene: From Open-World to Your Learning Task", AAAI 2022, arXiv:2106.06788,
its appendix and its released code; the paper's own text could not be read. Published: VGG16's last three convolutions
of 512 channels, 7,082,496 parameters; an individual of 11.79 million for 5 classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import is_number, require_int
from learngene_hub._conv import ConvShape
from learngene_hub.data import Augment, Images, normalise
from learngene_hub.errors import ArtefactError, DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _heuristic_cut as cut
from learngene_hub.methods import _heuristic_parts as parts
from learngene_hub.methods._heuristic_anchor import anchored_loss as anchored_loss
from learngene_hub.methods._heuristic_anchor import diagonal_fisher
from learngene_hub.methods._heuristic_calm import Meter, calmest, scores
from learngene_hub.methods._heuristic_copy import copy_at, unit_weights
from learngene_hub.methods._heuristic_tasks import Stream, Tasks, learn, together
from learngene_hub.methods._heuristic_tasks import grow_collective as grow_collective
from learngene_hub.methods._plain_plan import plan_plain
from learngene_hub.methods._whole import last_norm, parts_of, require_choice, require_same
from learngene_hub.shape import Preprocessing, Reach, Shape, ViTShape, shape_of
from learngene_hub.training import Recipe, Step

Watch = Callable[[Iterator[Step]], Iterator[Step]]
KINDS = ("vit", "conv")


@dataclass(frozen=True, kw_only=True)
class Heuristic:
    """The settings of heuristic learngene: which layers, the tasks that show it, and growth."""

    name: ClassVar[str] = "heuristic"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.06788"
    note: ClassVar[str] = (
        "ViTs, ResNets, and widths other than the ancestor's are this project's reading; the paper has VGGs."
    )
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "block", "conv", "tail", "fisher"})
    growth: ClassVar[frozenset[str]] = frozenset({"stem", "form", "front", "head_hidden"})

    last_k: int = 3  # layers kept: blocks of a ViT, convolutions of a CNN
    choice: str = "last"  # the last ones, as published; or "calmest": those of the best score of rho, in a row
    fisher: int = 0  # images that the Fisher information of the kept layers is estimated from; 0: none is stored
    # The tasks whose gradients are measured, each trained for ``epochs``.
    tasks: int = 0  # 0: nothing is measured or trained, and the settings "with tasks" do nothing
    classes_per_task: int = 5  # with tasks: drawn from those of the data
    epochs: int = 1  # with tasks: passes over the images of each
    batch_size: int = 64  # with tasks: images per update
    lr: float = 1e-3  # with tasks: learning rate, constant
    weight_decay: float = 5e-4  # with tasks: of tensors of two and more dimensions
    sigma: float = 0.0  # with tasks: threshold of |gradient|; 0: the quantile of the first updates' gradients
    quantile: float = 0.9  # with tasks: of |gradient|, for sigma 0
    flip: bool = True  # with tasks: mirror images at random
    crop_padding: int = 4  # with tasks: pixels by which a random crop moves
    seed: int = 0  # of every random draw
    # Growth.
    stem: str = "fresh"  # of a ViT: random; or "inherit": the ancestor's, which is then stored too
    form: str = "copy"  # of a ViT: the width transform's form; the method itself varies depth alone
    front: tuple[int, ...] = (64, 128, 256)  # of a CNN: channels of the stages before the gene
    head_hidden: int = 1024  # of a VGG: units of the head's two hidden layers; 0: none

    def __post_init__(self) -> None:
        require_choice("choice", self.choice, ("last", "calmest"))
        require_choice("stem", self.stem, ("fresh", "inherit"))
        require_choice("form", self.form, transforms.FORMS)
        for name, least in (("last_k", 1), ("tasks", 0), ("fisher", 0), ("classes_per_task", 2), ("head_hidden", 0)):
            require_int(name, getattr(self, name), at_least=least, error=SettingsError)
        if not (is_number(self.sigma) and self.sigma >= 0):
            raise SettingsError(f"sigma {self.sigma!r} asked; it is a threshold above 0, or 0 for the quantile")
        if not (is_number(self.quantile) and 0 < self.quantile < 1):
            raise SettingsError(f"quantile {self.quantile!r} asked; it is above 0 and below 1")
        if self.choice == "calmest" and not self.tasks:
            raise SettingsError("choice 'calmest' asked with tasks 0, which measures nothing: tasks=8 would work")
        if not isinstance(self.front, (list, tuple)):
            raise SettingsError(f"front {self.front!r:.60} asked; it is a list of channels, such as [64, 128, 256]")
        object.__setattr__(self, "front", tuple(self.front))
        for channels in self.front:
            require_int("channels of the front", channels, at_least=1, error=SettingsError)
        self.recipe()

    def recipe(self) -> Recipe:
        """The recipe of one task.

        Raises:
            SettingsError: a setting is out of its range.
        """
        augment = Augment(flip=self.flip, crop_padding=self.crop_padding)
        return Recipe(
            epochs=self.epochs, lr=self.lr, batch_size=self.batch_size, weight_decay=self.weight_decay,
            schedule="constant", augment=augment, seed=self.seed,
        )  # fmt: skip

    def require_ancestor(self, ancestor: nn.Module) -> None:
        """Nothing, where this method can begin with this ancestor.

        Raises:
            ShapeError: it is neither a plain ViT nor a CNN of a ConvShape, or has too few layers.
        """
        self._native(ancestor)

    def _native(self, ancestor: nn.Module) -> Any:
        native = shape_of(ancestor)
        if native.kind not in KINDS:
            raise ShapeError(f"a {type(ancestor).__name__} given; {self.name} needs a plain ViT, a vgg*_bn or a ResNet")
        most = native.depth if isinstance(native, ViTShape) else len(parts.names(native)) - 1
        if self.last_k > most:
            raise ShapeError(f"last_k {self.last_k} asked of {native}; at most {most} would work")
        return native

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Watch = iter,
    ) -> Learngene:
        """The learngene of ``ancestor``: a plain ViT, a ``vgg*_bn`` or a ResNet of basic blocks.

        ``data`` is looked at where ``tasks`` or ``fisher`` ask for it: images of one size, and for the tasks with
        labels. ``watch`` is called once for each task.

        Raises:
            ShapeError: the ancestor is another model, or has fewer layers than ``last_k``.
            SettingsError: fewer classes than a task has, or a Fisher information of an ancestor without classifier.
            DataError: no images, of different sizes, or of a size or channels that the ancestor does not take.
        """
        began = time.perf_counter()
        native = self._native(ancestor)
        images = together(data) if self.tasks or self.fisher else None
        if images is not None:
            self._require_images(native, images)
        stream = self._measured(ancestor, native, images, preprocessing, watch) if images and self.tasks else None
        report = parts.report(data if images else {}, stream, began)
        return self._cut(ancestor, native, stream, images, facts, preprocessing, report)

    def extract_collective(
        self, stream: Stream, data: Mapping[str, Images], *, facts: Mapping[str, Any], preprocessing: Preprocessing
    ) -> Learngene:
        """The learngene of a collective model that ``grow_collective`` has grown on ``data``, with the curves that were
        measured on the way. ``tasks`` stands for those that it has learned; nothing more is trained.

        Raises:
            ShapeError, SettingsError, DataError: as ``extract``.
        """
        native = self._native(stream.model)
        images = together(data) if self.fisher else None
        if images is not None:
            replace(self, tasks=0, choice="last")._require_images(native, images)
        report = parts.report(data, stream, time.perf_counter() - stream.seconds)
        return self._cut(stream.model, native, stream, images, facts, preprocessing, report)

    def _cut(
        self,
        ancestor: nn.Module,
        native: Any,
        stream: Stream | None,
        images: Images | None,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        report: Mapping[str, Any],
    ) -> Learngene:
        """The kept layers, and what is told of them."""
        kept = self._kept(native, stream)
        tensors = self._tensors(ancestor, native, kept)
        if images is not None and self.fisher:
            tensors |= self._fisher(ancestor, native, kept, images, preprocessing)
        settings = asdict(self) | {"front": list(self.front)}
        return Learngene(
            tensors={name: tensor.contiguous() for name, tensor in tensors.items()}, method=self.name,
            settings=settings, shape=native, reach=self._reach(native, kept), ancestor=dict(facts),
            preprocessing=preprocessing, license=str(facts.get("license", "")),
            provenance={**report, "kept": [parts.names(native)[i] for i in kept]},
        )  # fmt: skip

    def _require_images(self, native: Any, images: Images) -> None:
        """Refuse, before anything is trained, images that the ancestor or the settings cannot use."""
        channels, side = images.pixels.shape[1], images.pixels.shape[-1]
        if channels != native.in_chans:
            raise DataError(f"{images.name} has {channels} channels; the ancestor takes {native.in_chans}")
        if self.fisher and isinstance(native, ViTShape) and side != native.image_size:
            raise DataError(
                f"{images.name} has {side} px; a Fisher information needs the ancestor's {native.image_size}"
            )
        if self.fisher and native.classes < 2:
            raise SettingsError("fisher asked of an ancestor without classifier; fisher=0 would work")
        replace(native, image_size=side)  # ShapeError, where there is no such network
        if self.tasks:
            Tasks(count=1, classes=self.classes_per_task, recipe=self.recipe()).draw(images)

    def _measured(
        self, ancestor: nn.Module, native: Any, images: Images, preprocessing: Preprocessing, watch: Watch
    ) -> Stream:
        """The curves of a copy of the ancestor that learns the tasks; the ancestor is left alone."""
        shape = replace(native, image_size=images.pixels.shape[-1], classes=len(images.classes))
        meter = Meter(seed=self.seed, sigma=self.sigma, quantile=self.quantile)
        return learn(
            copy_at(ancestor, native, shape, seed=self.seed), images,
            Tasks(count=self.tasks, classes=self.classes_per_task, recipe=self.recipe()),
            lambda model: unit_weights(model, native), meter, parts.names(native), preprocessing=preprocessing,
            watch=watch, flops=lambda model: shape.flops(),
        )  # fmt: skip

    def _kept(self, native: Any, stream: Stream | None) -> range:
        """The numbers of the layers that are kept."""
        count = len(parts.names(native))
        if self.choice == "last" or stream is None:
            return range(count - self.last_k, count)
        first = 0 if isinstance(native, ViTShape) else 1  # a CNN's first convolution reads the image
        return calmest(scores(stream.curve.tasks()), self.last_k, first=first)

    def _tensors(self, ancestor: nn.Module, native: Any, kept: Sequence[int]) -> dict[str, Tensor]:
        """The kept layers, in a learngene's names: float32 copies on the CPU."""
        if isinstance(native, ViTShape):
            want = set(parts.expected(native, kept, stem=self.stem == "inherit", fisher=False))
            return {name: tensor for name, tensor in parts_of(ancestor, native).items() if name in want}
        state = ancestor.state_dict()
        names = {name: theirs for name, (theirs, _) in cut.stored(native, kept).items()}
        return {name: state[theirs].detach().cpu().float().clone() for name, theirs in names.items()}

    def _fisher(
        self, ancestor: nn.Module, native: Any, kept: Sequence[int], images: Images, preprocessing: Preprocessing
    ) -> dict[str, Tensor]:
        """The Fisher information of the kept layers at the ancestor's weights, of its own predictions."""
        shape = replace(native, image_size=images.pixels.shape[-1])
        model = copy_at(ancestor, native, shape, seed=self.seed, head=True)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = images.subset(torch.randperm(len(images), generator=generator)[: self.fisher])
        names = parts.anchored(native, kept)
        batches = [(normalise(chosen.pixels, preprocessing), chosen.labels)]
        found = diagonal_fisher(model, list(names.values()), batches, generator=generator)
        return {f"fisher.{name}": found[theirs] for name, theirs in names.items()}

    def _reach(self, native: Any, kept: Sequence[int]) -> Reach:
        if isinstance(native, ViTShape):
            step = native.head_dim
            return Reach(depths=(self.last_k, 2 * native.depth), widths=(step, 4 * native.width, step))
        least, width = cut.least_depth(native, kept), cut.units(native)[kept[-1]].conv.outputs
        whole = native.family == "resnet" and len(cut.gene_stages(native, kept)) == 4  # no stage is free
        return Reach(depths=(least, least if whole else max(least, 2 * native.depth)), widths=(width, width, 1))

    def plan(
        self,
        learngene: Learngene,
        *,
        depth: int | None,
        width: int | None,
        heads: int | tuple[int, ...] | None,
        num_labels: int | None,
        image_size: int | None,
        in_chans: int,
    ) -> Shape:
        """The descendant of these sizes; a CNN's depth counts convolutions (VGG) or residual blocks (ResNet).

        Raises:
            ShapeError: there is none; the message names what there is.
        """
        native = learngene.shape
        if isinstance(native, ViTShape):
            return plan_plain(
                learngene, depth=depth, width=width, heads=heads, num_labels=num_labels, image_size=image_size,
                in_chans=in_chans,
            )  # fmt: skip
        if heads is not None:
            raise ShapeError(f"heads {heads} asked; this learngene grows CNNs, which have none")
        only = learngene.reach.widths[0]
        if width is not None and width != only:
            raise ShapeError(
                f"width {width} asked; a descendant of this learngene ends with the gene's {only} channels: "
                "settings={'front': [..]} sets those before it"
            )
        if depth is not None and depth > learngene.reach.depths[1]:  # before so many layers are listed
            least = f"of an ancestor of {-(-depth // 2)} or more layers"
            who = "that keeps fewer (last_k)" if depth <= 2 * native.depth else least
            try:
                learngene.reach.require(depth, only)
            except ShapeError as error:
                raise ShapeError(f"{error}, and a learngene of heuristic {who} can grow depth {depth}") from None
        shape = cut.plan_conv(
            native, parts.numbers(learngene.tensors, "conv"), depth=depth, front=self.front,
            head_hidden=self.head_hidden, num_labels=num_labels, image_size=image_size, in_chans=in_chans,
        )  # fmt: skip
        learngene.reach.check(shape)
        return shape

    def expand(self, learngene: Learngene, shape: Shape) -> dict[str, Tensor | None]:
        """Every entry of the state dict of ``shape``; None: all that is not the gene.

        Raises:
            ShapeError: a network of another kind, or one that the gene does not fit.
            SettingsError: ``stem`` "inherit" of a learngene without a stem.
        """
        native = learngene.shape
        if type(shape) is not type(native):
            raise ShapeError(f"{shape} of kind {shape.kind} asked; this learngene is of kind {native.kind}")
        state: dict[str, Tensor | None] = dict.fromkeys(sorted(shape.keys()))
        if isinstance(native, ViTShape) and isinstance(shape, ViTShape):
            return state | self._vit(learngene, native, shape)
        assert isinstance(native, ConvShape) and isinstance(shape, ConvShape)  # the only other kind there is
        names = cut.placed(native, parts.numbers(learngene.tensors, "conv"), shape)
        return state | {theirs: learngene.tensors[name] for name, theirs in names.items()}

    def _vit(self, learngene: Learngene, native: ViTShape, shape: ViTShape) -> dict[str, Tensor | None]:
        """What a ViT inherits, at its width."""
        require_same(native, shape, self.name)
        kept = parts.numbers(learngene.tensors, "block")
        if shape.depth < len(kept):
            raise ShapeError(f"depth {shape.depth} asked; the gene alone has {len(kept)} blocks")
        resize = transforms.Resize.of({}, native, shape, self.form)
        state: dict[str, Tensor | None] = {}
        if self.stem == "inherit":
            state |= self._stem(learngene, resize, shape)
        for place, number in enumerate(kept, shape.depth - len(kept)):
            block = resize.block(learngene.group(f"block.{number}"), number)
            state |= {f"blocks.{place}.{key}": tensor for key, tensor in block.items()}
        norm = resize.norm({kind: learngene.tensors[f"tail.norm.{kind}"] for kind in ("weight", "bias")})
        return state | {f"{last_norm(shape)}.{kind}": tensor for kind, tensor in norm.items()}

    def _stem(self, learngene: Learngene, resize: transforms.Resize, shape: ViTShape) -> dict[str, Tensor]:
        if "stem.pos_embed" not in learngene.tensors:
            raise SettingsError("stem 'inherit' asked; this learngene was extracted without one: 'fresh' would work")
        stem = resize.stem(learngene.group("stem"))
        side = shape.image_size // shape.patch
        return stem | {
            "patch_embed.proj.weight": transforms.adapt_channels(stem["patch_embed.proj.weight"], shape.in_chans),
            "pos_embed": transforms.resample_positions(stem["pos_embed"], side, int(shape.class_token)),
        }

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: Any) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        if native.kind not in KINDS:
            raise ArtefactError(f"a native shape of kind {native.kind}; there are {', '.join(KINDS)}")
        kept = parts.numbers(shapes, "block" if native.kind == "vit" else "conv")
        if not kept or list(kept) != list(range(kept[0], kept[0] + len(kept))):
            raise ArtefactError(f"layers {list(kept)}; they are some of the ancestor's in a row")
        has = {group: any(name.startswith(f"{group}.") for name in shapes) for group in ("stem", "fisher")}
        want = parts.expected(native, kept, stem=has["stem"] and native.kind == "vit", fisher=has["fisher"])
        if missing := sorted(want.keys() - shapes.keys()):
            raise ArtefactError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
        if unknown := sorted(shapes.keys() - want.keys()):
            raise ArtefactError(f"{len(unknown)} unknown tensors, the first is {unknown[0]}")
        for name, size in want.items():
            if tuple(shapes[name]) != tuple(size):
                raise ArtefactError(
                    f"tensor {name} is {list(shapes[name])}; the native shape {native} has {list(size)}"
                )


def anchor(learngene: Learngene, shape: Shape) -> dict[str, Tensor]:
    """The stored Fisher information by the names of a descendant of ``shape``, for ``anchored_loss``.

    Raises:
        SettingsError: the learngene has none, or the descendant is a ViT of another width.
        ShapeError: ``shape`` is no descendant of it.
    """
    native = learngene.shape
    stored = learngene.group("fisher")
    if not stored:
        raise SettingsError("this learngene has no Fisher information; extract it with fisher=64, say")
    if native.kind == "vit" and shape.width != native.width:
        raise SettingsError(f"width {shape.width} asked; the Fisher information is of width {native.width}")
    kept = parts.numbers(learngene.tensors, "block" if native.kind == "vit" else "conv")
    return {theirs: stored[name].float() for name, theirs in parts.anchored(native, kept, shape).items()}
