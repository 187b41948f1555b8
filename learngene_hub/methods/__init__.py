"""The methods, one file per paper, and the table that names them.

A package of a third party adds its own method through the entry-point group ``learngene_hub.methods``: the name of the
entry point is the method's name, its object a class that fulfils ``Method``. A name that is taken is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from learngene_hub.errors import SettingsError
from learngene_hub.methods.base import Method
from learngene_hub.methods.lsamd import Lsamd

ENTRY_POINTS = "learngene_hub.methods"
BUILT_IN: Mapping[str, type] = MappingProxyType({method.name: method for method in (Lsamd,)})


def _table() -> Mapping[str, type]:
    """The built-in methods and those that installed packages offer.

    Raises:
        SettingsError: an installed package offers a name that is taken, or a class that is no Method.
    """
    table = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in table:
            raise SettingsError(f"the package {_package(point)} offers a method named {point.name!r}, which is taken")
        try:
            offered = point.load()
        except Exception as error:  # whatever importing foreign code raises
            raise SettingsError(
                f"the entry point {point.name!r} of {_package(point)} cannot be loaded: {error}"
            ) from error
        has = all(callable(getattr(offered, verb, None)) for verb in ("extract", "expand", "check"))
        if not isinstance(offered, type) or getattr(offered, "name", None) != point.name or not has:
            raise SettingsError(f"the entry point {point.name!r} of {_package(point)} is not a method of that name")
        table[point.name] = offered
    return MappingProxyType(table)


def _package(point: Any) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"


METHODS: Mapping[str, type] = _table()


def get_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method of this name with these settings (its defaults where left out).

    Raises:
        SettingsError: no such method, or a setting that it does not have.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise SettingsError(f"unknown method {name!r}{hint} known methods: {', '.join(sorted(METHODS))}")
    try:
        return METHODS[name](**(settings or {}))
    except TypeError as error:
        known = ", ".join(field.name for field in fields(METHODS[name])) if is_dataclass(METHODS[name]) else "none"
        raise SettingsError(f"settings of {name}: {error}; it has {known}") from error


__all__ = ["METHODS", "Method", "get_method"]
