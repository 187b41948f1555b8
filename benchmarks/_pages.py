"""Pages made from benchmarks/results/: RESULTS.md with every table, and for README.md a line per paired difference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from learngene_hub.card import table

Read = Callable[[str], Any]  # a name under results/ -> what that JSON says, None where it is not there
SETTINGS = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Line:
    """One paired difference, in points of accuracy."""

    what: str
    less: str
    where: str
    gap: dict[str, Any] | None

    def cells(self) -> list[str]:
        """As a row of a table."""
        assert self.gap is not None
        error = "" if self.gap.get("se") is None else f" ± {self.gap['se']:.1f}"
        return [self.what, self.less, self.where, f"{self.gap['mean']:+.1f}{error}", str(self.gap["n"])]


def settings(name: str) -> dict[str, Any]:
    """The settings of a benchmark."""
    return yaml.safe_load((SETTINGS / f"{name}.yaml").read_text(encoding="utf-8"))


def brief(read: Read) -> str:
    """The paired differences that matter, of all comparisons but the one of record; "" where there is none."""
    lines = [
        line
        for part in (_learned, _parts, _cnn, _advantages, _pool, _continual, _federated)
        for line in part(read)
        if line.gap
    ]
    head = ["start", "less", "where", "points", "runs"]
    return table(head, [line.cells() for line in lines]) if lines else ""


def _learned(read: Read) -> list[Line]:
    found = read("learned.json")
    if found is None:
        return []
    where = f"{found['data']}, six shapes, after 5 epochs"
    return [
        Line(what=f"`{arm}`", less="`net2net`", where=where, gap=found["minus_net2net"][arm]["overall"])
        for arm in ("sws", "tleg", "ldr", "lets", "weight-selection", "front")
    ]


PARTS = {  # comparison -> arm of the method's own -> what it is paired with
    "auto at 6x192": {
        "six-published": ("six-random", "net2net", "scratch"),
        "auto": ("six-random", "net2net", "scratch"),
    },
    "heuristic at 6x192, inherited stem": {"last+stem": ("three-random+stem", "net2net", "scratch")},
    "cluster at 6x192": {"cluster": ("whole-first", "net2net", "scratch")},
    "cluster at 12x192": {"cluster": ("cluster-copies", "nine-even", "net2net", "scratch")},
}


def _parts(read: Read) -> list[Line]:
    found, lines = read("parts.json"), []
    for title, arms in PARTS.items() if found else ():
        part = found["tables"].get(title)
        for arm, others in arms.items() if part else ():
            where = f"{', '.join(next(iter(part['accuracy'].values())))}, {part['shape']}, after 4 epochs"
            for other in others:
                gap = part["differences"].get(arm, {}).get(other)
                what = f"{part['method']}: {arm}"
                lines.append(Line(what=what, less=other, where=where, gap=gap and gap["overall"]["4"]))
    return lines


def _cnn(read: Read) -> list[Line]:
    from _cnn_summary import rivals

    found = read("cnn.json")
    if found is None:
        return []
    config, part = settings("cnn"), found["sets"]["tasks"]
    last = str(part["recipe"]["epochs"][-1])
    lines = []
    for arm in ("resnet-auto", "resnet-heuristic", "vgg-auto", "vgg-heuristic", "collective-heuristic"):
        for name, other in rivals(arm, config).items():
            gap = part["differences"].get(f"{arm} - {other}", {}).get(last)
            less = {"twin": "its random twin", "whole": "the whole ancestor"}.get(name, other)
            lines.append(
                Line(what=arm, less=less, where=f"5-way tasks of cifar100, 32 px, after {last} epochs", gap=gap)
            )
    return lines


def _advantages(read: Read) -> list[Line]:
    found = read("advantages.json")
    if found is None:
        return []
    where = "5-way tasks of cifar100, 64 px, after 12 epochs"
    return [
        Line(what=f"{arm} blocks", less=less, where=where, gap=found["minus"].get(f"{arm} - {less}", {}).get(FIXED))
        for arm, less in (("auto", "random"), ("auto", "scratch"), ("published", "random"), ("published", "scratch"))
    ]


FIXED = "fixed_budget"


def _pool(read: Read) -> list[Line]:
    found = read("pool.json")
    if found is None:
        return []
    where = f"{found['data']['data']}, all routes, equal compute"
    pairs = ("pool - sn-net-scratch", "pool - sn-net-cut", "pool - pool-ls")
    lines = []
    for pair in pairs:
        one, other = pair.split(" - ")
        lines.append(Line(what=one, less=other, where=where, gap=found["differences"].get(pair)))
    return lines


def _continual(read: Read) -> list[Line]:
    found, lines = read("continual.json"), []
    for way, part in found["ways"].items() if found else ():
        size = str(max(found["sizes"]))
        told = {"probe": "a linear probe", "tune": "finetuned"}.get(way, way)
        for less in ("anchor", "retrain", "sequential", "last", "soup"):
            gap = part["differences"].get("pool", {}).get(less, {}).get(size)
            where = f"20 images per class of three other sets, {told}, after {size} corpora"
            lines.append(Line(what="adaptive: pool and TALS", less=less, where=where, gap=gap))
    return lines


def _federated(read: Read) -> list[Line]:
    found, lines = read("federated.json"), []
    for name, arms in found["tables"].items() if found else ():
        own = arms.get("gene-fl", {}).get("minus_fedavg", {})
        for number, who in (("accuracy", "clients"), ("newcomer", "newcomers")):
            gap = own.get(number)
            lines.append(
                Line(what="gene-fl", less="fedavg", where=f"{name}, {who}", gap=gap if gap and gap["n"] else None)
            )
    return lines


# The page -------------------------------------------------------------------------------------------------------------


def page(read: Read, learned: Callable[[dict[str, Any]], str], first: Sequence[str] = ()) -> str:
    """RESULTS.md; ``learned`` writes the part of the learned expansions, ``first`` stands before all others."""
    parts = [
        "# Results",
        "Every table here is written by `make numbers` from the files under `results/`; [README.md](README.md) says "
        "how each was made. Accuracies are of test images, per cent, mean ± one deviation over seeds; differences are "
        "paired over seeds, ± one standard error.",
        *first,
    ]
    for title, name, write in (
        ("Learned expansions", "learned", learned),
        ("Inherited parts of DeiT-Tiny", "parts", _parts_page),
        ("Inherited parts of CNNs", "cnn", _cnn_page),
        ("Four advantages", "advantages", _advantages_page),
        ("Learngene Pool and SN-Net", "pool", _pool_page),
        ("A small pool", "pool_small", _pool_page),
        ("A pool that grows", "continual", _continual_page),
        ("Federations", "federated", _federated_page),
    ):
        if (found := read(f"{name}.json")) is not None:
            parts += [f"## {title}", write(found), f"![{title}](results/{name}.png)", f"Every run: `{name}.csv`."]
    return "\n\n".join(parts) + "\n"


def speedups_page(found: dict[str, Any]) -> str:
    """Accuracy before training and after it with each speed-up, less the same start without any."""
    rows = []
    for start, facts in found["starts"].items():
        plain = start.split("+")[0]
        gap = found["differences"][start].get(plain) if start != plain else None
        cells = [cell["starts"][start]["epochs"] for cell in found["cells"] if start in cell["starts"]]
        course = [sum(cell[epoch] for cell in cells) / len(cells) for epoch in ("0", "1")]
        told = "" if gap is None else f"{gap['mean']:+.1f} ± {gap['se']:.1f}"
        behind = "" if gap is None else f"{gap['losses']} of {gap['cells']}"
        rows.append([f"`{start}`", *(f"{value:.1f}" for value in course), f"{facts['accuracy']:.1f}", told, behind])
    head = ["start", "before training", "after 1 epoch", "at the end", "less the plain one", "cells behind"]
    sets = ", ".join(dict.fromkeys(cell["data"] for cell in found["cells"]))
    shapes = ", ".join(dict.fromkeys(cell["shape"] for cell in found["cells"]))
    return (
        f"Mean over {sets} at {shapes}, one seed; settings: `speedups.yaml`.\n\n{table(head, rows)}\n\n"
        "Every run: `speedups.csv`."
    )


def epochs_page(found: dict[str, Any]) -> str:
    """Accuracy of `lsamd-base` after each number of epochs, by training images."""
    starts = list(found["starts"])
    rows = [
        [cell["data"], str(cell["images"]), f"{cell['starts'][starts[0]]['epochs']['0']:.1f}"]
        + [f"{cell['starts'][start]['mean']:.1f}" if start in cell["starts"] else "" for start in starts]
        for cell in sorted(found["cells"], key=lambda cell: cell["images"])
    ]
    plan = settings("epochs")
    counts = [(plan["starts"][start] or {"recipe": plan["recipe"]})["recipe"]["epochs"] for start in starts]
    head = ["data set @ images per class", "images", "before training", *(f"{count} epochs" for count in counts)]
    recipe = plan["recipe"]
    return (
        f"`lsamd-base` at {plan['shapes'][0]}, {plan['image_size']} px, batches of {recipe['batch_size']}, one-cycle "
        f"to {recipe['lr']:g}, a head of class means, one seed: as `learngene finetune` does it.\n\n"
        f"{table(head, rows)}\n\nEvery run: `epochs.csv`."
    )


def deep_page(found: dict[str, Any]) -> str:
    """Accuracy where blocks occur more than once, by what a copy writes."""
    cells = found["cells"]
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
    rows = []
    for start in found["starts"]:
        there = {
            shape: [c["starts"][start] for c in cells if c["shape"] == shape and start in c["starts"]]
            for shape in shapes
        }
        told = [
            f"{_mean(course['epochs'][epoch] for course in there[shape]):.1f}"
            for shape in shapes
            for epoch in ("0", "3")
        ]
        rows.append([f"`{start}`", *told])
    head = ["start", *(f"{shape}, {when}" for shape in shapes for when in ("before training", "after 3 epochs"))]
    sets = ", ".join(dict.fromkeys(cell["data"] for cell in cells))
    return (
        "Of twelve stored blocks a deeper descendant repeats some. Each copy may write the whole update of its block "
        f"(`repeat` copy), its share of it (share), or none but the first (identity). Mean over {sets}, one "
        f"seed; settings: `deep.yaml`.\n\n"
        f"{table(head, rows)}\n\nEvery run: `deep.csv`."
    )


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _parts_page(found: dict[str, Any]) -> str:
    from _parts_summary import MEANINGS, differences_text, table_text

    tuning = found["tuning"]
    counts = [f"{part['train'] or 'all'} images of {name}" for name, part in found["sets"].items()]
    parts = [
        f"ViTs of 64 px trained on {' or '.join(counts)} with AdamW at a constant rate of {tuning['lr']:g} (scratch "
        f"{tuning['scratch_lr']:g}), {len(found['seeds'])} seeds. In bold the method's own arms.",
        "\n".join(f"- `{arm}`: {MEANINGS[arm]}." for arm in found["digests"] | {"scratch": ""}),
    ]
    for title, part in found["tables"].items():
        gaps = "\n".join(f"- {line}" for line in differences_text(part).splitlines())
        parts += [f"### {title}", table_text(part), gaps]
    return "\n\n".join(parts)


def _cnn_page(found: dict[str, Any]) -> str:
    from _cnn_summary import table as table_of

    config = settings("cnn")
    trained = [
        f"- `{name}`: {facts['shape']}, {facts['params']:,} parameters, {facts['images_seen']:,} images seen, "
        f"{facts['accuracy']:.1f} %"
        for name, facts in found["ancestors"].items()
    ]
    tables = [f"### {name}\n\n{table_of(found, config, name)}" for name in found["sets"]]
    return "\n\n".join(["The ancestors, trained here on 64 classes of cifar100 at 32 px:", "\n".join(trained), *tables])


def _advantages_page(found: dict[str, Any]) -> str:
    from _advantages_summary import as_text

    rows, _, pairs = as_text(found).partition("\n\n")
    head, *body = ([cell.strip() for cell in line.split("|")] for line in rows.splitlines())
    gaps = "\n".join(f"- {line.replace('+-', '±')}" for line in pairs.splitlines())
    return "\n\n".join([table(head, [[cell.replace("+-", "±") for cell in row] for row in body]), gaps])


def _pool_page(found: dict[str, Any]) -> str:
    from _pool_summary import short
    from _pool_summary import table as table_of

    parts = [short(found), table_of(found["networks"])]
    return "\n\n".join([*parts, *([table_of(found["aside"])] if found["aside"] else [])])


def _continual_page(found: dict[str, Any]) -> str:
    from _continual_text import text

    return text(found).replace("\n## ", "\n### ").replace("## ", "### ", 1)


def _federated_page(found: dict[str, Any]) -> str:
    from _federated_summary import table as table_of

    behind = "\n".join(f"- {line}" for line in found["loses"]) or "- nowhere"
    head = (
        f"{found['clients']} clients and {found['newcomers']} newcomers, {found['common']['limit']} images in all, "
        f"{found['common']['rounds']} rounds, {len(found['seeds'])} seeds."
    )
    return "\n\n".join(
        [head, *(table_of(name, arms) for name, arms in found["tables"].items()), f"Behind:\n\n{behind}"]
    )
