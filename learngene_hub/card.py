"""The model card of a learngene, written from the artefact, its registry entry and measured results; never by hand.

``results`` is what ``benchmarks/transfer.py --summarise`` writes: per shape and data set the accuracy of each arm. A
card without results says that nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from learngene_hub.learngene import Learngene
from learngene_hub.methods import METHODS
from learngene_hub.registry import Entry
from learngene_hub.shape import ViTShape

RECIPE = (
    "64 px, AdamW, weight decay 0.05, batch 64, one-cycle, 3 epochs, peak rate 3e-4 (random: 1e-3), no augmentation"
)
COMMON_SHAPES = ((4, 128), (6, 192), (12, 192), (6, 256), (7, 320), (12, 384), (12, 768))


def card_text(learngene: Learngene, entry: Entry, results: Mapping[str, Any] | None = None) -> str:
    """The card, Markdown with the Hub's YAML front matter."""
    sections = [
        _front_matter(learngene, entry),
        f"# {entry.name}\n\n{entry.description}",
        _use(entry, learngene),
        _reach(learngene),
        _made(learngene),
        _search(learngene),
        _width(learngene),
        _measured(results),
        _limits(learngene),
        _licence(learngene, entry),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(learngene: Learngene, entry: Entry) -> str:
    facts = {
        "license": entry.license.lower(),
        "library_name": "learngene-hub",
        "pipeline_tag": "image-classification",
        "tags": ["learngene", learngene.method],
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _use(entry: Entry, learngene: Learngene) -> str:
    shape = learngene.shape
    return f"""## Use

```python
from learngene_hub import Descendant

model = Descendant.from_learngene("{entry.name}", depth={shape.depth}, width={2 * shape.width}, num_labels=10)
```

The model is a plain timm ViT inside transformers' own wrapper. Its head is fresh: finetune it before use. `learngene
show {entry.name} --depth {shape.depth} --width {2 * shape.width}` tells its size before anything is grown."""


def _reach(learngene: Learngene) -> str:
    rows = []
    for depth, width in COMMON_SHAPES:
        shape = _at(learngene.shape, depth, width)
        rows.append([f"{depth}x{width}", f"{shape.params() / 1e6:.2f} M", f"{shape.macs() / 1e9:.2f} G"])
    size = f"{learngene.nbytes / 1e6:.1f} MB of tensors"
    costs = table(["shape", "parameters", "multiply-adds"], rows)
    return (
        f"## Reach\n\n{str(learngene.reach).capitalize()}, heads of {learngene.shape.head_dim}, any image size "
        f"divisible by "
        f"{learngene.shape.patch}, any number of input channels. One file, {size}, stands for all of them. At 10 "
        f"labels and "
        f"{learngene.shape.image_size} px:\n\n{costs}"
    )


def _at(native: ViTShape, depth: int, width: int) -> ViTShape:
    return replace(native, depth=depth, width=width, heads=width // native.head_dim, classes=10)


def _made(learngene: Learngene) -> str:
    facts, ancestor = learngene.provenance, learngene.ancestor
    lines = [
        f"- **Method:** {learngene.method}, [paper]({METHODS[learngene.method].paper}). The paper's text could not "
        f"be read "
        "beyond its abstract; the exact procedure is this project's reading of it.",
        f"- **Ancestor:** {ancestor['name']} ({ancestor['license']}), {ancestor['source']}, sha256 of its parameters "
        f"`{ancestor['sha256']}`.",
        f"- **Size of the images:** {facts.get('image_size', '?')} px. **Updates:** {facts.get('steps', '?')}, "
        f"{facts.get('images_seen', 0):,} images seen, {facts.get('seconds', '?')} s"
        + (f" on {facts['machine']}." if facts.get("machine") else "."),
    ]
    if facts.get("drift") is not None:
        lines.append(f"- **Drift of the base blocks:** {facts['drift']} of their norm.")
    if facts.get("command"):
        lines.append(f"- **Command:** `{facts['command']}`")
    terms = facts.get("terms", {})
    rows = [
        [name, f"{part['images']:,}", terms.get(name, "not recorded")] for name, part in facts.get("data", {}).items()
    ]
    data = "\n\nData (none of it is redistributed):\n\n" + table(["data set", "images", "terms"], rows) if rows else ""
    settings = ", ".join(f"{key}={value}" for key, value in sorted(learngene.settings.items()))
    return "## How it was made\n\n" + "\n".join(lines) + data + f"\n\nSettings: {settings}."


def _search(learngene: Learngene) -> str:
    facts = learngene.provenance
    if "base_rate" not in facts:
        return ""
    kept = sorted({int(name.split(".")[1]) for name in learngene.tensors if name.startswith("block.")})
    rate = table(
        ["position", *map(str, range(len(facts["base_rate"])))],
        [["base rate", *(f"{value:.2f}" for value in facts["base_rate"])]],
    )
    paths = table(["data set", "path"], [[name, f"`{path}`"] for name, path in facts.get("paths", {}).items()])
    return (
        "## What the search found\n\nBase rate: the share of data sets whose path takes the shared block at that "
        "position. "
        f"Stored blocks: {', '.join(map(str, kept))}.\n\n{rate}\n\nPaths (B: shared base block with the data set's "
        f"adapter, "
        f"S: the data set's own block):\n\n{paths}"
    )


def _width(learngene: Learngene) -> str:
    learned = learngene.group("width")
    if not learned:
        return "## Width\n\nUnits are copied cyclically above the native width and the leading ones kept below it."
    names = ", ".join(sorted(f"`width.{name}` {list(tensor.shape)}" for name, tensor in learned.items()))
    return (
        f"## Width\n\nForm `{learngene.settings.get('form', 'copy')}`: exact at multiples of "
        f"{learngene.shape.width}. Measured or "
        f"learned for it: {names}. {learngene.provenance.get('width_note', '')}".rstrip()
    )


def _measured(results: Mapping[str, Any] | None) -> str:
    if not results:
        return "## Measured\n\nNothing was measured."
    arms = [arm for arm in results["overall"]]
    rows = [[cell["shape"], cell["set"], *(score(cell["arms"].get(arm)) for arm in arms)] for cell in results["cells"]]
    return (
        f"## Measured\n\nThe {results['number']}, mean and standard deviation over seeds: {RECIPE}. `rows` is the "
        "training-free rival, evenly spaced blocks of the same ancestor with units copied cyclically and inputs "
        "divided "
        "by the number of copies. `base-even` is this learngene growing from evenly spaced blocks. No data set "
        "below was "
        f"seen in the extraction.\n\n{table(['shape', 'data set', *arms], rows)}\n\n{comparison(results)}"
    )


def comparison(results: Mapping[str, Any]) -> str:
    """The paired differences to ``rows`` in words, where it wins and where not."""
    lines = []
    for arm, found in results["minus_rows"].items():
        overall, cells = found["overall"], found["per_shape_and_set"]
        if arm == "random" or overall is None:
            continue
        means = sorted((part["mean"], name) for name, part in cells.items() if part)
        lost = [f"{name} ({mean:+.1f})" for mean, name in means if mean < 0]
        lines.append(
            f"{arm} less rows, paired: {overall['mean']:+.2f} ± {overall['se']:.2f} points over {overall['n']} "
            f"runs; ahead "
            f"in {len(means) - len(lost)} of {len(means)} pairs of shape and data set, most at {means[-1][1]} "
            f"({means[-1][0]:+.1f}); behind at {', '.join(lost) or 'none'}."
        )
    return "\n\n".join(lines)


def score(value: Mapping[str, Any] | None) -> str:
    """A mean with its deviation; empty where nothing was measured."""
    if value is None:
        return ""
    return f"{value['mean']:.1f} ± {value['sd']:.1f}" if value["sd"] is not None else f"{value['mean']:.1f}"


def _limits(learngene: Learngene) -> str:
    size = learngene.provenance.get("image_size", "?")
    return (
        f"## Limits\n\nClassification only. Trained and measured at {size} px; larger images work, their positions "
        f"are the "
        "ancestor's, and they were not measured here. Beyond the stored depth blocks repeat. Data sets that overlap "
        "the ancestor's "
        "own training data are not held-out."
    )


def _licence(learngene: Learngene, entry: Entry) -> str:
    return (
        f"## Licence\n\n{entry.license}, as its ancestor ({learngene.ancestor['license']}). The data sets above "
        f"have terms of "
        "their own, most of them academic use: check them against yours.\n\n"
        f"sha256 of `learngene.safetensors`: `{entry.sha256}`, {entry.bytes:,} bytes."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
