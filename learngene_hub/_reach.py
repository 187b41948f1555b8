"""Reach: the shapes that a learngene can be grown to. Private to ``shape.py``, whose name it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from learngene_hub._check import nearest, require_int, require_keys
from learngene_hub.errors import SettingsError, ShapeError

if TYPE_CHECKING:
    from learngene_hub._kinds import Shape


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The shapes that a learngene can be grown to."""

    depths: tuple[int, int]  # blocks: least, most
    widths: tuple[int, int, int]  # least, most, step
    heads: tuple[int, int] | None = None  # of a block: least, most; None: one number at each width
    routes: int | None = None  # of a pool: so many descendants, each of a fixed size; None: every depth at every width

    def __post_init__(self) -> None:
        for name, length in (("depths", 2), ("widths", 3), ("heads", 2)):
            if name == "heads" and self.heads is None:
                continue
            numbers = tuple(getattr(self, name))
            if len(numbers) != length:
                raise SettingsError(f"reach {name} {numbers} given; it is {length} whole numbers")
            for number in numbers:
                require_int(f"reach {name}", number, at_least=1, error=SettingsError)
            object.__setattr__(self, name, numbers)
        if self.routes is not None:
            require_int("reach routes", self.routes, at_least=1, error=SettingsError)
        (shallow, deep), (narrow, wide, step) = self.depths, self.widths
        crossed = self.heads is not None and self.heads[0] > self.heads[1]
        if shallow > deep or narrow > wide or (wide - narrow) % step or crossed:
            raise SettingsError(
                f"reach {self} given; least must not be above most, and steps must lead from one to the other"
            )

    def check(self, shape: Shape) -> None:
        """Nothing, where ``shape`` has a depth and a width within reach.

        Raises:
            ShapeError: it has not; the message names the nearest that are.
        """
        self.require(shape.depth, shape.width)

    def require(self, depth: int, width: int) -> None:
        """Nothing, where this depth and this width are within reach; numbers that no ViT has are told the same way.

        Raises:
            ShapeError: they are not; the message names the nearest that are.
        """
        (shallow, deep), (narrow, wide, step) = self.depths, self.widths
        if not shallow <= depth <= deep:
            near = shallow if depth < shallow else deep
            raise ShapeError(f"depth {depth} asked; this learngene reaches {self}: depth {near} would work")
        if not narrow <= width <= wide or (width - narrow) % step:
            near = nearest(width, lo=narrow, step=step, hi=wide)
            raise ShapeError(f"width {width} asked; this learngene reaches {self}: width {near} would work")

    def __str__(self) -> str:
        (shallow, deep), (narrow, wide, step) = self.depths, self.widths
        said = [f"depth {shallow}" if shallow == deep else f"depth {shallow}-{deep}"]
        said.append(f"width {narrow}" if narrow == wide else f"width {narrow}-{wide} step {step}")
        if self.heads is not None:
            least, most = self.heads
            said.append(f"heads {least}" if least == most else f"heads {least}-{most}")
        if self.routes is not None:
            said.append(f"{self.routes} fixed sizes among them" if self.routes > 1 else "one fixed size")
        return ", ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``heads`` and ``routes`` only where they are set."""
        values: dict[str, Any] = {"depths": list(self.depths), "widths": list(self.widths)}
        values |= {} if self.heads is None else {"heads": list(self.heads)}
        return values | ({} if self.routes is None else {"routes": self.routes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reach:
        """The inverse of ``to_dict``.

        Raises:
            SettingsError: a key is unknown or missing, or the numbers are no reach.
        """
        known, needed = [f.name for f in fields(cls)], ["depths", "widths"]
        require_keys(values, known=known, needed=needed, error=SettingsError)
        lists = {name: values[name] for name in ("depths", "widths", "heads") if name in values}
        if not all(isinstance(value, (list, tuple)) for value in lists.values()):
            raise SettingsError(f"reach {dict(values)} given; {', '.join(lists)} are lists of whole numbers")
        return cls(**{**values, **{name: tuple(value) for name, value in lists.items()}})
