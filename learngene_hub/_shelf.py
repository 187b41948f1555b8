"""The commands ``list`` and ``verify``: which learngenes there are, and whether those on this machine are whole."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from learngene_hub import errors
from learngene_hub._output import Output

if TYPE_CHECKING:
    from learngene_hub.registry import Entry

UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}
REMOTE_LIMIT = 20  # rows of a search of the Hub, where nothing else is asked

Row = dict[str, Any]


class Sort(StrEnum):
    """The order of a list: names and bytes least first, the others most or newest first; useful is the registry's."""

    BY_USE = "useful"
    BY_NAME = "name"
    BY_BYTES = "bytes"
    BY_DOWNLOADS = "downloads"
    BY_LIKES = "likes"
    BY_UPDATE = "updated"


def parse_bytes(written: str | int) -> int:
    """The bytes that ``16MB``, ``500kB``, ``1.5 GB``, ``8MiB`` or a plain number stand for; a kB is 1000.

    Raises:
        typer.BadParameter: it is no size.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})", str(written).strip(), re.ASCII)
    unit = UNITS.get(match[2].upper()) if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if count < 1:
        raise typer.BadParameter(f"{written!r} is no size; 16MB, 500kB or 16000000 would work")
    return count


def list_(
    out: Output,
    remote: Annotated[bool, typer.Option("--remote", help="Search the Hub instead of the registry.")] = False,
    search: Annotated[
        str | None, typer.Option("--search", help="Only with this text: in the name; locally also in the description.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="Only of this method.")] = None,
    author: Annotated[
        str | None, typer.Option("--author", help="Only of this user or organisation (--remote).")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option("--max-bytes", parser=parse_bytes, metavar="SIZE", help="At most so big: 16MB, 500kB, 16000000."),
    ] = None,
    sort: Annotated[
        Sort | None,
        typer.Option("--sort", help="downloads, likes, updated need --remote. Default: useful; --remote: downloads."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help=f"At most so many. Default: all; --remote: {REMOTE_LIMIT}.")
    ] = None,
) -> None:
    """The learngenes there are, and what each grows to.

    The bundled ones come first, the most useful at the top: by how far their descendants are ahead of the best start
    that needs no training, in the comparison that README.md shows. Then those of your own registry, in its order.

    \b
    learngene list
    learngene list --json | jq '.[].uri'
    learngene list --remote --method lsamd --max-bytes 16MB
    learngene list --remote --author some-org -q
    """
    if remote:
        if sort is Sort.BY_USE:
            raise typer.BadParameter("the Hub knows no useful; downloads, likes or updated", param_hint="--sort")
        _list_remote(out, search, method, author, max_bytes, sort or Sort.BY_DOWNLOADS, limit or REMOTE_LIMIT)
        return
    if author is not None:
        raise typer.BadParameter("a registry knows no authors; add --remote", param_hint="--author")
    if sort not in (None, Sort.BY_USE, Sort.BY_NAME, Sort.BY_BYTES):
        raise typer.BadParameter(f"a registry knows no {sort}; useful, name, bytes, or --remote", param_hint="--sort")
    from learngene_hub.hub import list_learngenes

    rows = [_row(out, entry) for entry in list_learngenes()]
    layered = any(row["origin"] != "built-in" for row in rows)
    kept = [row for row in rows if _fits(row, search, method, max_bytes)]
    if sort in (Sort.BY_NAME, Sort.BY_BYTES):
        kept.sort(key=lambda row: (row["bytes"] if sort is Sort.BY_BYTES else 0, row["name"]))
    columns = ["name", *_kinds(kept), "method", "ancestor", "reach", "bytes", "license"]
    out.rows(kept[:limit], key="name", columns=[*columns, *(["origin"] if layered else []), "description"])
    if limit is not None and len(kept) > limit:
        out.note(f"{len(kept)} fit, {limit} are shown; --limit {len(kept)} shows all")


def _list_remote(
    out: Output,
    search: str | None,
    method: str | None,
    author: str | None,
    max_bytes: int | None,
    sort: Sort,
    limit: int,
) -> None:
    from learngene_hub._remote import find_remote

    found = find_remote(
        search=search, method=method, author=author, max_bytes=max_bytes, sort=sort.value, limit=limit + 1
    )
    rows = [
        {
            "name": row.repo,
            "kind": _kind(row.is_pool),
            "method": row.method,
            "bytes": row.nbytes,
            "license": row.license,
            "downloads": row.downloads,
            "likes": row.likes,
            "updated": row.updated,
            "author": row.author,
            "uri": row.uri,
            "sha256": row.sha256,
            "private": row.private,
            "gated": row.gated,
            "tags": list(row.tags),
        }
        for row in found[:limit]
    ]
    out.rows(rows, key="name", columns=["name", *_kinds(rows), "method", "bytes", "license", "downloads", "updated"])
    if len(found) > limit:
        out.note(f"More fit; --limit {2 * limit} shows more")


def _kind(is_pool: bool) -> str:
    """What a row is, which other commands take: `learngene pool list` a pool, and all others its anchor too."""
    return "pool" if is_pool else "learngene"


def _kinds(rows: Sequence[Row]) -> list[str]:
    """The column of kinds, where they differ."""
    return ["kind"] if any(row["kind"] == "pool" for row in rows) else []


def _row(out: Output, entry: Entry) -> Row:
    """A registry entry; where the file is on this machine, with ancestor and reach from the artefact's header and
    whether it is a pool's."""
    from learngene_hub.hub import pool_at
    from learngene_hub.learngene import read_facts

    facts = path = None
    try:
        path = _path(entry)
        facts = read_facts(path) if path else None
    except errors.LearngeneError as error:  # one bad file should not hide the other entries
        out.note(f"{entry.name}: {error} (next: learngene verify)")
    return {
        "name": entry.name,
        "kind": _kind(path is not None and pool_at(path) is not None),
        "method": entry.method,
        "ancestor": facts.ancestor["name"] if facts else None,
        "reach": str(facts.reach) if facts else None,
        "bytes": entry.bytes,
        "license": entry.license,
        "description": entry.description,
        "uri": entry.uri if entry.is_remote else os.path.abspath(entry.root / entry.uri),
        "sha256": entry.sha256,
        "origin": entry.origin,
    }


