"""TALS: from few images of a task, which entries of a pool fit, and how much of each. Private to ``pool.py``.

1. Shortlist, from the images alone: the task's key against those of the entries (``methods/_adaptive_match.py``). Where
   the task lies farther from the combination than 95 % of samples of the entries' own data do, nothing is selected, and
   the anchor alone is left. The samples have as many images as the task; where it has labels at most SAMPLE (our
   change: samples of a hundred images lie so near their own key that every task but more of the same data would be
   refused, while held-out labels tell in the second stage whether an increment helps).
2. Amounts, where there are labels (``_pool_amounts.py``): a short training of the weights and a head, from
   s times the shares, s by cross-validation; nothing, where the anchor alone does as well (our reading). Without labels
   the weights are half of the shares.

The same images and seed give the same selection. Source: our reading of TALS, see ``methods/adaptive``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learngene_hub import _pool_features
from learngene_hub._check import is_number, require_int
from learngene_hub._pool_amounts import amounts
from learngene_hub._pool_baselines import simple
from learngene_hub.data import Images, seed_of
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.methods._adaptive_key import COUNTS, Key, key_of
from learngene_hub.methods._adaptive_match import MAX_K, matched

if TYPE_CHECKING:
    from learngene_hub.pool import Pool

TOLERANCE = 1.0  # times the 95th percentile: beyond it a task is of another kind
SAMPLE = COUNTS[0]  # images of the samples that a labelled task of as many, or more, may lie as far as
UNLABELLED = 0.5  # of the shares, where there are no labels
MOST = 1000  # images of a task that are looked at


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """An entry of a selection."""

    name: str
    sha256: str
    weight: float  # how much of the increment is added to the anchor
    share: float  # of the task's images, by what they look like


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What fits a task: ``Pool.merge`` and ``Descendant.from_learngene`` take it. Without entries it is the anchor."""

    anchor: str  # sha256 of the pool's anchor
    pool: str  # digest of the pool's manifest
    entries: tuple[Chosen, ...]  # the most similar first
    abstained: bool  # the task is like none of the pool's data
    residual: float  # how far the task lies from the combination of the keys
    threshold: float  # the 95th percentile of that of samples of the entries' own data
    images: int  # of the task that were looked at
    labelled: bool
    # s -> cross-entropy of held-out images, "0" of the anchor alone; by another rule the score of each entry.
    scores: Mapping[str, float] = field(default_factory=dict)
    rule: str = "tals"
    seconds: float = field(default=0.0, compare=False)

    @property
    def sampled(self) -> int:
        """Images of each of the samples that the threshold is of."""
        return min(self.images, SAMPLE) if self.labelled else self.images

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "entries": [asdict(chosen) for chosen in self.entries]}


@dataclass(frozen=True)
class Shortlist:
    """What the images alone say: sha256 of entries -> shares that sum to 1, the most similar first."""

    shares: dict[str, float]
    residual: float
    threshold: float
    abstained: bool


def select(
    pool: Pool,
    images: Images | Tensor,
    labels: Tensor | None,
    *,
    unlabelled: bool,
    k: int | None,
    tolerance: float,
    rule: str,
    seed: int,
) -> Selection:
    """The selection for a task; see ``Pool.select``."""
    began = time.perf_counter()
    task = _task(pool, images, labels, unlabelled, seed)
    labelled = not unlabelled and (labels is not None or isinstance(images, Images))
    _require(pool, task, labelled)
    most = k if k is not None else 1 if pool.manifest.entry == "blocks" or pool.manifest.topology == "chain" else 3
    _require_k(pool, most)
    if not (is_number(tolerance) and tolerance > 0):
        raise SettingsError(f"tolerance {tolerance!r} asked; it is a number above 0, such as 1")
    model = _pool_features.seeing(pool.anchor, pool.manifest.key)
    seen_ND = _pool_features.features(model, task, pool.anchor)
    key = key_of([_pool_features.directions(seen_ND)], pool.manifest.key, measure=False)
    found = shortlist(pool, key, k=most, tolerance=tolerance, sample=SAMPLE if labelled else key.count)
    weights, scores = {sha256: UNLABELLED * share for sha256, share in found.shares.items()}, dict[str, float]()
    if rule != "tals":
        weights, scores = simple(pool, rule, model, task, key, labelled=labelled)
    elif found.abstained:
        weights = {}
    elif labelled:
        weights, scores = amounts(pool, model, task, seen_ND, found.shares, seed)
    return Selection(
        anchor=pool.manifest.anchor.sha256,
        pool=pool.manifest.digest,
        entries=tuple(
            Chosen(
                name=pool.row(sha256).name, sha256=sha256, weight=weight, share=round(found.shares.get(sha256, 0), 6)
            )
            for sha256, weight in ((sha256, round(weights[sha256], 6)) for sha256 in weights)
        ),
        abstained=found.abstained and rule == "tals",
        rule=rule,
        residual=round(found.residual, 6),
        threshold=round(found.threshold, 6),
        images=len(task),
        labelled=labelled,
        scores=scores,
        seconds=round(time.perf_counter() - began, 3),
    )


