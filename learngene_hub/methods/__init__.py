"""The methods, one file per paper, and the table that names them.

A package of a third party adds its own method through the entry-point group ``learngene_hub.methods``: the name of the
entry point is the method's name, its object a class that fulfils ``Method``. A name that is taken is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from learngene_hub.errors import SettingsError
from learngene_hub.methods.base import Method
from learngene_hub.methods.lsamd import Lsamd

ENTRY_POINTS = "learngene_hub.methods"
BUILT_IN: Mapping[str, type] = MappingProxyType({method.name: method for method in (Lsamd,)})


class _Table(Mapping[str, type]):
    """Methods by name. A third party's is imported when it is asked for, so that a broken one breaks nothing else."""

    def __init__(self, points: Mapping[str, EntryPoint]) -> None:
        self._points = points

    def __getitem__(self, name: str) -> type:
        return BUILT_IN[name] if name in BUILT_IN else _load(self._points[name])

    def __iter__(self) -> Iterator[str]:
        yield from BUILT_IN
        yield from self._points

    def __len__(self) -> int:
        return len(BUILT_IN) + len(self._points)


def _table() -> Mapping[str, type]:
    """The built-in methods and those that installed packages offer.

    Raises:
        SettingsError: an installed package offers a name that is taken.
    """
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in BUILT_IN or point.name in points:
            raise SettingsError(f"the package {_package(point)} offers a method named {point.name!r}, which is taken")
        points[point.name] = point
    return _Table(points)


def _load(point: EntryPoint) -> type:
    """The class of an entry point.

    Raises:
        SettingsError: it cannot be imported, or is no method of that name.
    """
    try:
        offered = point.load()
    except Exception as error:  # whatever importing foreign code raises
        raise SettingsError(f"the entry point {point.name!r} of {_package(point)} cannot be loaded: {error}") from error
    has = all(callable(getattr(offered, verb, None)) for verb in ("extract", "expand", "check"))
    if not isinstance(offered, type) or getattr(offered, "name", None) != point.name or not has:
        raise SettingsError(f"the entry point {point.name!r} of {_package(point)} is not a method of that name")
    return offered


def _package(point: EntryPoint) -> str:
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
