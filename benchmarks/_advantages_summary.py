"""What the rows of the advantages comparison say: per arm the four measures, paired differences, a table and a plot.

A paired difference is taken between two runs of one task; its standard error is the deviation of the differences over
sqrt(n). A run that never reaches the target accuracy counts as one epoch more than there were.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ARMS = ("auto", "random", "first", "last", "published", "scratch", "ancestor")
MEASURES = ("curve", "shots", "grid", "probe")
EPOCHS = 12  # of every run outside of the grid
BASES = ("random", "scratch")  # what every arm is paired with
COLOURS = {
    "auto": "#0b6e4f",
    "random": "#d08c1d",
    "first": "#8a6fae",
    "last": "#c26e6e",
    "published": "#3b6ea8",
    "scratch": "#999999",
    "ancestor": "#333333",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    measure: (
        str  # "curve" (an accuracy per epoch), "grid", "shots" (the last accuracy alone), "probe" (before training)
    )
    arm: str
    lr: float
    decay: float
    shots: int  # training images per class
    epochs: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """What a run gave; a line of the CSV."""

    # Test accuracy after each measured epoch, per cent, with spaces between; of a probe of class token, patch tokens.
    accuracies: str
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
    rows = without_half_grids(list({row.job: row for row in rows if row.digest == newest[row.arm]}.values()))
    return {
        "target": target,
        "machines": sorted({row.machine for row in rows}),
        "arms": {arm: _of_arm([row for row in rows if row.arm == arm], target) for arm in ARMS if arm in newest},
        "minus": {
            f"{arm} - {base}": differences(rows, arm, base, target)
            for base in BASES
            for arm in ARMS
            if arm != base and arm in newest and base in newest
        },
    }


def without_half_grids(rows: Sequence[Row]) -> list[Row]:
    """The rows, but for those of a task's grid that has fewer cells than there are: their spread would be too small."""
    cells = {(row.lr, row.decay) for row in rows if row.measure == "grid"}
    there = Counter((row.arm, row.seed) for row in rows if row.measure == "grid")
    return [row for row in rows if row.measure != "grid" or there[row.arm, row.seed] == len(cells)]


def differences(rows: Sequence[Row], arm: str, base: str, target: float) -> dict[str, Any]:
    """Of two arms, paired over tasks: each of the four measures; fewer epochs and a smaller spread are better."""
    one, other = (_by_seed([row for row in rows if row.arm == name], target) for name in (arm, base))
    found = {}
    for measure in sorted(one.keys() & other.keys()):
        gaps = [
            one[measure][seed] - other[measure][seed] for seed in sorted(one[measure].keys() & other[measure].keys())
        ]
        if gaps:
            error = round(statistics.stdev(gaps) / math.sqrt(len(gaps)), 2) if len(gaps) > 1 else None
            found[measure] = {"mean": round(statistics.fmean(gaps), 2), "se": error, "n": len(gaps)}
    return found