def shortlist(pool: Pool, key: Key, *, k: int, tolerance: float, sample: int = SAMPLE) -> Shortlist:
    """The entries whose keys make up that of a task; of each entry its key is kept, and nothing else.

    A task is refused beyond ``tolerance`` times what samples of its count, at most ``sample``, lie from their keys.
    """
    keys = {row.sha256: Key.of(learngene.tensors) for row, learngene in pool.entries()}
    names = list(keys)

    def left(chosen: Iterable[int], count: int) -> float:
        """How far 95 % of samples of so many images of these entries lie from their keys, at most."""
        return max(keys[names[t]].residual_at(0.95, count) for t in chosen)

    means = torch.stack([one.mean for one in keys.values()])
    shares, residual = matched(key.mean, means, k, lambda chosen: left(chosen, key.count))
    threshold = left(shares, min(key.count, sample))
    return Shortlist(
        {names[t]: share for t, share in sorted(shares.items(), key=lambda item: -item[1])},
        residual,
        threshold,
        residual > tolerance * threshold,
    )


def _task(pool: Pool, images: Images | Tensor, labels: Tensor | None, unlabelled: bool, seed: int) -> Images:
    """The task's images, at most MOST of them.

    Raises:
        DataError: they cannot be used.
        SettingsError: labels are given twice, or with ``unlabelled``.
    """
    if labels is not None and (unlabelled or isinstance(images, Images)):
        beside = "unlabelled=True" if unlabelled else "images that have their own"
        raise SettingsError(f"labels asked beside {beside}; give one of them")
    if not isinstance(images, Images):
        if labels is None:
            labels, classes = torch.zeros(len(images), dtype=torch.int64), 1
        else:
            classes = int(labels.max()) + 1 if len(labels) else 1
        images = Images(images, labels, tuple(map(str, range(classes))), "task")
    _pool_features.require_images(images, pool.anchor, pool.manifest.key)
    if len(images) <= MOST:
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_of("task", seed)))
    return images.subset(order[:MOST].sort().values)


def _require(pool: Pool, task: Images, labelled: bool) -> None:
    if not len(pool):
        raise SettingsError("the pool is empty; `learngene pool add` puts entries into it")
    if labelled and len(task) < len(task.classes):
        raise DataError(
            f"{task.name} has {len(task)} images of {len(task.classes)} classes; at least one of each would work, or "
            "the images without their labels (--unlabelled)"
        )


def _require_k(pool: Pool, k: int) -> None:
    require_int("k", k, at_least=1, error=SettingsError)
    if k > MAX_K:
        raise SettingsError(f"k {k} asked; {MAX_K} is the most that works")
    if k > 1 and (pool.manifest.entry == "blocks" or pool.manifest.topology == "chain"):
        kind = (
            "entries are whole blocks" if pool.manifest.entry == "blocks" else "entries stand on each other in a chain"
        )
        raise SettingsError(f"k {k} asked of a pool whose {kind}; k=1 would work")
