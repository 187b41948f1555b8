"""What the rows of continual.py say: accuracy by size of the pool, paired differences, forgetting, selections, costs.

A paired difference is taken between two runs of one way, size, depth, set and seed. Runs of one task (set and seed) at
several depths and sizes share their images, so they are averaged first, and the standard error is that over tasks. The
growing was done once: it is not in the error.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from _continual_arms import ANCHOR, SINGLE, Found, Row
from _continual_data import Sources
from _continual_growth import BASE, POOL, Grown
from _continual_selection import Tried
from _continual_text import text
from _runs import read_rows

ORACLE = "oracle"
MEANINGS = {
    "pool": "what TALS selects, with labels; the anchor where it abstains",
    "pool-sure": "the same, but it may not abstain",
    "pool-shares": "TALS without labels (half of the shares), which may not abstain",
    "anchor": "the base alone",
    "retrain": "the base finetuned on all corpora so far, as many passes as the pool spent in all",
    "sequential": "the base finetuned on one corpus after the other",
    "last": "the base finetuned on the newest corpus alone",
    "soup": "every entry, in equal parts that sum to 1",
    "logme": "the single entry that LogME scores best",
    "oracle": "the single entry that is best on the test images: an upper bound, no method",
}


def accuracy(row: Row) -> float:
    """Of a row, per cent: after finetuning, or of the probe where that is all there is."""
    return row.tuned if row.way == "tune" else row.probe


def everywhere(rows: Iterable[Row], sizes: Sequence[int]) -> list[Row]:
    """The rows, with the anchor's at every size (it does not change) and the oracle's."""
    found, singles = list[Row](), defaultdict[tuple[Any, ...], list[Row]](list)
    for row in rows:
        if row.arm == ANCHOR:
            found += [replace(row, size=size) for size in sizes]
        elif row.arm.startswith(SINGLE):
            singles[row.way, row.size, row.depth, row.set, row.seed].append(row)
        else:
            found.append(row)
    full = max((len(part) for part in singles.values()), default=0)
    found += [replace(max(part, key=accuracy), arm=ORACLE) for part in singles.values() if len(part) == full]
    return found


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, standard error (of two and more) and count; None where there is nothing."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {
        "mean": round(statistics.mean(values), 2),
        "se": None if error is None else round(error, 2),
        "n": len(values),
    }


def difference(rows: Sequence[Row], arm: str, base: str) -> dict[str, Any] | None:
    """Of two arms over all cells that both have: mean, standard error over tasks, tasks won; None: no cell."""

    def cells(name: str) -> dict[tuple[Any, ...], float]:
        own = (row for row in rows if row.arm == name)
        return {(row.set, row.seed, row.way, row.size, row.depth): accuracy(row) for row in own}

    ours, theirs, by_task = cells(arm), cells(base), defaultdict[tuple[Any, ...], list[float]](list)
    for cell, value in ours.items():
        if cell in theirs:
            by_task[cell[:2]].append(value - theirs[cell])
    gaps = [statistics.mean(part) for part in by_task.values()]
    if not gaps:
        return None
    told = spread(gaps)
    return {**(told or {}), "cells": sum(map(len, by_task.values())), "won": sum(gap > 0 for gap in gaps)}


def comparison(rows: Sequence[Row], config: dict[str, Any]) -> dict[str, Any]:
    """One way: accuracy of each arm by size, by depth at the full size, by set; differences of the pool's own arms."""
    sizes, full = sorted({row.size for row in rows}), len(config["corpora"])
    arms = [arm for arm in MEANINGS if any(row.arm == arm for row in rows)]

    def table(pick: Callable[[Row], Any], only: Sequence[Row]) -> dict[str, Any]:
        keys = sorted({pick(row) for row in only})
        return {
            arm: {str(key): spread([accuracy(r) for r in only if r.arm == arm and pick(r) == key]) for key in keys}
            for arm in arms
        }

    last = [row for row in rows if row.size == full]
    at_all_sizes = common_depths(rows, lambda row: (row.arm, row.size))
    of_all_arms = common_depths(last, lambda row: row.arm)
    own = [arm for arm in ("pool", "pool-sure", "pool-shares") if arm in arms]
    parts = {"all": list(rows)} | {str(size): [row for row in rows if row.size == size] for size in sizes}
    parts |= {f"{name}, {full}": [row for row in last if row.set == name] for name in config["sets"]}
    depths = sorted({row.depth for row in rows})
    parts |= {f"depth {depth}, {full}": [row for row in last if row.depth == depth] for depth in depths}
    return {
        "by_size_depths": at_all_sizes,
        "by_set_depths": of_all_arms,
        "by_size": table(lambda row: row.size, [row for row in rows if row.depth in at_all_sizes]),
        "by_depth": table(lambda row: row.depth, last),
        "by_set": table(lambda row: row.set, [row for row in last if row.depth in of_all_arms]),
        "differences": {
            arm: {
                base: {part: difference(some, arm, base) for part, some in parts.items()}
                for base in arms
                if base != arm
            }
            for arm in own
        },
    }


