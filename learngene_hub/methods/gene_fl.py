"""GENE-FL: the few layers that local losses hang on most, condensed at clients that cannot share data, and averaged.

Learngene = q whole layers (blocks of a plain ViT, convolutions of a VGG) and the number of sensitivity xi of every
layer. In a federated run (``learngene federate``, ``learngene_hub.federated``) clients train, tell their xi, and send
only the layers that the server chose by it; this file says what comes out of one and how networks grow from it.
``extract`` condenses without a federation: the ancestor is one client's model, each data set of ``data`` one client,
and nothing is trained.

A descendant of the native depth has the layers at their own places and a random rest: stem, other layers, last norm and
head were private and are not in the file. At another depth block j stands at p = j (L-1) / (L'-1) and is the kept block
nearest to p ("nearest"); below the number of kept blocks the best of them are stacked in order. With ``fill="fresh"``
the kept blocks stand at their relative places and the rest is random. Other depths are our addition, and so are other
widths, by the shared width transform, of which the random stem needs nothing. A VGG grows at its native stages alone.

Source: Guo, Lv, Geng, GENE-FL, arXiv:2504.14628, of which only abstract and digests could be read, and the reviews of
its predecessor DFL2G (ICLR 2025 submission 3l9NRfezlo).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import require_int
from learngene_hub._conv import ConvShape
from learngene_hub.data import Images, normalise
from learngene_hub.errors import ArtefactError, DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _gene_fl_layers as layers
from learngene_hub.methods._gene_fl_sensitivity import CRITERIA, condensed, ranked, sensitivities
from learngene_hub.methods._plain_plan import plan_plain
from learngene_hub.methods._whole import require_choice, require_same
from learngene_hub.shape import Preprocessing, Reach, Shape, ViTShape, shape_of
from learngene_hub.training import Step

SCORE, BASIS, SPREAD = "score.sensitivity", "subspace.basis", "subspace.spread"


@dataclass(frozen=True, kw_only=True)
class GeneFl:
    """The settings of gene-fl outside a federation: which layers, and growth."""

    name: ClassVar[str] = "gene-fl"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.14628"
    note: ClassVar[str] = (
        "Only the paper's abstract and digests of it could be read: the sensitivity's formula, the choice of layers "
        "and the rule for other sizes are this project's reading."
    )
    groups: ClassVar[frozenset[str]] = frozenset({"block", "conv", "score", "subspace"})
    growth: ClassVar[frozenset[str]] = frozenset({"fill", "form"})

    blocks: int = 0  # layers kept; 0: as many as a quarter of the ancestor's parameters holds
    criterion: str = "sensitive"  # the layers kept: those that the loss hangs on most, or "stable": least
    images: int = 64  # of each data set, that the sensitivity is measured on
    seed: int = 0  # of the draw of these images
    # Growth.
    fill: str = "nearest"  # other depths: every block the nearest kept one; or "fresh": the rest random
    form: str = "copy"  # of a ViT: the width transform's form; the method itself does not vary width

    def __post_init__(self) -> None:
        require_choice("criterion", self.criterion, CRITERIA)
        require_choice("fill", self.fill, ("nearest", "fresh"))
        require_choice("form", self.form, transforms.FORMS)
        for name, least in (("blocks", 0), ("images", 1), ("seed", 0)):
            require_int(name, getattr(self, name), at_least=least, error=SettingsError)

    def require_ancestor(self, ancestor: nn.Module) -> None:
        """Nothing, where the ancestor has layers to keep.

        Raises:
            ShapeError: it is neither a plain ViT nor a VGG with batch norm, or has too few layers.
        """
        native = shape_of(ancestor)
        layers.require_layered(native)
        count = len(layers.layer_entries(native))
        if self.blocks > count:
            raise ShapeError(f"blocks {self.blocks} asked; the ancestor has {count} layers: {count} would work")

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
    ) -> Learngene:
        """The learngene of ``ancestor``, condensed by ``data``; each data set's xi counts by its number of images.

        Nothing is trained, so ``watch`` is never called. For a learngene of clients that train, run a federation.

        Raises:
            ShapeError: the ancestor has no layers, or fewer than asked.
            DataError: no images, of another size than the ancestor takes, or labels that it has no output for.
        """
        began = time.perf_counter()
        self.require_ancestor(ancestor)
        native = shape_of(ancestor)
        xi = self._sensitivity(ancestor, native, data, preprocessing)
        count = self.blocks or layers.quarter(native)
        tensors = condense(ancestor.state_dict(), native, xi, count, self.criterion)
        provenance = {
            "data": {name: {"images": len(images)} for name, images in data.items()},
            "steps": 0, "images_seen": 0, "flops": 0, "seconds": round(time.perf_counter() - began, 3),
        }  # fmt: skip
        return assemble_learngene(
            tensors, native, asdict(self), facts=facts, preprocessing=preprocessing, provenance=provenance
        )

    def _sensitivity(
        self, ancestor: nn.Module, native: Any, data: Mapping[str, Images], preprocessing: Preprocessing
    ) -> Tensor:
        """xi (L,) over all data sets."""
        if not data:
            raise DataError("no images given; gene-fl condenses by the sensitivity on some: data={'mine': images}")
        entries, total, seen = layers.layer_entries(native), torch.zeros(()), 0
        place = next(ancestor.parameters()).device
        for number, images in enumerate(data.values()):
            side = images.pixels.shape[-1]
            if isinstance(native, ViTShape) and side != native.image_size:
                raise DataError(f"{images.name} has {side} px; the ancestor takes {native.image_size}")
            generator = torch.Generator().manual_seed(self.seed + number)
            chosen = images.subset(torch.randperm(len(images), generator=generator)[: self.images])
            pixels = normalise(chosen.pixels.to(place), preprocessing)
            xi = sensitivities(ancestor, entries, pixels, chosen.labels.to(place))
            total, seen = total + len(images) * xi, seen + len(images)
        return total / seen

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
        """The ViT of these sizes; or the native VGG, of which only images and classes vary.

        Raises:
            ShapeError: a size out of reach.
        """
        native = learngene.shape
        if isinstance(native, ViTShape):
            return plan_plain(
                learngene, depth=depth, width=width, heads=heads, num_labels=num_labels, image_size=image_size,
                in_chans=in_chans,
            )  # fmt: skip
        if heads is not None:
            raise ShapeError(f"heads {heads} asked; a descendant of this learngene is a VGG, which has none")
        learngene.reach.require(depth or native.depth, width or native.width)
        classes = native.classes if num_labels is None else num_labels
        return replace(native, classes=classes, image_size=image_size or native.image_size, in_chans=in_chans)

    def expand(self, learngene: Learngene, shape: Shape) -> dict[str, Tensor | None]:
        """Every entry of the state dict of ``shape``; None: all that is not the learngene.

        Raises:
            ShapeError: a network of another kind, or one that the learngene does not fit.
        """
        native = learngene.shape
        if type(shape) is not type(native):
            raise ShapeError(f"{shape} of kind {shape.kind} asked; this learngene is of kind {native.kind}")
        state: dict[str, Tensor | None] = dict.fromkeys(sorted(shape.keys()))
        kept = layers.kept_layers(learngene.tensors, layers.group_of(native))
        if isinstance(native, ViTShape) and isinstance(shape, ViTShape):
            require_same(native, shape, self.name)
            resize = transforms.Resize.of({}, native, shape, self.form)
            for place, number in enumerate(self.positions(kept, native.depth, shape.depth, learngene.tensors[SCORE])):
                if number is not None:
                    block = resize.block(learngene.group(f"block.{number}"), number)
                    state |= {f"blocks.{place}.{key}": tensor for key, tensor in block.items()}
            return state
        assert isinstance(native, ConvShape)  # the only other kind there is
        if not isinstance(shape, ConvShape) or (shape.family, shape.stages) != (native.family, native.stages):
            raise ShapeError(f"{shape} asked; this learngene grows {native} alone")
        entries = layers.layer_entries(native)
        found = {name: learngene.tensors[f"conv.{i}.{rest}"] for i in kept for rest, name in entries[i].items()}
        if 0 in kept and shape.in_chans != native.in_chans:
            first = entries[0]["weight"]
            found[first] = transforms.adapt_channels(found[first], shape.in_chans)
        return state | found

    def positions(self, kept: Sequence[int], native: int, depth: int, xi: Tensor) -> tuple[int | None, ...]:
        """The kept block that stands at each place of a descendant; None: a random one."""
        if depth == native:
            return tuple(i if i in kept else None for i in range(depth))
        scores = xi.detach().tolist()
        best = [i for i in ranked(scores, self.criterion) if i in kept]
        if depth <= len(kept):
            return tuple(sorted(best[:depth]))
        if self.fill == "nearest":
            return transforms.nearest_positions(tuple(kept), native, depth)
        places = dict(zip(transforms.relative_positions(tuple(kept), native, depth), kept, strict=True))
        return tuple(places.get(place) for place in range(depth))

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: Any) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        try:
            layers.require_layered(native)
        except ShapeError as error:
            raise ArtefactError(f"a native shape of kind {native.kind}: {error}") from error
        want = layers.layer_sizes(native, layers.kept_layers(shapes, layers.group_of(native)))
        want[SCORE] = (len(layers.layer_entries(native)),)
        if any(name.startswith("subspace.") for name in shapes):
            size = tuple(shapes.get(BASIS, ()))
            want[BASIS] = size if len(size) == 2 and 1 <= size[1] <= size[0] else (1, 1)
            want[SPREAD] = want[BASIS][1:]
        if missing := sorted(want.keys() - shapes.keys()):
            raise ArtefactError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
        if unknown := sorted(shapes.keys() - want.keys()):
            raise ArtefactError(f"{len(unknown)} unknown tensors, the first is {unknown[0]}")
        for name, size in want.items():
            if tuple(shapes[name]) != tuple(size):
                raise ArtefactError(f"tensor {name} is {list(shapes[name])}; the native shape has {list(size)}")


def condense(state: Mapping[str, Tensor], native: Any, xi: Tensor, count: int, criterion: str) -> dict[str, Tensor]:
    """The tensors of a learngene of the ``count`` best layers of ``state``, float32 copies on the CPU."""
    entries, group = layers.layer_entries(native), layers.group_of(native)
    kept = condensed(xi.tolist(), count, criterion)
    tensors = {
        f"{group}.{i}.{rest}": state[name].detach().cpu().float().clone()
        for i in kept
        for rest, name in entries[i].items()
    }
    return tensors | {SCORE: xi.float()}


def assemble_learngene(
    tensors: Mapping[str, Tensor],
    native: Any,
    settings: Mapping[str, Any],
    *,
    facts: Mapping[str, Any],
    preprocessing: Preprocessing,
    provenance: Mapping[str, Any],
) -> Learngene:
    """A learngene of gene-fl: depth 1 to twice the native one, every width that the width transform reaches; of a VGG
    the native one."""
    if isinstance(native, ViTShape):
        step = native.head_dim
        reach = Reach(depths=(1, 2 * native.depth), widths=(step, 4 * native.width, step))
    else:
        reach = Reach(depths=(native.depth, native.depth), widths=(native.width, native.width, 1))
    return Learngene(
        tensors={name: tensor.contiguous() for name, tensor in tensors.items()}, method=GeneFl.name,
        settings=dict(settings), shape=native, reach=reach, ancestor=dict(facts), preprocessing=preprocessing,
        license=str(facts.get("license", "")), provenance=dict(provenance),
    )  # fmt: skip
