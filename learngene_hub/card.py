"""The model card of a learngene, written from the artefact, its registry entry and measured results; never by hand.

``results`` is what ``benchmarks/transfer.py --summarise`` writes: per shape and data set the accuracy of each arm. A
card without results says that nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from learngene_hub.errors import ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import METHODS
from learngene_hub.registry import Entry

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
    depth, width = learngene.shape.depth, min(2 * learngene.shape.width, learngene.reach.widths[1])
    return f"""## Use

```python
from learngene_hub import Descendant

model = Descendant.from_learngene("{entry.name}", depth={depth}, width={width}, num_labels=10)
```

The model is a plain timm ViT inside transformers' own wrapper. Its head is fresh: finetune it before use. `learngene
show {entry.name} --depth {depth} --width {width}` tells its size before anything is grown."""


def _reach(learngene: Learngene) -> str:
    native, rows = learngene.shape, []
    for depth, width in COMMON_SHAPES:
        if width % native.head_dim:
            continue
        shape = replace(native, depth=depth, width=width, heads=width // native.head_dim, classes=10)
        try:
            learngene.reach.check(shape)
        except ShapeError:
            continue
        rows.append([f"{depth}x{width}", f"{shape.params() / 1e6:.2f} M", f"{shape.flops() / 1e9:.2f} G"])
    costs = table(["shape", "parameters", "FLOPs of one image"], rows)
    return (
        f"## Reach\n\n{str(learngene.reach).capitalize()}, heads of {native.head_dim}, any image size divisible by "
        f"{native.patch}, any number of input channels. One file, {learngene.nbytes / 1e6:.1f} MB of tensors, "
        f"stands for "
        f"all of them. At 10 labels and {native.image_size} px:\n\n{costs}"
    )


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
    native, learned = learngene.shape.width, learngene.group("width")
    form = f"## Width\n\nForm `{learngene.settings.get('form', 'copy')}`: exact at multiples of {native}."
    if not learned:
        return f"{form} Below {native} the leading units are kept."
    names = ", ".join(sorted(f"`width.{name}` {list(tensor.shape)}" for name, tensor in learned.items()))
    text = f"{form} Below {native} the units that mattered most on real images are kept. Stored for it: {names}."
    stage = learngene.provenance.get("width", {}).get("loss", {})
    losses = "; ".join(f"at {width} the distance fell from {a} to {b}" for width, (a, b) in stage.items())
    return f"{text} Rows and norms were learned by distillation: {losses}." if losses else text


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
        ahead = sum(mean > 0 for mean, _ in means)
        lost = ", ".join(f"{name} ({mean:+.1f})" for mean, name in means if mean < 0)
        error = "" if overall["se"] is None else f" ± {overall['se']:.2f}"
        runs = "1 run" if overall["n"] == 1 else f"{overall['n']} runs"
        lines.append(
            f"{arm} less rows, paired: {overall['mean']:+.2f}{error} points over {runs}; ahead in {ahead} of "
            f"{len(means)} pairs of shape and data set, most at {means[-1][1]} ({means[-1][0]:+.1f}); behind at "
            f"{lost or 'none'}."
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
