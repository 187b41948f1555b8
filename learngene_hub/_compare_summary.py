"""What the rows of a comparison say: means, spread, paired tests, cost. Private to ``comparison.py``.

A cell is a shape on a data set. A paired difference of two starts in a cell is the mean over its seeds of the
difference of two runs of one seed, so what the cell and the order of the images are worth cancels; its standard error
is over the seeds. Over cells: the mean of the cells' differences, their deviation over sqrt(cells) as standard error,
and the probability p of a mean that far from zero if the sign of every cell's difference were a coin's (a sign-flip
test, two-sided; all flips up to EXACT cells, else FLIPS drawn with seed 0). The cells of one data set are not
independent, so p is a lower bound.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from learngene_hub._compare_row import Row

EXACT = 16
FLIPS = 100_000
RANDOM = "random"
FREE = ("method", "full")  # kinds that may be training-free

Cell = tuple[str, str]  # shape, data set


def summarise(rows: Iterable[Row]) -> dict[str, Any]:
    """Everything that is said about the rows, for JSON; of runs that were made again the last counts."""
    kept = list({row.job: row for row in rows}.values())
    starts = list(dict.fromkeys(row.start for row in kept))
    by = {start: _cells([row for row in kept if row.start == start]) for start in starts}
    rivals = [start for start in starts if is_training_free(by[start])]
    return {
        "number": "test accuracy after the last epoch, per cent",
        "runs": len(kept),
        "starts": {start: _facts(by[start]) for start in starts},
        "training_free": rivals,
        "cells": _table(by),
        "differences": {one: {other: paired(by[one], by[other]) for other in starts if other != one} for one in starts},
        "against_random": {s: found for s in starts if (found := _after_one(by[s], by.get(RANDOM, {})))},
        "break_even": {s: found for s in starts if (found := _break_even(by[s], by.get(RANDOM, {})))},
        "recipes": sorted({row.recipe for row in kept}),
        "versions": sorted({row.versions for row in kept}),
        "machines": sorted({row.machine for row in kept}),
    }


def _cells(rows: Sequence[Row]) -> dict[Cell, dict[int, Row]]:
    """Cell -> seed -> run, the cells by parameters."""
    found: dict[Cell, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: row.params):
        found.setdefault((row.shape, row.data), {})[row.seed] = row
    return found


def is_training_free(cells: dict[Cell, dict[int, Row]]) -> bool:
    """Whether a start inherits and nothing was trained to make it."""
    row = _any(cells)
    return row.kind in FREE and row.extraction_flops == 0


def _any(cells: dict[Cell, dict[int, Row]]) -> Row:
    return next(iter(next(iter(cells.values())).values()))


def _facts(cells: dict[Cell, dict[int, Row]]) -> dict[str, Any]:
    """What a start is and costs."""
    runs = [row for seeds in cells.values() for row in seeds.values()]
    means = [statistics.fmean(row.accuracy for row in seeds.values()) for seeds in cells.values()]
    row = runs[0]
    return {
        "kind": row.kind,
        "cells": len(cells),
        "runs": len(runs),
        "accuracy": statistics.fmean(means),
        "stored_bytes": max(row.stored_bytes for row in runs),
        "extraction_images": _known(row.extraction_images),
        "extraction_flops": _known(row.extraction_flops),
        "extraction_seconds": _known(row.extraction_seconds),
        "train_flops": statistics.fmean(row.train_flops for row in runs),
        "seconds": statistics.fmean(row.seconds for row in runs),
        "digest": row.digest,
        "versions": sorted({row.recipe for row in runs}),
    }


def _known(value: float) -> float | None:
    """None of nan, which JSON has not."""
    return None if math.isnan(value) else value


def _table(by: dict[str, dict[Cell, dict[int, Row]]]) -> list[dict[str, Any]]:
    """One entry per cell, with the mean, the spread and the course of each start."""
    sizes = {cell: _first(seeds).params for cells in by.values() for cell, seeds in cells.items()}
    return [
        {
            "shape": cell[0],
            "data": cell[1],
            "params": sizes[cell],
            "images": next(_first(cells[cell]).images for cells in by.values() if cell in cells),
            "classes": next(_first(cells[cell]).classes for cells in by.values() if cell in cells),
            "starts": {start: _course(cells[cell]) for start, cells in by.items() if cell in cells},
        }
        for cell in sorted(sizes, key=lambda cell: (cell[1], sizes[cell]))
    ]


def _first(seeds: dict[int, Row]) -> Row:
    return next(iter(seeds.values()))


def _course(seeds: dict[int, Row]) -> dict[str, Any]:
    rows = list(seeds.values())
    epochs = sorted(set.intersection(*(set(row.reached()) for row in rows)))
    return {
        **spread([row.accuracy for row in rows]),
        "epochs": {str(epoch): statistics.fmean(row.reached()[epoch] for row in rows) for epoch in epochs},
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None of a single one) and number."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values)}


def paired(one: dict[Cell, dict[int, Row]], other: dict[Cell, dict[int, Row]]) -> dict[str, Any] | None:
    """``one`` less ``other`` over the cells and seeds that both have; None without any. "full" is paired with any
    shape of its data set."""
    cells = {}
    for cell, seeds in one.items():
        twin = other.get(cell) or other.get(("native", cell[1])) or {}
        gaps = [row.accuracy - twin[seed].accuracy for seed, row in seeds.items() if seed in twin]
        if gaps:
            found = spread(gaps)
            error = None if found["sd"] is None else found["sd"] / math.sqrt(len(gaps))
            cells[f"{cell[0]} {cell[1]}"] = {"mean": found["mean"], "se": error, "n": len(gaps)}
    if not cells:
        return None
    means = [cell["mean"] for cell in cells.values()]
    found = spread(means)
    return {
        "mean": found["mean"],
        "se": None if found["sd"] is None else found["sd"] / math.sqrt(len(means)),
        "p": sign_flip(means),
        "cells": len(means),
        "runs": sum(cell["n"] for cell in cells.values()),
        "wins": sum(mean > 0 for mean in means),
        "losses": sum(mean < 0 for mean in means),
        "clear_losses": [name for name, cell in cells.items() if cell["se"] is not None and cell["mean"] < -cell["se"]],
        "per_cell": cells,
    }


def sign_flip(means: Sequence[float]) -> float | None:
    """Two-sided p of the mean under random signs; None of less than two."""
    n = len(means)
    if n < 2:
        return None
    values = torch.tensor(means, dtype=torch.float64)
    if n <= EXACT:
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
    else:
        drawn = torch.randint(0, 2, (FLIPS, n), generator=torch.Generator().manual_seed(0))
        signs = torch.cat([torch.ones(1, n, dtype=torch.float64), drawn.double() * 2 - 1])
    return float(((signs @ values).abs() >= values.sum().abs() - 1e-9).double().mean())


def _after_one(one: dict[Cell, dict[int, Row]], random: dict[Cell, dict[int, Row]]) -> dict[str, Any] | None:
    """In how many cells a start after one epoch is ahead of its random twin after all of the twin's."""
    if _any(one).kind in (RANDOM, "mimetic"):
        return None
    told = {}
    for cell in one.keys() & random.keys():
        first = [row.reached()[1] for row in one[cell].values() if 1 in row.reached()]
        if first:
            last = statistics.fmean(row.accuracy for row in random[cell].values())
            told[f"{cell[0]} {cell[1]}"] = statistics.fmean(first) - last
    if not told:
        return None
    behind = {name: gap for name, gap in sorted(told.items()) if gap <= 0}
    epochs = max(max(row.reached()) for seeds in random.values() for row in seeds.values())
    return {"cells": len(told), "ahead": len(told) - len(behind), "epochs": epochs, "behind": behind}


