"""The summary of continual.py in words: Markdown tables and lines of differences."""

from __future__ import annotations

from statistics import median
from typing import Any

WAYS = {"probe": "Linear probe of the ViT as it is grown", "tune": "After finetuning"}


def score(cell: dict[str, Any] | None) -> str:
    """Mean and standard error of a cell."""
    if cell is None:
        return "-"
    return f"{cell['mean']:.1f}" if cell["se"] is None else f"{cell['mean']:.1f} ± {cell['se']:.1f}"


def gap(cell: dict[str, Any] | None) -> str:
    """A difference, and of how many tasks it is ahead in."""
    if cell is None:
        return "-"
    error = "" if cell["se"] is None else f" ± {cell['se']:.1f}"
    return f"{cell['mean']:+.1f}{error} ({cell['won']}/{cell['n']})"


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def by(part: dict[str, Any], what: str) -> str:
    """Accuracy, a line per arm and a column per size, depth or set."""
    keys = list(next(iter(part.values())))
    return table([what, *keys], [[arm, *(score(cells[key]) for key in keys)] for arm, cells in part.items()])


def differences(part: dict[str, Any]) -> str:
    """A line per pair of arms: over all sizes, at each, and at the full size by set and depth, where anything is."""
    cells = {f"{arm} - {base}": by_part for arm, by_base in part.items() for base, by_part in by_base.items()}
    keys = [key for key in next(iter(cells.values())) if any(by_part[key] for by_part in cells.values())]
    # The other way round, and what a selection that may not abstain does to every arm, stand in the JSON.
    lines = [
        [name, *(gap(by_part[key]) for key in keys)]
        for name, by_part in cells.items()
        if not name.startswith("pool-sure") and name != "pool-shares - pool"
    ]
    return table(["difference", *keys], lines)


def forgetting(found: dict[str, Any]) -> str:
    """A line per arm at the end."""
    lines = [
        [arm, *(f"{told[key]:.1f}" if key in told else "-" for key in ("old", "newest", "all", "forgotten"))]
        for arm, told in found.items()
        if len(told) > 1 or told.get("probes")
    ]
    return table(["at the end", "old corpora", "newest", "all", "forgotten"], lines)


def selections(found: dict[str, Any]) -> str:
    """A line per rule and set."""
    lines = [
        [
            arm, name, f"{told['abstained']}/{told['selections']}", f"{told['distance']:.2f}", f"{told['entries']:.1f}",
            ", ".join(f"{entry} {weight:.2f}" for entry, weight in told["mean_weights"].items()) or "-",
            f"{told['seconds']:.1f}",
        ]
        for arm, by_set in found.items()
        for name, told in by_set.items()
    ]  # fmt: skip
    return table(["rule", "set", "abstained", "residual / threshold", "entries", "mean weights", "s"], lines)


def trials(found: dict[str, Any]) -> str:
    """A line per kind and number of images."""
    keys = ("top_is_true", "true_share", "both_selected", "abstained")
    lines = [
        [kind, count, str(told["tasks"]), *(f"{told[key]:.0f}" if key in told else "-" for key in keys)]
        for kind, by_count in found.items()
        for count, told in by_count.items()
    ]
    heads = ["task", "images", "tasks", "first is a source, %", "share of the sources, %", "both selected, %"]
    return table([*heads, "abstained, %"], lines)


def cost(found: dict[str, Any], growing: dict[str, Any]) -> str:
    """A line per selection; what an entry costs beside finetuning."""
    keys = ("entries", "threads", "selected", "seconds", "cpu_seconds", "peak_megabytes", "before_megabytes")
    told = []
    if found:
        heads = [key.replace("_", " ") for key in keys]
        told.append(table(heads, [[str(row[key]) for key in keys] for row in found["selections"]]))
        told += [
            f"{each['images']} images, {each['epochs']} epochs, batches of {each['batch_size']}: "
            f"{median(each['entry_cpu_seconds'])} CPU seconds for an entry, "
            f"{median(each['finetuning_cpu_seconds'])} for finetuning, ratio {each['ratio']}"
            for each in found["adding"]
        ]
    for what, part in growing.items():
        told.append(
            f"{what}: {part['images_seen']:.0f} images, {part['teraflops']:.3f} TFLOPs forward, "
            f"{part['seconds']:.1f} s, {part['milliseconds_per_image']:.1f} ms per image"
        )
    return "\n\n".join(told)


def text(found: dict[str, Any]) -> str:
    """All tables."""
    parts = []
    for way, part in found["ways"].items():
        sizes, sets = (", ".join(map(str, part[f"by_{what}_depths"])) for what in ("size", "set"))
        heading = f"## {WAYS[way]}: accuracy, mean over tasks, depth {sizes}"
        parts.append(f"{heading}\n\n{by(part['by_size'], 'corpora so far')}")
        parts.append(f"At the end:\n\n{by(part['by_depth'], 'depth')}\n\nAt the end, depth {sets}:")
        parts.append(by(part["by_set"], "set"))
        parts.append(f"Paired differences, error over tasks:\n\n{differences(part['differences'])}")
    parts.append(f"## A linear probe on the corpora\n\n{forgetting(found['forgetting'])}")
    if found["selections"]:
        parts.append(f"## Selections\n\n{selections(found['selections'])}")
    if found["trials"]:
        parts.append(f"## Tasks whose source is known\n\n{trials(found['trials'])}")
    parts.append(f"## Cost\n\n{cost(found['cost'], found['growing'])}")
    return "\n\n".join(parts)
