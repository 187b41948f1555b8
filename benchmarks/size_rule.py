"""How depth and width trade: fits the rule by which a budget chooses a size, on descendants that were measured.

    python benchmarks/size_rule.py       # seconds; reads results/transfer.csv and learned.csv, writes size_rule.json

Every run of a descendant after its tuning (3 epochs in transfer.csv, 5 in learned.csv) gives one equation:

    log-odds of accuracy = a constant of its arm, data set and seed
                           + s1 min(0, d) + s2 max(0, d) + s3 min(0, w) + s4 max(0, w)

with d and w the logarithms to base 2 of its depth and width over the ancestor's, 12 and 192. The slopes are those of
least squares, their standard errors those of leaving out one arm after the other (the runs of an arm are not
independent). ``learngene_hub/_sizing.py`` has the four numbers, rounded.

What the rule is good for is asked twice, of it and of simple ones; it with the slopes that the other arms give.

    budgets   one for the parameters of each measured shape of an arm: how far below the most accurate shape that fits
              is the one that is taken?
    pairs     two shapes of an arm whose numbers of parameters differ by a factor below RATIO: is the more accurate one
              taken?
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _arms
import _runs
import _summary
import learned
import numpy as np
from _learned_summary import newest

from learngene_hub.shape import ViTShape

RESULTS = Path(__file__).resolve().parent / "results"
OUT = RESULTS / "size_rule.json"
NATIVE = (12, 192)  # of DeiT-Tiny, the ancestor of all of them
TRANSFER = ("lsamd-base", "rows")
LEARNED = ("lets", "ldr", "tleg", "sws", "net2net", "weight-selection", "front")
TERMS = ("depth below", "depth above", "width below", "width above")
RATIO = 1.3
RULES = ("measured", "deeper", "wider", "more parameters", "the ancestor's width / depth")
LEAST = 0.5  # per cent: nearer to 0 and to 100 the log-odds are noise

Size = tuple[int, int]  # depth, width
Rule = Callable[[Size], float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A descendant after its tuning."""

    arm: str
    group: tuple[str, ...]  # arm, data set, seed: what the constant is of
    size: Size
    accuracy: float  # per cent


def main() -> None:
    found = analysis(runs())
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(as_text(found))


def runs(folder: Path = RESULTS) -> list[Run]:
    """The runs of both files, of each the newest."""
    rows = _summary.current(_runs.read_rows(folder / "transfer.csv", _arms.Row))
    found = [
        Run(arm=r.arm, group=(r.arm, r.set, str(r.seed)), size=size_of(r.shape), accuracy=r.epoch_3)
        for r in rows
        if r.arm in TRANSFER
    ]
    found += [
        Run(arm=r.arm, group=(r.arm, "cifar100", str(r.seed)), size=size_of(r.shape), accuracy=r.epoch_5)
        for r in newest(_runs.read_rows(folder / "learned.csv", learned.Row))
        if r.arm in LEARNED
    ]
    return [run for run in found if not math.isnan(run.accuracy)]


def size_of(written: str) -> Size:
    depth, width = written.split("x")
    return int(depth), int(width)


def terms(size: Size) -> list[float]:
    """What the four slopes are of."""
    deeper, wider = (math.log2(asked / native) for asked, native in zip(size, NATIVE, strict=True))
    return [min(deeper, 0.0), max(deeper, 0.0), min(wider, 0.0), max(wider, 0.0)]


def slopes(found: Sequence[Run]) -> np.ndarray:
    """The four slopes of least squares, log-odds per doubling; 0 where no run says anything."""
    x, y = _centred(found)
    return np.linalg.lstsq(x, y, rcond=None)[0]


