"""Size by budget: which descendant within reach is taken where a budget leaves depth or width open. Private to
``factory.py``.

Whatever depth, width or heads are given beside a budget stay; the rest is chosen among the shapes within reach that
keep every limit, as ``prefer`` says:

    "balanced"  the one of the best accuracy predicted from measured descendants (below)
    "depth"     the deepest, of these the widest
    "width"     the widest, of these the deepest
    a function  shape -> a key: the one with the largest

The descendants of a pool are networks of their own with measured accuracies, and "balanced" takes the most accurate, or
the largest where one of them was not measured.

The balanced rule: from the ancestor's own size on, the log-odds of a descendant's accuracy fall by 0.43 with each
halving of the depth and by 1.33 with each halving of the width, rise by 0.19 with each doubling of the width, and fall
by 0.70 with each doubling of the depth. So a small budget cuts the depth first, and a large one goes into width at the
ancestor's depth.

The evidence (``benchmarks/size_rule.py``): 288 runs of 13 shapes at 64 px, after 3 or 5 epochs of tuning, of nine ways
to grow them, all from one ancestor (DeiT-Tiny, 12x192). Under a budget of each measured shape's parameters, with slopes
fitted without the arm in question, the rule takes the most accurate shape 39 times of 51 and loses 0.47 points in the
mean; taking the deepest loses 9.6, the widest 5.0, the most parameters 0.5. Below the ancestor's size all nine agree.
Above it there are five shapes of two arms, of which one is deeper, 16x192, so that -0.70 +- 0.85 and 0.19 +- 0.19 are
little more than a sign; longer tuning may favour larger sizes. Blocks that 16x192 added wrote their whole update then;
as lsamd-base adds them now, "identity", 24x192 is nearly level with 12x192 (results/deep.csv). Of CNNs nothing was
measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from learngene_hub import _latency
from learngene_hub._check import is_number
from learngene_hub._folder import saved_bytes
from learngene_hub._planning import Sizes, plan_of, with_settings
from learngene_hub.errors import BudgetError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import get_method, is_listing
from learngene_hub.shape import Shape

Prefer = Literal["balanced", "depth", "width"] | Callable[[Shape], Any]
PREFERENCES = ("balanced", "depth", "width")
MAX_PARAMS = 2_000_000_000  # of a descendant, where no other limit is asked
MOST = 512  # depths, and widths, that are looked at: a stranger's file may claim any number

# Log-odds of accuracy per doubling: depth below and above the ancestor's, width below and above (size_rule.json).
SLOPES = (0.43, -0.70, 1.33, 0.19)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a descendant may cost at most; None: no limit.

    Raises:
        ShapeError: a limit that nothing can keep.
    """

    max_params: float | None = None  # parameters
    max_flops: float | None = None  # of one image's forward
    max_bytes: float | None = None  # of the file of its weights, once saved in ``dtype``
    max_latency_ms: float | None = None  # of one image's forward in ``dtype`` on ``device``, milliseconds
    dtype: torch.dtype | None = None  # float32 where left out
    device: torch.device | str | None = None  # the CPU where left out
    again: bool = False  # measure latencies even where they were measured before
    _known: dict[Shape, _latency.Measured] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, limit in self.limits():
            if not is_number(limit) or limit <= 0 or (limit < 1 and name != "max_latency_ms"):
                least = "above 0" if name == "max_latency_ms" else "at least 1"
                raise ShapeError(f"{name} {limit!r} asked; it is a number, {least}")

    def limits(self) -> list[tuple[str, float]]:
        """Those that are asked, by name."""
        names = ("max_params", "max_flops", "max_bytes", "max_latency_ms")
        return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]

    def cost(self, name: str, shape: Shape) -> float:
        """What ``shape`` takes of that which the limit ``name`` is of."""
        if name == "max_params":
            return shape.params()
        if name == "max_flops":
            return shape.flops()
        return self.nbytes(shape) if name == "max_bytes" else self.measured(shape).ms

    def nbytes(self, shape: Shape) -> int:
        """Bytes of the file of the weights."""
        return _nbytes(shape, self.dtype or torch.float32)

    def measured(self, shape: Shape) -> _latency.Measured:
        """Latency and peak memory; the same of one shape, however often it is asked.

        Raises:
            SettingsError: there is no such device here.
        """
        if shape not in self._known:
            self._known[shape] = _latency.measured(shape, device=self.device, dtype=self.dtype, again=self.again)
        return self._known[shape]

    def allows(self, shape: Shape) -> bool:
        """Whether every limit is kept, the cheaper ones to find out first."""
        if self.max_params is None and shape.params() > MAX_PARAMS:
            return False
        if self.max_bytes is not None and shape.bytes(self.dtype or torch.float32) > self.max_bytes:
            return False  # the file is larger still
        return all(self.cost(name, shape) <= limit for name, limit in self.limits())

    def require(self, shape: Shape, least: int = 1) -> None:
        """Nothing, where ``shape``, which leaves nothing to choose, keeps every limit; ``least`` is the least depth.

        Raises:
            BudgetError: it does not.
        """
        shape.require_budget(MAX_PARAMS if self.max_params is None else int(self.max_params), least)
        for name, limit in self.limits():
            if (cost := self.cost(name, shape)) > limit:
                raise BudgetError(
                    f"{shape} asked: {_said(name, cost)}; at most {_said(name, limit)} asked too: without depth or "
                    "width, the best that fits is taken"
                )


