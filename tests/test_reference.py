"""The reference pages are what the source says now."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pdoc.doc
import pytest

import learngene_hub

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """docs/reference.py, which stands in no package."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["api", "cli"])
def test_a_reference_page_is_current(page: str, reference: ModuleType) -> None:
    there = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert getattr(reference, page)() == there, f"docs/{page}.md is out of date: make docs writes it"


@pytest.mark.parametrize("name", learngene_hub.__all__)
def test_every_public_name_is_there_with_signature_and_docstring(name: str) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    entry = re.search(rf"^## {name}\n\n```py\n(?P<code>.*?)\n```\n\n(?P<said>\S.*?)$", page, re.M | re.S)
    assert entry, f"docs/api.md has no entry of {name} with code and docstring"
    assert re.search(rf"^(class |def )?{name}\b", entry["code"], re.M)
    assert f"| [`{name}`](#{name.lower()}) |" in page
    headings = Counter(re.findall(r"^#+ (.*)$", page.lower(), re.M))
    assert headings[name.lower()] == 1


def test_every_command_is_there() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    top = page.partition("\n## learngene list\n")[0].partition("\nCommands:\n")[2]
    commands = re.findall(r"^  ([a-z-]+)  ", top, re.M)
    assert {"export", "pool", "registry"} <= set(commands)
    for command in commands:
        assert f"\n## learngene {command}\n\n```text\nUsage: learngene {command} " in page


def test_pdoc_finds_the_names_that_are_fetched_on_first_use() -> None:
    assert set(learngene_hub.__all__) <= pdoc.doc.Module(learngene_hub).members.keys()
