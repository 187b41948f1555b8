"""The JSON and the plots of the comparisons of record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learngene_hub.comparison import as_text, read_rows, summarise
from learngene_hub.shape import ViTShape

SIZES = tuple((depth, width) for depth in (6, 9, 12) for width in (192, 256, 320, 384))  # of the plot of bytes
STYLE = {  # start -> colour, marker, line
    "lsamd-base": ("#0b6e4f", "o", "-"),
    "lsamd-small": ("#55a630", "o", "--"),
    "lsamd-tiny": ("#a3b18a", "o", ":"),
    "net2net": ("#3b6ea8", "s", "-"),
    "weight-selection": ("#8fb3d9", "v", "--"),
    "front": ("#7a86b8", "^", ":"),
    "first": ("#5c8a8a", "<", ":"),
    "random": ("#999999", "x", "-"),
    "mimetic": ("#bbbbbb", "+", "--"),
    "distilled": ("#c26e6e", "P", "-"),
    "lsamd-mini": ("#c9a227", "o", ":"),
    "adapted": ("#8c2f39", "P", "--"),
    "net2net-6": ("#6f8fb5", "s", "--"),
    "net2net-4": ("#9fb4cf", "s", ":"),
    "net2net-3": ("#b9c8da", "s", ":"),
    "auto-base": ("#8a6fae", "X", ":"),
    "cluster-base": ("#5f5f9f", "*", ":"),
    "lsamd-base+3": ("#55a630", "o", "--"),
    "lsamd-base+fresh": ("#a3b18a", "o", ":"),
}
SHOWN = ("lsamd-base", "net2net", "weight-selection", "front", "distilled", "random")  # of the busier plots


def write_all(results: Path) -> str:
    """PLAN.json of every PLAN.csv that is there, and its plots; what to print."""
    told = []
    for name, plots in (
        ("compare", (_by_parameters, _by_epochs, _by_sizes)),
        ("few", (_by_examples,)),
        ("speedups", ()),
        ("epochs", ()),
        ("deep", ()),
    ):
        rows = read_rows(results / f"{name}.csv")
        if not rows:
            continue
        summary = summarise(rows)
        (results / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        for plot in plots:
            plot(summary, results)
        told.append(f"{name}: {as_text(summary)}")
    return "\n\n".join(told)


def _figure(columns: int, lines: int = 1, height: float = 3.4, width: float = 3.9) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    return figure, list(axes.flat)


def _finish(figure: Any, panels: Sequence[Any], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    for panel in panels:
        panel.grid(color="#eeeeee")
        panel.spines[["top", "right"]].set_visible(False)
    found = dict(pair for panel in panels for pair in zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.legend(found.values(), found.keys(), loc="lower center", ncols=min(len(found), 7), frameon=False)
    figure.tight_layout(rect=(0, 0.09 if len(found) <= 7 else 0.13, 1, 0.99))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style(start: str) -> dict[str, Any]:
    colour, marker, line = STYLE.get(start, ("#444444", ".", "-"))
    return {"color": colour, "marker": marker, "ls": line, "ms": 5, "lw": 1.3, "label": start}


def _sets(summary: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["data"] for cell in summary["cells"]))


def _by_parameters(summary: dict[str, Any], results: Path) -> None:
    """Accuracy of every start against the parameters of the descendant, a panel per data set."""
    sets = _sets(summary)
    figure, panels = _figure(3, -(-len(sets) // 3))
    for panel, data in zip(panels, sets, strict=False):
        cells = [cell for cell in summary["cells"] if cell["data"] == data]
        for start in summary["starts"]:
            there = [cell for cell in cells if start in cell["starts"]]
            if there:
                points = [cell["params"] / 1e6 for cell in there], [cell["starts"][start]["mean"] for cell in there]
                panel.plot(*points, **_style(start))
        panel.set_title(f"{data}: test accuracy, %", loc="left", fontsize=10)
        panel.set_xlabel("parameters, millions", fontsize=8)
    for panel in panels[len(sets) :]:
        panel.set_visible(False)
    title = "After 3 epochs on 500 images; random and mimetic after 20 (mean of the seeds)"
    _finish(figure, panels[: len(sets)], results / "compare_params.png", title)


def _by_epochs(summary: dict[str, Any], results: Path) -> None:
    """The course of some starts, mean over shapes, a panel per data set."""
    sets = _sets(summary)
    figure, panels = _figure(3, -(-len(sets) // 3))
    for panel, data in zip(panels, sets, strict=False):
        cells = [cell for cell in summary["cells"] if cell["data"] == data]
        for start in (each for each in SHOWN if each in summary["starts"]):
            courses = [cell["starts"][start]["epochs"] for cell in cells if start in cell["starts"]]
            epochs = sorted(set.intersection(*(set(map(int, course)) for course in courses))) if courses else []
            means = [sum(course[str(epoch)] for course in courses) / len(courses) for epoch in epochs]
            panel.plot(epochs, means, **_style(start))
        panel.set_xscale("symlog", linthresh=1, linscale=0.3)
        panel.set_xticks([0, 1, 2, 3, 5, 10, 20], ["0", "1", "2", "3", "5", "10", "20"])
        panel.minorticks_off()
        panel.set_title(f"{data}: test accuracy, %", loc="left", fontsize=10)
        panel.set_xlabel("epochs of 500 images", fontsize=8)
    for panel in panels[len(sets) :]:
        panel.set_visible(False)
    _finish(
        figure,
        panels[: len(sets)],
        results / "compare_epochs.png",
        "Mean over the shapes that a start has; epoch 0: the head from class means",
    )


def storage(summary: dict[str, Any], name: str = "lsamd-base") -> dict[str, Any]:
    """Bytes of SIZES as checkpoints in float16, with 10 classes at 224 px, beside the learngene ``name``."""
    shapes = [ViTShape(depth=d, width=w, heads=w // 64, image_size=224, classes=10) for d, w in SIZES]
    checkpoints = [2 * shape.params() for shape in shapes]
    one = summary["starts"][name]["stored_bytes"]
    return {
        "sizes": [f"{d}x{w}" for d, w in SIZES],
        "checkpoints": checkpoints,
        "learngene": one,
        "ratio": sum(checkpoints) / one,
    }


def _by_sizes(summary: dict[str, Any], results: Path) -> None:
    """Bytes stored against the number of sizes that are to be had."""
    found = storage(summary)
    figure, (panel,) = _figure(1, height=4.0, width=7.0)
    counts = range(1, len(SIZES) + 1)
    sums = [sum(sorted(found["checkpoints"])[:count]) / 1e6 for count in counts]
    panel.plot(counts, sums, color="#3b6ea8", marker="s", label="a checkpoint of each size")
    for start in ("lsamd-base", "lsamd-tiny"):
        if start in summary["starts"]:
            stored = summary["starts"][start]["stored_bytes"] / 1e6
            panel.plot(counts, [stored] * len(sums), **{**_style(start), "marker": None})
    panel.set_yscale("log")
    panel.set_xlabel("sizes, the smallest first", fontsize=8)
    panel.set_title("stored, MB in float16", loc="left", fontsize=10)
    _finish(figure, [panel], results / "compare_bytes.png", "")


def _by_examples(summary: dict[str, Any], results: Path) -> None:
    """Accuracy against training images per class."""
    sets = list(dict.fromkeys(cell["data"].split("@")[0] for cell in summary["cells"]))
    figure, panels = _figure(len(sets))
    for panel, data in zip(panels, sets, strict=True):
        cells = [cell for cell in summary["cells"] if cell["data"].split("@")[0] == data]
        cells.sort(key=lambda cell: int(cell["data"].split("@")[1]))
        for start in summary["starts"]:
            there = [cell for cell in cells if start in cell["starts"]]
            counts = [int(cell["data"].split("@")[1]) for cell in there]
            panel.plot(counts, [cell["starts"][start]["mean"] for cell in there], **_style(start))
        panel.set_xscale("log")
        counts = [int(cell["data"].split("@")[1]) for cell in cells]
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.minorticks_off()
        panel.set_title(f"{data}: test accuracy, %", loc="left", fontsize=10)
        panel.set_xlabel("training images of each class", fontsize=8)
    _finish(figure, panels, results / "few.png", "At 6x192 (mean of the seeds)")
