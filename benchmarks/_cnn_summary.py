"""What the rows of cnn.py say: accuracy per arm, paired differences to the twin and to others, compute, a plot.

A paired difference is taken between two runs of one set and seed. Its standard error is the deviation of the
differences over sqrt(n), as if the n runs were independent; they share the ancestor and the learngene.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _summary import rounded as spread
from cnn import ANCHOR, TWIN, Job, Row, arms_of

BACKWARD = 3  # the FLOPs of a training step over those of its forward
WHOLE = "-whole"


def newest(rows: Sequence[Row]) -> list[Row]:
    """One row per cell: the last."""
    return list({row.job: row for row in rows}.values())


def difference(rows: Sequence[Row], set: str, arm: str, base: str, place: int) -> dict[str, Any]:
    """Of two arms on a set, paired over seeds, at one of its epochs: mean, standard error, runs, runs won."""
    other = {row.seed: row.curve[place] for row in rows if (row.set, row.arm) == (set, base)}
    gaps = [
        row.curve[place] - other[row.seed] for row in rows if (row.set, row.arm) == (set, arm) and row.seed in other
    ]
    if not gaps:
        return {"n": 0}
    error = round(statistics.stdev(gaps) / math.sqrt(len(gaps)), 2) if len(gaps) > 1 else None
    won = sum(gap > 0 for gap in gaps)
    return {"mean": round(statistics.mean(gaps), 2), "se": error, "n": len(gaps), "won": won}


def twin_of(arm: str, config: dict[str, Any]) -> str | None:
    """The random network beside an arm; None: a twin, or a whole ancestor."""
    if arm.endswith(TWIN):
        return None
    base = Job(set="", arm=arm, seed=0).base
    about = config["arms"][base]
    return about.get("twin", base) + TWIN if "method" in about else None


def rivals(arm: str, config: dict[str, Any]) -> dict[str, str]:
    """What an arm is compared with: name of the comparison -> arm."""
    if arm.endswith(TWIN) or arm.endswith(WHOLE):
        return {}
    base = Job(set="", arm=arm, seed=0).base
    found = {"twin": twin_of(arm, config) or "", "whole": config["arms"][base]["ancestor"] + WHOLE}
    return found | ({"without the anchor": base} if arm.endswith(ANCHOR) else {})


def compute(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one arm on one set: what is stored, inherited and spent; training FLOPs in 10^12."""
    row = rows[0]
    return {
        "params": row.params,
        "inherited": row.inherited,
        "stored_megabytes": round(row.stored_bytes / 1e6, 2),
        "extraction_seconds": row.extraction_seconds,
        "extraction_teraflops": round(BACKWARD * row.extraction_flops / 1e12, 2),
        "tuning_teraflops": round(BACKWARD * row.flops * row.images_seen / 1e12, 2),
        "seconds": round(statistics.mean(row.seconds for row in rows), 1),
    }


def summary(rows: Sequence[Row], config: dict[str, Any], sources: dict[str, Any]) -> dict[str, Any]:
    """Everything, as JSON."""
    rows = newest(rows)
    sets = {}
    for set, stage in config["sets"].items():
        there = {arm: [row for row in rows if (row.set, row.arm) == (set, arm)] for arm in arms_of(config)}
        there = {arm: found for arm, found in there.items() if found}
        if not there:
            continue
        sets[set] = {
            "recipe": {key: value for key, value in stage.items() if key != "seeds"},
            "accuracy": {arm: _by_epoch(found, stage) for arm, found in there.items()},
            "differences": {
                f"{arm} - {base}": {
                    str(epoch): gap
                    for place, epoch in enumerate(stage["epochs"])
                    if (gap := difference(rows, set, arm, base, place))["n"]
                }
                for arm in there
                for base in rivals(arm, config).values()
                if base in there
            },
            "compute": {arm: compute(found) for arm, found in there.items()},
        }
    ancestors = {
        name: {key: value for key, value in facts.items() if key != "shape"} | {"shape": _shape(facts)}
        for name, facts in sources["ancestors"].items()
    }
    return {
        "machine": sorted({row.machine for row in rows}),
        "ancestors": ancestors,
        "learngenes": sources["learngenes"],
        "sets": sets,
    }


def _shape(facts: dict[str, Any]) -> str:
    return f"{facts['shape']['family']} {'-'.join(','.join(map(str, stage)) for stage in facts['shape']['stages'])}"


def _by_epoch(rows: Sequence[Row], stage: dict[str, Any]) -> dict[str, Any]:
    return {str(epoch): spread([row.curve[place] for row in rows]) for place, epoch in enumerate(stage["epochs"])}


