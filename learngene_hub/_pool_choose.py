"""The command ``learngene select``: which entries of a pool fit a task, and the mixture of them."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub._command import (
    DataOption,
    LimitOption,
    SeedOption,
    SkipOption,
    YesOption,
    require_new,
    require_place,
    tell_skipped,
)
from learngene_hub._output import Output
from learngene_hub._pool_options import PoolArgument, SplitOption, images_for

if TYPE_CHECKING:
    from learngene_hub.learngene import Learngene
    from learngene_hub.pool import Selection

SAMPLED = 10  # images of the samples beside a task with labels, as ``_pool_select.SAMPLE``

UnlabelledOption = Annotated[
    bool,
    typer.Option(
        "--unlabelled", help="Look at the images alone, in any folders; the amounts are then half of the shares."
    ),
]
MostOption = Annotated[int | None, typer.Option("--k", help="At most so many entries [3; 1 of blocks or a chain].")]
ToleranceOption = Annotated[
    float,
    typer.Option(
        "--tolerance",
        help="How many times as far a task may be as samples of the pool's own data: of as many images, with labels "
        f"of at most {SAMPLED}.",
    ),
]
RuleOption = Annotated[
    str, typer.Option("--rule", help="tals, or one to compare it with: logme, nearest, soup, anchor.")
]
MixtureOption = Annotated[
    Path | None, typer.Option("--out", help="Also write the mixture, a learngene: NAME.safetensors or a folder.")
]


def select(
    out: Output,
    name: PoolArgument,
    data: DataOption,
    unlabelled: UnlabelledOption = False,
    k: MostOption = None,
    tolerance: ToleranceOption = 1.0,
    rule: RuleOption = "tals",
    path: MixtureOption = None,
    split: SplitOption = "train",
    limit: LimitOption = None,
    skip_unreadable: SkipOption = False,
    seed: SeedOption = 0,
    yes: YesOption = False,
) -> None:
    """Which entries of a pool fit a task, and how much of each.

    A few images of the task say it. A task that is like none of the pool's data gets no entry: the anchor alone.

    \b
    learngene select mypool --data photos/ --limit 100
    learngene select mypool --data photos/ --unlabelled --k 1 --json
    learngene select mypool --data photos/ --out mixed; learngene finetune mixed --depth 6 --data photos/ --out tuned
    """
    from learngene_hub.hub import pull_pool

    if path is not None:
        require_new(out, path, yes=yes)
        require_place(path)
    pool = pull_pool(name)
    images = images_for(pool, data, split, limit, skip_unreadable, unlabelled=unlabelled)
    tell_skipped(out, images)
    found = pool.select(images, unlabelled=unlabelled, k=k, tolerance=tolerance, rule=rule, seed=seed)
    if path is not None:
        _write(pool.merge(found), path)
    if out.format == "quiet":
        out.rows(found.to_dict()["entries"], key="name", columns=["name"])
    else:
        written = {} if path is None else {"out": str(path)}
        out.facts({"pool": name, "data": data} | _facts(found, plain=out.format == "json") | written, key="pool")
    if why := _why_none(found, data):
        out.note(why)
    if path is not None:
        out.note(f"Next: learngene finetune {shlex.quote(str(path))} --data SOURCE --out DIR")


def _write(merged: Learngene, path: Path) -> None:
    if path.suffix == ".safetensors":
        merged.save(path)
    else:
        merged.save_pretrained(path)


def _facts(found: Selection, *, plain: bool) -> dict[str, Any]:
    """What is told of a selection; the entries in a list where it is for programs (``plain``), else by name."""
    told = found.to_dict()
    entries = told["entries"] if plain else {row["name"]: _row(row) for row in told["entries"]} or None
    facts: dict[str, Any] = {"abstained": found.abstained, "entries": entries}
    facts |= {key: told[key] for key in ("rule", "residual", "threshold")} | {"threshold_images": found.sampled}
    facts |= {key: told[key] for key in ("images", "labelled", "scores", "seconds")}
    return facts | {"anchor_sha256": found.anchor, "pool_digest": found.pool}


def _why_none(found: Selection, data: str) -> str:
    """Why nothing was selected; "" where something was."""
    from learngene_hub._pool_amounts import FLOOR, is_anchor_best

    if found.entries:
        return ""
    if found.abstained:
        times = found.residual / found.threshold
        more = math.floor(10 * times + 1) / 10
        fewer = "; with labels of that few, for they judge the rest" if found.sampled < found.images else ""
        return (
            f"{data} is like none of the entries ({times:.1f} times as far as 95 % of samples of {found.sampled} "
            f"images of their own data{fewer}): the anchor alone is selected; --tolerance {more:g} allows more"
        )
    if found.rule != "tals":
        return f"rule {found.rule} selects no entry: the anchor alone"
    without = "images of it that were held out are read as well without them"
    why = without if is_anchor_best(found.scores) else f"all weights fell below the least, {FLOOR:g}"
    return (
        f"{data} looks like some of the entries, but {why}: the anchor alone is selected; --unlabelled takes the "
        "weights from the shares"
    )


def _row(row: dict[str, Any]) -> dict[str, float]:
    return {"weight": row["weight"], "share": row["share"]}
