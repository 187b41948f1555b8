"""Checks of numbers and mappings that several files share, and the nearest values that would pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from learngene_hub.errors import SettingsError, ShapeError


def shortest_ratio(width: int, hidden: int) -> float:
    """The decimal with the fewest digits, ``r``, for which ``int(width * r) == hidden``."""
    for digits in range(18):
        ratio = round(hidden / width, digits)
        if int(width * ratio) == hidden:
            return ratio
    return math.nextafter(hidden / width, math.inf)


def nearest(value: int, *, lo: int, step: int, hi: int | None = None) -> str:
    """The multiples of ``step`` from ``lo`` on that are nearest to ``value``, as "192" or "192 or 256"."""
    below = lo + max(0, (value - lo) // step) * step
    above = below if value <= below else below + step
    legal = {min(n, hi) if hi is not None else n for n in (below, above)}
    return " or ".join(str(n) for n in sorted(legal))


def nearest_divisors(width: int, heads: int) -> str:
    """The numbers of heads around ``heads`` that divide ``width``."""
    divisors = [d for n in range(1, math.isqrt(width) + 1) if width % n == 0 for d in (n, width // n)]
    below = [d for d in divisors if d < heads]
    above = [d for d in divisors if d > heads]
    return " or ".join(str(n) for n in [*([max(below)] if below else []), *([min(above)] if above else [])])


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def floats(name: str, values: Iterable[float]) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(is_number(value) for value in values):
        raise SettingsError(f"{name} {values!r} asked; give one finite number per channel")
    return tuple(float(value) for value in values)


def require_int(name: str, value: object, *, at_least: int, error: type[Exception] = ShapeError) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(f"{name} {value!r} asked; it is a whole number, at least {at_least}")
    if value < at_least:
        raise error(f"{name} {value} asked; {at_least} is the least that works")


def require_keys(values: object, *, known: Sequence[str], needed: Sequence[str], error: type[Exception]) -> None:
    if not isinstance(values, Mapping):
        raise error(f"{type(values).__name__} given; a mapping with {', '.join(needed)} is needed")
    unknown, missing = sorted(map(str, set(values) - set(known))), sorted(set(needed) - set(values))
    if unknown:
        raise error(f"unknown keys {', '.join(unknown)} given; the known ones are {', '.join(known)}")
    if missing:
        raise error(f"keys {', '.join(missing)} are missing; there are {', '.join(map(str, values)) or 'none'}")
