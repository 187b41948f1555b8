"""What the rows of the transfer comparison say: means, paired differences, a table and a plot.

The number of a run is its accuracy after the last epoch. A paired difference is taken between two runs of one shape,
set and seed, so what a cell is worth by itself cancels. Its standard error is the deviation of the differences over
sqrt(n), as if the n cells were independent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from _arms import ARMS, Row

from learngene_hub._compare_summary import spread

MARKS = {  # arm -> colour, marker
    "rows": ("#3b6ea8", "s"),
    "random": ("#999999", "x"),
    "lsamd-base": ("#0b6e4f", "o"),
    "base-even": ("#d08c1d", "^"),
    "base-frequent": ("#d08c1d", "^"),
}
OTHER_MARKS = (
    ("#7fbf9f", "D"),
    ("#8fb3d9", "v"),
    ("#c26e6e", "P"),
    ("#8a6fae", "X"),
    ("#b59a3c", "<"),
    ("#5c8a8a", ">"),
)
Cell = tuple[str, str, int]  # shape, set, seed


def current(rows: Iterable[Row]) -> list[Row]:
    """One row per job: the last, and only if it was made from what the last row of its kind was made from."""
    rows = list(rows)
    newest = {_kind(row.arm): row.digest for row in rows}
    return list({row.job: row for row in rows if row.digest == newest[_kind(row.arm)]}.values())


def _kind(arm: str) -> str:
    return "learngene" if ARMS[arm].source == "learngene" and not ARMS[arm].variant else arm


def cells(rows: Iterable[Row]) -> dict[str, dict[Cell, float]]:
    """arm -> (shape, set, seed) -> accuracy after the last epoch."""
    found: dict[str, dict[Cell, float]] = {}
    for row in rows:
        found.setdefault(row.arm, {})[row.shape, row.set, row.seed] = row.epoch_3
    return {arm: found[arm] for arm in ARMS if arm in found}


def _of_cell(runs: dict[Cell, float], shape: str, data: str) -> list[float]:
    return [value for cell, value in runs.items() if cell[:2] == (shape, data)]


def rounded(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None of a single one) and number, to two places."""
    found = spread(values)
    return found | {key: value and round(value, 2) for key, value in found.items() if key != "n"}


def paired(one: dict[Cell, float], other: dict[Cell, float]) -> dict[str, Any] | None:
    """one - other over the cells that both have: mean, standard error, number, wins, losses. None without any."""
    differences = [one[cell] - other[cell] for cell in one if cell in other]
    if not differences:
        return None
    found = spread(differences)
    error = None if found["sd"] is None else found["sd"] / math.sqrt(len(differences))
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {"mean": found["mean"], "se": error, "n": len(differences), "wins": wins, "losses": losses}


def paired_by(
    one: dict[Cell, float], other: dict[Cell, float], key: Callable[[Cell], str]
) -> dict[str, dict[str, Any] | None]:
    """``paired`` within each group of cells that ``key`` names."""
    groups = dict.fromkeys(key(cell) for cell in one)
    return {
        group: paired({cell: value for cell, value in one.items() if key(cell) == group}, other) for group in groups
    }


def summarise(rows: Iterable[Row], base: str = "rows") -> dict[str, Any]:
    """Everything that is said about the rows, JSON; the arms are compared with ``base``."""
    kept = current(rows)
    found = cells(kept)
    shapes = dict.fromkeys(row.shape for row in sorted(kept, key=lambda row: row.params))
    sets = dict.fromkeys(row.set for row in kept)
    per_cell = [
        {"shape": shape, "set": data, "arms": arms}
        for shape in shapes
        for data in sets
        if (arms := {arm: spread(v) for arm, runs in found.items() if (v := _of_cell(runs, shape, data))})
    ]
    against = {}
    for arm in found:
        if arm == base or base not in found:
            continue
        one, other = found[arm], found[base]
        against[arm] = {
            "overall": paired(one, other),
            "per_shape": paired_by(one, other, lambda cell: cell[0]),
            "per_set": paired_by(one, other, lambda cell: cell[1]),
            "per_shape_and_set": paired_by(one, other, lambda cell: f"{cell[0]} {cell[1]}"),
        }
    return {
        "number": "test accuracy after epoch 3, per cent",
        "runs": len(kept),
        "precision": sorted({row.precision for row in kept}),
        "numerics": {arm: sorted({row.numerics for row in kept if row.arm == arm}) for arm in found},
        "machines": sorted({row.machine for row in kept}),
        "digests": {arm: next(row.digest for row in kept if row.arm == arm) for arm in found},
        "overall": {arm: spread(list(runs.values())) for arm, runs in found.items()},
        "base": base,
        f"minus_{base}": against,
        "cells": per_cell,
    }


