"""Edits of a registry file: one row is added, replaced or removed, and every other byte stays as it was.

The text is edited at the places that the YAML nodes tell, never dumped anew, so comments, order, blank lines, quotes
and line endings of the other rows survive. Before anything is written, the new text is read again and has to give
exactly the entries that were meant; a layout for which it does not is refused.

One process edits at a time (``_lock.py``), and writes the new text to ``.registry.yaml.tmp`` beside the file, which is
flushed and then renamed.
"""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import yaml

from learngene_hub._lock import locked
from learngene_hub.errors import LearngeneError, RegistryError, StoreError
from learngene_hub.registry import KEYS, MAX_BYTES, Entry, read_rows, read_text, read_top

BREAKS = "\r\n\x85\u2028\u2029"  # what ends a line in YAML 1.1
REST_OF_LINE = re.compile(rf"[^{BREAKS}]*(?:\r\n|[{BREAKS}])?")
BEFORE_DASH = re.compile(rf"(?:\s|#[^{BREAKS}]*+|[!&]\S*+)*+(?=-)")  # comments, or the tag or anchor of the whole list
BLANK_LINE = re.compile(rf"(?>\r\n|[{BREAKS}])[ \t]*(?>\r\n|[{BREAKS}])[ \t]*\Z")


def add_entry(path: str | os.PathLike[str], entry: Entry, *, replace: bool = False) -> None:
    """Writes ``entry`` as the last row of the registry file, which is made where it is missing.

    With ``replace`` an entry of the same name gives way to it, in its place. A uri that is a path counts from the
    folder of ``path``.

    Raises:
        RegistryError: the name is there already; or the file is no registry, or laid out so that it cannot be edited.
        StoreError: the file cannot be read or written; it is as it was.
    """
    path = Path(path)
    _edit(path, lambda text: with_entry(path, text, entry, replace=replace), make=True)


def remove_entry(path: str | os.PathLike[str], name: str) -> Entry:
    """The entry of this name, whose row is gone from the registry file. Comments above the row stay.

    Raises:
        RegistryError: there is none, and the nearest are listed; or the file is no registry, or cannot be edited.
        StoreError: the file cannot be read or written; it is as it was.
    """
    path, removed = Path(path), list[Entry]()

    def change(text: str) -> str:
        new, entry = without_entry(path, text, name)
        removed.append(entry)
        return new

    _edit(path, change, make=False)
    return removed[-1]


def current_text(path: Path) -> str:
    """The text of a registry file; "" where there is none yet.

    Raises:
        RegistryError, StoreError: as ``read_text``.
    """
    return read_text(path) if os.path.exists(path) else ""


# --- the text ---------------------------------------------------------------------------------------------------------


def with_entry(path: Path, text: str, entry: Entry, *, replace: bool = False) -> str:
    """The text of the registry file ``path`` with this entry in it.

    Raises:
        RegistryError: as ``add_entry``.
    """
    top = read_top(path, text)
    rows = read_rows(path, top)
    entries = [row.entry for row in rows]
    at = next((i for i, there in enumerate(entries) if there.name == entry.name), None)
    if at is None or top is None:
        new = _extended_flow(text, top, entry) if top and top.flow_style else _extended(text, top, entry)
        return _checked(path, new, [*entries, entry])
    if not replace:
        raise RegistryError(
            f"{path} has an entry {entry.name!r} already; --replace writes over it, --name adds it under another name"
        )
    if entries[at] == entry:
        return text
    return _checked(path, _replaced(text, top, at, entry), [*entries[:at], entry, *entries[at + 1 :]])


def without_entry(path: Path, text: str, name: str) -> tuple[str, Entry]:
    """The text of the registry file ``path`` without the entry of this name, and that entry.

    Raises:
        RegistryError: as ``remove_entry``.
    """
    top = read_top(path, text)
    entries = [row.entry for row in read_rows(path, top)]
    names = [entry.name for entry in entries]
    if name not in names or top is None:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise RegistryError(
            f"{path} has no entry {name!r}{hint} there: {', '.join(sorted(names)[:20]) or 'none'}{more}"
        )
    at = names.index(name)
    return _checked(path, _removed(text, top, at), [*entries[:at], *entries[at + 1 :]]), entries[at]


def _checked(path: Path, text: str, meant: Sequence[Entry]) -> str:
    """``text``, where it holds the meant entries and nothing else."""
    size = len(text.encode())
    if size > MAX_BYTES:
        raise RegistryError(f"{path} would have {size} bytes; a registry has at most {MAX_BYTES}: begin a second one")
    try:
        found = [row.entry for row in read_rows(path, read_top(path, text))]
    except RegistryError:
        found = None
    if found != list(meant):
        raise RegistryError(f"{path} is laid out in a way that no row can be changed alone; edit it by hand")
    return text


def _extended(text: str, top: yaml.SequenceNode | None, entry: Entry) -> str:
    """The text with one more row in block style, at its end."""
    end = top.end_mark.index if top else len(text)
    line_break, column, gap = _line_break(text), 0, ""
    if top:
        last = _span(text, top, len(top.value) - 1)
        column = last.column
        gap = line_break if len(top.value) > 1 and BLANK_LINE.search(text[: last.start]) else ""
    joint = "" if text[:end].strip("\ufeff") == "" or text[end - 1] in BREAKS else line_break
    return text[:end] + joint + gap + _block(entry, column, line_break) + text[end:]


def _extended_flow(text: str, top: yaml.SequenceNode, entry: Entry) -> str:
    """The text with one more row in flow style, which is that of JSON, after the last one."""
    if not top.value:
        end = top.end_mark.index - 1
        return text[:end] + _flow(entry) + text[end:]
    first, end = top.value[0].start_mark.index, top.value[-1].end_mark.index
    space = text[len(text[:first].rstrip()) : first] or " "
    return f"{text[:end]},{space}{_flow(entry)}{text[end:]}"


