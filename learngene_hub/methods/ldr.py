"""LDR: every block decomposed into shared components, and recomposed at any depth from as many of them as one likes.

Learngene = components A_1 .. A_N, each of the shape of one whole block, with the stem and the last norm. Block l of L,
counted from 1, is W_l = sum_n a(l, n) A_n, every tensor alike (LayerNorm and biases too), with coefficients that are
never trained: a(l, n) = T_n(x_l), x_l = (l - 1) / L, where T_n is the Chebyshev polynomial of the first kind. The first
component takes T_1, not T_0: at x = 0 it counts nothing, so that with one component the first block is all zeros and
passes its input on. ``order_offset`` 1 is that literal reading; with 0 component n takes T_(n-1), one component is a
ViT that shares all its weights, and two are TLEG. Other bases: Taylor x^n, Legendre P_n, Fourier (our reading: cos(pi
x), sin(pi x), cos(2 pi x), ...; of half the frequency of the usual one, whose 12th function is 0 at all 12 blocks).

Components are trained inside an auxiliary of L blocks, in phases of 1, 2, 4, 8, 12 of them. In each phase the new ones
learn and the earlier ones do not; their sum over each block is computed once. Our reading, where the paper is silent:
new components start from zeros, so that a phase begins with the function that the last one ended with; stem, last norm
and head learn in every phase, and stem and norm are kept as they were at the end of each. A descendant of k components
takes those of the phase that reached k, or of the next one.

A grown descendant trains freely. ``Ldr.constrained`` (``factory.constrain``, ``learngene finetune --constrained``) is
the paper's other mode: components instead of blocks are trained.

Source: Lin et al., "Linearly Decomposing and Recomposing Vision Transformers for Diverse-Scale Models", NeurIPS 2024,
its text with appendix. Published: a DeiT-B auxiliary; a teacher RegNetY-16GF; CE + KL, of weights 1 and 1; 100 epochs
per phase at batch 512, learning rate 8e-4. Here the ancestor teaches, unless a teacher is given, and what the settings
leave open of the auxiliary is the ancestor's. The paper varies depth alone; width comes from the shared width
transform (``transforms.py``), without a stage of its own, and is our addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import require_int
from learngene_hub.data import Images, seed_of
from learngene_hub.errors import ArtefactError, SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _auxiliary, _lesson
from learngene_hub.methods._distillation import ResizedDistillation
from learngene_hub.methods._whole import assemble, require_choice, require_same
from learngene_hub.shape import Preprocessing, ViTShape
from learngene_hub.teacher import Teacher
from learngene_hub.training import StateDir, Step

BASES = ("chebyshev", "taylor", "legendre", "fourier")


@dataclass(frozen=True, kw_only=True)
class Ldr(ResizedDistillation):
    """The settings of LDR: those of the distillation (epochs are of each phase), and the components."""

    name: ClassVar[str] = "ldr"
    paper: ClassVar[str] = "https://openreview.net/forum?id=Yhd0yzC8yD"
    note: ClassVar[str] = "Widths other than the auxiliary's are an addition of this project; the paper varies depth."
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "component", "phase", "tail", "head"})
    growth: ClassVar[frozenset[str]] = frozenset({"form", "head", "components"})

    lr: float = 8e-4
    labels: float = 1.0
    label_smoothing: float = 0.0
    depth: int = 0  # blocks of the auxiliary; 0: the ancestor's
    basis: str = "chebyshev"  # functions of depth: chebyshev, taylor, legendre, fourier
    order_offset: int = 1  # component n takes the function of order n - 1 + order_offset: 1 as published, 0 as in TLEG
    phases: tuple[int, ...] = (1, 2, 4, 8, 12)  # components at the end of each phase; one number: all at once
    added: str = "zeros"  # where new components start: zeros, or "normal": Linear weights from a normal of 0.02
    # Growth.
    components: int = 0  # k, those that a descendant is recomposed from; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("basis", self.basis, BASES)
        require_choice("added", self.added, ("zeros", "normal"))
        for name in ("depth", "components", "order_offset"):
            require_int(name, getattr(self, name), at_least=0, error=SettingsError)
        if self.order_offset > 1:
            raise SettingsError(f"order_offset {self.order_offset} asked; there are 0, 1")
        phases = self.phases
        if not isinstance(phases, (list, tuple)) or not phases:
            raise SettingsError(
                f"phases {phases!r:.60} asked; it is a list of numbers of components, such as [1, 2, 4]"
            )
        object.__setattr__(self, "phases", tuple(phases))
        for count in self.phases:
            require_int("phase", count, at_least=1, error=SettingsError)
        if list(self.phases) != sorted(set(self.phases)):
            raise SettingsError(f"phases {list(self.phases)} asked; each has more components than the one before")
        if self.components > self.phases[-1]:
            raise SettingsError(f"components {self.components} asked; there are {self.phases[-1]} after the last phase")

    def require_ancestor(self, ancestor: nn.Module) -> None:
        """Refuse an ancestor that lacks what is to be its own (ShapeError)."""
        _lesson.require_ancestor(self, ancestor, self.depth)

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
        state_dir: StateDir | None = None,
        teacher: Teacher | None = None,
    ) -> Learngene:
        """The learngene of an auxiliary that learns from ``teacher`` (the ancestor) on all images of ``data``, of one
        size.

        The native shape is the auxiliary's, at the size of the images. ``ancestor`` is any model with logits; a plain
        ViT where the auxiliary's sizes or first weights are to be its own. ``watch`` is called once for each phase.

        Raises:
            SettingsError: no data, settings that they or the teacher do not allow, or labels of other classes than its.
            DataError: images of different sizes, of other channels than the teacher's, or none.
            ShapeError: no such auxiliary, or the ancestor is no plain ViT where something is to be its own.
        """
        lesson = _lesson.prepare(
            self, ancestor, data, depth=self.depth, method=self.name, preprocessing=preprocessing, teacher=teacher
        )
        native = lesson.native
        outer, start = self.begin(native, ancestor)
        lesson.ask(state_dir)
        tensors, head = _auxiliary.without_head(outer)
        done: list[dict[str, Tensor]] = []
        snapshots, logs = {}, []
        for count in self.phases:
            new = range(len(done) + 1, count + 1)
            for n in new:
                tensors |= _auxiliary.prefixed(f"component.{n}", start[n - 1])
            auxiliary = self.phase(tensors, done, head, native, facts, preprocessing)
            state = state_dir and replace(state_dir, path=state_dir.path / f"phase-{count}")
            logs.append(_lesson.train(auxiliary, lesson, self.recipe(self._seed(count)), watch, state))
            found, head = auxiliary.found(), auxiliary.heads()
            done += [_group(found, f"component.{n}") for n in new]
            tensors = {name: tensor for name, tensor in found.items() if not name.startswith("component.")}
            snapshots |= {f"phase.{count}.{name}": t for name, t in tensors.items() if count != self.phases[-1]}
        for n, component in enumerate(done, 1):
            tensors |= _auxiliary.prefixed(f"component.{n}", component)
        tensors |= _auxiliary.prefixed("head", head) if self.head == "inherit" else {}
        blank = _auxiliary.blank(self.name, self, tensors | snapshots, native, facts, preprocessing)
        return replace(blank, provenance=_lesson.report(lesson, logs))

    def phase(
        self,
        tensors: Mapping[str, Tensor],
        done: Sequence[Mapping[str, Tensor]],
        head: Mapping[str, Tensor],
        native: ViTShape,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
    ) -> _auxiliary.Auxiliary:
        """The auxiliary of a phase that trains ``tensors`` and ``head`` beside the components of earlier phases, which
        are ``done``."""
        held = {**tensors, **_auxiliary.prefixed(_auxiliary.FROZEN, self.frozen(done, native.depth))}
        blank = _auxiliary.blank(self.name, self, held, native, facts, preprocessing)
        whole = replace(self, components=0)
        return _auxiliary.Auxiliary(blank, whole.expand, native, head, drop_path=self.drop_path)

    def _seed(self, count: int) -> int:
        """The seed of a phase: its order of the images is no other phase's."""
        return self.seed if count == self.phases[0] else seed_of("ldr", self.seed, count)

    def begin(self, native: ViTShape, ancestor: nn.Module | None) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Where stem, norm and head start, and all components: the first is a block, the others as ``added`` says.

        None of them depends on how many there will be.
        """
        outer, blocks = _auxiliary.random_parts(native, 1, self.seed)
        if self.start == "ancestor":  # its middle block (our addition)
            outer, blocks = _auxiliary.ancestor_parts(ancestor, native, [0.5], self.seed)
        for n in range(2, self.phases[-1] + 1):
            block = {key: tensor * 0.0 for key, tensor in blocks[0].items()}
            if self.added == "normal":
                _, (random,) = _auxiliary.random_parts(native, 1, seed_of("component", self.seed, n))
                block |= {key: tensor for key, tensor in random.items() if tensor.dim() > 1}
            blocks.append(block)
        return outer, blocks

    def frozen(self, components: Sequence[Mapping[str, Tensor]], depth: int) -> dict[str, Tensor]:
        """sum_n a(l, n) A_n over these first components: key -> (L, numbers); empty without any."""
        return _auxiliary.mix(components, self.table(depth, range(1, len(components) + 1))) if components else {}

    def table(self, depth: int, numbers: Sequence[int]) -> Tensor:
        """a(l, n) of the components ``numbers`` (from 1) at each of ``depth`` blocks: (L, N), float64."""
        return coefficients(self.basis, depth, [n - 1 + self.order_offset for n in numbers])

    def expand(self, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        """Every parameter of a ViT of ``shape`` recomposed from the first ``components``; None: the head, where it is
        not inherited (it is that of the last phase).

        Raises:
            ShapeError: something other than depth, width, image size, input channels or classes differs.
            SettingsError: more components than there are.
        """
        native = learngene.shape
        require_same(native, shape, self.name)
        resize = transforms.Resize.of({}, native, shape, self.form)
        numbers = self.numbers(learngene)
        # Resizing is linear in a block's tensors, so that components are resized and not each of the blocks.
        parts = [resize.block(learngene.group(f"component.{n}"), 0) for n in numbers]
        blocks = _auxiliary.compose(parts, self.table(shape.depth, numbers), learngene.group(_auxiliary.FROZEN))
        outer = snapshot(learngene, numbers[-1])
        norm = resize.norm(_group(outer, "tail.norm"))
        state = assemble(shape, resize.stem(_group(outer, "stem")), blocks, norm)
        return state | _auxiliary.inherited_head(learngene, shape, resize, self.head)

    def constrained(self, learngene: Learngene, shape: ViTShape, *, seed: int = 0) -> _auxiliary.Auxiliary:
        """A descendant of ``shape`` whose components are trained, not its blocks: as many parameters at any depth.

        It is a module like any other (``factory.finetune`` trains it); its ``materialise`` gives the plain timm model
        that it has become. The head is a descendant's: fresh, drawn with ``seed``, where it is not inherited.

        Raises:
            ShapeError: ``shape`` is outside the learngene's reach, or of another kind.
            SettingsError: more components are asked than the learngene has.
        """
        learngene.reach.check(shape)
        require_same(learngene.shape, shape, self.name)
        numbers = self.numbers(learngene)
        tensors = snapshot(learngene, numbers[-1])
        for n in numbers:
            tensors |= _auxiliary.prefixed(f"component.{n}", learngene.group(f"component.{n}"))
        head: dict[str, Tensor] = {}
        if shape.classes:
            weight = torch.empty(shape.classes, shape.width)
            nn.init.trunc_normal_(weight, std=0.02, generator=torch.Generator().manual_seed(seed))
            head = {"weight": weight, "bias": torch.zeros(shape.classes)}
            resize = transforms.Resize.of({}, learngene.shape, shape, self.form)
            inherited = _auxiliary.inherited_head(learngene, shape, resize, self.head)
            head |= {name.removeprefix("head."): tensor for name, tensor in inherited.items()}
        free = replace(self, components=0)  # only the chosen ones are there
        return _auxiliary.Auxiliary(replace(learngene, tensors=tensors), free.expand, shape, head)

    def numbers(self, learngene: Learngene) -> list[int]:
        """The components that a descendant is recomposed from.

        Raises:
            SettingsError: more than there are.
        """
        stored = _auxiliary.numbers_of(learngene.tensors, "component")
        if self.components > stored[-1]:
            raise SettingsError(f"components {self.components} asked; this learngene has {stored[-1]}")
        return [n for n in stored if n <= (self.components or n)]

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        stored, phases = (_auxiliary.numbers_of(shapes, group) for group in ("component", "phase"))
        if not stored or stored != list(range(1, len(stored) + 1)):
            raise ArtefactError(f"components {stored} given; they are 1, 2 and so on")
        if not all(1 <= phase < len(stored) for phase in phases):
            raise ArtefactError(f"snapshots of {phases} components given; there are {len(stored)} components")
        names = [f"component.{n}" for n in stored], [f"phase.{phase}" for phase in phases]
        _auxiliary.check_stored(shapes, native, *names)


def coefficients(basis: str, depth: int, orders: Sequence[int]) -> Tensor:
    """The functions of these orders at x = 0, 1 / depth, .. (depth - 1) / depth: (L, N), float64."""
    rows = [[_FUNCTIONS[basis](order, place / depth) for order in orders] for place in range(depth)]
    return torch.tensor(rows, dtype=torch.float64)


def _chebyshev(order: int, x: float) -> float:
    """T_0 = 1, T_1 = x, T_(n+1) = 2 x T_n - T_(n-1)."""
    last, value = x, 1.0  # T_(-1) = x continues the recurrence backwards
    for _ in range(order):
        last, value = value, 2 * x * value - last
    return value


def _legendre(order: int, x: float) -> float:
    """P_0 = 1, P_1 = x, (n + 1) P_(n+1) = (2 n + 1) x P_n - n P_(n-1)."""
    last, value = 0.0, 1.0
    for n in range(order):
        last, value = value, ((2 * n + 1) * x * value - n * last) / (n + 1)
    return value


def _fourier(order: int, x: float) -> float:
    """1, cos(pi x), sin(pi x), cos(2 pi x), sin(2 pi x), ..."""
    angle = math.pi * ((order + 1) // 2) * x
    return math.cos(angle) if order % 2 or not order else math.sin(angle)


_FUNCTIONS: Mapping[str, Callable[[int, float], float]] = {
    "chebyshev": _chebyshev,
    "taylor": lambda order, x: x**order,
    "legendre": _legendre,
    "fourier": _fourier,
}


def snapshot(learngene: Learngene, count: int) -> dict[str, Tensor]:
    """Stem and last norm, under ``stem.`` and ``tail.``, of the phase that reached ``count`` components."""
    phases = [n for n in _auxiliary.numbers_of(learngene.tensors, "phase") if n >= count]
    if phases:
        return learngene.group(f"phase.{phases[0]}")
    return {name: tensor for name, tensor in learngene.tensors.items() if name.startswith(("stem.", "tail."))}


def _group(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
