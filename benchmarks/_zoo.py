"""Which learngenes are worth bundling, in what order, and what their cards and README.md say of the comparison.

A learngene stays in the package where it is ahead of the training-free starts on at least one axis, in the mean of
their common cells by more than the standard error over cells:

    accuracy   ahead of the best of them, whatever that stores
    storage    ahead of every one that stores no more bytes (net2net of fewer blocks)
    data       ahead of the best of them on few images per class (few.csv)

What stores as many bytes is within SLACK of them: a header is not a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from learngene_hub._compare_summary import best_rival
from learngene_hub.card import table

SLACK = 1.02
SIZE = 64  # pixels
SEEN = ("pacs",)  # of the comparison's sets, those of lsamd-base's extraction
MEANINGS = {
    "net2net": "the ancestor itself, nothing trained: evenly spaced blocks, units copied or left out; at 12x192 the "
    "whole ancestor, finetuned",
    "net2net-6": "the same from six blocks of it, 5.7 MB",
    "net2net-4": "the same from four blocks of it, 3.9 MB",
    "net2net-3": "the same from three blocks of it, 3.0 MB",
    "full": "the whole ancestor, finetuned at its own 12x192 alone; beside each shape of the others",
    "first": "the same with the first blocks of the ancestor",
    "weight-selection": "evenly spaced units of the ancestor (Xu et al., ICLR 2024)",
    "front": "the ancestor's weights resized by a cosine transform",
    "random": "the same network from timm's own initialisation, 20 epochs",
    "mimetic": "random, with attention that begins as that of trained ViTs (Trockman and Kolter, 2023), 20 epochs",
    "distilled": "random, taught by the ancestor first, each size by itself, at a 24th of lsamd-base's extraction",
    "adapted": "the ancestor, taught at 64 px what it says at 160 px, at a 24th of lsamd-base's extraction, then "
    "net2net",
}
CARD = (
    "net2net",
    "net2net-6",
    "net2net-4",
    "net2net-3",
    "net2net-2",
    "weight-selection",
    "front",
    "distilled",
    "adapted",
    "random",
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the comparison says of a learngene."""

    name: str
    gap: dict[str, Any]  # less the best training-free start
    rival: str  # the best training-free start that stores no more, "" where there is none
    rival_gap: dict[str, Any] | None
    axes: tuple[str, ...]  # on which it is ahead


def verdicts(compared: Mapping[str, Any], few: Mapping[str, Any] | None) -> list[Verdict]:
    """Of every learngene that was compared, the most useful first: the farthest ahead of what needs no training."""
    base = best_rival(compared)
    names = [name for name, facts in compared["starts"].items() if facts["kind"] == "learngene"]
    found = [_verdict(compared, few, name, base) for name in names] if base else []
    return sorted(found, key=lambda verdict: -verdict.gap["mean"])


def _verdict(compared: Mapping[str, Any], few: Mapping[str, Any] | None, name: str, base: str) -> Verdict:
    starts, gaps = compared["starts"], compared["differences"][name]
    within = [
        other
        for other in compared["training_free"]
        if starts[other]["kind"] != "full"  # which has one size
        and starts[other]["stored_bytes"] <= SLACK * starts[name]["stored_bytes"]
        and gaps.get(other)
    ]
    rival = min(within, key=lambda other: gaps[other]["mean"], default="")
    axes = ["accuracy"] if is_ahead(gaps[base]) else []
    axes += ["storage"] if within and all(is_ahead(gaps[other]) for other in within) and rival != base else []
    if few is not None and name in few["starts"]:
        rivals = [few["differences"][name][other] for other in few["training_free"]]
        axes += ["data"] if rivals and all(is_ahead(gap) for gap in rivals if gap) else []
    return Verdict(name=name, gap=gaps[base], rival=rival, rival_gap=gaps.get(rival), axes=tuple(axes))


def is_ahead(gap: Mapping[str, Any]) -> bool:
    """By more than its standard error."""
    return gap["mean"] > (gap["se"] or 0.0)


def points(gap: Mapping[str, Any] | None) -> str:
    """A difference for a table."""
    if gap is None:
        return ""
    error = "" if gap["se"] is None else f" ± {gap['se']:.1f}"
    return f"{gap['mean']:+.1f}{error}"


