"""What the rows of learned.py say: accuracy per epoch, paired differences, when scratch catches up, compute, a plot.

A paired difference is taken between two runs of one shape and seed. Its standard error is the deviation of the
differences over sqrt(n), as if the n cells were independent; the seeds share the images and the ancestor.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _summary import rounded
from learned import EPOCHS, Row

from learngene_hub._card_results import score

LEARNED = ("lets", "ldr", "tleg", "sws")
RIVALS = ("net2net", "weight-selection", "front")
BASE = "net2net"  # the strongest of them
TUNED = 5  # epochs of the comparison
MEANINGS = {
    "lets": "learned jointly with maps that make a large ViT of a small one",
    "ldr": "shared components, mixed by Chebyshev polynomials of the depth",
    "tleg": "two blocks, mixed linearly in the depth",
    "sws": "one block per stage of the depth",
    "net2net": "the ancestor itself: evenly spaced blocks, units copied or left out",
    "weight-selection": "the ancestor itself: its first blocks, evenly spaced units",
    "front": "the ancestor itself, resized by a cosine transform",
    "random": "timm's own initialisation",
}
BACKWARD = 3  # the FLOPs of a training step over those of its forward
COLOURS = {
    "lets": "#0b6e4f",
    "ldr": "#d08c1d",
    "tleg": "#8a6fae",
    "sws": "#c26e6e",
    "net2net": "#3b6ea8",
    "weight-selection": "#7fa7d0",
    "front": "#5c8a8a",
    "random": "#999999",
}


def newest(rows: Sequence[Row]) -> list[Row]:
    """One row per cell: the last."""
    return list({row.job: row for row in rows}.values())


def accuracy(row: Row, epoch: int) -> float:
    """Of a row, after so many epochs; nan where it was not asked."""
    return getattr(row, f"epoch_{epoch}")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, deviation (of two and more) and count of what is there."""
    found = [value for value in values if not math.isnan(value)]
    return rounded(found) if found else {"n": 0}


def difference(rows: Sequence[Row], arm: str, base: str, epoch: int, shape: str = "") -> dict[str, Any]:
    """Of two arms, paired over shape (or of one) and seed: mean, standard error, cells, cells won."""
    rows = [row for row in rows if shape in ("", row.shape)]
    other = {(row.shape, row.seed): accuracy(row, epoch) for row in rows if row.arm == base}
    gaps = [
        accuracy(row, epoch) - other[row.shape, row.seed]
        for row in rows
        if row.arm == arm and (row.shape, row.seed) in other
    ]
    gaps = [gap for gap in gaps if not math.isnan(gap)]
    if not gaps:
        return {"n": 0}
    error = round(statistics.stdev(gaps) / math.sqrt(len(gaps)), 2) if len(gaps) > 1 else None
    return {
        "mean": round(statistics.mean(gaps), 2),
        "se": error,
        "n": len(gaps),
        "won": sum(gap > 0 for gap in gaps),
    }


def caught_up(rows: Sequence[Row], arm: str, shape: str, epoch: int) -> int | None:
    """The first epoch at which scratch, in the mean over seeds, has what ``arm`` has after ``epoch``; None: at none."""
    asked = mean_of(rows, arm, shape, epoch)
    for later in EPOCHS:
        reached = mean_of(rows, "random", shape, later)
        if reached is not None and asked is not None and reached >= asked:
            return later
    return None


def mean_of(rows: Sequence[Row], arm: str, shape: str, epoch: int) -> float | None:
    """Over seeds; None where there is no run."""
    found = spread([accuracy(row, epoch) for row in rows if (row.arm, row.shape) == (arm, shape)])
    return found.get("mean")


def compute(rows: Sequence[Row], arm: str, images: int) -> dict[str, Any]:
    """Training FLOPs: of an extraction, and of tuning one ViT of each shape for TUNED epochs, in 10^15."""
    own = [row for row in rows if row.arm == arm]
    shapes = {row.shape: row.flops for row in own}
    last = max((epoch for epoch in EPOCHS for row in own if not math.isnan(accuracy(row, epoch))), default=0)
    extraction = statistics.mean(row.extraction_flops for row in own)
    return {
        "stored_megabytes": round(max(row.stored_bytes for row in own) / 1e6, 2),
        "extraction_images": max(row.extraction_images for row in own),
        "extraction_seconds": round(statistics.mean(row.extraction_seconds for row in own), 1),
        "extraction_petaflops": round(BACKWARD * extraction / 1e15, 3),
        "tuning_petaflops": round(BACKWARD * last * images * sum(shapes.values()) / 1e15, 3),
        "tuning_epochs": last,
    }