def as_text(summary: dict[str, Any]) -> str:
    """The summary for people."""
    arms = list(summary["overall"])
    lines = [f"{'shape':>7} {'set':<12}" + "".join(f"{arm:>18}" for arm in arms)]
    for cell in summary["cells"]:
        lines.append(
            f"{cell['shape']:>7} {cell['set']:<12}" + "".join(f"{_said(cell['arms'].get(a)):>18}" for a in arms)
        )
    lines.append(f"{'all':>7} {'':<12}" + "".join(f"{_mean(summary['overall'][arm]):>18}" for arm in arms))
    for arm, found in summary[f"minus_{summary['base']}"].items():
        if found["overall"] is None:
            continue
        lines += ["", f"{arm} - {summary['base']}, paired: {_difference(found['overall'])}"]
        for group in ("per_shape", "per_set"):
            lines += [f"  {name:<12} {_difference(each)}" for name, each in found[group].items() if each]
        means = [(each["mean"], name) for name, each in found["per_shape_and_set"].items() if each]
        lines.append("  most won:  " + ", ".join(f"{name} {d:+.1f}" for d, name in sorted(means)[::-1][:4] if d > 0))
        lines.append("  most lost: " + ", ".join(f"{name} {d:+.1f}" for d, name in sorted(means)[:4] if d < 0))
    if len({each for arm in summary["numerics"].values() for each in arm}) > 1:
        lines += ["", "These rows were not all made by one code on one kind of machine (column numerics):"]
        lines += [f"  {arm}: {', '.join(each)}" for arm, each in summary["numerics"].items()]
    return "\n".join(lines)


def _said(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    deviation = "" if found["sd"] is None else f" +- {found['sd']:.1f}"
    return f"{found['mean']:.1f}{deviation} ({found['n']})"


def _mean(found: dict[str, Any]) -> str:
    return f"{found['mean']:.2f} ({found['n']})"


def _difference(found: dict[str, Any]) -> str:
    error = "" if found["se"] is None else f" +- {found['se']:.2f}"
    return f"{found['mean']:+.2f}{error} over {found['n']}, {found['wins']} won, {found['losses']} lost"


def plot(summary: dict[str, Any], path: Path) -> None:
    """Accuracy per shape, a panel per set; and the paired differences per shape in the last panel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(cell["shape"] for cell in summary["cells"]))
    sets = list(dict.fromkeys(cell["set"] for cell in summary["cells"]))
    arms = list(summary["overall"])
    columns = min(len(sets) + 1, 2)
    lines = -(-(len(sets) + 1) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.2 * columns, 3.5 * lines), squeeze=False)
    panels = list(axes.flat)
    for axis, data in zip(panels, sets, strict=False):
        chosen = {cell["shape"]: cell["arms"] for cell in summary["cells"] if cell["set"] == data}
        for arm in arms:
            _points(axis, arm, arms, shapes, {s: chosen[s].get(arm) for s in shapes if s in chosen}, "sd")
        _dress(axis, shapes, f"{data}: test accuracy, %")
    base = summary["base"]
    for arm in [arm for arm in arms if arm != base and arm != "random"]:
        found = summary[f"minus_{base}"].get(arm)
        if found:
            _points(panels[len(sets)], arm, arms, shapes, found["per_shape"], "se")
    panels[len(sets)].axhline(0, color=_mark(base, arms)[0], lw=1.2)
    _dress(panels[len(sets)], shapes, f"difference from {base}, points (bars: standard error)")
    for axis in panels[len(sets) + 1 :]:
        axis.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False)
    figure.suptitle("After 3 epochs (bars: deviation over seeds)", x=0.01, ha="left", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _points(axis: Any, arm: str, arms: Sequence[str], shapes: Sequence[str], found: dict[str, Any], bar: str) -> None:
    """One arm's points, beside those of the others."""
    colour, marker = _mark(arm, arms)
    shift = 0.14 * (arms.index(arm) - (len(arms) - 1) / 2)
    kept = [(shapes.index(shape) + shift, each["mean"], each[bar] or 0.0) for shape, each in found.items() if each]
    if kept:
        x, y, height = zip(*kept, strict=True)
        axis.errorbar(x, y, yerr=height, color=colour, marker=marker, ls="none", ms=6, elinewidth=1.2, label=arm)


def _mark(arm: str, arms: Sequence[str]) -> tuple[str, str]:
    """Its own colour and marker, or the next of the others."""
    others = [each for each in arms if each not in MARKS]
    return MARKS[arm] if arm in MARKS else OTHER_MARKS[others.index(arm) % len(OTHER_MARKS)]


def _dress(axis: Any, shapes: Sequence[str], title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xticks(range(len(shapes)), shapes)
    axis.set_xlim(-0.6, len(shapes) - 0.4)
    axis.set_xticks([i + 0.5 for i in range(len(shapes) - 1)], minor=True)
    axis.grid(axis="y", color="#eeeeee")
    axis.grid(axis="x", which="minor", color="#eeeeee")
    axis.tick_params(which="minor", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def write_summary(rows: Iterable[Row], stem: Path, base: str = "rows", *, picture: bool = True) -> str:
    """Write STEM.json and, of few arms at many shapes, a picture STEM.png; returns the text."""
    summary = summarise(rows, base)
    if not summary["cells"]:
        raise SystemExit("no rows to summarise; run the comparison first")
    stem.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    if picture:
        plot(summary, stem.with_suffix(".png"))
    return as_text(summary)
