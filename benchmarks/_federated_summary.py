"""What the rows of federated.csv say: accuracy of clients and newcomers, bytes over FedAvg's, and a plot.

Differences are taken per seed (which draws the partition, the first model and the order of the images) and averaged;
the standard error is that of the seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _summary import rounded as spread
from federated import Row, current

BASE, OURS = "fedavg", "gene-fl"
NUMBERS = ("accuracy", "accuracy_received", "newcomer", "newcomer_received")
COLOURS = {
    "gene-fl": "#0b6e4f", "early": "#7fb89f", "late": "#b7d7c8", "local": "#999999", "fedavg": "#3b6ea8",
    "fedprox": "#8a6fae", "fedavg-bytes": "#d08c1d", "gene-fl-stable": "#c26e6e",
}  # fmt: skip


def difference(mine: Sequence[Row], theirs: Sequence[Row], number: str) -> dict[str, Any]:
    """Mine less theirs over the seeds that both have."""
    other = {row.seed: getattr(row, number) for row in theirs}
    gaps = [getattr(row, number) - other[row.seed] for row in mine if row.seed in other]
    if not gaps:
        return {"n": 0}
    error = round(statistics.stdev(gaps) / math.sqrt(len(gaps)), 2) if len(gaps) > 1 else None
    return {"mean": round(statistics.mean(gaps), 2), "se": error, "n": len(gaps)}


def cell(rows: Sequence[Row], base: Sequence[Row]) -> dict[str, Any]:
    """One arm in one partition from one start."""
    sent = statistics.mean(row.up + row.down for row in rows)
    whole = sent + statistics.mean(row.start_up for row in rows)
    found: dict[str, Any] = {number: spread([getattr(row, number) for row in rows]) for number in NUMBERS}
    found |= {
        "rounds": rows[0].rounds,
        "megabytes": {
            way: round(statistics.mean(getattr(row, way) for row in rows) / 1e6, 3)
            for way in ("up", "down", "start_up")
        },
        "newcomer_megabytes": round(statistics.mean(row.newcomer_down for row in rows) / 1e6, 3),
        "model_megabytes": round(rows[0].model_bytes / 1e6, 3),
        "layers": [row.layers for row in rows],
        "seconds": round(statistics.mean(row.seconds for row in rows), 1),
    }
    if base:
        theirs = statistics.mean(row.up + row.down + row.start_up for row in base)
        found["fedavg_bytes_over_its"] = round(theirs / whole, 2) if whole else None
        found["minus_fedavg"] = {number: difference(rows, base, number) for number in NUMBERS}
    return found


def summary(rows: Sequence[Row], config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, as JSON."""
    rows = current(rows, dict(config))
    tables: dict[str, Any] = {}
    for partition in config["partitions"]:
        for start in config["starts"]:
            here = [row for row in rows if (row.partition, row.start) == (partition, start)]
            by_arm = {arm: [row for row in here if row.arm == arm] for arm in config["arms"]}
            found = {arm: cell(own, by_arm.get(BASE, [])) for arm, own in by_arm.items() if own}
            if found:
                tables[f"{partition}, {start}"] = found
    return {
        "clients": config["clients"], "newcomers": config["newcomers"], "common": config["common"],
        "seeds": sorted({row.seed for row in rows}), "machine": sorted({row.machine for row in rows}), "tables": tables,
        "loses": losses(tables),
    }  # fmt: skip


def losses(tables: Mapping[str, Any]) -> list[str]:
    """Where ours is behind another arm, in words."""
    found = []
    for name, arms in tables.items():
        for number in ("accuracy", "newcomer"):
            mine = arms.get(OURS, {}).get(number, {}).get("mean")
            for arm, told in arms.items():
                if mine is not None and arm != OURS and told[number]["mean"] > mine:
                    found.append(f"{name}: {number} {mine} of {OURS}, {told[number]['mean']} of {arm}")
    return found


def shown(told: Mapping[str, Any]) -> str:
    """Mean and deviation."""
    return f"{told['mean']:.1f}" + (f" ± {told['sd']:.1f}" if told["sd"] is not None else "")


def table(name: str, arms: Mapping[str, Any]) -> str:
    """A line per arm."""
    head = "| arm | clients | as received | newcomers | as received | MB up | MB down | start-up MB | fewer bytes |"
    lines = [f"{name}:", "", head, "|---" * 9 + "|"]
    for arm, told in arms.items():
        sent = told["megabytes"]
        ratio = told.get("fedavg_bytes_over_its")
        ratio = "none sent" if sent["up"] < 0.1 else "" if ratio is None else f"{ratio:.1f}"
        numbers = " | ".join(shown(told[number]) for number in NUMBERS)
        lines.append(
            f"| {arm} | {numbers} | {sent['up']:.1f} | {sent['down']:.1f} | {sent['start_up']:.2f} | {ratio} |"
        )
    return "\n".join(lines)


def write_summary(rows: Sequence[Row], stem: Path, config: Mapping[str, Any]) -> str:
    """Write STEM.json and STEM.png; the tables."""
    found = summary(rows, config)
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found["tables"], stem.with_suffix(".png"))
    behind = "\n".join(f"- {line}" for line in found["loses"])
    return "\n\n".join([*(table(name, arms) for name, arms in found["tables"].items()), f"Behind:\n\n{behind}"])


def draw(tables: Mapping[str, Any], path: Path) -> None:
    """Accuracy of clients and of newcomers over all bytes, one panel per table and kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not tables:
        return
    figure, panels = pyplot.subplots(2, len(tables), figsize=(3.9 * len(tables) + 1, 7), squeeze=False)
    for column, (name, arms) in enumerate(tables.items()):
        for line, number in enumerate(("accuracy", "newcomer")):
            panel = panels[line][column]
            for arm, told in arms.items():
                x = max(sum(told["megabytes"].values()), 0.05)
                panel.errorbar(
                    [x], [told[number]["mean"]], [told[number]["sd"] or 0], fmt="o", color=COLOURS.get(arm, "#000000"),
                    label=arm, capsize=2,
                )  # fmt: skip
            panel.set(xscale="log", xlabel="MB, all clients and rounds", title=name)
            panel.set_ylabel("clients' accuracy, %" if line == 0 else "newcomers' accuracy, %")
            panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