def summary(rows: Sequence[Row], config: dict[str, Any], ancestor: dict[str, Any]) -> dict[str, Any]:
    """Everything, as JSON."""
    rows = newest(rows)
    arms = [arm for arm in config["arms"] if any(row.arm == arm for row in rows)]
    shapes = [shape for shape in config["shapes"] if any(row.shape == shape for row in rows)]
    cells = {
        arm: {
            shape: {
                str(epoch): found
                for epoch in EPOCHS
                if (found := spread([accuracy(row, epoch) for row in rows if (row.arm, row.shape) == (arm, shape)]))[
                    "n"
                ]
            }
            for shape in shapes
        }
        for arm in arms
    }
    reached = {arm: [shape for shape in shapes if cells[arm][shape]] for arm in arms}
    learned = [arm for arm in arms if arm.split("+")[0].split("-random")[0] in LEARNED]
    return {
        "data": config["data"],
        "tuning": config["tuning"],
        "ancestor": ancestor,
        "digests": {arm: min((row for row in rows if row.arm == arm), key=lambda row: row.seed).digest for arm in arms},
        "machine": sorted({row.machine for row in rows}),
        "accuracy": cells,
        "differences": {
            f"{arm} - {base}": {str(epoch): difference(rows, arm, base, epoch) for epoch in (1, 2, TUNED)}
            for arm in learned
            for base in (*RIVALS, "random", *(("net2net+head",) if arm.endswith("+head") else ()))
            if base in arms
        },
        f"minus_{BASE}": {
            arm: {
                "overall": difference(rows, arm, BASE, TUNED),
                "per_shape": {shape: difference(rows, arm, BASE, TUNED, shape) for shape in reached[arm]},
            }
            for arm in arms
            if arm != BASE and BASE in arms
        },
        "caught_up": {
            arm: {
                shape: {str(epoch): caught_up(rows, arm, shape, epoch) for epoch in (0, 1, 2, TUNED)}
                for shape in shapes
            }
            for arm in arms
            if arm != "random"
        },
        "compute": {arm: compute(rows, arm, config["tuning"]["images"]) for arm in arms},
    }  # fmt: skip


def as_card(found: dict[str, Any]) -> dict[str, Any]:
    """The same as results of a card, without the controls."""
    arms = [arm for arm in found["accuracy"] if arm in MEANINGS]
    tuning, data = found["tuning"], found["data"]
    minus = {arm: found[f"minus_{BASE}"][arm] for arm in arms if arm != BASE}
    return {
        "number": f"test accuracy after {TUNED} epochs",
        "recipe": f"{tuning['images']:,} images of {data} at 64 px, AdamW, constant rate {tuning['lr']:g} (random: "
        f"{tuning['random_lr']:g}), batch {tuning['batch_size']}, random crops and flips, a fresh head; each "
        "seed has an extraction of its own, the first of which is bundled",
        "meanings": {arm: MEANINGS[arm] for arm in arms},
        "base": BASE,
        "digests": {arm: found["digests"][arm] for arm in arms},
        "overall": {arm: None for arm in arms},
        "cells": [
            {
                "shape": shape,
                "set": data,
                "arms": {arm: found["accuracy"][arm].get(shape, {}).get(str(TUNED)) for arm in arms},
            }
            for shape in found["accuracy"][BASE]
        ],
        f"minus_{BASE}": {
            arm: {
                "overall": by["overall"],
                "per_shape_and_set": {f"{shape} {data}": part for shape, part in by["per_shape"].items()},
            }
            for arm, by in minus.items()
        },
    }


def table(found: dict[str, Any], epoch: int) -> str:
    """Accuracy after ``epoch`` epochs, a line per arm, a column per shape."""
    shapes = list(next(iter(found["accuracy"].values())))
    lines = ["| start | " + " | ".join(shapes) + " | mean |", "|---" * (len(shapes) + 2) + "|"]
    for arm, by_shape in found["accuracy"].items():
        cells = [by_shape[shape].get(str(epoch)) for shape in shapes]
        told = [score(cell) for cell in cells]
        have = [cell["mean"] for cell in cells if cell]
        mean = f"{statistics.mean(have):.1f}" if len(have) == len(shapes) else ""
        lines.append(f"| {arm} | " + " | ".join(told) + f" | {mean} |")
    return "\n".join(lines)


def write_summary(rows: Sequence[Row], stem: Path, config: dict[str, Any]) -> str:
    """Write STEM.json and STEM.png; the tables. STEM_ancestor.json says how the ancestor was finetuned."""
    facts = json.loads(stem.with_name(f"{stem.name}_ancestor.json").read_text())
    found = summary(rows, config, facts)
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, stem.with_suffix(".png"))
    return "\n\n".join(f"after {epoch} epochs\n{table(found, epoch)}" for epoch in EPOCHS)


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel per shape: accuracy over epochs, a line per arm, a band of one deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(next(iter(found["accuracy"].values())))
    figure, axes = pyplot.subplots(
        2, math.ceil(len(shapes) / 2), figsize=(11, 6.6), sharex=True, sharey="row", squeeze=False
    )
    for panel, shape in zip(axes.flat, shapes, strict=False):
        for arm, colour in COLOURS.items():
            cells = found["accuracy"].get(arm, {}).get(shape, {})
            epochs = [int(epoch) for epoch in cells]
            means, sds = ([cells[str(epoch)][key] for epoch in epochs] for key in ("mean", "sd"))
            style = "--" if arm in RIVALS else ":" if arm == "random" else "-"
            panel.plot(epochs, means, style, color=colour, label=arm, linewidth=1.6)
            low, high = ([m + sign * (s or 0) for m, s in zip(means, sds, strict=True)] for sign in (-1, 1))
            panel.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set_title(shape, fontsize=10)
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xticks(EPOCHS, [str(epoch) for epoch in EPOCHS])
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[-1]:
        panel.set_xlabel(f"epochs of {found['tuning']['images']:,} images")
    for panel in axes[:, 0]:
        panel.set_ylabel(f"{found['data']} accuracy, %")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
