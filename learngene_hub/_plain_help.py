"""Help as plain text, and one suggestion for a word that is no command. Private to ``cli.py``.

Below 0.21, which Flower asks for, typer writes "\\[default: 1]" where rich is installed, though rich does not print it.
What a mistyped command may have meant is said by typer, and by newer versions of click once more.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


def plain_help(app: typer.Typer) -> None:
    """Lets all commands of an application that is complete, and those of its groups, write their help as it is."""
    app.info.cls = _Group
    for command in app.registered_commands:
        command.cls = _Command
    for group in app.registered_groups:
        if group.typer_instance is not None:
            plain_help(group.typer_instance)


class _Command(TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _unescape(formatter)


class _Group(TyperGroup):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _unescape(formatter)

    def resolve_command(self, ctx: Any, args: Any) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:  # click's, whose own list typer has put into the message already
            if "Did you mean" in getattr(error, "message", "") and getattr(error, "possibilities", None):
                error.possibilities = None  # type: ignore[attr-defined]
            raise


def _unescape(formatter: Any) -> None:
    formatter.buffer = [text.replace("\\[", "[") for text in formatter.buffer]
