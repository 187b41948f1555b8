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
from learngene_hub.methods._words import growth_of, words
from learngene_hub.methods.adaptive import Adaptive
from learngene_hub.methods.auto import Auto
from learngene_hub.methods.base import (
    Constrainable,
    Listing,
    Method,
    Planning,
    Resumable,
    Taught,
    is_constrainable,
    is_listing,
    is_planning,
    is_resumable,
    is_taught,
    require_ancestor,
)
from learngene_hub.methods.cluster import Cluster
from learngene_hub.methods.front import Front
from learngene_hub.methods.gene_fl import GeneFl
from learngene_hub.methods.heuristic import Heuristic
from learngene_hub.methods.ldr import Ldr
from learngene_hub.methods.learngene_pool import LearngenePool
from learngene_hub.methods.lets import Lets
from learngene_hub.methods.lsamd import Lsamd
from learngene_hub.methods.net2net import Net2Net
from learngene_hub.methods.sn_net import SnNet
from learngene_hub.methods.sws import Sws
from learngene_hub.methods.tleg import Tleg
from learngene_hub.methods.weight_selection import WeightSelection

ENTRY_POINTS = "learngene_hub.methods"
BUILT_IN: Mapping[str, type] = MappingProxyType(
    {
        method.name: method
        for method in (
            Lsamd,
            Net2Net,
            WeightSelection,
            Front,
            Tleg,
            Lets,
            Sws,
            Ldr,
            Auto,
            Heuristic,
            LearngenePool,
            SnNet,
            Cluster,
            Adaptive,
            GeneFl,
        )
    }
)


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
"""Every method's class by its name: the built-in ones and those of installed packages."""


def get_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method of this name with these settings (its defaults where left out).

    Raises:
        SettingsError: no such method, a setting that it does not have, or a value of another kind than the setting's.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise SettingsError(f"unknown method {name!r}{hint} known methods: {', '.join(sorted(METHODS))}")
    known = [field.name for field in fields(METHODS[name])] if is_dataclass(METHODS[name]) else []
    if known and (odd := sorted(map(str, (settings or {}).keys() - set(known)))):
        near = difflib.get_close_matches(odd[0], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SettingsError(f"{name} has no setting {odd[0]!r:.60}; {hint}it has {', '.join(known)}")
    _require_kinds(METHODS[name], settings or {})
    try:
        return METHODS[name](**(settings or {}))
    except TypeError as error:
        raise SettingsError(f"settings of {name}: {error}; it has {', '.join(known) or 'none'}") from error


_KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
)
_LARGEST = 2**63  # of a number in the settings


def _require_kinds(method: type, settings: Mapping[str, Any]) -> None:
    """Refuse a value that is not of the JSON type of its setting, as a stranger's file may have it."""
    for field in fields(method) if is_dataclass(method) else ():
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        if field.name not in settings or kind not in _KINDS:
            continue
        value = settings[field.name]
        if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise SettingsError(f"{field.name} {value!r:.60} asked; it is a {kind}")
        if kind in ("int", "float") and not abs(value) <= _LARGEST:
            shown = f"{value} asked" if isinstance(value, float) else "out of range"  # an int may have any length
            raise SettingsError(f"{field.name} {shown}; a number of at most {_LARGEST} would work")


__all__ = [
    "METHODS",
    "Constrainable",
    "Listing",
    "Method",
    "Planning",
    "Resumable",
    "Taught",
    "get_method",
    "growth_of",
    "is_constrainable",
    "is_listing",
    "is_planning",
    "is_resumable",
    "is_taught",
    "require_ancestor",
    "words",
]
