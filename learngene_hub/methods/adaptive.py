"""Adaptive-Learngene: a pool that grows without old data, one increment on a frozen anchor for each new data set.

    W = A_0 + sum_t w_t A_t        in the parts of the anchor A_0: whole blocks, or components of LDR

Two kinds of learngene are of this method. An *anchor* is what ``extract`` makes: the ancestor's blocks projected on the
first N_0 Chebyshev polynomials of their place, W_l = sum_n T_n(l / L) A^(n), by least squares and without data. (Other
anchors: learngenes of net2net, lsamd, ldr and tleg.) An *increment* is what a pool trains on a new data set with its
anchor frozen (``learngene_hub.pool``); it holds the key of that data set (``_adaptive_key.py``) and grows only where
its anchor is: ``_adaptive_merge.py`` has the sum.

Source: Lin, Wang, Liu, Yang, Geng, "Adaptive-Learngene", AAAI 2026, 40(28), 23576-23584. Only the abstract could be
read: new pre-training data arrives over time, the ancestor is trained on the new data alone, a new component joins a
pool, and a selection from few images of a task combines few of them; descendants of several sizes. Everything more
exact than that is our reading, with LDR of the same first author (NeurIPS 2024) as the form of the components. The
paper varies depth; width comes from the shared width transform (``transforms.py``) and is our addition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import is_number, require_int
from learngene_hub._format import SHA256
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _auxiliary
from learngene_hub.methods._adaptive_key import COUNTS, LEVELS, Space
from learngene_hub.methods._adaptive_merge import FORMS, design, fitted
from learngene_hub.methods._whole import assemble, parts_of, require_choice, require_same, untrained
from learngene_hub.shape import Preprocessing, Reach, ViTShape
from learngene_hub.training import Step

MAX_PARENTS = 64


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """The settings of an anchor, or of an increment: those that are not of its kind keep their defaults."""

    name: ClassVar[str] = "adaptive"
    paper: ClassVar[str] = "https://ojs.aaai.org/index.php/AAAI/article/view/39530"
    note: ClassVar[str] = (
        "Only the paper's abstract could be read: whatever is more exact than that is this project's reading. "
        "Widths other than the anchor's are an addition of this project."
    )
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "component", "tail", "increment", "key"})

    # An anchor.
    components: int = 4  # N_0
    form: str = "copy"  # of the width transform
    # An increment.
    anchor: str = ""  # sha256 of its anchor's file; empty: this is an anchor
    entry: str = "components"  # how it adds to the anchor's parts; or "blocks": an increment of each
    parents: Mapping[str, float] = field(default_factory=dict)  # sha256 of increments under it -> their weights
    key_features: int = 1024  # of the space of its key, as of ``Space``
    key_seed: int = 0
    key_scale: float = 0.0
    key_size: int = 64  # pixels

    def __post_init__(self) -> None:
        require_int("components", self.components, at_least=1, error=SettingsError)
        require_choice("form", self.form, transforms.FORMS)
        require_choice("entry", self.entry, FORMS)
        if self.anchor and not SHA256.match(self.anchor):
            raise SettingsError(f"anchor {self.anchor!r:.80} asked; it is a sha256, 64 hex digits, or empty")
        if not isinstance(self.parents, Mapping) or len(self.parents) > MAX_PARENTS:
            raise SettingsError(f"parents {self.parents!r:.80} asked; it maps at most {MAX_PARENTS} sha256 to weights")
        for sha256, weight in self.parents.items():
            if not (isinstance(sha256, str) and SHA256.match(sha256) and is_number(weight) and abs(weight) <= 10):
                raise SettingsError(
                    f"parent {sha256!r:.80} of weight {weight!r:.20} asked; a sha256 and a number up to 10"
                )
        Space(features=self.key_features, seed=self.key_seed, scale=self.key_scale, image_size=self.key_size)

    @property
    def space(self) -> Space:
        """The space of an increment's key."""
        return Space(features=self.key_features, seed=self.key_seed, scale=self.key_scale, image_size=self.key_size)

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
    ) -> Learngene:
        """An anchor: the ancestor's blocks on ``components`` polynomials; ``provenance["residual"]`` is the share lost.

        ``data`` is not looked at and may be empty. Nothing is trained, so ``watch`` is never called.

        Raises:
            ShapeError: the ancestor is no plain ViT.
            SettingsError: more components than it has blocks, or settings of an increment.
        """
        began = time.perf_counter()
        native = ViTShape.of(ancestor)
        if self.components > native.depth:
            raise SettingsError(f"components {self.components} asked; the ancestor has {native.depth} blocks")
        if self.anchor or self.parents:
            raise SettingsError("an increment asked of an ancestor; `learngene pool add` makes one, on a pool's anchor")
        parts = parts_of(ancestor, native)
        found, residual = fitted(
            _stacked(parts, native.depth), dict.fromkeys(transforms.BLOCK_KEYS, design(native.depth, self.components))
        )
        tensors = {name: tensor for name, tensor in parts.items() if not name.startswith("block.")}
        tensors |= {f"component.{name}": tensor for name, tensor in found.items()}
        step = native.head_dim
        learngene = untrained(
            self.name, asdict(self), tensors, native=native, facts=facts, preprocessing=preprocessing, began=began,
            reach=Reach(depths=(1, 2 * native.depth), widths=(step, 4 * native.width, step)),
        )  # fmt: skip
        return replace(learngene, provenance={**learngene.provenance, "residual": round(residual, 6)})

    def expand(self, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        """Every parameter of a ViT of ``shape`` grown from an anchor; None: the head.

        Raises:
            ShapeError: something other than depth, width, image size, input channels or classes differs; or this is an
                increment.
        """
        if self.anchor:
            raise ShapeError(
                f"an increment grows only on its anchor {self.anchor[:12]}; the pool that holds both would work"
            )
        native = learngene.shape
        require_same(native, shape, self.name)
        resize = transforms.Resize.of({}, native, shape, self.form)
        numbers = _auxiliary.numbers_of(learngene.tensors, "component")
        parts = [resize.block(learngene.group(f"component.{n}"), 0) for n in numbers]
        blocks = _auxiliary.compose(parts, design(shape.depth, len(parts)))
        norm = resize.norm({kind: learngene.tensors[f"tail.norm.{kind}"] for kind in ("weight", "bias")})
        return assemble(shape, resize.stem(learngene.group("stem")), blocks, norm)

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        """Refuse tensors that no anchor, or no increment, of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        if self.anchor:
            return self._check_increment(shapes, native)
        stored = _auxiliary.numbers_of(shapes, "component")
        if not stored or stored != list(range(1, len(stored) + 1)):
            raise ArtefactError(f"components {stored} given; they are 1, 2 and so on")
        _auxiliary.check_stored(shapes, native, [f"component.{n}" for n in stored])

    def _check_increment(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        stored = _auxiliary.numbers_of(shapes, "increment")
        if not stored or stored != list(range(1, len(stored) + 1)):
            raise ArtefactError(f"parts {stored} of an increment given; they are 1, 2 and so on")
        block = transforms.expected_shapes(native, {0})
        want = {f"increment.{n}.{key}": block[f"block.0.{key}"] for n in stored for key in transforms.BLOCK_KEYS}
        want |= {"key.mean": (self.key_features,), "key.residuals": (len(LEVELS), len(COUNTS))}
        want |= {"key.centre": (native.width,), "key.variance": (native.width,), "key.count": (1,)}
        if odd := sorted(want.keys() ^ shapes.keys()):
            raise ArtefactError(f"{len(odd)} tensors are missing or unknown, the first is {odd[0]}")
        for name, shape in shapes.items():
            if tuple(shape) != want[name]:
                raise ArtefactError(f"tensor {name} is {list(shape)}; {list(want[name])} is needed")


def _stacked(parts: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Key of a block -> (L, ...)."""
    return {key: torch.stack([parts[f"block.{i}.{key}"] for i in range(depth)]) for key in transforms.BLOCK_KEYS}
