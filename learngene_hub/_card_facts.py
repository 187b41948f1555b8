"""What a card may say of facts that anyone may have written: text that stays in its place, names that the Hub takes.

The provenance of a learngene and the config of a descendant are free JSON out of a file. Whatever stands there, it
becomes one line of a page that shows it as it is: no markup, no HTML, no link, no second line, no new key of YAML.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import yaml

from learngene_hub.errors import LearngeneError

LONGEST = 300  # characters of one fact
_MARKUP = re.compile(
    r"""[\\`*\[\]<>&|~$@]"""
    r"""|(?<![^\W_])_|_(?![^\W_])"""  # inside a word it is no markup
    r"""|^[-+=#:]|^\d{1,9}[.)](?= |$)"""  # at the start of a block: lists, headings, rules
    r"""|:(?=//)|(?<=www)\.""",  # what readers of Markdown turn into links by themselves
    re.IGNORECASE,
)
_DATA_SET = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REPOSITORY = re.compile(
    r"(?:hf://|hf-hub:|https://huggingface\.co/)?(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@[\w./-]+)?",
    re.ASCII,
)
_FILE = re.compile(r"\.(safetensors|bin|pth?|ckpt|npz|onnx|json|h5|tar|zip)$", re.IGNORECASE)
_ODD = re.compile(r"--|\.\.|[.-](/|$)")  # never in a name of the Hub
_TAG = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_URL = re.compile(r"https://[A-Za-z0-9.-]+(/[\w./%+~-]*)?", re.ASCII)
_KEY = re.compile(r"[a-z][a-z0-9_]{0,60}")
_YAML_WORDS = frozenset("y n yes no on off true false null".split())
_SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")

# The identifiers of the Hub (its documentation, "Licenses"). Nearly all are an SPDX identifier in lower case.
HUB_LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql
    unknown unlicense wtfpl zlib
    """.split()
)
_OTHERWISE = {"c-uda-1.0": "c-uda", "lgpllr": "lgpl-lr", "odbl-1.0": "odbl", "odc-by-1.0": "odc-by", "pddl-1.0": "pddl"}


def one_line(value: Any, most: int = LONGEST) -> str:
    """A JSON value as one line of printable text: a string as it is, anything else as JSON."""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, sort_keys=True)
        except (TypeError, ValueError, RecursionError):  # in memory it may be more than JSON
            value = type(value).__name__
    value = " ".join("".join(c if c.isprintable() else " " for c in value[: 8 * most]).split())
    return value if len(value) <= most else f"{value[: most - 1]}…"


def text(value: Any, most: int = LONGEST) -> str:
    """One line of Markdown that shows the value and does nothing else, wherever it stands."""
    return _MARKUP.sub(lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", one_line(value, most))


def code(value: Any, most: int = LONGEST) -> str:
    """The value in the type of code, or plain where it has marks that would end that, or a cell of a table."""
    line = one_line(value, most)
    return f"`{line}`" if line and not set(line) & set("`|") else text(line, most)


def amount(value: Any, form: str = ",") -> str | None:
    """A number as it is told; None where the value is no number that can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return format(value, form) if abs(value) < 1e15 and math.isfinite(value) else None


def mapping(value: Any, most: int = 100) -> dict[str, Any]:
    """The first items of an object, by their keys as text; nothing where it is none."""
    return {str(key): value[key] for key in list(value)[:most]} if isinstance(value, Mapping) else {}


def numbers(value: Any, most: int = 64) -> list[float]:
    """A list of numbers; empty where it is none, or a long one."""
    listed = isinstance(value, list | tuple) and len(value) <= most and all(amount(n) is not None for n in value)
    return list(value) if listed else []


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def settings_block(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, one on each line, that ``learngene extract --config`` reads."""
    lines = []
    for name, value in sorted(mapping(settings).items()):
        key = name if _KEY.fullmatch(name) and name not in _YAML_WORDS else json.dumps(name)
        try:
            line = f"{key}: {json.dumps(value, sort_keys=True)}"
        except (TypeError, ValueError, RecursionError):
            continue
        lines.append(line if len(line) <= 2000 else f"# {one_line(line, 60)} ({len(line)} characters)")
    return "\n".join(["```yaml", *lines, "```"])


def front_matter(facts: Mapping[str, Any]) -> str:
    """The head of a card, YAML between two rules; what is None or empty is left out."""
    kept = {key: value for key, value in facts.items() if value}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, width=2**16)}---"