def _by_seed(rows: Sequence[Row], target: float) -> dict[str, dict[int, float]]:
    """Measure -> task -> number, of one arm."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.measure == "curve":
            found.setdefault("epochs_to_target", {})[row.seed] = epochs_to(row.curve, target) or len(row.curve) + 1
            found.setdefault("fixed_budget", {})[row.seed] = row.final
        if row.measure == "shots":
            found.setdefault(f"shots_{row.shots}", {})[row.seed] = row.final
        if row.measure == "probe":
            found.setdefault("probe_class_token", {})[row.seed] = row.curve[0]
            found.setdefault("probe_patch_tokens", {})[row.seed] = row.curve[1]
    cells = [row for row in rows if row.measure == "grid"]
    of_grid: dict[str, Callable[[list[float]], float]] = {
        "grid_spread": lambda values: max(values) - min(values), "grid_mean": statistics.fmean, "grid_best": max,
    }  # fmt: skip
    for name, value in of_grid.items():
        for seed in sorted({row.seed for row in cells}):
            found.setdefault(name, {})[seed] = value([row.final for row in cells if row.seed == seed])
    return found


def _of_arm(rows: Sequence[Row], target: float) -> dict[str, Any]:
    curves = [row for row in rows if row.measure == "curve"]
    epochs = [epochs_to(row.curve, target) for row in curves]
    grid: dict[int, list[float]] = {}
    for row in rows:
        if row.measure == "grid":
            grid.setdefault(row.seed, []).append(row.final)
    shots: dict[int, list[float]] = {}
    for row in rows:
        if row.measure in ("curve", "shots"):
            shots.setdefault(row.shots, []).append(row.final)
    return {
        "epochs_to_target": epochs,
        "curve": [round(statistics.fmean(at), 2) for at in zip(*(row.curve for row in curves), strict=True)],
        "grid_spread": [round(max(cells) - min(cells), 2) for cells in grid.values()],
        "grid_mean": [round(statistics.fmean(cells), 2) for cells in grid.values()],
        "grid_best": [max(cells) for cells in grid.values()],
        "fixed_budget": [row.final for row in curves],
        "by_shots": {str(n): values for n, values in sorted(shots.items())},
        "probe": {
            token: [row.curve[place] for row in rows if row.measure == "probe"]
            for place, token in enumerate(("class_token", "patch_tokens"))
        },
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
    lines = [" | ".join([*head, *(f"{n}/class" for n in shots), "probe cls", "patches", "params"])]
    for name, arm in summary["arms"].items():
        reached = [epoch for epoch in arm["epochs_to_target"] if epoch is not None]
        runs = len(arm["epochs_to_target"])
        said = f"{statistics.fmean(reached):.1f}" if reached else "never"
        epochs = said if len(reached) in (0, runs) else f"{said} ({len(reached)} of {runs})"
        cells = [_said(arm[key]) for key in ("grid_spread", "grid_mean", "grid_best", "fixed_budget")]
        cells += [_said(arm["by_shots"].get(str(n), [])) for n in shots]
        cells += [_said(arm["probe"][token]) for token in ("class_token", "patch_tokens")]
        lines.append(" | ".join([name, epochs, *cells, f"{arm['params']:,}"]))
    return "\n".join([*lines, "", *(_paired(name, found) for name, found in summary["minus"].items())])


def _paired(name: str, found: dict[str, Any]) -> str:
    """A line of the paired differences."""
    told = [f"{key} {gap['mean']:+.1f} +- {gap['se'] or 0:.1f} ({gap['n']})" for key, gap in found.items()]
    return f"{name}: {', '.join(told)}"


def _said(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def draw(summary: dict[str, Any], path: Path) -> None:
    """Four panels: accuracy over epochs with the target, the grid's range, accuracy after the last epoch, by images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = summary["arms"]
    figure, ((curves, grid), (budget, shots)) = pyplot.subplots(2, 2, figsize=(11, 7.4))
    ticks = sorted({int(n) for arm in arms.values() for n in arm["by_shots"]})
    for name, arm in arms.items():
        curves.plot(range(1, len(arm["curve"]) + 1), arm["curve"], color=COLOURS[name], label=name, linewidth=1.6)
        counts = {int(n): statistics.fmean(values) for n, values in arm["by_shots"].items()}
        shots.plot(list(counts), list(counts.values()), "o-", color=COLOURS[name], markersize=4)
    curves.axhline(summary["target"], color="#bbbbbb", linewidth=0.8, linestyle="--")
    curves.set(title=f"1  accuracy over epochs; the target is {summary['target']:g} %", xlabel="epochs of 5 updates")
    shots.set(title="4  accuracy by training images per class", xlabel="images per class", xscale="log")
    shots.set_xticks(ticks, [str(n) for n in ticks])
    shots.minorticks_off()
    _bars(grid, {name: arm["grid_spread"] for name, arm in arms.items() if arm["grid_spread"]})
    grid.set(title="2  spread over the grid (best less worst cell), points: less is better")
    _bars(budget, {name: arm["fixed_budget"] for name, arm in arms.items() if arm["fixed_budget"]})
    budget.set(title=f"3  accuracy after {EPOCHS} epochs, %; bars: one deviation over tasks")
    for panel in (curves, grid, budget, shots):
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(10)
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(panel: Any, values: dict[str, list[float]]) -> None:
    """A point per task, their mean, and a bar of one deviation, of each arm."""
    for place, (name, each) in enumerate(values.items()):
        deviation = statistics.stdev(each) if len(each) > 1 else 0.0
        panel.errorbar(place, statistics.fmean(each), yerr=deviation, fmt="s", color=COLOURS[name], capsize=3)
        panel.plot([place + 0.15] * len(each), each, ".", color=COLOURS[name], alpha=0.5)
    panel.set_xticks(range(len(values)), list(values))
