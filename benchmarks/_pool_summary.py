"""What the rows of pool.csv say: accuracy over parameters, paired differences, choices under a budget, compute, a plot.

Two arms are compared over the routes that both have. A seed gives one difference, the mean over these routes; the
standard error is that of the seeds, which draw the instances and the order of the images.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from _pool_cost import recipe_of
from _summary import rounded as spread
from pool import COST, Row, current

from learngene_hub._card_results import score

OURS, BASE, BUNDLED = "pool", "sn-net-scratch", "sn-net-cut"
MEANINGS = {
    "pool": "instances distilled from the ancestor, stitches from the maps of the distillation",
    "pool-ls": "the same instances, stitches by least squares",
    "sn-net-scratch": "SN-Net as the paper of the pool has it: instances trained from scratch with labels, stitches by "
    "least squares, the pool trained alike",
    "sn-net-cut": "SN-Net as this package makes it of one ancestor: both instances cut out of it, stitches by "
    "least squares, the pool trained alike",
    "alone": "that instance without a pool, distilled and trained with all the compute",
    "net2net": "a ViT cut out of the ancestor and tuned with one share of the compute, that of one route",
    "net2net-all": "a ViT cut out of the ancestor and tuned with all the compute",
    "sn-net": "the ancestor itself as the wide anchor, the narrow one cut out of it",
}
ASIDE = ("pool-start", "pool-ls-start", "pool-wide", "pool-wide-ls")  # arms of one seed, that explain others
WHOLE = "sn-net"  # stores the whole ancestor
GATHERED = {"alone-64": "alone", "alone-128": "alone"}  # arms that are one in tables
BUDGETS = (400_000, 600_000, 800_000, 1_000_000, 1_200_000, 1_400_000)  # parameters
COLOURS = {
    "pool": "#0b6e4f",
    "pool-ls": "#7fb89f",
    "sn-net-scratch": "#c26e6e",
    "sn-net-cut": "#8a6fae",
    "sn-net": "#3b6ea8",
    "alone": "#d08c1d",
    "net2net": "#777777",
    "net2net-all": "#222222",
}
Spread = dict[str, Any]  # mean, sd (None of one), n


def gathered(row: Row) -> str:
    """The arm of a row, in tables."""
    return GATHERED.get(row.arm, row.arm)


def networks(rows: Sequence[Row], arms: Collection[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm -> network -> its size and its accuracy over seeds, the smallest network first."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (row.params, row.route)):
        found.setdefault(gathered(row), {}).setdefault(row.route, []).append(row)
    return {
        arm: {
            route: {"params": each[0].params, "flops": each[0].flops, **spread([row.accuracy for row in each])}
            for route, each in found[arm].items()
        }
        for arm in arms
        if arm in found
    }


def difference(rows: Sequence[Row], arm: str, base: str, route: str = "") -> dict[str, Any]:
    """``arm`` less ``base`` over the routes that both have, or one of them: mean and standard error over seeds."""
    mine, theirs = (
        {(row.seed, row.route): row.accuracy for row in rows if gathered(row) == name and route in ("", row.route)}
        for name in (arm, base)
    )
    by_seed: dict[int, list[float]] = {}
    by_route: dict[str, list[float]] = {}
    for key in mine.keys() & theirs.keys():
        by_seed.setdefault(key[0], []).append(mine[key] - theirs[key])
        by_route.setdefault(key[1], []).append(mine[key] - theirs[key])
    means = [statistics.mean(gaps) for gaps in by_seed.values()]
    if not means:
        return {"n": 0}
    error = round(statistics.stdev(means) / math.sqrt(len(means)), 2) if len(means) > 1 else None
    won = sum(statistics.mean(gaps) > 0 for gaps in by_route.values())
    return {
        "mean": round(statistics.mean(means), 2), "se": error, "n": len(means), "routes": len(by_route), "won": won
    }  # fmt: skip


def chosen(rows: Sequence[Row], arm: str, budget: int) -> dict[str, Any] | None:
    """Test accuracy of the route that a pool chooses for at most ``budget`` parameters, by the held-out images, over
    seeds; and of the route that would have been best on the test images. None: nothing is that small."""
    chosen_ones, best = [], []
    for seed in sorted({row.seed for row in rows}):
        there = [row for row in rows if (row.arm, row.seed) == (arm, seed) and row.params <= budget]
        if not there:
            return None
        chosen_ones.append(max(there, key=lambda row: (row.held_out, -row.params)))
        best.append(max(row.accuracy for row in there))
    return {
        **spread([row.accuracy for row in chosen_ones]), "best": spread(best)["mean"],
        "routes": [row.route for row in chosen_ones],
    }  # fmt: skip


def compute(rows: Sequence[Row], arm: str, reference: float) -> dict[str, Any]:
    """Training FLOPs of an arm, in 10^12, by stage; all over those of the reference arm; what it stores, and what
    its networks take one by one, in float16."""
    own = [row for row in rows if row.arm == arm]
    row = own[0]
    told = {name: round(getattr(row, name) / 1e12, 3) for name in COST}
    total = sum(getattr(row, name) for name in COST)
    return told | {
        "total": round(total / 1e12, 3),
        "over_reference": round(total / reference, 3),
        "networks": row.networks,
        "stored_megabytes": round(row.stored_bytes / 1e6, 2),
        "one_by_one_megabytes": round(2 * sum({each.route: each.params for each in own}.values()) / 1e6, 2),
        "seconds": round(statistics.mean({each.seed: each.seconds for each in own}.values()), 1),
    }


def summary(rows: Sequence[Row], config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, as JSON."""
    rows = current(rows, {arm: recipe_of(dict(config), arm) for arm in config["arms"]})
    arms = [arm for arm in config["arms"] if arm not in ASIDE and any(row.arm == arm for row in rows)]
    reference = next(row for row in rows if row.arm == config["reference"])
    spent = sum(getattr(reference, name) for name in COST)
    found, base = networks(rows, MEANINGS), config.get("base", BASE)
    return {
        "reference": config["reference"],
        "base": base,
        "data": {name: config[name] for name in ("data", "image_size", "train", "test")},
        "seeds": sorted({row.seed for row in rows}),
        "machine": sorted({row.machine for row in rows}),
        "digests": {
            arm: min((row for row in rows if gathered(row) == arm), key=lambda row: row.seed).digest for arm in found
        },
        "compute": {arm: compute(rows, arm, spent) for arm in arms},
        "networks": found,
        "aside": networks(rows, ASIDE),
        "mean_over_networks": {arm: spread([n["mean"] for n in by.values()])["mean"] for arm, by in found.items()},
        "differences": {
            f"{one} - {arm}": difference(rows, one, arm)
            for one in (OURS, BUNDLED)
            if one in found
            for arm in found
            if arm != one
        },
        "per_route": {
            arm: {route: difference(rows, arm, base, route) for route in found[arm] if route in found.get(base, {})}
            for arm in found
            if arm != base
        },
        "overall": {arm: difference(rows, arm, base) for arm in found if arm != base},
        "chosen": {
            arm: {str(budget): chosen(rows, arm, budget) for budget in BUDGETS}
            for arm in arms
            if config["arms"][arm]["kind"] in ("pool", "scratch", "sn-net")
        },
    }  # fmt: skip


