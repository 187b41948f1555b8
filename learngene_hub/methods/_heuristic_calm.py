"""How calm the gradients of each layer are while tasks follow each other, and which layers to keep for it.

rho of a unit (a transformer block, a convolution) is the share of its weights' gradients whose absolute value exceeds
sigma, the mean over the updates of an epoch. A unit whose rho settles as tasks accumulate holds what the tasks share.

Our readings. The released code counts signed gradients, g > sigma, with sigma fixed by hand for each data set; here it
is |g|, and sigma is by default the 0.90 quantile of |g| over all units in the first updates (at most EARLY). rho is
measured at SAMPLE weights of a unit, drawn once, or at all of them where there are no more. The paper's choice is made
by eye, the last three layers; the automatic one ("calmest") takes, for rho of each task the mean over its epochs,

    score = (first - late) + (peak - late),   0 unless both differences exceed 12 % of late,

with first and late the means over the first and the last quarter of the tasks and peak the largest rho, and keeps the
contiguous units of the largest sum of scores, the later ones among equals.

Source: Wang et al., "Learngene: From Open-World to Your Learning Task", AAAI 2022, arXiv:2106.06788, and its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from learngene_hub.data import seed_of
from learngene_hub.errors import SettingsError

EARLY = 32  # updates whose gradients give sigma
SAMPLE = 2**14  # weights of a unit
SHARE = 0.12  # of the late mean, that both drops must exceed
ROWS = 120  # epochs that are kept of a curve, at most
NUMBERS = 4000  # numbers that are kept of it, at most: half of what the header of a learngene may hold

Weights = Sequence[Sequence[Tensor]]  # of each unit its weights, (gradients in .grad)


@dataclass
class Meter:
    """Measures rho from the gradients that an update leaves behind."""

    seed: int
    sigma: float = 0.0  # 0: found in the first updates
    quantile: float = 0.9
    rows: list[list[float]] = field(default_factory=list)  # of each epoch, rho of each unit
    _early: list[list[Tensor]] = field(default_factory=list)
    _sums: list[float] = field(default_factory=list)
    _count: int = 0

    def add(self, weights: Weights, *, epoch_done: bool) -> None:
        """Counts one update; at the end of an epoch its row is written."""
        samples = [_sample(unit, seed_of("calmness", self.seed, place)) for place, unit in enumerate(weights)]
        if self.sigma:
            self._count_in(samples)
        else:
            self._early.append(samples)
            if len(self._early) == EARLY or epoch_done:
                self.sigma = _quantile(torch.cat([t for row in self._early for t in row]), self.quantile)
                for row in self._early:
                    self._count_in(row)
                self._early = []
        if epoch_done:
            self.rows.append([total / self._count for total in self._sums])
            self._sums, self._count = [], 0

    def _count_in(self, samples: Sequence[Tensor]) -> None:
        found = [float((sample > self.sigma).float().mean()) for sample in samples]
        self._sums = [a + b for a, b in zip(self._sums or [0.0] * len(found), found, strict=True)]
        self._count += 1


def _sample(unit: Sequence[Tensor], seed: int) -> Tensor:
    """|g| of a unit's weights, (n,) float32 on the CPU; a weight that got no gradient has 0."""
    flat = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in unit])
    if len(flat) > SAMPLE:
        flat = flat[torch.randint(len(flat), (SAMPLE,), generator=torch.Generator().manual_seed(seed)).to(flat.device)]
    return flat.detach().abs().float().cpu()


def _quantile(values: Tensor, share: float) -> float:
    """The smallest of the values that at least ``share`` of them do not exceed; above 0."""
    place = min(max(int(-(-share * len(values) // 1)), 1), len(values))
    return float(values.kthvalue(place).values) or torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Curve:
    """What was measured: rho (tasks, epochs, units), and sigma."""

    sigma: float
    rho: Tensor  # float64
    units: tuple[str, ...]  # names of the units, of the ancestor

    @classmethod
    def of(cls, meter: Meter, epochs: int, units: Sequence[str]) -> Curve:
        """What the meter has, of tasks of so many epochs each."""
        rows = torch.tensor(meter.rows, dtype=torch.float64)
        return cls(meter.sigma, rows.reshape(-1, epochs, len(units)), tuple(units))

    def tasks(self) -> Tensor:
        """rho of each task, the mean over its epochs: (tasks, units)."""
        return self.rho.mean(1)

    def facts(self) -> dict[str, Any]:
        """Plain JSON values for a provenance: at most ROWS rows of four decimals, fewer of many units; one per epoch,
        or else one per task (of more tasks than that, every so many)."""
        tasks, epochs, units = self.rho.shape
        most = max(1, min(ROWS, NUMBERS // units))
        per = "epoch" if tasks * epochs <= most else "task"
        rows = self.rho.flatten(0, 1) if per == "epoch" else self.tasks()
        rows = rows[:: -(-len(rows) // most)]
        return {
            "sigma": self.sigma,
            "tasks": tasks,
            "epochs": epochs,
            "row": per,
            "units": list(self.units),
            "rho": [[round(float(value), 4) for value in row] for row in rows],
            "score": [round(float(value), 4) for value in scores(self.tasks())],
        }


def scores(rho: Tensor) -> Tensor:
    """The score of each unit, (units,), of rho (tasks, units): how far it has come down, 0 unless far enough."""
    quarter = max(1, len(rho) // 4)
    first, late, peak = rho[:quarter].mean(0), rho[-quarter:].mean(0), rho.max(0).values
    settled = (first - late > SHARE * late) & (peak - late > SHARE * late)
    return torch.where(settled, (first - late) + (peak - late), torch.zeros(()).to(rho))


def calmest(score: Tensor, count: int, *, first: int = 0) -> range:
    """The ``count`` contiguous units, none before ``first``, whose scores sum to most; the later ones among equals.

    Raises:
        SettingsError: there are not so many.
    """
    if not 1 <= count <= len(score) - first:
        raise SettingsError(f"{count} units asked of {len(score) - first}; 1 to {len(score) - first} would work")
    starts = range(first, len(score) - count + 1)
    best = max(starts, key=lambda start: (round(float(score[start : start + count].sum()), 12), start))
    return range(best, best + count)