def _path(entry: Entry) -> Path | None:
    """The file of an entry; None where it is on the Hub and not in the client's cache.

    Raises:
        StoreError: it is not in the folder where the registry has it.
    """
    if entry.is_remote:
        from learngene_hub._remote import cached_path

        return cached_path(entry.uri)
    from learngene_hub.hub import FolderStore

    return FolderStore(root=entry.root).read(entry.uri)


def _fits(row: Row, search: str | None, method: str | None, max_bytes: int | None) -> bool:
    texts = [row["name"], row["description"], row["ancestor"] or ""]
    return (
        (search is None or any(search.lower() in text.lower() for text in texts))
        and (method is None or row["method"] == method)
        and (max_bytes is None or row["bytes"] <= max_bytes)
    )


class _Subject(NamedTuple):
    """What is to be checked: a file, and the sha256 that somebody promised for it."""

    name: str
    path: Path | None  # None: not on this machine
    sha256: str | None
    mend: str = ""  # what to do if its bytes are others
    next: str = "learngene list"  # the command that helps


def verify(
    out: Output,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Names or paths; all that is known if none.")
    ] = None,
    in_cache: Annotated[
        bool, typer.Option("--cached", help="Check every learngene in the Hub client's cache.")
    ] = False,
    registry: Annotated[
        str | None,
        typer.Option("--registry", metavar="FILE", help="Check what this registry names; hf://org/repo works too."),
    ] = None,
    fail_on_missing: Annotated[
        bool, typer.Option("--fail-on-missing", help="Exit status 1 also if something is not on this machine.")
    ] = False,
) -> None:
    """Check that learngenes are whole; exit status 1 if not.

    That is format, sha256 and finite values, of all bundled ones and those of your own registry where none is named.
    Of a pool's anchor the pool is checked too. Only a NAME is fetched where it has to be, and fails where it cannot be.
    Otherwise what is not on this machine counts as not checked: a dash in the table, null in JSON, and exit status 0,
    as `hf cache verify` has it. With --quiet only the names that failed are printed: nothing means all is well.

    \b
    learngene verify
    learngene verify lsamd-base my-learngene/learngene.safetensors
    learngene verify --cached --quiet
    learngene verify --registry shelf/registry.yaml --fail-on-missing
    """
    if bool(names) + in_cache + (registry is not None) > 1:
        raise typer.BadParameter("NAME, --cached and --registry contradict each other; choose one")
    if names:
        rows = [_verify_name(out, name) for name in names]
    else:
        subjects = _cached() if in_cache else _of_registry(out, registry)
        rows = [subject if isinstance(subject, dict) else _verdict(out, subject) for subject in subjects]
    missing = [row for row in rows if row["ok"] is None]
    failed = [row for row in rows if row["ok"] is False or (fail_on_missing and row["ok"] is None)]
    shown = failed if out.format == "quiet" else rows
    out.rows(shown, key="name", columns=["name", "ok", "bytes", "sha256", "path"])
    if missing and not fail_on_missing:
        out.note(
            f"{len(missing)} of {len(rows)} not on this machine, so not checked; `learngene pull NAME` fetches one"
        )
    if unpinned := [row["name"] for row in rows if row["ok"] and row["promised"] is None]:
        out.note(
            f"{len(unpinned)} of {len(rows)} without a promised sha256 ({unpinned[0]}): whole, but nothing says which "
            "bytes it should have; `learngene registry add` pins them"
        )
    for row in missing if fail_on_missing else []:
        out.error(f"{row['name']}: {row['problem']} (next: learngene pull {row['name']})")
    if failed:
        raise typer.Exit(1)


