"""What the rows of parts.py say: a table per comparison, paired differences, what each arm stores and cost, a plot.

A paired difference is taken between two runs of one shape, set and seed. Its standard error is the deviation of the
differences over sqrt(n), as if the n cells were independent; the seeds share the ancestor and the test images.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _summary import rounded
from parts import EPOCHS, SCRATCH, Row

from learngene_hub._card_results import score

LAST = EPOCHS[-1]
BACKWARD = 3  # the FLOPs of a training step over those of its forward
MEANINGS = {
    "auto": "the six blocks that the search found, at the bottom, with the stem",
    "six-first": "the first six blocks in their place, one of the two published lists",
    "six-published": "blocks 0, 1 and 8 to 11 in their place, the other published list",
    "four-ends": "blocks 0, 1, 10 and 11 in their place",
    "six-random": "six blocks in their place, drawn by the seed",
    "six-random-0": "the first block and five others in their place, drawn by the seed",
    "six-last": "the last six blocks in their place",
    "six-even": "six evenly spaced blocks in their place",
    "last+stem": "the last three blocks behind random ones, with the stem",
    "calmest+stem": "the three blocks with the calmest gradients behind random ones, with the stem",
    "three-random+stem": "three blocks behind random ones, drawn by the seed, with the stem",
    "three-first+stem": "the first three blocks behind random ones, with the stem",
    "three-even+stem": "three evenly spaced blocks behind random ones, with the stem",
    "last": "the last three blocks behind random ones, the stem fresh as well, as the method says",
    "calmest": "the three blocks with the calmest gradients, the stem fresh",
    "three-random": "three blocks drawn by the seed, the stem fresh",
    "cluster": "the heads kept of each layer, one FFN of two layers where the paper shares them, with trained maps",
    "cluster-even": "the same, evenly spaced layers",
    "cluster-pairs": "the same, one FFN for each two layers",
    "cluster-copies": "the same, FFNs copied instead of mapped",
    "heads-random": "as many heads of each layer, drawn by the seed, FFNs copied",
    "nine-even": "nine evenly spaced blocks of the ancestor, three of them twice",
    "whole-first": "the ancestor's first blocks",
    "net2net": "the whole ancestor, pre-trained and finetuned; evenly spaced blocks of it at a smaller depth",
    "scratch": "timm's own initialisation",
}


def newest(rows: Sequence[Row]) -> list[Row]:
    """One row per cell: the last."""
    return list({row.job: row for row in rows}.values())


def accuracy(row: Row, epoch: int) -> float:
    """Of a row, after so many epochs, per cent."""
    return getattr(row, f"epoch_{epoch}")


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, deviation (of two and more) and count; None where there is nothing."""
    return rounded(values) if values else None


def difference(rows: Sequence[Row], arm: str, base: str, epoch: int) -> dict[str, Any] | None:
    """Of two arms, paired over shape, set and seed: mean, standard error, cells, cells won; None: no pair."""
    other = {(row.shape, row.set, row.seed): accuracy(row, epoch) for row in rows if row.arm == base}
    own = {(row.shape, row.set, row.seed): accuracy(row, epoch) for row in rows if row.arm == arm}
    gaps = [value - other[cell] for cell, value in own.items() if cell in other]
    if not gaps:
        return None
    error = round(statistics.stdev(gaps) / math.sqrt(len(gaps)), 2) if len(gaps) > 1 else None
    return {"mean": round(statistics.mean(gaps), 2), "se": error, "n": len(gaps), "won": sum(g > 0 for g in gaps)}


def cost(rows: Sequence[Row]) -> dict[str, Any]:
    """What the rows of one arm at one shape store and took, means over seeds."""
    return {
        "params": rows[0].params,
        "stored_megabytes": round(max(row.stored_bytes for row in rows) / 1e6, 2),
        "extraction_images": max(row.extraction_images for row in rows),
        "extraction_teraflops": round(BACKWARD * statistics.mean(row.extraction_flops for row in rows) / 1e12, 2),
        "extraction_seconds": round(statistics.mean(row.extraction_seconds for row in rows), 1),
    }


