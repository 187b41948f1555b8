"""Write the numbers of README.md, RESULTS.md and the cards from the files under results/ (make numbers; make cards).

README.md's part stands between two comment lines; benchmarks/RESULTS.md and a card are written whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import _compare_plots
import _pages
import _zoo
import yaml
from _learned_summary import LEARNED, TUNED, as_card

from learngene_hub import Learngene
from learngene_hub._card_results import score
from learngene_hub.card import RECIPE, card_text, comparison, measured_with, table
from learngene_hub.comparison import read_rows, summarise
from learngene_hub.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
ZOO_BEGIN, ZOO_END = "<!-- zoo -->", "<!-- /zoo -->"
OTHERS = (
    "The other methods, from one DeiT-Tiny each (CNNs: from ancestors trained here): paired differences in points of "
    "test accuracy, ± one standard error. A minus is a loss, and there are many: with what two cores can train, the "
    "ancestor's own blocks are hard to beat."
)
LEFT_OUT = {  # name -> what it is: made, compared (results/left_out.csv), and not bundled
    "auto-deit-tiny": "DeiT-Tiny's first two and last two blocks, by `auto`",
    "ldr-cifar100": "four components of a DeiT-Tiny finetuned on cifar100, by `ldr`",
    "lets-cifar100": "four small blocks of the same, by `lets`",
    "ldr-base": "lsamd-base's descendant, by `ldr` from 30,000 images",
    "lets-base": "the same, by `lets`",
    "sws-base": "four blocks of it, each trained for three places, by `sws` from 10,000 images seen six times",
    "gene-base": "the three blocks of it that `gene-fl` takes for the most sensitive, its first",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", action="store_true", help="the cards only")
    only_cards = parser.parse_args(arguments).cards
    if read("compare.json") is not None:
        order_registry()
    for name, text in cards().items():
        (ROOT / "model_cards" / name / "README.md").write_text(text, encoding="utf-8")
    if not only_cards:
        write_readme()
        (ROOT / "benchmarks" / "RESULTS.md").write_text(results_page(), encoding="utf-8")


def write_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for begin, end, part in ((BEGIN, END, readme_part()), (ZOO_BEGIN, ZOO_END, zoo_part())):
        before, after = readme.split(begin)[0], readme.split(end)[1]
        readme = f"{before}{begin}\n{part}\n{end}{after}"
    (ROOT / "README.md").write_text(readme, encoding="utf-8")


def order_registry() -> None:
    """The rows of registry.yaml, the most useful first; what was not compared last."""
    path, compared = ROOT / "registry.yaml", read("compare.json")
    ranks = {verdict.name: rank for rank, verdict in enumerate(_zoo.verdicts(compared, read("few.json")))}
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows.sort(key=lambda row: ranks.get(row["name"], len(ranks)))
    path.write_text(yaml.safe_dump(rows, sort_keys=False, width=120, allow_unicode=True), encoding="utf-8")


def cards() -> dict[str, str]:
    """Name -> card of every bundled learngene."""
    made, compared = {}, read("compare.json")
    plan = _pages.settings("compare")
    for name, entry in Registry.load(ROOT / "registry.yaml").entries.items():
        learngene = Learngene.load(ROOT / entry.uri / "learngene.safetensors")
        found = None if compared is None else _zoo.as_card(compared, name, plan)
        made[name] = card_text(
            learngene,
            name=name,
            source=name,
            description=entry.description,
            nbytes=entry.bytes,
            results=found if measured_with(found, entry.sha256) else None,
        )
    return made


def zoo_part() -> str:
    """What README.md says of the bundled learngenes."""
    compared, few = read("compare.json"), read("few.json")
    if compared is None:
        return "Nothing was compared."
    found = {verdict.name: verdict for verdict in _zoo.verdicts(compared, few)}
    base, rows = _zoo.best_rival(compared), []
    for name, entry in Registry.load(ROOT / "registry.yaml").entries.items():
        learngene, verdict = Learngene.load(ROOT / entry.uri / "learngene.safetensors"), found[name]
        rival = f"{_zoo.points(verdict.rival_gap)} (`{verdict.rival}`)" if verdict.rival else ""
        rows.append(
            [f"[`{name}`]({entry.card})", entry.method, f"{entry.bytes / 1e6:.1f}", str(learngene.reach)]
            + [_zoo.points(verdict.gap), rival, ", ".join(verdict.axes), entry.description]
        )
    head = ["name", "method", "MB", "grows to", f"less {base}", "less what stores no more", "ahead in", "what it is"]
    told = [
        "The most useful first, as `learngene list` has them: points of test accuracy, in the comparison above, "
        f"less `{base}`, the best start that needs no training and stores 11.1 MB, and less the best such start that "
        "stores no more bytes than the learngene. One that is ahead in neither, and not on few images per class, by "
        "more than the standard error, is not bundled.",
        table(head, rows),
    ]
    if lines := _left_out(compared):
        told.append("Made, measured and left out: " + "; ".join(lines) + ".")
    return "\n\n".join(told)


def _left_out(compared: dict[str, Any]) -> list[str]:
    """A line for each learngene that was made and compared, and is not bundled."""
    rows = read_rows(RESULTS / "left_out.csv")
    if not rows:
        return []
    rivals = [row for row in read_rows(RESULTS / "compare.csv") if row.start in compared["training_free"]]
    both, lines = summarise([*rows, *rivals]), []
    for verdict in _zoo.verdicts(both, None):
        less = f"{_zoo.points(verdict.gap)} less `{_zoo.best_rival(both)}`"
        if verdict.rival:
            less += f", {_zoo.points(verdict.rival_gap)} less `{verdict.rival}`"
        lines.append(f"`{verdict.name}` ({LEFT_OUT[verdict.name]}): {less}")
    parts = read("parts.json")
    if parts is not None:
        gap = parts["tables"]["cluster at 6x192"]["differences"]["cluster"]["net2net"]["overall"]["4"]
        lines.append(
            f"`cluster-deit-tiny`, heads by clusters: {gap['mean']:+.1f} ± {gap['se']:.1f} less `net2net` at "
            "6x192 on signdigits"
        )
    if read("pool_small.json") is not None:
        lines.append("`pool-deit-tiny`, six fixed networks by `sn-net`, which has none of these shapes")
    return lines


def read(name: str) -> Any:
    """What a file of results says; None where there is none."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def results_page() -> str:
    """The text of benchmarks/RESULTS.md."""
    transfer, lines = read("transfer.json"), _pages.brief(read)
    first = [] if transfer is None else ["## lsamd-base on data that it never saw", _transfer(transfer)]
    first += ["## Every method, in one table", OTHERS, lines] if lines else []
    if (speedups := read("speedups.json")) is not None:
        first += ["## Learning speed-ups", _pages.speedups_page(speedups)]
    if (epochs := read("epochs.json")) is not None:
        first += ["## Epochs by data-set size", _pages.epochs_page(epochs)]
    if (deep := read("deep.json")) is not None:
        first += ["## Copies of a block", _pages.deep_page(deep)]
    return _pages.page(read, _learned, first)


