"""What the rows of the advantages comparison say: per arm the four measures, as JSON and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

ARMS = ("auto", "random", "first", "last", "scratch", "ancestor")
EPOCHS = 12  # of every run outside of the grid


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    measure: str  # "curve" (an accuracy per epoch), "grid", "shots" (the last accuracy alone)
    arm: str
    lr: float
    decay: float
    shots: int  # training images per class
    epochs: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """What a run gave; a line of the CSV."""

    accuracies: str  # test accuracy after each measured epoch, per cent, with spaces between
    params: int
    seconds: float
    digest: str  # of the learngene that the arm was grown from
    machine: str

    @property
    def job(self) -> Job:
        return Job(**{field.name: getattr(self, field.name) for field in fields(Job)})

    @property
    def curve(self) -> list[float]:
        return [float(number) for number in self.accuracies.split()]

    @property
    def final(self) -> float:
        return self.curve[-1]


def summarise(rows: Sequence[Row], target: float) -> dict[str, Any]:
    """Everything that is said about the rows: per arm the four advantages, each with its values per seed."""
    newest = {row.arm: row.digest for row in rows}
    rows = list({row.job: row for row in rows if row.digest == newest[row.arm]}.values())
    return {
        "target": target,
        "machines": sorted({row.machine for row in rows}),
        "arms": {arm: _of_arm([row for row in rows if row.arm == arm], target) for arm in ARMS if arm in newest},
    }


def _of_arm(rows: Sequence[Row], target: float) -> dict[str, Any]:
    curves = [row for row in rows if row.measure == "curve"]
    epochs = [epochs_to(row.curve, target) for row in curves]
    grid: dict[int, list[float]] = {}
    for row in rows:
        if row.measure == "grid":
            grid.setdefault(row.seed, []).append(row.final)
    shots: dict[int, list[float]] = {}
    for row in rows:
        if row.measure != "grid":
            shots.setdefault(row.shots, []).append(row.final)
    return {
        "epochs_to_target": epochs,
        "curve": [round(statistics.fmean(at), 2) for at in zip(*(row.curve for row in curves), strict=True)],
        "grid_spread": [round(max(cells) - min(cells), 2) for cells in grid.values()],
        "grid_mean": [round(statistics.fmean(cells), 2) for cells in grid.values()],
        "grid_best": [max(cells) for cells in grid.values()],
        "fixed_budget": [row.final for row in curves],
        "by_shots": {str(n): values for n, values in sorted(shots.items())},
        "params": rows[0].params,
    }


def epochs_to(curve: Sequence[float], target: float) -> int | None:
    """The first epoch, from 1, after which the accuracy is at least ``target``; None: it never is."""
    return next((epoch for epoch, accuracy in enumerate(curve, 1) if accuracy >= target), None)


def as_text(summary: dict[str, Any]) -> str:
    """A table for people: means over the seeds, and the deviation where there are several."""
    target = f"{summary['target']:g}"
    shots = sorted({int(n) for arm in summary["arms"].values() for n in arm["by_shots"]})
    head = ["arm", f"epochs to {target} %", "spread", "grid mean", "grid best", f"{EPOCHS} epochs"]
    lines = [" | ".join([*head, *(f"{n}/class" for n in shots), "params"])]
    for name, arm in summary["arms"].items():
        reached = [epoch for epoch in arm["epochs_to_target"] if epoch is not None]
        runs = len(arm["epochs_to_target"])
        said = f"{statistics.fmean(reached):.1f}" if reached else "never"
        epochs = said if len(reached) in (0, runs) else f"{said} ({len(reached)} of {runs})"
        cells = [_said(arm[key]) for key in ("grid_spread", "grid_mean", "grid_best", "fixed_budget")]
        cells += [_said(arm["by_shots"].get(str(n), [])) for n in shots]
        lines.append(" | ".join([name, epochs, *cells, f"{arm['params']:,}"]))
    return "\n".join(lines)


def _said(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"
