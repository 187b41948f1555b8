"""Model cards, written from the artefact, its name and measured results; never by hand.

``results`` of a learngene is what ``benchmarks/transfer.py --summarise`` writes: per shape and data set the accuracy of
each arm. A card without results says that nothing was measured. A section stands only where the artefact has the facts
for it; what a fact may look like on the page is decided in ``_card_facts.py``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from learngene_hub import _card_federation
from learngene_hub._card_descendant import descendant_card as descendant_card
from learngene_hub._card_facts import (
    amount,
    code,
    data_set_names,
    front_matter,
    license_facts,
    mapping,
    method_line,
    model_index,
    numbers,
    one_line,
    repository_id,
    settings_block,
    tags,
    text,
)
from learngene_hub._card_facts import table as table
from learngene_hub._card_results import RECIPE as RECIPE
from learngene_hub._card_results import comparison as comparison
from learngene_hub._card_results import measured_with as measured_with
from learngene_hub._card_results import read_results
from learngene_hub._card_shapes import example, examples, family, labels, loading, reach_section

if TYPE_CHECKING:
    from learngene_hub.learngene import Learngene

PLURAL = {"vit": "plain vision transformers", "conv": "convolutional networks"}
WIDTHS = {
    "copy": "exact at multiples of the native width {native}: the descendant computes what the native one does",
    "balanced": "exact at multiples of the native width {native}: the descendant computes what the native one does",
    "exact": "exact at every width from the native {native} up: the descendant computes what the native one does",
}
TOLD = frozenset(  # facts of a provenance that have a place of their own in the card; `log` is too long for one
    "base_rate command data drift image_size images_seen license_link log machine paths seconds steps terms "
    "wall_seconds width".split()
)


def card_text(
    learngene: Learngene,
    *,
    name: str,
    source: str,
    description: str,
    nbytes: int,
    results: Mapping[str, Any] | None = None,
) -> str:
    """The card of a learngene, Markdown with the Hub's YAML at its head.

    Args:
        name: the heading.
        source: what its snippets give to ``from_learngene``: a name of the registry, or ``org/repo``.
        description: one line under the heading; may be empty.
        nbytes: of the file.
        results: those of another artefact are left out.

    Raises:
        SettingsError: results that ``benchmarks/transfer.py`` did not write.
    """
    own, measured = read_results(results, learngene.digest, mapping(learngene.provenance.get("data")))
    federation = _card_federation.federation_of(learngene.provenance)
    there = [part for part in (measured, _card_federation.measured_section(federation)) if part]
    sections = [
        _head(learngene, model_index(name, own)),
        f"# {text(name)}",
        text(description),
        f"A learngene is a small part of a pre-trained {family(learngene)[0]}, its ancestor. It is not run itself: "
        f"{family(learngene)[1]} within its reach is grown from it, already initialised, and then finetuned.",
        _use(learngene, source),
        reach_section(learngene, _classifier(learngene)),
        _made(learngene),
        _search(learngene),
        _width(learngene),
        "\n\n".join(["## Measured", *(there or ["Nothing was measured."])]),
        _limits(learngene),
        _verify(learngene, source, nbytes),
        _licence(learngene),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(learngene: Learngene, index: list[dict[str, Any]] | None) -> str:
    facts = {
        **license_facts(learngene.license, learngene.provenance.get("license_link")),
        "library_name": "learngene-hub",
        "pipeline_tag": "image-classification",
        "base_model": repository_id(learngene.ancestor.get("source")),
        "datasets": data_set_names(learngene.provenance.get("data")),
        "metrics": ["accuracy"] if index else None,
        "tags": tags("learngene", learngene.method, "image-classification"),
        "model-index": index,
    }
    return front_matter(facts)


def _use(learngene: Learngene, source: str) -> str:
    shape = example(learngene)
    sizes = f"depth={shape.depth}, width={shape.width}, " if shape else ""
    flags = f" --depth {shape.depth} --width {shape.width}" if shape else ""
    native = shape or learngene.shape
    size, channels, count = native.image_size, native.in_chans, labels(learngene)
    what, where = loading(examples(learngene) or [learngene.shape])
    return f"""## Use

