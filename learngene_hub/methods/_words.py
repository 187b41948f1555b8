"""What is said of a method's settings: the comment beside each field, and which of them act when a learngene grows.

The comment at the end of a field's line is its one description: it is read out of the source when somebody asks.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import fields, is_dataclass
from typing import Any


def words(method: type) -> dict[str, str]:
    """Setting -> the comment beside it, its own or the nearest base's; without those that have none, and empty where
    there is no source."""
    found: dict[str, str] = {}
    for kind in reversed(method.__mro__):
        if is_dataclass(kind):
            found |= _beside_fields(kind)
    return found


def growth_of(method: type) -> tuple[str, ...] | None:
    """The settings that act when a learngene grows, sorted; None where the method does not declare them."""
    declared = getattr(method, "growth", None)
    return None if declared is None else tuple(sorted(declared))


def _beside_fields(kind: Any) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(kind))
        body = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    comments = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith("# type:")
    }
    found, own = {}, {field.name for field in fields(kind)}
    for node in body.body if isinstance(body, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in own:
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if said := " ".join(comments[line] for line in lines if line in comments):
                found[node.target.id] = said
    return found
