"""The public surface is one sorted list, every name of it exists, and importing it costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import learngene_hub

ASKED = (  # what the README, the documentation and other people's code rely on
    "ArtefactError BudgetError DataError Descendant DigestError Learngene LearngeneError METHODS RegistryError"
    " SettingsError ShapeError StoreError TrainingError ViTShape evaluate expand extract finetune list_learngenes"
)


def test_the_list_is_sorted_and_holds_what_was_promised() -> None:
    names = list(learngene_hub._HOME)
    assert names == sorted(names) == learngene_hub.__all__
    assert set(ASKED.split()) <= set(names)
    assert set(names) <= set(dir(learngene_hub))


def test_type_checkers_see_the_same_names_from_the_same_homes() -> None:
    tree = ast.parse(Path(learngene_hub.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: (node.module or "").removeprefix("learngene_hub.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == learngene_hub._HOME


@pytest.mark.parametrize("name", list(learngene_hub._HOME))
def test_every_public_name_exists(name: str) -> None:
    value = getattr(learngene_hub, name)
    assert value is getattr(learngene_hub, name)
    if isinstance(value, type):
        assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Gene'"):
        learngene_hub.Gene  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "torch timm transformers accelerate numpy pyarrow PIL huggingface_hub datasets rich typer yaml".split()
    code = f"import sys, learngene_hub; print(*[m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