def table(found: dict[str, Any], config: dict[str, Any], set: str) -> str:
    """A line per arm: accuracy after each number of epochs, less its twin at the last one, what it costs."""
    part = found["sets"][set]
    epochs = [str(epoch) for epoch in part["recipe"]["epochs"]]
    head = [
        "start",
        *epochs,
        f"less its twin, {epochs[0]}",
        epochs[-1],
        "less the whole ancestor",
        "inherited",
        "stored MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for arm, by_epoch in part["accuracy"].items():
        cells = [f"{by_epoch[epoch]['mean']:.1f} ± {by_epoch[epoch]['sd'] or 0:.1f}" for epoch in epochs]
        against, cost = rivals(arm, config), part["compute"][arm]
        for name, epoch in (("twin", epochs[0]), ("twin", epochs[-1]), ("whole", epochs[-1])):
            cells.append(_gap(part["differences"].get(f"{arm} - {against.get(name)}", {}).get(epoch)))
        cells += [f"{cost['inherited'] / cost['params']:.0%}", f"{cost['stored_megabytes']:.2f}"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gap(gap: dict[str, Any] | None) -> str:
    if not gap:
        return ""
    error = "" if gap["se"] is None else f" ± {gap['se']:.1f}"
    return f"{gap['mean']:+.1f}{error} ({gap['won']}/{gap['n']})"


def write_summary(rows: Sequence[Row], stem: Path, config: dict[str, Any]) -> str:
    """Write STEM.json and STEM.png; the tables. STEM_sources.json says how ancestors and learngenes were made."""
    found = summary(rows, config, json.loads(stem.with_name(f"{stem.name}_sources.json").read_text()))
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, config, stem.with_suffix(".png"))
    told = [
        f"{name}: {facts['shape']}, {facts['params']:,} parameters, {facts['images_seen']:,} images seen, "
        f"{facts['accuracy']:.1f} %"
        for name, facts in found["ancestors"].items()
    ]
    return "\n\n".join(["\n".join(told), *(f"{set}\n{table(found, config, set)}" for set in found["sets"])])


def draw(found: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Two panels per set: accuracy of each arm and its twin, a bar of one deviation; the paired difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    sets = list(found["sets"])
    arms = [arm for arm in arms_of(config) if not arm.endswith(TWIN)]
    figure, axes = pyplot.subplots(
        1, 2 * len(sets), figsize=(6.2 * len(sets), 0.36 * len(arms) + 1.6), sharey=True, squeeze=False,
        width_ratios=[1.4, 1] * len(sets),
    )  # fmt: skip
    for number, set in enumerate(sets):
        left, right = axes[0, 2 * number], axes[0, 2 * number + 1]
        epoch = str(found["sets"][set]["recipe"]["epochs"][-1])
        for place, arm in enumerate(arms):
            _draw_arm(left, right, found["sets"][set], arm, twin_of(arm, config), len(arms) - 1 - place, epoch)
        right.axvline(0, color="#444444", linewidth=0.8)
        left.set_title(f"{set}: accuracy after {epoch} epochs, %", fontsize=9)
        right.set_title("less its twin, points", fontsize=9)
    axes[0, 0].set_yticks(range(len(arms)), list(reversed(arms)))
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#eeeeee")
        panel.set_axisbelow(True)
    handles = [
        Line2D([], [], marker="o", linestyle="", color="#0b6e4f", label="inherited; bar: one deviation"),
        Line2D([], [], marker="o", linestyle="", color="#999999", mfc="white", label="its random twin"),
        Line2D([], [], marker="s", linestyle="", color="#3b6ea8", label="difference; bar: one standard error"),
    ]
    figure.legend(handles=handles, ncols=3, loc="lower center", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_arm(left: Any, right: Any, part: dict[str, Any], arm: str, twin: str | None, y: int, epoch: str) -> None:
    """One line of both panels."""
    for name, colour, face, size in ((twin, "#999999", "white", 5), (arm, "#0b6e4f", "#0b6e4f", 6)):
        if name in part["accuracy"]:
            cell = part["accuracy"][name][epoch]
            left.errorbar(cell["mean"], y, xerr=cell["sd"] or 0, fmt="o", color=colour, mfc=face, markersize=size)
    gap = part["differences"].get(f"{arm} - {twin}", {}).get(epoch)
    if gap:
        right.errorbar(gap["mean"], y, xerr=gap["se"] or 0, fmt="s", color="#3b6ea8", markersize=5)
