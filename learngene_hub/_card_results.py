"""Measured results as a card tells them: a table, the comparison in words, and the Hub's evaluation results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from learngene_hub._card_facts import code, mapping, one_line, table, text
from learngene_hub.errors import SettingsError

RECIPE = (
    "64 px, AdamW, weight decay 0.05, batch 64, one-cycle, 3 epochs, peak rate 3e-4 (random: 1e-3), no augmentation"
)
ARMS = {
    "rows": "the rival without training: evenly spaced blocks of the same ancestor, units copied cyclically and inputs "
    "divided by the number of copies",
    "random": "the same network from timm's own initialisation",
    "base-even": "this learngene, growing from evenly spaced blocks",
    "base-frequent": "this learngene, growing from the blocks that the search found most often",
}
Told = tuple[list[tuple[str, str, float]], str]  # (data set, what, accuracy in per cent) of the model; Markdown


def measured_with(results: Mapping[str, Any] | None, digest: str) -> bool:
    """Whether the results were measured with the artefact of this digest."""
    return digest in mapping(mapping(results).get("digests")).values()


def read_results(results: Mapping[str, Any] | None, digest: str, seen: Collection[str]) -> Told:
    """What transfer.py measured with the artefact of this digest; nothing where it measured others.

    Results of another comparison also say their ``recipe``, the arm ``base`` that the others are compared with (their
    differences stand under ``minus_BASE``), and ``meanings`` of the arms.

    Args:
        seen: names of the data sets of the extraction.

    Raises:
        SettingsError: the results are not what transfer.py writes.
    """
    if results is None or not measured_with(results, digest):
        return [], ""
    return _guarded(
        lambda: (_own(results, digest), _prose(results, digest, seen)), "benchmarks/transfer.py --summarise"
    )


def descendant_results(results: Mapping[str, Any] | None) -> Told:
    """What was measured with a descendant: data set -> accuracy in per cent and, where known, the count of images.

    Raises:
        SettingsError: the results have another form.
    """
    if not results:
        return [], ""

    def told() -> Told:
        rows = [[text(name), f"{part['accuracy']:.1f}", _count(part.get("count"))] for name, part in results.items()]
        own = [(name, "test accuracy", float(part["accuracy"])) for name, part in results.items()]
        return own, table(["data set", "test accuracy, per cent", "images"], rows)

    return _guarded(told, '{"name": {"accuracy": 95.1, "count": 411}}')


def _guarded(read: Callable[[], Told], works: str) -> Told:
    try:
        return read()
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {one_line(str(error), 80)}"
        raise SettingsError(f"results that cannot be read ({why}) given; those of {works} would work") from error


def _own(results: Mapping[str, Any], digest: str) -> list[tuple[str, str, float]]:
    arm = _arm(results, digest)
    found = [(cell, cell["arms"][arm]) for cell in results["cells"] if cell["arms"].get(arm)]
    return [
        (cell["set"], f"{cell['shape']} after finetuning{_runs(mean.get('n'))}", float(mean["mean"]))
        for cell, mean in found
    ]


def _arm(results: Mapping[str, Any], digest: str) -> str:
    """The artefact as it is: of the arms made from it the first."""
    return next(arm for arm, of in results["digests"].items() if of == digest)


def _runs(count: int | None) -> str:
    return "" if count is None else ", 1 run" if count == 1 else f", mean of {count} runs"


def _prose(results: Mapping[str, Any], digest: str, seen: Collection[str]) -> str:
    arms = list(results["overall"])
    rows = [
        [text(cell["shape"]), text(cell["set"]), *(score(cell["arms"].get(arm)) for arm in arms)]
        for cell in results["cells"]
    ]
    meanings = {_arm(results, digest): "this learngene"} | dict(results.get("meanings", ARMS))
    how = text(str(results.get("recipe", RECIPE)))
    parts = [
        f"The {text(results['number'])}, mean and standard deviation over seeds (one run where no deviation stands): "
        f"{how}. {_held_out({cell['set'] for cell in results['cells']}, seen)}".rstrip(),
        "\n".join(f"- {code(arm)}: {text(meanings[arm])}." for arm in arms if arm in meanings),
        table(["shape", "data set", *map(text, arms)], rows),
        comparison(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _held_out(measured: Collection[str], seen: Collection[str]) -> str:
    """What is known of the overlap with the extraction, by name."""
    if not seen:
        return ""
    both = sorted(set(measured) & set(seen))
    if not both:
        return "None of these data sets was among those of the extraction."
    return f"Also among the data sets of the extraction: {', '.join(map(text, both))}."


def comparison(results: Mapping[str, Any]) -> str:
    """The paired differences to the arm ``base`` (rows) in words, where it wins and where not."""
    lines, base = [], text(str(results.get("base", "rows")))
    for arm, found in results[f"minus_{base}"].items():
        overall, cells = found["overall"], found["per_shape_and_set"]
        if arm == "random" or overall is None:
            continue
        means = sorted((part["mean"], name) for name, part in cells.items() if part)
        ahead = sum(mean > 0 for mean, _ in means)
        lost = ", ".join(f"{text(name)} ({mean:+.1f})" for mean, name in means if mean < 0)
        error = "" if overall["se"] is None else f" ± {overall['se']:.2f}"
        runs = "1 run" if overall["n"] == 1 else f"{overall['n']} runs"
        lines.append(
            f"{text(arm)} less {base}, paired: {overall['mean']:+.2f}{error} points over {runs}; ahead in {ahead} of "
            f"{len(means)} pairs of shape and data set, most at {text(means[-1][1])} ({means[-1][0]:+.1f}); behind at "
            f"{lost or 'none'}."
        )
    return "\n\n".join(lines)


def score(value: Mapping[str, Any] | None) -> str:
    """A mean with its deviation; empty where nothing was measured."""
    if value is None:
        return ""
    return f"{value['mean']:.1f} ± {value['sd']:.1f}" if value["sd"] is not None else f"{value['mean']:.1f}"


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"
