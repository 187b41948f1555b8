"""The command ``fit-size``: which descendants of a learngene a budget leaves, and which of them is taken."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import (
    MIXTURE,
    ChannelsOption,
    DtypeOption,
    GrowthOption,
    HeadsOption,
    ImageSizeOption,
    LabelsOption,
    NameArgument,
    parse_count,
    read_heads,
    read_settings,
    require_dtype,
    tell_pool,
)
from learngene_hub._output import Output
from learngene_hub._shelf import parse_bytes

if TYPE_CHECKING:
    from learngene_hub._sizing import Budget, Candidate

ParamsOption = Annotated[
    int | None,
    typer.Option("--max-params", parser=parse_count, metavar="N", help="At most so many: 5M, 500K, 5000000."),
]
FlopsOption = Annotated[
    int | None, typer.Option("--max-flops", parser=parse_count, metavar="N", help="Of one image's forward: 1G, 300M.")
]
BytesOption = Annotated[
    int | None,
    typer.Option("--max-bytes", parser=parse_bytes, metavar="SIZE", help="Of its saved weights: 10MB, 500kB."),
]
LatencyOption = Annotated[
    float | None, typer.Option("--max-latency-ms", help="Of one image's forward, measured on --device.")
]
HeldDepth = Annotated[int | None, typer.Option("--depth", help="Only with so many blocks.")]
HeldWidth = Annotated[int | None, typer.Option("--width", help="Only so wide.")]
PlaceOption = Annotated[
    str | None, typer.Option("--device", help="Where to measure: cpu (where left out), cuda, cuda:1, mps.")
]
PreferOption = Annotated[str, typer.Option("--prefer", help="balanced (by measured descendants), depth or width.")]


def fit_size(
    out: Output,
    name: NameArgument,
    max_params: ParamsOption = None,
    max_flops: FlopsOption = None,
    max_bytes: BytesOption = None,
    max_latency_ms: LatencyOption = None,
    depth: HeldDepth = None,
    width: HeldWidth = None,
    heads: HeadsOption = None,
    num_labels: LabelsOption = None,
    image_size: ImageSizeOption = None,
    in_chans: ChannelsOption = 3,
    dtype: DtypeOption = "float32",
    device: PlaceOption = None,
    prefer: PreferOption = "balanced",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure latency and peak memory of what is shown.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure even what was measured before.")] = False,
    settings: GrowthOption = None,
) -> None:
    """The sizes that a budget leaves, and the one to take.

    Shows those that can be made neither deeper nor wider within the budget (of a pool: those that none is as accurate
    and as small as), and the one that is taken. With --quiet only that one, as options of `learngene expand`.

    balanced: the accuracy of measured descendants fell by far more with each halving of the width than of the depth,
    and above the ancestor's size rose with width alone. So a small budget takes blocks away, and a large one widens.

    Latency is the median of single forwards of one image. It is kept in the folder LEARNGENE_CACHE, or else
    ~/.cache/learngene_hub, under the device, torch's version, the dtype and the shape.

    \b
    learngene fit-size lsamd-base --max-params 5M
    learngene fit-size lsamd-base --max-flops 1G --max-bytes 10MB --image-size 64 --num-labels 10 --json
    learngene fit-size lsamd-base --max-latency-ms 5 --device cuda
    """
    from learngene_hub import _sizing
    from learngene_hub._planning import Sizes, with_settings
    from learngene_hub.hub import pull

    if max_params is max_flops is max_bytes is max_latency_ms is None:
        raise errors.SettingsError(
            "no budget asked; --max-params 5M, --max-flops 1G, --max-bytes 10MB or --max-latency-ms 5 would work"
        )
    _sizing.require_preference(prefer)
    number, growth = require_dtype(dtype), read_settings(None, settings or [])
    budget = _sizing.Budget(
        max_params=max_params, max_flops=max_flops, max_bytes=max_bytes, max_latency_ms=max_latency_ms, dtype=number,
        device=device, again=again,
    )  # fmt: skip
    learngene = with_settings(pull(name), growth)
    sizes = Sizes(
        depth=depth, width=width, heads=read_heads(heads), num_labels=num_labels, image_size=image_size,
        in_chans=in_chans,
    )  # fmt: skip
    found = _sizing.fitting(learngene, sizes, budget)
    taken = _sizing.best(learngene, found, budget, prefer)  # type: ignore[arg-type]
    shown = _sizing.frontier(found)
    shown = sorted({id(each): each for each in [*shown, taken]}.values(), key=lambda each: each.shape.params())
    rows = [_row(each, each is taken, budget, measured=measure or max_latency_ms is not None) for each in shown]
    given = {"heads": sizes.heads, "num_labels": num_labels, "image_size": image_size, "in_chans": in_chans}
    asked = _asked(taken, given | {"dtype": dtype, "device": device}, growth)
    _tell(out, name, budget, prefer, rows, asked)
    tell_pool(out, name, MIXTURE)


def _row(each: Candidate, is_taken: bool, budget: Budget, *, measured: bool) -> dict[str, Any]:
    """What a descendant is and costs."""
    shape = each.shape
    facts = {"size": str(shape), "depth": shape.depth, "width": shape.width}
    facts |= {} if each.accuracy is None else {"accuracy": each.accuracy}
    facts |= {"params": shape.params(), "flops": shape.flops(), "bytes": budget.nbytes(shape)}
    if measured:
        found = budget.measured(shape)
        facts |= {"latency_ms": round(found.ms, 3), "peak_bytes": found.peak_bytes}
    return facts | {"taken": is_taken}


def _asked(taken: Candidate, given: dict[str, Any], growth: dict[str, Any]) -> dict[str, Any]:
    """What ``from_learngene`` is given for it, apart from the name; without what is the default."""
    default = {"in_chans": 3, "dtype": "float32"}
    rest = {key: value for key, value in given.items() if value is not None and value != default.get(key)}
    settings = growth | taken.asked.get("settings", {})
    sizes = {key: value for key, value in taken.asked.items() if key != "settings"}
    return sizes | rest | ({"settings": settings} if settings else {})


def _tell(
    out: Output, name: str, budget: Budget, prefer: str, rows: Sequence[dict[str, Any]], asked: dict[str, Any]
) -> None:
    """The rows, and how to grow the one that is taken; for scripts in one document."""
    call = ", ".join([_quoted(name), *(f"{key}={_quoted(value)}" for key, value in asked.items())])
    call = f"Descendant.from_learngene({call})"
    taken = next(row for row in rows if row["taken"])
    if out.human:
        out.rows(rows, key="size", columns=[column for column in rows[0] if column not in ("depth", "width")])
        out.note(f"{taken['size']} is taken (--prefer {prefer}). Next: {call}")
        return
    facts: dict[str, Any] = {"name": name, "budget": dict(budget.limits()), "prefer": prefer, "sizes": list(rows)}
    out.facts(facts | {"taken": taken, "call": call, "options": _options(asked)}, key="options")


def _options(asked: dict[str, Any]) -> str:
    """The same as options of ``learngene expand``, which measures nothing and has no --device."""
    words = []
    for key, value in asked.items():
        if key == "settings":
            words += [word for name, each in value.items() for word in ("--set", f"{name}={json.dumps(each)}")]
        elif key != "device":
            written = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{key.replace('_', '-')}", written]
    return shlex.join(words)


def _quoted(value: Any) -> str:
    """A value as Python has it, texts in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