def readme_part() -> str:
    """What README.md says of the measurements."""
    parts, compared = ["## What was measured"], read("compare.json")
    if compared is not None:
        parts.append(_compared(compared))
    if rows := _speed():
        parts.append("On a shared machine, so only ratios mean much:\n\n" + table(["what", "measured", "goal"], rows))
    return "\n\n".join(parts)


def _compared(compared: dict[str, Any]) -> str:
    """The comparison of record."""
    plan = _pages.settings("compare")
    shapes, sets = ", ".join(plan["shapes"]), ", ".join(plan["data"])
    best = _zoo.verdicts(compared, None)[0].name
    stored = _compare_plots.storage(compared, best)
    there = [arm for arm in _zoo.MEANINGS if arm in compared["starts"]]
    return "\n\n".join(
        [
            f"One recipe for all that inherits: {plan['images']} images of each of {sets}, {plan['image_size']} px, "
            f"shapes {shapes}, {plan['recipe']['epochs']} epochs at {plan['recipe']['lr']:g}, a head from class means; "
            f"for `random` and `mimetic` {plan['fresh']['epochs']} epochs at {plan['fresh']['lr']:g}. Test accuracy in "
            "per cent, the mean over a start's own cells (a shape on a data set), which differ where a start has not "
            "every shape or was not run on every set; the differences are paired over the cells that both have, and "
            "seeds: ± the standard error over cells, with the p of a sign-flip test. `lsamd-base`, and so what is made "
            "of it, was trained on pacs and four sets that are not among these; what its extraction took is estimated "
            "from above.",
            _zoo.as_table(compared),
            "\n".join(f"- `{arm}`: {_zoo.MEANINGS[arm]}." for arm in there),
            "\n".join(f"- {line}" for line in _zoo.goals(compared)),
            f"Stored: {len(stored['sizes'])} sizes ({stored['sizes'][0]} to {stored['sizes'][-1]}) are "
            f"{sum(stored['checkpoints']) / 1e6:.0f} MB as checkpoints in float16, and "
            f"{stored['learngene'] / 1e6:.1f} MB as `{best}`: {stored['ratio']:.1f} times less.",
            "![Accuracy against parameters](benchmarks/results/compare_params.png)",
            "[Accuracy against epochs](benchmarks/results/compare_epochs.png), [against training images per "
            "class](benchmarks/results/few.png), [bytes against the number of "
            "sizes](benchmarks/results/compare_bytes.png); every run: "
            "[compare.csv](benchmarks/results/compare.csv). `learngene compare` makes such a comparison of your own; "
            "[RESULTS.md](benchmarks/RESULTS.md) has all others that were made here, with what lost.",
        ]
    )