def _verify_name(out: Output, name: str) -> Row:
    """The row of what was named, fetched where it has to be."""
    from learngene_hub.hub import locate

    try:
        located = locate(name)
    except errors.LearngeneError as error:
        return _failed(out, name, str(error))
    if located.entry is not None:
        return _verdict(out, _subject(located.entry, located.path))
    pull = f"learngene pull {name}" if located.sha256 else "learngene list"
    return _verdict(out, _Subject(name, located.path, located.sha256, next=pull))


def _cached() -> list[_Subject]:
    """What the Hub's client has kept, under names that pin it."""
    from learngene_hub._remote import cached

    return [
        _Subject(name := f"{row.repo}@{row.revision}", row.path, row.sha256, next=f"learngene pull {name}")
        for row in cached()
    ]


def _of_registry(out: Output, registry: str | None) -> Iterable[_Subject | Row]:
    """What a registry names, or the known ones together; an entry without its file is a row that has failed."""
    for entry in _entries(registry):
        try:
            yield _subject(entry, _path(entry))
        except errors.LearngeneError as error:
            yield _failed(out, entry.name, str(error))


def _entries(registry: str | None) -> Sequence[Entry]:
    from learngene_hub.hub import HubStore, list_learngenes
    from learngene_hub.registry import FILE_NAME, Registry

    if registry is None:
        return list_learngenes()
    remote = registry.startswith("hf:")
    path = HubStore(file_name=FILE_NAME).read(registry) if remote else Path(registry).expanduser()
    entries = Registry.load(path / FILE_NAME if path.is_dir() else path).entries
    return [entries[name] for name in sorted(entries)]


def _subject(entry: Entry, path: Path | None) -> _Subject:
    from learngene_hub.registry import data_folder

    if not entry.is_remote:
        mend = "install learngene-hub again" if entry.root == data_folder() else "put the promised file there"
        return _Subject(entry.name, path, entry.sha256, mend)
    from learngene_hub._remote import linked_digest

    served = linked_digest(path) if path else None
    if served not in (None, entry.sha256):
        return _Subject(entry.name, path, entry.sha256, f"the server itself gave it as {served}: trust neither")
    return _Subject(entry.name, path, entry.sha256, next=f"learngene pull {entry.name}")


def _verdict(out: Output, subject: _Subject) -> Row:
    """The row of one learngene; what is wrong with it goes to stderr."""
    from learngene_hub.learngene import Learngene

    path, promised = subject.path, subject.sha256
    row = _blank(subject.name) | {"path": path and str(path), "promised": promised}
    if path is None:
        return row | {"problem": "not on this machine"}
    try:
        row["bytes"] = path.stat().st_size
        row["sha256"] = Learngene.load(path, sha256=promised).digest
    except errors.ArtefactError as error:
        digest = row["sha256"] = _sha256(path) if promised else None
        problem = str(error)
        if digest not in (None, promised):
            mend = f"; {subject.mend}" if subject.mend else ""
            problem = f"{path}: its sha256 is {digest}, {promised} was promised{mend}"
        return _failed(out, subject.name, problem, row, subject.next)
    except OSError as error:  # StoreError is one
        return _failed(out, subject.name, str(error), row)
    from learngene_hub.hub import pool_problems

    if wrong := pool_problems(path):
        more = f"; and {len(wrong) - 1} more" if wrong[1:] else ""
        next = f"learngene pool verify {shlex.quote(subject.name)}"
        return _failed(out, subject.name, f"the pool that it is the anchor of: {wrong[0]}{more}", row, next)
    return row | {"ok": True}


def _blank(name: str) -> Row:
    return dict.fromkeys(["name", "ok", "bytes", "sha256", "promised", "path", "problem"]) | {"name": name}


def _failed(out: Output, name: str, problem: str, row: Row | None = None, next: str = "learngene list") -> Row:
    out.error(f"{name}: {problem} (next: {next})")
    return (row or _blank(name)) | {"ok": False, "problem": problem}


def _sha256(path: Path) -> str | None:
    """The digest of a file that is no learngene; None where it can no longer be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
