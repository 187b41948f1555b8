"""The card of a descendant, from its config.json; the learngene's stands in ``card.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from learngene_hub._card_facts import (
    amount,
    code,
    front_matter,
    license_facts,
    mapping,
    method_line,
    model_index,
    numbers,
    repository_id,
    table,
    tags,
    text,
)
from learngene_hub._card_results import descendant_results
from learngene_hub._format import ODD
from learngene_hub.errors import LearngeneError
from learngene_hub.shape import shape_from_dict

LABELS_SHOWN = 100
NOT_MEASURED = (
    "Nothing was measured. A descendant starts with a fresh head; whether it was trained since is not recorded here."
)


def descendant_card(
    facts: Mapping[str, Any],
    *,
    repo: str,
    license: str,
    params: int,
    ancestor: str | None = None,
    results: Mapping[str, Any] | None = None,
) -> str:
    """The card of a descendant, Markdown with the Hub's YAML at its head.

    Args:
        facts: the content of its config.json, which anyone may have written.
        repo: ``org/name``, where the card will stand.
        license: SPDX identifier.
        params: numbers in its weights.
        ancestor: Hub repository of the model that its learngene came from, where there is one.
        results: data set -> ``{"accuracy": per cent, "count": images}``, on test images; left out where not measured.

    Raises:
        SettingsError: results of another form.
    """
    grown = mapping(facts.get("learngene"))
    own, measured = descendant_results(results)
    parent = repository_id(grown.get("name")) or repository_id(ancestor)
    index = model_index(repo, own)
    head = {
        **license_facts(license),
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "base_model": parent,
        "base_model_relation": "finetune" if parent else None,
        "metrics": ["accuracy"] if index else None,
        "tags": tags("learngene", grown.get("method"), "image-classification", "timm", "transformers"),
        "model-index": index,
    }
    sections = [
        front_matter(head),
        f"# {text(repo)}",
        _what(facts, params),
        _loading(facts, repo),
        _origin(facts, grown),
        _labels(facts),
        f"## Measured\n\n{measured or NOT_MEASURED}",
        f"## Licence\n\n{text(license) or 'None is stated: ask the author before using it'}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what(facts: Mapping[str, Any], params: int) -> str:
    classes, side = amount(facts.get("num_classes"), ","), _input(facts)[1]
    parts = [f"{params:,} parameters", *_blocks(mapping(facts.get("model_args")))]
    parts += [f"images of {side} px"] if side else []
    parts += [f"{classes} labels"] if classes else []
    sort = "convolutional network" if "stages" in mapping(facts.get("model_args")) or _is_resnet(facts) else ""
    if _is_ours(facts):
        load = "`timm` and `transformers` load it after `import learngene_hub.descendant`."
    else:
        load = "Plain `timm` and `transformers` load it."
    return (
        f"A {sort or 'vision transformer'} for image classification: {', '.join(parts)}. It was grown from a "
        f"learngene, a small part of a pre-trained model that stands for {'networks' if sort else 'ViTs'} of many "
        f"sizes. {load}"
    )


def _is_ours(facts: Mapping[str, Any]) -> bool:
    """Whether timm knows the architecture only from learngene_hub."""
    return str(facts.get("architecture")).startswith("learngene_")


def _is_resnet(facts: Mapping[str, Any]) -> bool:
    return str(facts.get("architecture")).startswith("resnet")


def _blocks(sizes: Mapping[str, Any]) -> list[str]:
    """Blocks and widths, where the arguments of the model have them."""
    heads, depths, widths = (numbers(sizes.get(key), 4096) for key in ("heads", "depths", "widths"))
    if depths and len(depths) == len(widths):
        parts = (
            f"{amount(depth, '')} blocks of width {amount(width, '')}"
            for depth, width in zip(depths, widths, strict=True)
        )
        return [" and ".join(parts)]
    depth, width = amount(len(heads) or sizes.get("depth"), ""), amount(sizes.get("embed_dim"), "")
    if not (depth and width):
        return []
    return [f"{depth} blocks of width {width}"] + ([f"heads {_list(heads[:64])}"] if heads else [])


def _input(facts: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Channels and side of its images, as far as they are told."""
    sizes, told = mapping(facts.get("model_args")), numbers(mapping(facts.get("pretrained_cfg")).get("input_size"))
    channels, side = sizes.get("in_chans"), sizes.get("img_size")
    if len(told) == 3:
        channels, side = (told[0] if channels is None else channels), (told[2] if side is None else side)
    return amount(channels, ""), amount(side, "")


def _loading(facts: Mapping[str, Any], repo: str) -> str:
    channels, side = (said or usual for said, usual in zip(_input(facts), ("3", "224"), strict=True))
    first = "import learngene_hub.descendant  # timm learns the architecture from it\n" if _is_ours(facts) else ""
    blocks = ["## Use"]
    if channels == "3":  # a picture as files hold it
        blocks.append(f"""```python
{first}from transformers import pipeline

classify = pipeline("image-classification", model={json.dumps(repo)})
print(classify("photo.jpg"))
```""")
    blocks.append(f"""```python
{first}import timm
import torch

model = timm.create_model({json.dumps(f"hf-hub:{repo}")}, pretrained=True).eval()
logits = model(torch.zeros(1, {channels}, {side}, {side}))
```""")
    return "\n\n".join(blocks)


def _origin(facts: Mapping[str, Any], grown: Mapping[str, Any]) -> str:
    """The learngene that it was grown from, and how to grow it again."""
    if not grown:
        return ""
    native, cfg = mapping(grown.get("learngene_shape")), mapping(facts.get("pretrained_cfg"))
    rows = [
        ["learngene", code(grown.get("name", "not named"))],
        ["revision", code(grown["revision"]) if grown.get("revision") else ""],
        ["sha256", code(grown.get("digest", "not recorded"))],
        ["method", method_line(grown.get("method", "not recorded"))],
        ["native shape", _native(native)],
        ["grown with", f"learngene-hub {text(grown['version'], 40)}" if grown.get("version") else ""],
        ["mean and deviation of its input", f"{_list(cfg.get('mean'))}; {_list(cfg.get('std'))}" if cfg else ""],
    ]
    return "## Where it comes from\n\n" + table(["", ""], [row for row in rows if row[1]])


def _native(shape: Mapping[str, Any]) -> str:
    if "kind" in shape:
        try:
            return text(str(shape_from_dict(shape)))
        except (LearngeneError, *ODD):
            return ""
    said = amount(shape.get("depth"), ""), amount(shape.get("width"), "")
    return "x".join(part for part in said if part) if all(said) else ""


def _list(values: Any) -> str:
    return ", ".join(f"{n:g}" for n in numbers(values, 16)) or "not recorded"


def _labels(facts: Mapping[str, Any]) -> str:
    names = facts.get("label_names")
    listed = names if isinstance(names, list | tuple) else []
    if not listed or all(isinstance(name, str) and name.startswith("LABEL_") for name in listed):
        return ""
    shown = ", ".join(f"{i} {text(name, 60)}" for i, name in enumerate(listed[:LABELS_SHOWN]))
    more = f" and {len(listed) - LABELS_SHOWN} more, in config.json" if len(listed) > LABELS_SHOWN else ""
    return f"## Labels\n\n{shown}{more}."
