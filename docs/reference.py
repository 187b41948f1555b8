"""Writes ``api.md`` and ``cli.md`` beside this file: every public name and every command, as the source has them.

Signatures and fields are copied from the source, comments and all, so that no version of Python changes a page.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from pdoc.docstrings import google
from typer.main import get_command

import learngene_hub
from learngene_hub.cli import app

API = """# Python

Every public name of `learngene_hub`, from its docstring. `make docs` writes this page.
"""
CLI = """# Command line

What `--help` says of every command. `make docs` writes this page.
"""


def api() -> str:
    """The text of ``api.md``."""
    found = {name: _definition(name) for name in learngene_hub.__all__}
    rows = [f"| [`{name}`](#{name.lower()}) | {_first_sentence(said)} |" for name, (_, said, _) in found.items()]
    entries = [_entry(name, *each) for name, each in found.items()]
    return "\n".join([API, "| name | what it is |", "|---|---|", *rows, "", *entries])


def cli() -> str:
    """The text of ``cli.md``."""
    return "\n".join([CLI, *_pages(get_command(app), "learngene", None)])


def _definition(name: str) -> tuple[ast.stmt, str, list[str]]:
    """Where a public name is defined, its docstring, and the lines of that file."""
    value: Any = getattr(learngene_hub, name)
    home = value.__module__ if isinstance(value, type) or inspect.isfunction(value) else _home(name)
    source = inspect.getsource(import_module(home))
    body = ast.parse(source).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, ast.get_docstring(node) or "", source.splitlines()
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            said = ast.get_docstring(ast.Module([after], [])) if after else None
            return node, said or "", source.splitlines()
    raise LookupError(f"{name} is not defined at the top of {home}")


def _home(name: str) -> str:
    return f"learngene_hub.{learngene_hub._HOME[name]}"


def _entry(name: str, node: ast.stmt, said: str, lines: list[str]) -> str:
    """A heading, the lines that define a name, its docstring, and the same of a class's public methods."""
    parts = [f"## {name}\n\n{_code(_signature(node, lines))}{_markdown(said)}"]
    for each in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
            said = _markdown(ast.get_docstring(each) or "")
            parts.append(f"### {name}.{each.name}\n\n{_code(_signature(each, lines))}{said}")
    return "\n".join(parts)


def _signature(node: ast.stmt, lines: list[str]) -> str:
    """Decorators and the lines up to the body; of a class also its fields, of an assignment all of it."""
    first, last = node.lineno, node.end_lineno or node.lineno
    if not isinstance(node, ast.ClassDef | ast.FunctionDef):
        return "\n".join(lines[first - 1 : last])
    first = min([first, *(decorator.lineno for decorator in node.decorator_list)])
    head = lines[first - 1 : node.body[0].lineno - 1]
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)] if isinstance(node, ast.ClassDef) else []
    for field in fields:
        head += lines[field.lineno - 1 : field.end_lineno]
    text = inspect.cleandoc("\n" + "\n".join(line for line in head if line.strip()))
    return re.sub("  # (type|pyright|noqa).*", "", text)


def _code(text: str) -> str:
    return f"```py\n{text}\n```\n"  # no example to run, so not "python"


def _markdown(said: str) -> str:
    """A docstring with its sections as headings and lists."""
    return f"\n{google(said).strip()}\n" if said else ""


def _first_sentence(said: str) -> str:
    """Of a docstring, on one line, for a table."""
    paragraph = " ".join(said.partition("\n\n")[0].split())
    return (paragraph.partition(". ")[0].rstrip(".") + ".").replace("|", "\\|")


def _pages(command: Any, name: str, parent: Any) -> Iterator[str]:
    """The help of a command that is not hidden, then that of the commands of a group."""
    context = command.context_class(
        command, parent, name, max_content_width=100, terminal_width=100, **command.context_settings
    )
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    for each in command.list_commands(context) if hasattr(command, "list_commands") else []:
        if not command.get_command(context, each).hidden:
            yield from _pages(command.get_command(context, each), each, context)


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "api.md").write_text(api(), encoding="utf-8")
    (here / "cli.md").write_text(cli(), encoding="utf-8")
