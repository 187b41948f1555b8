"""Auto-Learngene: the ancestor's layers that a pseudo descendant is most similar to, found by meta-learning.

A small network, the pseudo descendant, learns classes that the ancestor was never taught. A meta-network says for each
pair of a group m of the ancestor's layers and a group n of the pseudo descendant's how strongly the one is to match the
other, and is trained to say what makes the pseudo descendant learn those classes faster (``_auto_loop.py``). What it
says at the end is the similarity matrix S (M, N), and the groups with the largest s_m = sum_n S_mn are the learngene,
with the ancestor's stem. In a descendant they stand at the bottom in the ancestor's order, right after the inherited
stem; the blocks above, the last norm and the head are fresh, and everything is trained.

Source: Wang, Yang, Lin, Wang, Geng, "Learngene: Inheriting Condensed Knowledge from the Ancestry Model to Descendant
Models", arXiv:2305.02279. Its abstract and its authors' code could be read. From the code: groups of two blocks of a
ViT, the match term, the bilevel loop with its rates, one fixed batch for the match term, and the lists of layers that
were kept (PUBLISHED). How layers are selected from lambda is not in the code: s_m as the sum over n (or the maximum),
the mean over the last epoch, ties to the lower group, and that kept blocks stand at the bottom, are our reading.

The paper varies depth alone; width comes from the shared width transform (``transforms.py``), without a stage of its
own, and is our addition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import is_number, require_int
from learngene_hub._conv import ConvShape
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _auto_search as searching
from learngene_hub.methods._auto_conv import Convs
from learngene_hub.methods._auto_vit import ViTs
from learngene_hub.methods._whole import require_choice, untrained
from learngene_hub.shape import Preprocessing, Shape, ViTShape, shape_of
from learngene_hub.training import StateDir, Step

# Units that were kept, by the ancestor: its family, its depth, the units. Of DINO's ViT-S/16, VGG16 and ResNet18 in the
# authors' code, of DeiT-Ti/S/B in a later paper's. Units are the blocks of a ViT and the stages of a CNN.
PUBLISHED: Mapping[str, tuple[str, int, tuple[int, ...]]] = MappingProxyType(
    {
        "dino-vits16": ("vit", 12, (0, 1, 8, 9, 10, 11)),
        "deit": ("vit", 12, (0, 1, 2, 3, 4, 5)),
        "vgg16": ("vgg", 13, (0, 1, 2, 4)),
        "resnet18": ("resnet", 8, (0, 3)),
    }
)


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The settings of Auto-Learngene; those of the search are the published ones."""

    name: ClassVar[str] = "auto"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.02279"
    note: ClassVar[str] = (
        "The rule that selects layers from the searched similarities is this project's reading, and widths other than "
        "the ancestor's are its addition. Blocks above the inherited ones are fresh."
    )
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "block", "search"})
    growth: ClassVar[frozenset[str]] = frozenset({"form"})

    # The search.
    order: int = 2  # of the derivatives by which phi learns: 2 as published; 1 is an approximation
    epochs: int = 100  # passes over the images
    batch_size: int = 64  # images per update
    lr: float = 0.1  # of the pseudo descendant: SGD, falling along a cosine
    momentum: float = 0.9  # of the pseudo descendant's SGD
    weight_decay: float = 1e-4  # of the pseudo descendant
    meta_lr: float = 1e-4  # of phi: Adam
    meta_weight_decay: float = 1e-4  # of phi
    inner_steps: int = 0  # T, steps on the match term alone; 0: as published, 2 of a ViT, 5 of a CNN
    match: float = 0.0  # c, weight of the match term; 0: as published, 0.1 of a ViT, 1 of a CNN
    meta_batch: int = 0  # images of the fixed batch of the match term; 0: as many as of any other
    group: int = 2  # blocks of a group of a ViT
    pseudo_depth: int = 0  # blocks of the pseudo descendant of a ViT; 0: half the ancestor's
    flip: bool = True  # mirror images at random
    crop_padding: int = 4  # pixels by which a random crop moves
    seed: int = 0  # of every random draw
    # What is kept.
    keep: int = 0  # groups; 0: of a ViT half of them, of a CNN all but the weakest
    score: str = "sum"  # of a group m: the sum over n of S_mn, or the "max"
    layers: str | tuple[int, ...] = ()  # no search: these blocks or stages, or those of a PUBLISHED list by its name
    # Growth.
    form: str = "copy"  # of the width transform: copy, balanced, exact

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (1, 2):
            raise SettingsError(f"order {self.order!r} asked; there are 1, 2")
        require_choice("score", self.score, ("sum", "max"))
        require_choice("form", self.form, transforms.FORMS)
        for name in ("inner_steps", "meta_batch", "pseudo_depth", "keep", "crop_padding"):
            require_int(name, getattr(self, name), at_least=0, error=SettingsError)
        require_int("group", self.group, at_least=1, error=SettingsError)
        for name in ("momentum", "weight_decay", "meta_weight_decay", "match"):
            if not (is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; 0 is the least that works")
        if not (is_number(self.lr) and self.lr > 0):
            raise SettingsError(f"lr {self.lr!r} asked; it must be above 0")
        searching.recipe(self)
        object.__setattr__(self, "layers", _layers(self.layers))

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
        """The learngene of ``ancestor``, searched on the images of ``data``, which are of one size.

        They should be of classes that neither the ancestor was taught nor a descendant will be (the paper's open-world
        classes). With ``layers`` they are not looked at and may be none. Looks at features and gradients itself.

        Raises:
            ShapeError: the ancestor is no plain ViT.
            SettingsError: no data, or settings that the ancestor does not allow.
            DataError: images of different sizes, of other channels than the ancestor's, or none.
        """
        began = time.perf_counter()
        family = self._family(shape_of(ancestor))
        if self.layers:
            found, kept = None, self._listed(family)
        else:
            found, kept = self._searched(family, ancestor, data, preprocessing, watch, state_dir)
        tensors = family.parts(ancestor, kept) | ({} if found is None else {"search.similarity": found.similarity})
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        learngene = untrained(
            self.name, settings, tensors, native=family.native, reach=family.reach(kept), facts=facts,
            preprocessing=preprocessing, began=began,
        )  # fmt: skip
        searched = {} if found is None else found.provenance
        return replace(learngene, provenance={**learngene.provenance, **searched, "kept": list(kept)})

    def require_ancestor(self, ancestor: nn.Module) -> None:
        """Nothing, where ``ancestor`` is of a kind that this method knows.

        Raises:
            ShapeError: it is not.
        """
        self._family(shape_of(ancestor))

    def _family(self, native: Shape) -> ViTs | Convs:
        """How this method treats networks of a native shape.

        Raises:
            ShapeError: it knows none of that kind.
        """
        if isinstance(native, ViTShape):
            return ViTs(self, native)
        if isinstance(native, ConvShape):
            return Convs(self, native)
        raise ShapeError(f"a {type(native).__name__} given; auto knows plain ViTs, VGGs with batch norm and ResNets")

    def _listed(self, family: ViTs | Convs) -> tuple[int, ...]:
        """The units of ``layers``.

        Raises:
            SettingsError: they are not of an ancestor like this one.
        """
        if isinstance(self.layers, tuple):
            if self.layers[-1] >= family.units:
                raise SettingsError(f"layer {self.layers[-1]} asked; the ancestor's are 0 to {family.units - 1}")
            return self.layers
        kind, depth, listed = PUBLISHED[self.layers]
        if (kind, depth) != (getattr(family.native, "family", "vit"), family.native.depth):
            raise SettingsError(
                f"layers {self.layers!r} asked, of a {kind} of depth {depth}; the ancestor is a {family.kind}: a list, "
                "such as [0, 1], would work"
            )
        return listed

    def _searched(
        self, family: ViTs | Convs, ancestor: nn.Module, data: Mapping[str, Images], preprocessing: Preprocessing,
        watch: searching.Watch, state: StateDir | None,
    ) -> tuple[searching.Found, tuple[int, ...]]:  # fmt: skip
        """What the search found, and the units that are kept for it."""
        groups = family.groups()
        if self.keep > len(groups):
            raise SettingsError(f"keep {self.keep} asked; the ancestor has {len(groups)} groups: at most as many")
        images = searching.joined(data, family.native.in_chans)
        if self.crop_padding >= images.pixels.shape[-1]:
            raise SettingsError(
                f"crop_padding {self.crop_padding} asked; it is below the image size {images.pixels.shape[-1]}"
            )
        pair = family.pair(ancestor, images.pixels.shape[-1], len(images.classes))
        names = {name: len(each) for name, each in data.items()}
        found = searching.search(self, pair, images, names, preprocessing, watch, state)
        chosen = select(found.similarity, self.keep or family.keep(), self.score)
        return found, tuple(unit for m in chosen for unit in groups[m])

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
        """The shape of these sizes. Where no depth is asked: a ViT of the ancestor's, a CNN of its skeleton.

        Raises:
            ShapeError: a size out of reach.
        """
        return self._family(learngene.shape).plan(
            learngene, depth=depth, width=width, heads=heads, num_labels=num_labels, image_size=image_size,
            in_chans=in_chans,
        )  # fmt: skip

    def expand(self, learngene: Learngene, shape: Any) -> dict[str, Tensor | None]:
        """Every entry of the state dict of ``shape``; None: what is not inherited, which is fresh.

        Raises:
            ShapeError: fewer layers than are inherited, or another kind of network than ``plan`` gives.
        """
        return self._family(learngene.shape).expand(learngene, shape)

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: Any) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        family = self._family(native)
        want = family.expected(shapes)
        if not self.layers:
            want["search.similarity"] = family.similar()
        if missing := sorted(want.keys() - shapes.keys()):
            raise ArtefactError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
        if unknown := sorted(shapes.keys() - want.keys()):
            raise ArtefactError(f"{len(unknown)} unknown tensors, the first is {unknown[0]}")
        for name, shape in shapes.items():
            if tuple(shape) != want[name]:
                raise ArtefactError(f"tensor {name} is {list(shape)}; the native shape {native} has {list(want[name])}")


def select(similarity: Tensor, keep: int, score: str = "sum") -> tuple[int, ...]:
    """The ``keep`` groups of the largest s_m, in the ancestor's order; of equal ones the lower. ``similarity`` (M, N).

    s_m is the sum over n of S_mn, or the "max".
    """
    scores = similarity.double().sum(1) if score == "sum" else similarity.double().amax(1)
    best = scores.sort(descending=True, stable=True).indices[:keep]
    return tuple(sorted(best.tolist()))


def _layers(given: object) -> str | tuple[int, ...]:
    """The setting ``layers``, checked: a published name, or positions in ascending order.

    Raises:
        SettingsError: it is neither.
    """
    if isinstance(given, str):
        require_choice("layers", given, PUBLISHED)
        return given
    if not isinstance(given, (list, tuple)):
        raise SettingsError(f"layers {given!r:.60} asked; it is a list of positions, or one of {', '.join(PUBLISHED)}")
    for place in given:
        require_int("layer", place, at_least=0, error=SettingsError)
    if list(given) != sorted(set(given)):
        raise SettingsError(f"layers {list(given)!r:.60} asked; each is above the one before")
    return tuple(given)