def table_of(rows: Sequence[Row], table: dict[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """One comparison: accuracies, differences of the method's own arms from all others, costs."""
    rows = [row for row in rows if row.shape == table["shape"] and row.set in sets]
    arms = [arm for arm in table["arms"] if any(row.arm == arm for row in rows)]
    own = [arm for arm in table["own"] if arm in arms]

    def gaps(arm: str, base: str) -> dict[str, Any]:
        parts = {name: [row for row in rows if row.set == name] for name in sets} if len(sets) > 1 else {}
        found = {"overall": rows, **parts}
        return {
            name: {str(epoch): difference(part, arm, base, epoch) for epoch in (EPOCHS[0], LAST)}
            for name, part in found.items()
        }

    def cells(arm: str, name: str) -> dict[str, Any]:
        part = [row for row in rows if (row.arm, row.set) == (arm, name)]
        return {str(epoch): spread([accuracy(row, epoch) for row in part]) for epoch in EPOCHS}

    return {
        "method": table["method"],
        "shape": table["shape"],
        "own": own,
        "accuracy": {arm: {name: cells(arm, name) for name in sets} for arm in arms},
        "differences": {arm: {base: gaps(arm, base) for base in arms if base != arm} for arm in own},
        "costs": {arm: cost([row for row in rows if row.arm == arm]) for arm in arms},
    }


def summary(rows: Sequence[Row], config: dict[str, Any]) -> dict[str, Any]:
    """Everything, as JSON."""
    rows = newest(rows)
    arms = list(dict.fromkeys(row.arm for row in rows))
    first = {arm: min((row for row in rows if row.arm == arm), key=lambda row: row.seed) for arm in arms}
    tables = {
        title: table_of(rows, table, [name for name in table.get("sets", config["sets"]) if _has(rows, name)])
        for title, table in config["tables"].items()
    }
    return {
        "sets": {name: part for name, part in config["sets"].items() if _has(rows, name)},
        "tuning": config["tuning"],
        "seeds": sorted({row.seed for row in rows}),
        "machine": sorted({row.machine for row in rows}),
        "digests": {arm: first[arm].digest for arm in arms if arm != SCRATCH},
        "kept": {
            arm: {str(row.seed): row.kept for row in sorted(rows, key=lambda row: row.seed) if row.arm == arm}
            for arm in arms
            if first[arm].kept
        },
        "tables": {title: table for title, table in tables.items() if table["accuracy"]},
    }


def _has(rows: Sequence[Row], name: str) -> bool:
    return any(row.set == name for row in rows)


def table_text(table: dict[str, Any]) -> str:
    """Markdown: a line per arm, accuracy after each number of epochs of each set, what is stored and what it took."""
    names = list(next(iter(table["accuracy"].values())))
    heads = [f"{name}, {epoch}" for name in names for epoch in EPOCHS]
    costs = ["stored MB", "parameters", "extraction: images", "TFLOPs", "s"]
    lines = ["| start | " + " | ".join([*heads, *costs]) + " |", "|---" * (len(heads) + len(costs) + 1) + "|"]
    for arm, by_set in table["accuracy"].items():
        told, took = [score(by_set[name][str(epoch)]) for name in names for epoch in EPOCHS], table["costs"][arm]
        keys = ("stored_megabytes", "params", "extraction_images", "extraction_teraflops", "extraction_seconds")
        label = f"**{arm}**" if arm in table["own"] else arm
        lines.append(f"| {label} | " + " | ".join([*told, *(f"{took[key]:,}" for key in keys)]) + " |")
    return "\n".join(lines)


def differences_text(table: dict[str, Any]) -> str:
    """A line per own arm and other arm: the paired difference after the first and the last epoch."""
    lines = []
    for arm, by_base in table["differences"].items():
        for base, gaps in by_base.items():
            told = [f"after {epoch}: {_gap(gap)}" for epoch, gap in gaps["overall"].items()]
            lines.append(f"{arm} - {base}: " + "; ".join(told))
    return "\n".join(lines)


def _gap(gap: dict[str, Any] | None) -> str:
    if gap is None:
        return "none"
    error = "" if gap["se"] is None else f" ± {gap['se']:.1f}"
    return f"{gap['mean']:+.1f}{error} ({gap['won']} of {gap['n']} won)"


def write_summary(rows: Sequence[Row], stem: Path, config: dict[str, Any]) -> str:
    """Write STEM.json and STEM.png; the tables in words."""
    found = summary(rows, config)
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, newest(rows), stem.with_suffix(".png"))
    return "\n\n".join(
        f"## {title}\n\n{table_text(table)}\n\n{differences_text(table)}" for title, table in found["tables"].items()
    )


def draw(found: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """A row of panels per method, a panel per comparison and set: a line per arm, a dot per seed, the mean as a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(table["method"] for table in found["tables"].values()))
    panels = {
        method: [
            (title, table, name)
            for title, table in found["tables"].items()
            for name in next(iter(table["accuracy"].values()))
            if table["method"] == method
        ]
        for method in methods
    }
    across = max(map(len, panels.values()))
    figure, axes = pyplot.subplots(len(methods), across, figsize=(5 * across, 3.1 * len(methods)), squeeze=False)
    for line, method in zip(axes, methods, strict=True):
        for panel, part in zip(line, panels[method], strict=False):
            _panel(panel, part, rows)
        for panel in line[len(panels[method]) :]:
            panel.set_axis_off()
    figure.suptitle(
        f"Test accuracy, %, after {EPOCHS[0]} epoch (grey) and {LAST} epochs; a dot per seed; green: the method",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(panel: Any, part: tuple[str, dict[str, Any], str], rows: Sequence[Row]) -> None:
    title, table, name = part
    arms = list(table["accuracy"])
    for place, arm in enumerate(arms):
        own = [row for row in rows if (row.arm, row.shape, row.set) == (arm, table["shape"], name)]
        for epoch, colour in ((EPOCHS[0], "#b5b5b5"), (LAST, "#0b6e4f" if arm in table["own"] else "#3b6ea8")):
            values = [accuracy(row, epoch) for row in own]
            panel.scatter(values, [place] * len(values), s=16, color=colour, alpha=0.75, linewidths=0, zorder=3)
            if values:
                panel.plot([statistics.mean(values)] * 2, [place - 0.32, place + 0.32], color=colour, lw=2, zorder=2)
    labels = [f"{arm}  ({table['costs'][arm]['stored_megabytes']:.1f} MB)" for arm in arms]
    panel.set_yticks(range(len(arms)), labels, fontsize=8)
    panel.set_ylim(len(arms) - 0.4, -0.6)
    panel.grid(axis="x", color="#e6e6e6", zorder=0)
    panel.set_title(f"{title}: {name}", fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