def _centred(found: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Terms (runs, 4) and log-odds (runs,), each less the mean of its group, which takes the constants out."""
    groups = defaultdict(list)
    for run in found:
        share = min(max(run.accuracy, LEAST), 100 - LEAST) / 100
        groups[run.group].append([*terms(run.size), math.log(share / (1 - share))])
    centred = [np.array(rows) - np.mean(rows, axis=0) for rows in groups.values()]
    table = np.concatenate(centred)
    return table[:, :4], table[:, 4]


def analysis(found: Sequence[Run]) -> dict[str, Any]:
    """What size_rule.json holds."""
    arms = list(dict.fromkeys(run.arm for run in found))
    pooled, (x, y) = slopes(found), _centred(found)
    without = {arm: slopes([run for run in found if run.arm != arm]) for arm in arms}
    jackknife = np.array(list(without.values()))
    n = len(arms)
    errors = np.sqrt((n - 1) / n * ((jackknife - jackknife.mean(axis=0)) ** 2).sum(axis=0))
    return {
        "what": "log-odds of accuracy per doubling, relative to the ancestor's 12x192",
        "runs": len(found),
        "arms": arms,
        "shapes": sorted({f"{d}x{w}" for d, w in (run.size for run in found)}, key=lambda s: size_of(s)[::-1]),
        "slopes": dict(zip(TERMS, _rounded(pooled), strict=True)),
        "standard_errors": dict(zip(TERMS, _rounded(errors), strict=True)),
        "explained": round(1 - float(((y - x @ pooled) ** 2).sum() / (y**2).sum()), 3),
        "per_arm": {
            arm: dict(zip(TERMS, _rounded(slopes([r for r in found if r.arm == arm])), strict=True)) for arm in arms
        },
        "shapes_behind": {
            term: sorted({f"{r.size[0]}x{r.size[1]}" for r in found if terms(r.size)[place]})
            for place, term in enumerate(TERMS)
        },
        "budgets": _budgets(found, without),
        "pairs": _pairs(found, without),
    }


def _rounded(numbers: np.ndarray) -> list[float]:
    return [round(float(number), 4) + 0.0 for number in numbers]


def _budgets(found: Sequence[Run], without: dict[str, np.ndarray]) -> dict[str, Any]:
    """How often each rule takes the most accurate measured shape under a budget, and what it loses in the mean."""
    told: dict[str, list[float]] = {name: [] for name in RULES}
    for arm, sizes in means(found).items():
        for budget in map(params, sizes):
            fit = sorted((size for size in sizes if params(size) <= budget), key=params)
            if len(fit) == 1:
                continue
            best = max(sizes[size] for size in fit)
            for name in RULES:
                told[name].append(best - sizes[max(fit, key=_rule(name, without[arm]))])
    return {"count": len(told["measured"]), "rules": {name: _score(lost) for name, lost in told.items()}}


def _score(lost: Sequence[float]) -> dict[str, Any]:
    mean = round(statistics.mean(lost), 2) if lost else None
    return {"right": sum(gap == 0 for gap in lost), "points_lost": mean}


def _pairs(found: Sequence[Run], without: dict[str, np.ndarray]) -> dict[str, Any]:
    """How often each rule takes the more accurate shape of a pair, and what it gives away in the mean."""
    pairs = nearly_equal(found)
    told = {}
    for name in RULES:
        lost = []
        for arm, (one, other), (first, second) in pairs:
            rule = _rule(name, without[arm])
            taken = first if rule(one) >= rule(other) else second
            lost.append(max(first, second) - taken)
        told[name] = _score(lost)
    kinds = {
        f"{one[0]}x{one[1]}, {other[0]}x{other[1]}": {
            arm: round(first - second, 2) for arm, sizes, (first, second) in pairs if sizes == (one, other)
        }
        for one, other in dict.fromkeys(sizes for _, sizes, _ in pairs)
    }
    return {"ratio": RATIO, "count": len(pairs), "rules": told, "first_less_second": kinds}


def nearly_equal(found: Sequence[Run]) -> list[tuple[str, tuple[Size, Size], tuple[float, float]]]:
    """(arm, two shapes, their mean accuracies) wherever their numbers of parameters are within RATIO."""
    pairs = []
    for arm, sizes in means(found).items():
        for one, other in itertools.combinations(sorted(sizes), 2):
            counts = params(one), params(other)
            if max(counts) < RATIO * min(counts):
                pairs.append((arm, (one, other), (sizes[one], sizes[other])))
    return pairs


def means(found: Sequence[Run]) -> dict[str, dict[Size, float]]:
    """Arm -> shape -> mean accuracy, per cent."""
    by: dict[str, dict[Size, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in found:
        by[run.arm][run.size].append(run.accuracy)
    return {arm: {size: statistics.mean(each) for size, each in sizes.items()} for arm, sizes in by.items()}


def params(size: Size) -> int:
    """Of the ViT of 64 px with 10 classes that was tuned."""
    depth, width = size
    return ViTShape(depth=depth, width=width, heads=width // 64, image_size=64, classes=10).params()


def _rule(name: str, fitted: np.ndarray) -> Rule:
    return {
        "measured": lambda size: float(np.dot(fitted, terms(size))),
        "deeper": lambda size: size[0],
        "wider": lambda size: size[1],
        "more parameters": params,
        "the ancestor's width / depth": lambda size: -abs(math.log(size[1] / size[0] * NATIVE[0] / NATIVE[1])),
    }[name]


def as_text(found: dict[str, Any]) -> str:
    """What is printed."""
    lines = [f"{found['runs']} runs, {len(found['arms'])} arms, {len(found['shapes'])} shapes: {found['what']}"]
    for term, slope in found["slopes"].items():
        behind = ", ".join(found["shapes_behind"][term])
        lines.append(f"  {term:<12} {slope:+.2f} ± {found['standard_errors'][term]:.2f}   from {behind}")
    for name, kind in (("budgets", "budgets"), ("pairs", f"pairs with parameters within a factor {RATIO}")):
        lines.append(f"of {found[name]['count']} {kind}:")
        lines += [
            f"  {rule:<30} right {told['right']}, {told['points_lost']:.2f} points lost in the mean"
            for rule, told in found[name]["rules"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
