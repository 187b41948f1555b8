"""The one sink of the command line: data to stdout in the form that was asked, everything else to stderr.

human   aligned columns on a terminal (colour unless refused), tab-separated columns with a header line when piped
json    one document: an array for a list, an object for one thing; numbers raw (bytes, parameters, seconds)
quiet   one identifier per line and no notes
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TextIO

Row = Mapping[str, Any]


class Format(StrEnum):
    """How results are printed; ``auto`` is ``human``."""

    auto = "auto"
    human = "human"
    json = "json"
    quiet = "quiet"


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a command sends what it found; made once per call from the options every command shares."""

    format: Format
    color: bool

    @property
    def human(self) -> bool:
        return self.format in (Format.auto, Format.human)

    @property
    def interactive(self) -> bool:
        """Whether somebody is there to answer a question and to watch a progress bar."""
        return self.human and sys.stdin.isatty() and sys.stderr.isatty()

    def rows(self, rows: Sequence[Row], *, key: str, columns: Sequence[str]) -> None:
        """Prints a list; ``key`` is the column that identifies a row, ``columns`` the ones that people see."""
        if self.format is Format.json:
            _print_json([dict(row) for row in rows])
        elif self.format is Format.quiet:
            for row in rows:
                print(row[key])
        elif not rows:
            print("No results found.")
        elif sys.stdout.isatty():
            _print_table(rows, columns, color=self.color)
        else:
            print("\t".join(columns))
            for row in rows:
                print("\t".join(_one_line(text(column, row[column])) for column in columns))

    def facts(self, facts: Row, *, key: str) -> None:
        """Prints one thing, a line per fact; a fact that is itself a mapping gives one line per member."""
        if self.format is Format.json:
            _print_json(dict(facts))
        elif self.format is Format.quiet:
            print(facts[key])
        else:
            lines = list(_flat(facts))
            gap = max(len(name) for name, _ in lines) if sys.stdout.isatty() else 0
            for name, value in lines:
                print(f"{name:<{gap}}  {_one_line(value)}" if gap else f"{name}\t{_one_line(value)}")

    def lines(self, written: str) -> None:
        """Prints text that is laid out already, for people; scripts get ``facts`` of the same."""
        if self.human:
            print(written)

    def note(self, message: str) -> None:
        """A remark for people, on stderr; scripts (json, quiet) are spared."""
        if self.human:
            _print_err(_one_line(message), style="2", color=self.color)

    def error(self, message: str) -> None:
        """One line on stderr, in every format."""
        _print_err(f"Error: {_one_line(message)}", style="31", color=self.color)


def may_color(refused: bool) -> bool:
    """Colour is for terminals, and NO_COLOR (any value, see no-color.org) or --no-color refuse it."""
    return not refused and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def text(name: str, value: Any) -> str:
    """``value`` for people: a number in the unit that the last word of ``name`` says ("teacher_flops"), any other whole
    number with its thousands apart, any other fraction to four digits, and a default as it is typed."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _UNITS.get(_unit(name), _plain)(value)
    if isinstance(value, list | tuple):
        return ", ".join(text(name, item) for item in value) or "-"
    return str(value)


def _unit(name: str) -> str:
    """The last word of a name."""
    return name.rpartition("_")[2]


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.4g}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _typed(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.4g}"


_UNITS: Mapping[str, Callable[[float], str]] = {
    "bytes": _size,
    "params": lambda n: f"{n:,}",
    "flops": lambda n: f"{n / 1e9:,.3f} G",
    "accuracy": lambda n: f"{n:.2f} %",
    "seconds": lambda n: f"{n:,.2f} s",
    "default": _typed,
}
_MEASURED = _UNITS.keys() - {"default"}


def _flat(facts: Row, prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        lines += (
            _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, text(name, value))]
        )
    return lines


def _one_line(message: str) -> str:
    """On one line, and without what a terminal would obey: quoted text may come from a stranger's file."""
    line = " ".join(message.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False, default=str))


def _print_err(message: str, *, style: str, color: bool) -> None:
    paint = color and sys.stderr.isatty()
    _write(sys.stderr, f"\033[{style}m{message}\033[0m" if paint else message)


def _write(stream: TextIO, line: str) -> None:
    """Prints ``line`` even where the terminal's encoding lacks some of its characters."""
    encoding = stream.encoding or "utf-8"
    print(line.encode(encoding, errors="replace").decode(encoding), file=stream, flush=True)


def _print_table(rows: Sequence[Row], columns: Sequence[str], *, color: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # a plain string would be read as rich's markup

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if _unit(column) in _MEASURED else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_one_line(text(column, row[column]))) for column in columns))
    Console(no_color=not color, highlight=False).print(table)