def common_depths(rows: Sequence[Row], pick: Callable[[Row], Any]) -> list[int]:
    """The depths that there are for everything that ``pick`` tells apart: other means cannot be compared."""
    found: dict[Any, set[int]] = {}
    for row in rows:
        found.setdefault(pick(row), set()).add(row.depth)
    return sorted(set.intersection(*found.values())) if found else []


def forgetting(rows: Sequence[Grown], names: Sequence[str]) -> dict[str, Any]:
    """Of each arm: what a probe reads off each corpus after each, how much of the old ones fell, the newest, the mean.

    ``forgotten``: over the corpora but the newest, accuracy just after the corpus less accuracy at the end. Of the pool
    each corpus is read with its own entry, which does not change, so that nothing is forgotten by construction.
    """
    found: dict[str, Any] = {}
    newest = {(row.arm, row.size): json.loads(row.probes) for row in rows}
    newest |= {(arm, 1): newest["last", 1] for arm in ("retrain", "sequential") if ("last", 1) in newest}
    full = len(names)
    for arm in (BASE, "retrain", "sequential", "last"):
        seen = {size: probes for (who, size), probes in newest.items() if who == arm}
        told: dict[str, Any] = {"probes": {str(size): seen[size] for size in sorted(seen)}}
        if full in seen:
            told |= {"old": _mean(seen[full], names[:-1]), "newest": round(seen[full][names[-1]], 2)}
            told |= {"all": _mean(seen[full], names)}
        if len(seen) == full:
            old = [seen[place][name] - seen[full][name] for place, name in enumerate(names[:-1], start=1)]
            told |= {"forgotten": round(statistics.mean(old), 2)}
        if arm == BASE and seen:
            told |= {"all": _mean(seen[0], names), "old": _mean(seen[0], names[:-1])}
        found[arm] = told
    own = {names[size - 1]: probes for (arm, size), probes in newest.items() if arm == POOL}
    if len(own) == full:
        diagonal = {name: own[name][name] for name in names}
        found[POOL] = {"probes": own, "forgotten": 0.0, "old": _mean(diagonal, names[:-1])}
        found[POOL] |= {"newest": round(diagonal[names[-1]], 2), "all": _mean(diagonal, names)}
    return found


def _mean(probes: dict[str, float], names: Sequence[str]) -> float:
    return round(statistics.mean(probes[name] for name in names), 2)


def growing_cost(rows: Sequence[Grown]) -> dict[str, Any]:
    """An entry beside the base finetuned on the same data: images, FLOPs of the forwards, seconds; and per image."""
    entries = [row for row in rows if row.arm == POOL]
    others = [row for row in rows if row.arm == "last"]

    def told(part: Sequence[Grown]) -> dict[str, Any]:
        seconds = sum(row.seconds for row in part) / sum(row.images_seen for row in part)
        return {
            "images_seen": statistics.mean(row.images_seen for row in part),
            "teraflops": round(statistics.mean(row.flops for row in part) / 1e12, 4),
            "seconds": round(statistics.mean(row.seconds for row in part), 1),
            "milliseconds_per_image": round(1000 * seconds, 2),
        }

    return {"entry": told(entries), "finetuning": told(others)} if entries and others else {}


