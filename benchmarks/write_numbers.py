"""Write the numbers of README.md, RESULTS.md and the cards from the files under results/ (make numbers; make cards).

README.md's part stands between two comment lines; benchmarks/RESULTS.md and a card are written whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import _pages
import _parts_summary
import _pool_summary
from _learned_summary import LEARNED, TUNED, as_card

from learngene_hub import Learngene
from learngene_hub._card_results import score
from learngene_hub.card import RECIPE, card_text, comparison, measured_with, table
from learngene_hub.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
OTHERS = (
    "The other methods, from one DeiT-Tiny each (CNNs: from ancestors trained here): paired differences in points of "
    "test accuracy, ± one standard error. A minus is a loss, and there are many: with what two cores can train, the "
    "ancestor's own blocks are hard to beat. Tables, costs and plots: [benchmarks/RESULTS.md](benchmarks/RESULTS.md)."
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", action="store_true", help="the cards only")
    only_cards = parser.parse_args(arguments).cards
    for name, text in cards().items():
        (ROOT / "model_cards" / name / "README.md").write_text(text, encoding="utf-8")
    if not only_cards:
        write_readme()
        (ROOT / "benchmarks" / "RESULTS.md").write_text(results_page(), encoding="utf-8")


def write_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    (ROOT / "README.md").write_text(f"{before}{BEGIN}\n{readme_part()}\n{END}{after}", encoding="utf-8")


def cards() -> dict[str, str]:
    """Name -> card of every bundled learngene."""
    results, made = measured(), {}
    for name, entry in Registry.load(ROOT / "registry.yaml").entries.items():
        learngene = Learngene.load(ROOT / entry.uri / "learngene.safetensors")
        made[name] = card_text(
            learngene,
            name=name,
            source=name,
            description=entry.description,
            nbytes=entry.bytes,
            results=next((found for found in results if measured_with(found, entry.sha256)), None),
        )
    return made


def measured() -> list[dict[str, Any]]:
    """The results of each comparison in the form that cards take."""
    transfer, learned, parts, pool = map(read, ("transfer.json", "learned.json", "parts.json", "pool_small.json"))
    found = [transfer] if transfer is not None else []
    found += [as_card(learned)] if learned is not None else []
    if parts is not None:
        methods = {part["method"] for part in parts["tables"].values()}
        found += [_parts_summary.as_card(parts, method) for method in sorted(methods)]
    return found + ([_pool_summary.as_card(pool)] if pool is not None else [])


def read(name: str) -> Any:
    """What a file of results says; None where there is none."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def results_page() -> str:
    """The text of benchmarks/RESULTS.md."""
    return _pages.page(read, _learned)


def readme_part() -> str:
    """What README.md says of the measurements."""
    parts = ["## What was measured"]
    transfer = read("transfer.json")
    if any(measured_with(transfer, entry.sha256) for entry in Registry.load(ROOT / "registry.yaml").entries.values()):
        parts.append(_transfer(transfer))
    if rows := _pages.brief(read):
        parts += [OTHERS, rows]
    if rows := _speed():
        parts.append("On a shared machine, so only ratios mean much:\n\n" + table(["what", "measured", "goal"], rows))
    return "\n\n".join(parts)


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
        "![Accuracy per shape and data set](benchmarks/results/transfer.png)",
        "Every run: [benchmarks/results/transfer.csv](benchmarks/results/transfer.csv).",
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