def _replaced(text: str, top: yaml.SequenceNode, at: int, entry: Entry) -> str:
    """The text with another entry in this row."""
    node = top.value[at]
    if node.flow_style:
        return text[: node.start_mark.index] + _flow(entry) + text[node.end_mark.index :]
    span = _span(text, top, at)
    new = _block(entry, span.column, _line_break(text))
    if text[span.end - 1] not in BREAKS:  # the last line of the file
        new = new.rstrip(BREAKS)
    return text[: span.start] + new + text[span.end :]


def _removed(text: str, top: yaml.SequenceNode, at: int) -> str:
    """The text without this row."""
    if top.flow_style:
        start, end = _flow_span(text, top, at)
        return text[:start] + text[end:]
    span = _span(text, top, at)
    before, after = text[: span.start], text[span.end :]
    # Between `---` and `...` nothing would be null, not an empty list.
    empty = "[]" + _line_break(text) if len(top.value) == 1 and _is_more_than_comments(before + after) else ""
    return before + empty + after


class Span(NamedTuple):
    """The lines of a row in block style: from the indentation before its dash to the end of its last line."""

    start: int
    end: int
    column: int  # of the dash


def _span(text: str, top: yaml.SequenceNode, at: int) -> Span:
    """Where a row stands. Blank lines and comment lines after its last value are not part of it."""
    node = top.value[at]
    before = top.value[at - 1].end_mark.index if at else top.start_mark.index
    match = BEFORE_DASH.match(text, before)
    dash = match.end() if match else before
    start = len(text[:dash].rstrip(" "))
    limit = end = node.end_mark.index  # in flow style that of its brace, in block style that of all comments after it
    if not node.flow_style:  # an alias has the marks of what it stands for, which may be far away
        end = max((v.end_mark.index for _, v in node.value if dash < v.end_mark.index <= limit), default=dash)
    end = _line_end(text, len(text[:end].rstrip()))
    while end < limit and _is_more_than_comments(text[end:limit]):  # the line of an alias
        end = _line_end(text, end)
    return Span(start, end, dash - start)


def _flow_span(text: str, top: yaml.SequenceNode, at: int) -> tuple[int, int]:
    """Where a row in flow style stands, with the comma that goes with it."""
    start, end = top.value[at].start_mark.index, top.value[at].end_mark.index
    if at == 0 or at + 1 < len(top.value):
        comma = re.compile(r"\s*,\s*").match(text, end)
        return start, comma.end() if comma else end
    between = text[top.value[at - 1].end_mark.index : start]
    return start - (0 if "#" in between else len(between)), end


def _line_end(text: str, index: int) -> int:
    match = REST_OF_LINE.match(text, index)
    return match.end() if match else index


def _is_more_than_comments(text: str) -> bool:
    return bool(re.sub(rf"#[^{BREAKS}]*", "", text).strip(" \ufeff\t" + BREAKS))


def _values(entry: Entry) -> dict[str, str | int]:
    return {key: getattr(entry, key) for key in KEYS}


def _flow(entry: Entry) -> str:
    return json.dumps(_values(entry), ensure_ascii=False)


def _block(entry: Entry, column: int, line_break: str) -> str:
    text = yaml.safe_dump([_values(entry)], sort_keys=False, allow_unicode=True, width=math.inf)
    return "".join(f"{' ' * column}{line}{line_break}" for line in text.rstrip("\n").split("\n"))


def _line_break(text: str) -> str:
    """The first one of the text."""
    match = re.search(r"\r\n|\n|\r", text)
    return match[0] if match else "\n"


# --- the file ---------------------------------------------------------------------------------------------------------


def _edit(path: Path, change: Callable[[str], str], *, make: bool) -> None:
    """Replaces the text of a file by ``change(text)``, while no other process does so. A link leads to its target.

    The change, which takes most of the time, is made before the lock is taken, and again under it only if another
    process was faster. So the lock is free most of the time, and of processes that edit in a loop none has to starve.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise StoreError(f"{path} is not a file; the path of a registry.yaml would work")
        if target.exists() and not os.access(target, os.W_OK):
            raise StoreError(f"{path} is read-only; `chmod u+w` allows the change, or name another file")
        read = current_text if make else read_text
        text = read(path)
        new = change(text)
        with locked(target):
            if (now := read(path)) != text:
                text, new = now, change(now)
            if new != text:
                _write(target, new)
    except LearngeneError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise StoreError(_why_unwritten(path, error)) from error


def _why_unwritten(path: Path, error: OSError | ValueError) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for {path}: free some; nothing was changed"
    if code in (errno.ENOENT, errno.ENOTDIR):
        return f"no folder {os.path.dirname(os.path.realpath(path))}; make it first"
    if code in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
        return f"the disk of {path} knows no locks; edit a copy on another disk; nothing was changed"
    return f"cannot write {path}: {getattr(error, 'strerror', None) or error}; nothing was changed"


def _write(target: Path, text: str) -> None:
    """Writes the whole file, or nothing; with the mode and owner of the one before."""
    temporary = target.with_name(f".{target.name}.tmp")  # one name: only who holds the lock writes it
    temporary.unlink(missing_ok=True)  # of a process that was killed
    try:
        with temporary.open("xb") as file:
            if target.exists():
                _copy_rights(target, temporary)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # makes the new name last too, where folders can be flushed
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _copy_rights(source: Path, target: Path) -> None:
    if sys.platform != "win32":
        there = source.stat()
        with suppress(OSError):  # only root may give a file away
            os.chown(target, there.st_uid, there.st_gid)
    shutil.copymode(source, target)