@lru_cache(maxsize=1024)
def _nbytes(shape: Shape, dtype: torch.dtype) -> int:
    state = shape.build(device="meta").state_dict()
    return saved_bytes({name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()})


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A descendant within reach."""

    shape: Shape
    asked: dict[str, Any]  # what ``from_learngene`` is given for it: depth and width, or settings
    accuracy: float | None = None  # per cent, measured at extraction; of a pool's descendants alone


def choose(learngene: Learngene, sizes: Sizes, budget: Budget, prefer: Prefer = "balanced") -> Shape:
    """The shape of these sizes; those left out are the native ones, or beside a budget chosen, as the module says.

    Raises:
        ShapeError: a size outside the learngene's reach.
        BudgetError: what is asked is beyond the budget, or everything within reach is.
        SettingsError: an unknown ``prefer``, or a device that is not there.
    """
    require_preference(prefer)
    fixed = sizes.depth is not None and sizes.width is not None
    if not budget.limits() or fixed:
        shape = plan_of(learngene, sizes)
        if not is_listing(get_method(learngene.method, learngene.settings)) or budget.allows(shape):
            budget.require(shape, learngene.reach.depths[0])
            return shape
    return best(learngene, fitting(learngene, sizes, budget), budget, prefer).shape


def best(learngene: Learngene, candidates: Sequence[Candidate], budget: Budget, prefer: Prefer) -> Candidate:
    """The one that ``prefer`` takes of ``fitting``; of equal ones the smallest."""
    key = _key(learngene, candidates, prefer)
    ranked = sorted(candidates, key=lambda each: each.shape.params())
    ranked.sort(key=lambda each: key(each), reverse=True)
    # Of those in the middle, whose latency was not measured, the first that keeps its limit when it is.
    return next((each for each in ranked if budget.allows(each.shape)), ranked[0])


def fitting(learngene: Learngene, sizes: Sizes, budget: Budget) -> list[Candidate]:
    """Every descendant of these sizes within reach that keeps the budget, narrow before wide, shallow before deep.

    Of plain ViTs, whose costs rise with depth and with width, only those at the edge are measured and built.

    Raises:
        ShapeError: none has these sizes.
        BudgetError: none keeps the budget; the message names the smallest.
    """
    method = get_method(learngene.method, learngene.settings)
    if is_listing(method):
        everything = _listed(learngene, sizes, method.descendants(learngene))
        found = [each for each in everything if budget.allows(each.shape)]
        if not found:
            raise _nothing(everything, budget)
        return found
    plain = learngene.shape.kind == "vit" and learngene.reach.heads is None
    found, smallest = [], []
    hindmost: int | None = None  # so many depths fitted at the width before: no more can at a larger one
    for column in _columns(learngene, sizes):
        smallest += column[:1]
        if plain:
            column = column[:hindmost]
            hindmost = bisect_left(column, True, key=lambda each: not budget.allows(each.shape))
            found += column[:hindmost]
            if not hindmost:
                break
        else:
            found += [each for each in column if budget.allows(each.shape)]
    if not found:
        raise _nothing(smallest, budget)
    return found


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those of which no other is as deep and as wide; of a pool, as accurate and as small, where all were measured."""
    if any(each.asked.keys() == {"settings"} and each.accuracy is None for each in candidates):
        return list(candidates)
    if all(each.accuracy is None for each in candidates):  # of each width the deepest: a stranger's reach may be large
        candidates = list({each.shape.width: each for each in sorted(candidates, key=lambda c: c.shape.depth)}.values())

    def worth(each: Candidate) -> tuple[float, float]:
        shape = each.shape
        return (shape.depth, shape.width) if each.accuracy is None else (each.accuracy, -shape.params())

    def covered(each: Candidate, other: Candidate) -> bool:
        (a, b), (c, d) = worth(each), worth(other)
        return (a, b) != (c, d) and c >= a and d >= b

    return [each for each in candidates if not any(covered(each, other) for other in candidates)]


