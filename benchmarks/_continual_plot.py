"""The plot of continual.py: accuracy over the size of the pool, a line per arm, a panel per way and set."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _continual_arms import ANCHOR, Row

STYLES: dict[str, tuple[str, str, str]] = {  # colour, line, marker
    "pool": ("#0b6e4f", "-", "o"),
    "pool-sure": ("#4cb944", "-", "s"),
    "pool-shares": ("#9bc53d", "--", "s"),
    "retrain": ("#1f4e9c", "-", "^"),
    "sequential": ("#d1495b", "-", "v"),
    "last": ("#edae49", "-", "D"),
    "anchor": ("#6b6b6b", ":", ""),
    "soup": ("#7b5ea7", "", "P"),
    "logme": ("#b07aa1", "", "X"),
    "oracle": ("#000000", "", "*"),
}
SHIFT = 0.065  # between arms, so that dots and bars do not lie on each other
TITLES = {"probe": "linear probe", "tune": "finetuned"}


def points(rows: Sequence[Row], arm: str, size: int, accuracy: Any) -> list[float]:
    """One number per seed: the mean over sets and depths; only of seeds that have as many runs as any."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        if (row.arm, row.size) == (arm, size):
            by_seed.setdefault(row.seed, []).append(accuracy(row))
    most = max(map(len, by_seed.values()), default=0)
    return [statistics.mean(values) for values in by_seed.values() if len(values) == most]


def draw(found: dict[str, Any], rows: Sequence[Row], config: dict[str, Any], path: Path) -> None:
    """A row of panels per way: the mean of the sets, then each; a dot is the mean over seeds, a bar their range.

    The anchor, which does not change, has no bars.
    """
    import matplotlib

    matplotlib.use("Agg")
    from _continual_summary import everywhere
    from matplotlib import pyplot

    ways, sets = list(found["ways"]), list(config["sets"])
    if not ways:
        return
    across = len(sets) + 1
    figure, axes = pyplot.subplots(len(ways), across, figsize=(3.6 * across, 3.4 * len(ways) + 0.8), squeeze=False)
    for line, way in zip(axes, ways, strict=True):
        sizes = [size for size in config["ways"][way]["sizes"] if size]
        depths = found["ways"][way]["by_size_depths"]
        whole = everywhere([row for row in rows if row.way == way and row.depth in depths], sizes)
        for panel, name in zip(line, [None, *sets], strict=True):
            _panel(panel, [row for row in whole if name in (None, row.set)], list(found["ways"][way]["by_size"]))
            told = ", ".join(map(str, depths))
            panel.set_title(f"{name or 'mean of the sets'}, {TITLES[way]}, depth {told}", fontsize=9, loc="left")
            panel.set_xticks(found["sizes"])
            panel.set_xlim(found["sizes"][0] - 0.45, found["sizes"][-1] + 0.45)
        line[0].set_ylabel("test accuracy, %")
    for panel in axes[-1]:
        panel.set_xlabel("corpora so far (entries of the pool)")
    handles: dict[str, Any] = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        [handles[arm] for arm in STYLES if arm in handles], [arm for arm in STYLES if arm in handles],
        loc="upper center", ncol=len(handles), frameon=False, fontsize=9,
        bbox_to_anchor=(0.5, 0.965 if len(ways) > 1 else 0.945),
    )  # fmt: skip
    figure.suptitle(
        f"Data that arrives in five corpora: accuracy on other data sets from {config['few']} images per class "
        "(dots: mean of the seeds and depths; bars: range of the seeds)",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.94 if len(ways) > 1 else 0.91))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(panel: Any, rows: Sequence[Row], arms: Sequence[str]) -> None:
    from _continual_summary import accuracy

    sizes = sorted({row.size for row in rows})
    there = [arm for arm in STYLES if arm in arms]
    for place, arm in enumerate(there):
        colour, line, marker = STYLES[arm]
        shift = SHIFT * (place - len(there) / 2)
        values = {size: found for size in sizes if (found := points(rows, arm, size, accuracy))}
        if not values:
            continue
        x, y = [size + shift for size in values], [statistics.mean(part) for part in values.values()]
        low = [mean - min(part) for mean, part in zip(y, values.values(), strict=True)]
        high = [max(part) - mean for mean, part in zip(y, values.values(), strict=True)]
        bars = None if arm == ANCHOR else [low, high]
        panel.errorbar(
            x, y, yerr=bars, color=colour, linestyle=line or "none", marker=marker, markersize=5, lw=1.6,
            elinewidth=0.9, label=arm, zorder=3,
        )  # fmt: skip
    panel.grid(axis="y", color="#e6e6e6", zorder=0)
    panel.spines[["top", "right"]].set_visible(False)