def selection_facts(rows: Sequence[Found]) -> dict[str, Any]:
    """Of each rule and set: how often it abstained, its mean weights, seconds."""
    found: dict[str, Any] = {}
    for arm, name in dict.fromkeys((row.arm, row.set) for row in rows):
        part = [row for row in rows if (row.arm, row.set) == (arm, name)]
        total = defaultdict[str, float](float)
        for row in part:
            for entry, weight in json.loads(row.weights).items():
                total[entry] += weight / len(part)
        found.setdefault(arm, {})[name] = {
            "selections": len(part),
            "abstained": sum(row.abstained for row in part),
            "distance": round(statistics.mean(row.residual / row.threshold for row in part), 2),
            "entries": round(statistics.mean(len(json.loads(row.weights)) for row in part), 2),
            "mean_weights": {entry: round(weight, 3) for entry, weight in sorted(total.items())},
            "seconds": round(statistics.mean(row.seconds for row in part), 2),
        }
    return found


def trial_facts(rows: Sequence[Tried]) -> dict[str, Any]:
    """Of each kind (of other data: each set) and number of images: how often it is found, and refused; per cent."""
    found: dict[str, Any] = {}
    for row in rows:
        kind = row.what if row.kind == "other" else row.kind
        found.setdefault(kind, {}).setdefault(str(row.count), []).append(row)
    return {
        kind: {count: _trial(part) for count, part in sorted(by_count.items(), key=lambda item: int(item[0]))}
        for kind, by_count in found.items()
    }


def _trial(part: Sequence[Tried]) -> dict[str, Any]:
    def share(holds: Callable[[Tried], Any]) -> float:
        return round(100 * statistics.mean(float(holds(row)) for row in part), 1)

    told = {"tasks": len(part), "abstained": share(lambda row: row.abstained)}
    if part[0].kind in ("one", "two"):
        told |= {"top_is_true": share(lambda row: row.hit), "true_share": share(lambda row: row.true_share)}
    if part[0].kind == "two":
        told |= {"both_selected": share(lambda row: row.complete)}
    return told


def summary(rows: Sequence[Row], sources: Sources, config: dict[str, Any]) -> dict[str, Any]:
    """Everything, as JSON."""
    sizes = list(range(1, len(config["corpora"]) + 1))
    grown = list({row.job: row for row in read_rows(sources.beside("growing"), Grown)}.values())
    chosen = list({row.job: row for row in read_rows(sources.beside("selections"), Found)}.values())
    tried = list({row.job: row for row in read_rows(sources.beside("trials"), Tried)}.values())
    cost = sources.beside("cost").with_suffix(".json")
    ways = {way: [row for row in rows if row.way == way] for way in config["ways"]}
    whole = {way: everywhere(part, [s for s in config["ways"][way]["sizes"] if s]) for way, part in ways.items()}
    return {
        "settings": {key: config[key] for key in config if key != "superclasses"},
        "seeds": sorted({row.seed for row in rows}),
        "sizes": sizes,
        "machine": sorted({row.machine for row in (*rows, *grown)}),
        "ways": {way: comparison(part, config) for way, part in whole.items() if part},
        "forgetting": forgetting(grown, list(config["corpora"])),
        "growing": growing_cost(grown),
        "selections": selection_facts(chosen),
        "trials": trial_facts(tried),
        "cost": json.loads(cost.read_text()) if cost.exists() else {},
    }


def write_summary(rows: Sequence[Row], sources: Sources, config: dict[str, Any]) -> str:
    """Write OUT's .json and .png; the tables in words."""
    from _continual_plot import draw

    found = summary(rows, sources, config)
    sources.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, rows, config, sources.out.with_suffix(".png"))
    return text(found)
