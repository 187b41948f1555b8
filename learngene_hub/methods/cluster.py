"""Cluster-Learngene: one head for each cluster of alike heads, one FFN for each group of alike layers; any head count.

Nothing of the ancestor is trained. In each layer the heads are clustered by their mean attention distance on real
images (``_cluster_attention.py``): DBSCAN with ``min_samples`` 1, which on numbers is a cut wherever the gap exceeds
``eps``. Of each cluster the head nearest to its mean stays, the centroid; centroids are kept in the order of priority,
those of large clusters first. Of each group of consecutive layers one FFN stays, with a small learned map from which
the others are regenerated (``_cluster_maps.py``). The residual stream keeps the ancestor's width.

    learngene = stem, last norm;
                of every layer: both norms, the q, k and v rows (with biases) and the projection columns of its c
                centroids in their order, the projection's bias;
                of every group: one FFN and, where it was trained, the group's map

    head i of H' = centroid i mod c, of which there are n copies;  its projection columns = the centroid's / n

so that with H' below c the first H' centroids are taken, and more heads never change what the centroids add up to: with
one cluster per head, any multiple of the ancestor's heads computes the ancestor's function. head_dim, and so the scale
of attention, is the ancestor's; heads x head_dim may differ from the width, which is then a ``HeadsShape``. Layer i of
a descendant is layer i of the ancestor, the first L' of them, or evenly spaced ones (addition).

Source: Wang, Yang, Feng, Wang, Geng, "Cluster-Learngene: Inheriting Adaptive Clusters for Vision Transformers", NeurIPS
2024; the released code, where it and the paper's description agree. Our readings, each where one of them is silent or
they differ: q, k and v are gathered head by head, with their biases; the projection's columns are those of the chosen
heads, and are divided by the number of copies; eps is 10 of 224 pixels at any image size; which layers share an FFN
(``ffn_groups``) is as published for a DeiT-Ti, -S or -B, and measured for any other ancestor.
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
from learngene_hub._heads import HeadsShape
from learngene_hub.data import Images, seed_of
from learngene_hub.errors import DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._cluster_attention import attention_distances, seen_at
from learngene_hub.methods._cluster_groups import RULES, cluster_heads, fixed_groups, group_of, measured_groups
from learngene_hub.methods._cluster_maps import FFN_KEYS, identity_maps, regenerate, train_maps
from learngene_hub.methods._cluster_parts import NORM_KEYS, check_stored, condense, ffn_name, grow_heads, stored_groups
from learngene_hub.methods._lesson import pooled
from learngene_hub.methods._whole import assemble, parts_of, require_choice, untrained
from learngene_hub.shape import Preprocessing, Reach, ViTShape
from learngene_hub.training import Recipe, StateDir, Step

MOST = 8  # times the ancestor's heads: the largest number in the paper's Fig. 3 (our reading)
SCHEDULES: Mapping[str, tuple[float, float, float]] = {  # shares of the heads in the three thirds of the blocks
    "same": (1, 1, 1),
    "decrementing": (1 / 2, 3 / 4, 1),  # the reduction does. Middle: as the caption; the code divides by 1.5
    "incrementing": (1, 3 / 4, 1 / 2),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The settings of cluster."""

    name: ClassVar[str] = "cluster"
    paper: ClassVar[str] = "https://openreview.net/forum?id=92vVuJVLVW"
    note: ClassVar[str] = "Width is the ancestor's; heads and depth vary. Evenly spaced depth is an addition."
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "block", "ffn", "psi", "tail"})
    growth: ClassVar[frozenset[str]] = frozenset({"select", "schedule"})

    # Measuring. The ancestor sees the images at ``size``, its position embeddings resampled.
    eps: float = 10 / 224  # largest gap within a cluster, as a share of the side of the images
    images: int = 1000  # drawn from those of ``data``; 0: all
    size: int = 0  # side, pixels; 0: that of the images
    ffn_groups: str | tuple[tuple[int, ...], ...] = (
        "auto"  # "published", "measured", "none"; or lists, kept layer first
    )
    # The maps of the FFN groups.
    psi_epochs: int = 3  # passes over the images; 0: no maps, regenerated FFNs are copies
    psi_lr: float = 3e-3  # peak
    batch_size: int = 64  # images per update
    precision: str = "fp32"  # of the training: fp32, bf16, fp16
    seed: int = 0  # of every random draw
    # Growth.
    select: str = "first"  # the layers of a smaller depth: the first, or "even"ly spaced ones
    schedule: str = "same"  # heads over the blocks; "decrementing", "incrementing": a half, three quarters, all

    def __post_init__(self) -> None:
        if not (is_number(self.eps) and self.eps >= 0):
            raise SettingsError(f"eps {self.eps!r} asked; it is a share of the image side, at least 0")
        for name in ("images", "size", "psi_epochs"):
            require_int(name, getattr(self, name), at_least=0, error=SettingsError)
        require_choice("select", self.select, ("first", "even"))
        require_choice("schedule", self.schedule, SCHEDULES)
        if isinstance(self.ffn_groups, str):
            require_choice("ffn_groups", self.ffn_groups, RULES)
        else:
            object.__setattr__(self, "ffn_groups", _layers(self.ffn_groups))
        self.recipe()

    def recipe(self) -> Recipe:
        """How the maps are trained. They do not decay: at 0 they would give no FFN at all.

        Raises:
            SettingsError: a setting is out of its range.
        """
        return Recipe(
            epochs=max(self.psi_epochs, 1), lr=self.psi_lr, batch_size=self.batch_size, weight_decay=0.0,
            schedule="cosine", warmup=0.05, precision=self.precision, seed=self.seed,
        )  # fmt: skip

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
        """The learngene of ``ancestor``, its heads measured on, and its maps trained with, all images of ``data``.

        ``watch`` is called once where there are maps to train, else never. The provenance tells every head's distance,
        the centroids with the sizes of their clusters, and the groups of layers, the kept one first.

        Raises:
            SettingsError: no data, groups that do not fit the ancestor, or maps asked of one without a classifier.
            DataError: images of different sizes, of other channels than the ancestor's, or none.
            ShapeError: the ancestor is no plain ViT, or images whose size is no multiple of its patch.
        """
        began = time.perf_counter()
        native = ViTShape.of(ancestor)
        pictures = _gathered(data, native)
        groups = fixed_groups(self.ffn_groups, native)
        if self.psi_epochs and not native.classes:
            raise SettingsError(
                "an ancestor without a classifier given; the maps learn its predictions: psi_epochs=0 would work"
            )
        size = self.size or pictures.pixels.shape[-1]
        seen, drawn = seen_at(ancestor, size), self._drawn(pictures)
        distances = attention_distances(seen, drawn, preprocessing).tolist()
        clusters = [cluster_heads(layer, self.eps * size) for layer in distances]
        groups = groups or measured_groups(distances, self.eps * size)
        centroids = [[cluster.centroid for cluster in layer] for layer in clusters]
        settings = asdict(self)
        if not isinstance(self.ffn_groups, str):
            settings["ffn_groups"] = [list(layers) for layers in self.ffn_groups]
        learngene = untrained(
            self.name, settings, condense(parts_of(ancestor, native), native, centroids, groups), native=native,
            reach=Reach(
                depths=(1, native.depth), widths=(native.width, native.width, 1), heads=(1, MOST * native.heads)
            ),
            facts=facts, preprocessing=preprocessing, began=began,
        )  # fmt: skip
        told = {
            "data": {name: {"images": len(images)} for name, images in data.items()},
            "image_size": size,
            "measured_images": len(drawn),
            "attention_distance_px": [[round(value, 3) for value in layer] for layer in distances],
            "centroids": centroids,
            "cluster_sizes": [[len(cluster.members) for cluster in layer] for layer in clusters],
            "ffn_groups": [group.to_list() for group in groups if len(group) > 1],
            "teacher_flops": len(drawn) * ViTShape.of(seen).flops(),  # the ancestor's forward passes
        }
        learngene = replace(learngene, provenance={**learngene.provenance, **told})
        return self._with_maps(learngene, seen, pictures, watch, state_dir) if self.psi_epochs else learngene

    def _drawn(self, pictures: Images) -> Images:
        """The images that are measured on, in their order."""
        if not 0 < self.images < len(pictures):
            return pictures
        generator = torch.Generator().manual_seed(seed_of("cluster", self.seed))
        return pictures.subset(torch.randperm(len(pictures), generator=generator)[: self.images].sort().values)

    def _with_maps(
        self,
        learngene: Learngene,
        seen: nn.Module,
        pictures: Images,
        watch: Callable[[Iterator[Step]], Iterator[Step]],
        state_dir: StateDir | None,
    ) -> Learngene:
        """The same with trained maps, where a group has more than one layer."""
        maps = identity_maps(stored_groups(learngene.tensors))
        if not maps:
            return learngene
        start = replace(learngene, tensors={**learngene.tensors, **maps})
        trained, log = train_maps(
            start, replace(self, select="first").expand, seen, pictures, recipe=self.recipe(), watch=watch,
            state=state_dir,
        )  # fmt: skip
        told, one = learngene.provenance, ViTShape.of(seen).flops()
        trainings = {
            "steps": log.steps,
            "images_seen": log.images,
            "flops": log.images * one,  # of training: images seen times the FLOPs of one
            "teacher_flops": told["teacher_flops"] + log.images * one,
            "seconds": round(told["seconds"] + log.seconds, 3),
            "loss": log.losses,
        }
        return replace(start, tensors={**start.tensors, **trained}, provenance={**told, **trainings})

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
    ) -> ViTShape | HeadsShape:
        """The shape of a descendant; a size left out is the ancestor's.

        ``heads`` is one number, spread over the blocks by ``schedule``, or one for each block, which then gives the
        depth too where that is left out.

        Raises:
            ShapeError: another width, more blocks than the ancestor's, or heads out of reach.
        """
        native: ViTShape = learngene.shape
        if depth is None:
            depth = len(heads) if isinstance(heads, tuple) else native.depth
        counts = self._counts(native, native.heads if heads is None else heads, depth)
        _require_sizes(native, depth, native.width if width is None else width, counts)
        sizes: dict[str, Any] = {
            "image_size": native.image_size if image_size is None else image_size,
            "in_chans": in_chans,
            "classes": native.classes if num_labels is None else num_labels,
        }
        if all(count == native.heads for count in counts):
            return replace(native, depth=depth, **sizes)
        kept = ("width", "head_dim", "mlp_ratio", "patch", "class_token", "pool")
        alike: dict[str, Any] = {name: getattr(native, name) for name in kept}
        return HeadsShape(heads=counts, **alike, **sizes)

    def _counts(self, native: ViTShape, heads: int | tuple[int, ...], depth: int) -> tuple[int, ...]:
        """The heads of each of ``depth`` blocks: as given, or by ``schedule``, rounded down, at least one.

        Raises:
            ShapeError: not one for each block.
        """
        if isinstance(heads, tuple):
            if len(heads) != depth:
                raise ShapeError(f"{len(heads)} numbers of heads asked for {depth} blocks; one for each would work")
            return heads
        shares = SCHEDULES[self.schedule]
        return tuple(max(1, int(heads * shares[3 * place // depth])) for place in range(depth))

    def expand(self, learngene: Learngene, shape: ViTShape | HeadsShape) -> dict[str, Tensor | None]:
        """Every parameter of a ViT of ``shape``; None: the head.

        Raises:
            ShapeError: something other than depth, heads, image size, input channels or classes differs, or depth or
                heads are out of reach.
        """
        native: ViTShape = learngene.shape
        counts = (shape.heads,) * shape.depth if isinstance(shape, ViTShape) else shape.heads
        for name in ("patch", "class_token", "pool", "head_dim", "hidden"):
            if getattr(native, name) != getattr(shape, name):
                raise ShapeError(
                    f"{name} {getattr(shape, name)} asked; this learngene has {getattr(native, name)}, which "
                    f"{self.name} cannot change: {getattr(native, name)} would work"
                )
        _require_sizes(native, shape.depth, shape.width, counts)
        even = transforms.even_positions(native.depth, shape.depth)
        layers = even if self.select == "even" else tuple(range(shape.depth))
        groups = stored_groups(learngene.tensors)
        blocks = []
        for layer, count in zip(layers, counts, strict=True):
            block, group = learngene.group(f"block.{layer}"), group_of(groups, layer)
            kept, psi = learngene.group(ffn_name(group)), learngene.group(f"psi.{group.name}")
            norms = {key: block[key] for key in NORM_KEYS}
            ffn = regenerate({key: kept[key] for key in FFN_KEYS}, psi, layer - group.first)
            blocks.append(norms | grow_heads(block, count, native.head_dim) | ffn)
        norm = {kind: learngene.tensors[f"tail.norm.{kind}"] for kind in ("weight", "bias")}
        outer = shape if isinstance(shape, ViTShape) else shape.frame
        return assemble(outer, learngene.group("stem"), blocks, norm)

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: Any) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        check_stored(shapes, native)


def _layers(groups: object) -> tuple[tuple[int, ...], ...]:
    """The setting ``ffn_groups`` as lists of layers."""
    if not isinstance(groups, (list, tuple)) or not all(isinstance(each, (list, tuple)) for each in groups):
        raise SettingsError(
            f"ffn_groups {groups!r:.60} asked; it is one of {', '.join(RULES)}, or lists of layers, the kept one "
            "first, such as [[6, 7], [9, 10, 11]]"
        )
    for layer in (layer for each in groups for layer in each):
        require_int("layer of ffn_groups", layer, at_least=0, error=SettingsError)
    return tuple(tuple(each) for each in groups)


def _gathered(data: Mapping[str, Images], native: ViTShape) -> Images:
    """All images, of one size, without their labels.

    Raises:
        SettingsError: no data.
        DataError: images of different sizes, of other channels than the ancestor's, or none.
    """
    if not data:
        raise SettingsError(f"no data sets asked; {Cluster.name} measures attention on images: one would work")
    images = pooled(data, labelled=False, method=Cluster.name)
    if images.pixels.shape[1] != native.in_chans:
        raise DataError(f"images of {images.pixels.shape[1]} channels asked; the ancestor takes {native.in_chans}")
    return images


def _require_sizes(native: ViTShape, depth: int, width: int, heads: Sequence[int]) -> None:
    """Nothing, where a descendant can have these.

    Raises:
        ShapeError: it cannot; the message names what would work, or the method that could.
    """
    if width != native.width:
        raise ShapeError(
            f"width {width} asked; {Cluster.name} keeps the ancestor's {native.width}: a learngene of lsamd or net2net "
            "can grow other widths"
        )
    if depth > native.depth:
        raise ShapeError(
            f"depth {depth} asked; {Cluster.name} has the ancestor's {native.depth} layers: up to {native.depth} would "
            "work, and a learngene of lsamd or net2net can grow deeper"
        )
    for count in heads:
        if not 1 <= count <= MOST * native.heads:
            raise ShapeError(f"{count} heads asked; 1 to {MOST * native.heads} would work")