def _break_even(one: dict[Cell, dict[int, Row]], random: dict[Cell, dict[int, Row]]) -> dict[str, Any] | None:
    """After how many trainings of a new size or task the extraction is paid back, in FLOPs.

    What one training saves is, in the mean over cells, what the random twin computes until its mean accuracy is that of
    the start after one epoch (all of its epochs, where it never is: then it saves more than is counted), less that one
    epoch.
    """
    cost = _any(one).extraction_flops
    if _any(one).kind in (RANDOM, "mimetic") or math.isnan(cost) or not cost:
        return None
    saved, open_ended = [], 0
    for cell in one.keys() & random.keys():
        goal = _course(one[cell])["epochs"].get("1")
        course = _course(random[cell])["epochs"]
        if goal is None or not course:
            continue
        reached = [int(epoch) for epoch, accuracy in course.items() if accuracy >= goal]
        open_ended += not reached
        epochs = min(reached) if reached else max(map(int, course))
        twin, own = _first(random[cell]), _first(one[cell])
        per_epoch = twin.train_flops / max(twin.reached())
        saved.append(epochs * per_epoch - own.train_flops / max(own.reached()))
    mean = statistics.fmean(saved) if saved else 0.0
    trainings = math.ceil(cost / mean) if mean > 0 else None
    return {"cells": len(saved), "never_reached": open_ended, "saved_flops": mean, "trainings": trainings}