def table(by_arm: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per network, the smallest first: accuracy of each arm that has it."""
    sizes = {route: each["params"] for by in by_arm.values() for route, each in by.items()}
    lines = ["| blocks | parameters | " + " | ".join(by_arm) + " |", "|---" * (len(by_arm) + 2) + "|"]
    for route in sorted(sizes, key=lambda route: (sizes[route], route)):
        told = [score(by.get(route)) for by in by_arm.values()]
        lines.append(f"| {route} | {sizes[route] / 1e6:.2f} M | " + " | ".join(told) + " |")
    return "\n".join(lines)


def short(found: Mapping[str, Any]) -> str:
    """A line per arm: what it stores and spends, its smallest and largest network, the mean, and ours less it."""
    lines = ["| arm | networks | stored MB | compute | teacher's part | smallest | largest | mean | pool less it |"]
    lines.append("|---" * 9 + "|")
    for arm, spent in found["compute"].items():
        own = list(found["networks"][GATHERED.get(arm, arm)].values())
        if arm in GATHERED:
            own = [own[0] if arm.endswith("-64") else own[-1]]
        gap = found["differences"].get(f"{OURS} - {arm}", {"n": 0})
        less = f"{gap['mean']:+.1f} ± {gap['se'] or 0:.1f} ({gap['routes']} networks)" if gap["n"] else ""
        taught = (spent["first_teacher"] + spent["second_teacher"]) / spent["total"]
        lines.append(
            f"| {arm} | {spent['networks']} | {spent['stored_megabytes']} | {spent['over_reference']:.2f} | "
            f"{taught:.0%} | {score(own[0])} | {score(own[-1])} | "
            f"{statistics.mean(each['mean'] for each in own):.1f} | {less} |"
        )
    return "\n".join(lines)


def write_summary(rows: Sequence[Row], stem: Path, config: Mapping[str, Any]) -> str:
    """Write STEM.json and STEM.png; the tables."""
    found = summary(rows, config)
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, stem.with_suffix(".png"))
    return "\n\n".join([short(found), table(found["networks"]), *([table(found["aside"])] if found["aside"] else [])])


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Test accuracy over parameters, every network of every arm, bars of one deviation over seeds; where there is the
    arm that stores the ancestor, once more with it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    small = [arm for arm in found["networks"] if arm != WHOLE]
    views = [small] if WHOLE not in found["networks"] else [small, list(found["networks"])]
    figure, panels = pyplot.subplots(1, len(views), figsize=(4 + 4.5 * len(views), 5.2), squeeze=False)
    for panel, arms in zip(panels[0], views, strict=True):
        for arm in arms:
            points = list(found["networks"][arm].values())
            line = len(points) > 1 and arm not in ("alone", "net2net")
            panel.errorbar(
                [each["params"] / 1e6 for each in points], [each["mean"] for each in points],
                [each["sd"] or 0 for each in points], fmt="o-" if line else "D", color=COLOURS[arm], label=arm,
                markersize=4 if line else 6, linewidth=1.2, elinewidth=0.8, capsize=2,
            )  # fmt: skip
        panel.set_xlabel("parameters of the network, millions")
        panel.set_ylabel(f"{found['data']['data']} test accuracy, %")
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.89))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