def require_preference(prefer: object) -> None:
    """Nothing, where ``prefer`` is a name there is, or a function.

    Raises:
        SettingsError: it is neither.
    """
    if not callable(prefer) and prefer not in PREFERENCES:
        raise SettingsError(f"prefer {prefer!r} asked; there are {', '.join(PREFERENCES)}, or a function of a shape")


def predicted(native: Shape, shape: Shape) -> float:
    """Log-odds of the accuracy of ``shape`` over that of the ancestor's own size, as the module says."""
    deeper, wider = math.log2(shape.depth / native.depth), math.log2(shape.width / native.width)
    amounts = (min(deeper, 0), max(deeper, 0), min(wider, 0), max(wider, 0))
    return sum(slope * amount for slope, amount in zip(SLOPES, amounts, strict=True))


def _key(learngene: Learngene, candidates: Sequence[Candidate], prefer: Prefer) -> Callable[[Candidate], Any]:
    """What ``prefer`` makes large."""
    if not isinstance(prefer, str):
        return lambda each: prefer(each.shape)
    if prefer == "depth":
        return lambda each: (each.shape.depth, each.shape.width)
    if prefer == "width":
        return lambda each: (each.shape.width, each.shape.depth)
    if all(each.accuracy is not None for each in candidates):
        return lambda each: each.accuracy
    if is_listing(get_method(learngene.method, learngene.settings)):
        return lambda each: each.shape.params()
    return lambda each: predicted(learngene.shape, each.shape)


def _columns(learngene: Learngene, sizes: Sizes) -> Iterator[list[Candidate]]:
    """For each width within reach the descendants of these sizes, shallow before deep.

    Raises:
        ShapeError: there are none at any width.
    """
    (shallow, deep), (narrow, wide, step) = learngene.reach.depths, learngene.reach.widths
    widths = range(narrow, wide + 1, step)[:MOST] if sizes.width is None else [sizes.width]
    depths = range(shallow, deep + 1)[:MOST] if sizes.depth is None else [sizes.depth]
    refused: ShapeError | None = None
    some = False
    for width in widths:
        column = []
        for depth in depths:
            try:
                shape = plan_of(learngene, replace(sizes, depth=depth, width=width))
            except ShapeError as error:
                refused = error
            else:
                column.append(Candidate(shape=shape, asked={"depth": depth, "width": width}))
        if column:
            some = True
            yield column
    if refused is not None and not some:
        raise refused


def _listed(
    learngene: Learngene, sizes: Sizes, descendants: Sequence[tuple[dict[str, Any], float | None]]
) -> list[Candidate]:
    """The descendants of a pool that have these sizes.

    Raises:
        ShapeError: none has.
    """
    found = []
    for settings, accuracy in descendants:
        try:
            shape = plan_of(with_settings(learngene, settings), sizes)
        except ShapeError:
            continue
        found.append(Candidate(shape=shape, asked={"settings": settings}, accuracy=accuracy))
    if not found:
        plan_of(learngene, sizes)  # says why
        raise ShapeError(f"{sizes} asked; no descendant of this pool has them")
    return found


def _nothing(candidates: Sequence[Candidate], budget: Budget) -> BudgetError:
    """What is said where none of ``candidates`` keeps the budget."""
    smallest = min((each.shape for each in candidates), key=lambda shape: shape.params())
    smallest.require_budget(MAX_PARAMS)
    limits = budget.limits()
    beyond = [(name, budget.cost(name, smallest)) for name, limit in limits if budget.cost(name, smallest) > limit]
    asked = ", ".join(_said(name, limit) for name, limit in limits)
    has = ", ".join(_said(name, cost) for name, cost in beyond)
    works = ", ".join(f"{name}={math.ceil(cost)}" for name, cost in beyond)
    return BudgetError(f"at most {asked} asked; the smallest in reach, {smallest}, has {has}: {works} would work")


def _said(name: str, amount: float) -> str:
    """An amount in the unit of its limit."""
    if name == "max_latency_ms":
        return f"{amount:,.3g} ms"
    unit = {"max_params": "parameters", "max_flops": "FLOPs", "max_bytes": "bytes"}[name]
    return f"{math.floor(amount):,} {unit}"