def license_facts(license: str, link: Any = None) -> dict[str, str]:
    """``license`` of a head as the Hub spells it; where it has no name for it, ``other``, its own name and a link.

    An SPDX identifier links to SPDX's page, anything else to ``link``, where that is an address. Empty without one.
    """
    said = one_line(license)
    known = _OTHERWISE.get(said.lower(), said.lower())
    known = known if known in HUB_LICENSES else re.sub(r"(-only|-or-later|\+)$", "", known)
    if not known or (known in HUB_LICENSES and known != "other"):
        return {"license": known} if known else {}
    name = re.sub(r"[^a-z0-9.]+", "-", said.lower()).strip("-.")[:80] or "unnamed"
    spdx = _SPDX.fullmatch(said) and not said.startswith("LicenseRef-")
    where = web_page(link) or (f"https://spdx.org/licenses/{quote(said)}.html" if spdx else "")
    return {"license": "other", "license_name": name} | ({"license_link": where} if where else {})


def web_page(value: Any) -> str:
    """An address that can stand in a card as it is; empty where the value is none."""
    return value if isinstance(value, str) and _URL.fullmatch(value) else ""


def method_line(name: Any) -> str:
    """The name of a method, its paper, and its ``note`` where it has one; the name alone where it is not installed."""
    from learngene_hub.methods import METHODS  # it imports torch

    try:
        method = METHODS[name]
    except (KeyError, LearngeneError, TypeError):
        return f"{code(name)}."
    paper, note = web_page(getattr(method, "paper", "")), getattr(method, "note", "")
    said = f"{code(name)}, [paper]({paper})." if paper else f"{code(name)}."
    return f"{said} {text(note, 600)}" if note else said


def tags(*values: Any) -> list[str]:
    """Those that can be tags of the Hub, each once."""
    return list(dict.fromkeys(value for value in values if isinstance(value, str) and _TAG.fullmatch(value)))


def data_set_names(values: Any) -> list[str]:
    """Those of the names of an object, or a list, that the Hub takes as data sets."""
    listed = list(values)[:100] if isinstance(values, Mapping | list | tuple) else []
    return [name for name in listed if isinstance(name, str) and _DATA_SET.fullmatch(name) and not _ODD.search(name)]


def repository_id(value: Any) -> str | None:
    """``org/repo`` where the value names a repository of the Hub, such as ``hf://org/repo@revision``; else None."""
    match = _REPOSITORY.fullmatch(value) if isinstance(value, str) else None
    repo = match["repo"] if match is not None else ""
    legal = repo and len(repo) <= 96 and not _FILE.search(repo) and not _ODD.search(repo)
    return repo if legal else None


def model_index(name: str, results: Sequence[tuple[str, str, float]]) -> list[dict[str, Any]] | None:
    """The Hub's ``model-index`` of (data set, what was measured, accuracy in per cent); None without any.

    The Hub wants one entry per data set and a share of 1 for its metric ``accuracy``.
    """
    by_set: dict[str, list[dict[str, Any]]] = {}
    for data, what, accuracy in results:
        if data_set_names([data]):
            metric = {"type": "accuracy", "value": round(accuracy / 100, 4), "name": one_line(what)}
            by_set.setdefault(data, []).append(metric)
    if not by_set:
        return None
    task = {"type": "image-classification", "name": "Image Classification"}
    entries = [
        {"task": dict(task), "dataset": {"name": data, "type": data, "split": "test"}, "metrics": metrics}
        for data, metrics in by_set.items()
    ]
    return [{"name": one_line(name), "results": entries}]