```python
import torch
from learngene_hub import Descendant

model = Descendant.from_learngene({json.dumps(source)}, {sizes}num_labels={count})
logits = model(torch.zeros(1, {channels}, {size}, {size})).logits  # (1, {count})
```

The model is {what} inside transformers' own wrapper: train it with `transformers.Trainer`, with
`learngene finetune`, or with a loop of your own. {_classifier(learngene)}, so finetune it
before use. Saved, it loads with {where}. What a size costs, before anything is grown:

```sh
learngene show {shlex.quote(one_line(source))}{flags}
```"""


def _classifier(learngene: Learngene) -> str:
    if learngene.group("head"):
        return f"The head is inherited at {learngene.shape.classes} labels and fresh otherwise"
    return "The head is fresh"


def _made(learngene: Learngene) -> str:
    facts, federation = learngene.provenance, _card_federation.federation_of(learngene.provenance)
    lines = [f"- **Method:** {method_line(learngene.method)}", f"- **Ancestor:** {_ancestor(learngene)}"]
    if (size := amount(facts.get("image_size"), "")) is not None:
        lines.append(f"- **Images:** {size} px.")
    if training := _training(facts):
        lines.append(f"- **Training:** {training}.")
    if (drift := amount(facts.get("drift"), "")) is not None:
        lines.append(f"- **Change of the ancestor's blocks:** {drift} of their norm.")
    if isinstance(facts.get("command"), str):
        lines.append(f"- **Command:** {code(facts['command'])}")
    others = [
        f"- **{text(name.replace('_', ' '), 60)}:** {code(value)}"
        for name, value in sorted(mapping(facts, 40).items())
        if name not in TOLD and not (name == "federation" and federation)
    ]
    parts = ["## How it was made", "\n".join([*lines, *_card_federation.made_lines(federation), *others]), _data(facts)]
    if learngene.settings:
        block = settings_block(learngene.settings)
        parts.append(f"<details><summary>All settings</summary>\n\n{block}\n\n</details>")
    parts.append(_card_federation.settings_section(federation))
    return "\n\n".join(part for part in parts if part)


def _ancestor(learngene: Learngene) -> str:
    known = learngene.ancestor
    parts = [text(known.get("name") or "not named")]
    if known.get("license"):
        parts.append(f"licence {text(known['license'])}")
    if known.get("source"):
        parts.append(f"source: {text(known['source'])}")
    if known.get("sha256"):
        parts.append(f"sha256 of its parameters {code(known['sha256'])}")
    return f"{', '.join(parts)}."


def _training(facts: Mapping[str, Any]) -> str:
    """Updates, images, seconds and machine, as far as they are known."""
    told = [
        (facts.get("steps"), ",", "{} updates"),
        (facts.get("images_seen"), ",", "{} images seen"),
        (facts.get("seconds"), ",.1f", "{} s"),
        (facts.get("wall_seconds"), ",.1f", "{} s in all"),
    ]
    parts = [form.format(said) for value, how, form in told if (said := amount(value, how)) is not None]
    if facts.get("machine"):
        parts.append(f"on {text(facts['machine'])}")
    return ", ".join(parts)


def _data(facts: Mapping[str, Any]) -> str:
    """The data sets with their sizes and terms."""
    data, terms = facts.get("data"), mapping(facts.get("terms"))
    listed = mapping(data) or ({one_line(name): {} for name in data[:100]} if isinstance(data, list | tuple) else {})
    rows = [
        [
            text(name),
            amount(mapping(part).get("images")) or "not recorded",
            text(terms[name]) if name in terms else "not recorded",
        ]
        for name, part in listed.items()
    ]
    if not rows:
        return ""
    return "Data (the file holds weights, none of these images):\n\n" + table(["data set", "images", "terms"], rows)


def _search(learngene: Learngene) -> str:
    facts = learngene.provenance
    rates = numbers(facts.get("base_rate"))
    if not rates:
        return ""
    names = {name.split(".")[1] for name in learngene.tensors if name.startswith("block.")}
    kept = ", ".join(map(str, sorted(int(name) for name in names if name.isdecimal())))
    parts = [
        "## What the search found",
        "Base rate: the share of data sets whose path takes the shared block at that position."
        + (f" Stored blocks: {kept}." if kept else ""),
        table(["position", *map(str, range(len(rates)))], [["base rate", *(f"{rate:.2f}" for rate in rates)]]),
    ]
    if paths := [[text(name), code(path)] for name, path in mapping(facts.get("paths")).items()]:
        parts.append("Paths (B: shared base block with the data set's adapter, S: the data set's own block):")
        parts.append(table(["data set", "path"], paths))
    return "\n\n".join(parts)


def _width(learngene: Learngene) -> str:
    native, form, learned = learngene.shape.width, learngene.settings.get("form"), learngene.group("width")
    (narrow, wide, _), said = learngene.reach.widths, []
    if narrow == wide or not (learned or form):
        return ""
    form = form or "copy"
    exact = WIDTHS.get(form, "").format(native=native) if isinstance(form, str) else ""
    said.append(f"Form {code(form)}{f', {exact}' if exact else ''}.")
    if narrow < native:
        best = "that mattered most on real images" if learned else "that come first"
        said.append(f"Below {native} the units {best} are kept.")
    if learned:
        names = ", ".join(code(f"width.{name} {list(tensor.shape)}") for name, tensor in sorted(learned.items()))
        said.append(f"Stored for it: {names}.")
    losses = [
        f"at {text(width, 20)} the distance fell from {amount(pair[0], '.3g')} to {amount(pair[1], '.3g')}"
        for width, pair in mapping(mapping(learngene.provenance.get("width")).get("loss")).items()
        if len(numbers(pair)) == 2
    ]
    if losses:
        said.append(f"Rows and norms were learned by distillation: {'; '.join(losses)}.")
    return f"## Width\n\n{' '.join(said)}"


def _limits(learngene: Learngene) -> str:
    native, size = learngene.shape.image_size, amount(learngene.provenance.get("image_size"), "")
    said = [
        f"- Image classification with {PLURAL.get(learngene.shape.kind, 'vision transformers')}; detection, "
        "segmentation and the like were not tried.",
        "- A data set that overlaps what the ancestor was trained on is not held out, wherever it stands on this page.",
        "- What the ancestor and the data got wrong, a descendant may inherit: test it on data of your own.",
        *_card_federation.limit_lines(learngene.provenance),
    ]
    if size is not None and size != str(native):
        said.append(
            f"- Made with images of {size} px; its native size is {native} px. Measure before relying on others."
        )
    return "## Limits\n\n" + "\n".join(said)


def _verify(learngene: Learngene, source: str, nbytes: int) -> str:
    parts = [
        "## Verify and pin",
        f"sha256 of `learngene.safetensors`, {nbytes:,} bytes: `{learngene.digest}`",
        f"```sh\nlearngene verify {shlex.quote(one_line(source))}\n"
        "sha256sum learngene.safetensors  # the same, without this software\n```",
        "The file is plain safetensors: no pickle, no code, and nothing in it is ever run.",
    ]
    if repo := repository_id(source):
        parts.append(
            "A branch moves, a commit does not. `learngene pull` prints the commit that it got; asked for again by its "
            f"40 hex digits, as `hf://{repo}@COMMIT` or as here, it is this file and no other:"
        )
        parts.append(f'```python\nmodel = Descendant.from_learngene({json.dumps(repo)}, revision="COMMIT")\n```')
    else:
        parts.append(
            "A registry names a learngene with its sha256; every load by that name checks it, offline as well."
        )
    return "\n\n".join(parts)


def _licence(learngene: Learngene) -> str:
    said = f"{text(learngene.license)}." if learngene.license else "None is stated: ask the author before using it."
    if learngene.ancestor.get("license"):
        said += f" Licence of its ancestor: {text(learngene.ancestor['license'])}."
    if _data(learngene.provenance):
        said += " The data sets have terms of their own, told above: check them against your use."
    return f"## Licence\n\n{said}"