def _transfer(results: dict[str, Any]) -> str:
    arms = list(results["overall"])
    shapes = list(dict.fromkeys(cell["shape"] for cell in results["cells"]))
    rows = []
    for shape in shapes:
        cells = [cell for cell in results["cells"] if cell["shape"] == shape]
        rows.append([shape, *(_mean([cell["arms"].get(arm) for cell in cells]) for arm in arms)])
    sets = ", ".join(dict.fromkeys(cell["set"] for cell in results["cells"]))
    parts = [
        f"Finetuning on data that `lsamd-base` never saw ({sets}), the mean over them of the {results['number']}: "
        f"{RECIPE}. `rows` is the training-free rival: evenly spaced blocks of the same ancestor, units copied. "
        "`base-frequent` is `lsamd-base` growing from the blocks that its search found most often instead of evenly "
        "spaced ones.",
        table(["shape", *arms], rows),
        comparison(results),
        "![Accuracy per shape and data set](results/transfer.png)",
        "Every run: `transfer.csv`.",
    ]
    return "\n\n".join(parts)


def _learned(found: dict[str, Any]) -> str:
    """The learned methods beside the training-free ones."""
    results, tuning, ancestor = as_card(found), found["tuning"], found["ancestor"]
    shapes, arms = [cell["shape"] for cell in results["cells"]], list(results["overall"])
    last = str(max(tuning["random_epochs"]))
    seeds = results["cells"][0]["arms"][results["base"]]["n"]

    def line(arm: str, epoch: str) -> list[str]:
        cells = [found["accuracy"][arm][shape].get(epoch) for shape in shapes]
        return [f"{arm}, {epoch}", *map(score, cells), _mean(cells)]

    rows = [line(arm, epoch) for arm in arms for epoch in ("1", str(TUNED))] + [line("random", last)]
    scratch = {shape: found["accuracy"]["random"][shape][last]["mean"] for shape in shapes}
    ahead = [
        f"{arm} in {sum(found['accuracy'][arm][s]['1']['mean'] > scratch[s] for s in shapes)}" for arm in arms[:-1]
    ]
    costs = [
        [arm, *(f"{cost[key]:g}" for key in ("stored_megabytes", "extraction_images", "extraction_petaflops"))]
        + [f"{cost['tuning_petaflops']:g}, {cost['tuning_epochs']} epochs"]
        for arm, cost in found["compute"].items()
        if arm in arms
    ]
    parts = [
        f"The learned expansions ({', '.join(LEARNED)}) against the training-free ones and scratch: all from one "
        f"DeiT-Tiny finetuned on {found['data']} at 64 px ({ancestor['accuracy'][-1]:.1f} % after "
        f"{ancestor['images_seen']:,} images); every ViT is then trained on {results['recipe']}. Test accuracy after 1 "
        f"and {TUNED} epochs, of scratch also after {last}; mean and deviation over {seeds} seeds, "
        "which also draw the extraction:",
        table(["start, epochs", *shapes, "mean"], rows),
        comparison(results),
        f"After 1 epoch ahead of scratch after {last}: {', '.join(ahead)} of {len(shapes)} shapes.",
        f"Scratch reaches what an arm has after {TUNED} epochs, within {last}, in: {_reached(found, arms[:-1])}.",
        "What it costs: training FLOPs in 10^15 (three times the forward's) of one extraction, the ancestor's own "
        "training left out, and of finetuning one ViT of each of the shapes:",
        table(["start", "stored MB (fp16)", "images seen in extraction", "extraction", "finetuning"], costs),
    ]
    return "\n\n".join(parts)


def _reached(found: dict[str, Any], arms: list[str]) -> str:
    """Arm by arm, the shapes in which scratch catches up, and at which epoch."""
    told = []
    for arm in arms:
        epochs = {shape: by[str(TUNED)] for shape, by in found["caught_up"][arm].items()}
        there = ", ".join(f"{shape} (epoch {epoch})" for shape, epoch in epochs.items() if epoch is not None)
        told.append(f"{arm}: {there or 'none'}")
    return "; ".join(told)


def _mean(values: list[Any]) -> str:
    there = [value["mean"] for value in values if value is not None]
    return f"{sum(there) / len(there):.1f}" if len(there) == len(values) else ""


def _speed() -> list[list[str]]:
    rows = []
    if (grown := read("grow_speed.json")) is not None:
        what = "time of `from_learngene` 12x384 over that of transformers' `from_pretrained` of the same model"
        rows.append([what, f"{grown['time']['ratio']:.2f}", f"at most {grown['time']['limit']}"])
        memory = grown["memory"]["grow"]["ratio"]
        rows.append(
            ["its peak extra memory over the model's bytes", f"{memory:.2f}", f"at most {grown['memory']['limit']}"]
        )
    for fitted in read("fit_speed.json") or []:
        run = f"{fitted['shape']} at {fitted['image_size']} px, {fitted['precision']}"
        what = f"images/s of `fit` over a hand-written loop, {run}"
        rows.append([what, f"{fitted['ratio_median']:.2f}", "at least 0.95"])
    if (aux := read("aux_speed.json")) is not None:
        rows.append(["an auxiliary step, through `expand`, over a plain one", f"{aux['ratio']:.2f}", "at most 1.10"])
    return rows


if __name__ == "__main__":
    main()