def as_text(summary: dict[str, Any]) -> str:
    """The summary for people: a line per start, and how it differs from the best training-free one."""
    lines = [f"{summary['runs']} runs; {summary['number']}, the mean over cells of shape and data set"]
    lines.append(f"{'start':<20}{'accuracy':>9}{'cells':>7}{'stored':>10}{'extraction':>12}")
    ranked = sorted(summary["starts"].items(), key=lambda item: -item[1]["accuracy"])
    for name, facts in ranked:
        cost = facts["extraction_flops"]
        told = "unknown" if cost is None else "-" if not cost else f"{cost / 1e12:.3g} TF"
        stored = f"{facts['stored_bytes'] / 1e6:.1f} MB" if facts["stored_bytes"] else "-"
        lines.append(f"{name:<20}{facts['accuracy']:>9.2f}{facts['cells']:>7}{stored:>10}{told:>12}")
    base = best_rival(summary)
    if base is None or len(ranked) == 1:
        return "\n".join(lines)
    lines += ["", f"less {base}, paired:"]
    for name, _ in ranked:
        gap = summary["differences"][name].get(base)
        if gap:
            lines.append(f"  {name:<18} {difference(gap)}")
    for name, found in summary["against_random"].items():
        lines.append(
            f"{name} after 1 epoch is ahead of random after {found['epochs']} in {found['ahead']} of "
            f"{found['cells']} cells"
        )
    return "\n".join(lines)


def best_rival(summary: dict[str, Any]) -> str | None:
    """The training-free start that is ahead of most others of them, paired; random where there is none."""
    rivals = summary["training_free"] or [name for name in summary["starts"] if name == RANDOM]

    def beaten(name: str) -> tuple[int, float]:
        gaps = [gap["mean"] for other in rivals if (gap := summary["differences"][name].get(other))]
        return sum(gap > 0 for gap in gaps), summary["starts"][name]["accuracy"]

    return max(rivals, key=beaten, default=None)


def difference(gap: dict[str, Any]) -> str:
    """A paired difference in words."""
    error = "" if gap["se"] is None else f" ± {gap['se']:.2f}"
    chance = "" if gap["p"] is None else f", p {gap['p']:.2g}"
    cells = f"{gap['cells']} cell{'s' if gap['cells'] > 1 else ''}: {gap['wins']} won, {gap['losses']} lost"
    clear = f", {len(gap['clear_losses'])} by more than their standard error"
    known = any(cell["se"] is not None for cell in gap["per_cell"].values())
    return f"{gap['mean']:+.2f}{error}{chance}; {cells}{clear if known else ' (one seed)'}"