def as_table(compared: Mapping[str, Any]) -> str:
    """Every start: accuracy, what it stores and costs, and how far it is from the best training-free one."""
    base = best_rival(compared)
    rows = []
    for name, facts in sorted(compared["starts"].items(), key=lambda item: -_order(compared, item[0], base)):
        gap = compared["differences"][name].get(base)
        cost = facts["extraction_flops"]
        told = "not told" if cost is None else f"{cost / 1e15:.3g}" if cost else ""
        stored = f"{facts['stored_bytes'] / 1e6:.1f}" if facts["stored_bytes"] else ""
        chance = "" if not gap or gap["p"] is None else f"{gap['p']:.1g}"
        cells = f"{facts['cells']} x {facts['runs'] / facts['cells']:.2g}"
        rows.append([f"`{name}`", f"{facts['accuracy']:.1f}", points(gap), chance, cells, stored, told])
    head = ["start", "accuracy", f"less {base}", "p", "cells x seeds", "stored MB", "extraction PFLOPs"]
    return table(head, rows)


def _order(compared: Mapping[str, Any], name: str, base: str | None) -> float:
    gap = compared["differences"][name].get(base) if base else None
    return gap["mean"] if gap else 0.0


def as_card(compared: Mapping[str, Any], name: str, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results in the form that a card takes: this learngene beside its rivals; None where it was not compared."""
    if name not in compared["starts"]:
        return None
    arms = [name, *(arm for arm in CARD if arm in compared["starts"])]
    cells = [cell for cell in compared["cells"] if name in cell["starts"]]
    minus = {}
    base = best_rival(compared)
    for arm in arms:
        gap = compared["differences"][arm].get(base)
        if gap and arm in (name, "adapted", "distilled"):
            minus[arm] = {"overall": {**gap, "n": gap["runs"]}, "per_shape_and_set": gap["per_cell"]}
    recipe = plan["recipe"]
    return {
        "number": f"test accuracy after {recipe['epochs']} epochs, of random after {plan['fresh']['epochs']}",
        "recipe": f"{plan['images']} images of each set at {plan['image_size']} px, AdamW, "
        f"batch {recipe['batch_size']}, {recipe['schedule']} with warm-up, "
        f"peak rate {recipe['lr']:g} (random: {plan['fresh']['lr']:g}), "
        "a head from class means, no augmentation",
        "meanings": {arm: MEANINGS[arm] for arm in arms if arm in MEANINGS},
        "base": base,
        "digests": {arm: compared["starts"][arm]["digest"] for arm in arms if compared["starts"][arm]["digest"]},
        "overall": dict.fromkeys(arms),
        "cells": [
            {"shape": cell["shape"], "set": cell["data"], "arms": {arm: cell["starts"].get(arm) for arm in arms}}
            for cell in cells
        ],
        f"minus_{base}": minus,
    }


def goals(compared: Mapping[str, Any]) -> list[str]:
    """The goals of the comparison, with what was found."""
    best, base = verdicts(compared, None)[0], best_rival(compared)
    gap, against = best.gap, compared["against_random"].get(best.name)
    told = []
    if against:
        behind = ", ".join(f"{name} ({value:+.1f})" for name, value in against["behind"].items()) or "none"
        told.append(
            f"`{best.name}` after 1 epoch is ahead of its random twin after {against['epochs']} in "
            f"{against['ahead']} of {against['cells']} cells; behind in: {behind}."
        )
    lost = ", ".join(gap["clear_losses"]) or "none"
    told.append(
        f"`{best.name}` less `{base}`, the best start without training: {points(gap)} points in the mean over "
        f"{gap['cells']} cells ({gap['runs']} pairs of runs); worse by more than one standard error in: {lost}."
    )
    whole = compared["differences"][best.name].get("full")
    if whole:
        told.append(
            f"Less the whole ancestor, pre-trained and finetuned at its own size (`full`), whatever the descendant's: "
            f"{points(whole)} over {whole['cells']} cells; ahead in {whole['wins']}."
        )
    adapted = compared["differences"][best.name].get("adapted")
    if adapted:
        by_shape: dict[str, list[float]] = {}
        for cell, found in adapted["per_cell"].items():
            by_shape.setdefault(cell.split()[0], []).append(found["mean"])
        parts = ", ".join(f"{fmean(means):+.1f} at {shape}" for shape, means in by_shape.items())
        told.append(
            f"Less `adapted`, to which training at {SIZE} px alone gave a 24th of the compute: {points(adapted)} over "
            f"{adapted['cells']} cells; {parts}."
        )
    unseen = [cell["mean"] for name, cell in gap["per_cell"].items() if name.split()[1] not in SEEN]
    if 0 < len(unseen) < gap["cells"]:
        mean = sum(unseen) / len(unseen)
        told.append(f"On the sets that it was not trained on ({len(unseen)} cells): {mean:+.1f} points.")
    even = compared["break_even"].get(best.name)
    if even and even["trainings"]:
        never = (
            f" ({even['never_reached']} cells never are, and count with all epochs)" if even["never_reached"] else ""
        )
        told.append(
            f"Its extraction is paid back, in FLOPs, after {even['trainings']} trainings of a size on a task: so many "
            f"random twins trained until they are as good as one epoch makes the descendant{never}."
        )
    return told
