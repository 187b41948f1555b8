"""The folder of a pool: its files, the manifest that pins them, and every check that needs no tensor.

    learngene.safetensors        the anchor: a learngene like any other, so that the folder is one too
    entries/<sha256>.safetensors an increment each, named after its bytes
    pool.json                    the manifest: what the pool is, and the sha256 and size of every file

Files are never changed and never renamed: adding an entry writes one more file, then a new manifest in place of the
old one, whole or not at all; one process at a time, by a lock on ``.pool.json.lock``. The manifest is JSON with sorted
keys, indented by two, and ends in a line break; ``digest`` is the sha256 of the rest of it (the same without
``digest``, no spaces), so that an edit by hand is noticed. A file that no manifest names, such as a killed process
leaves, is told by ``verify`` and read by nobody.

A pool is read like anything from a stranger: no name in the manifest is ever used as a path, every number is bounded,
and each file is checked against its sha256 before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from learngene_hub._check import require_int
from learngene_hub._format import FILE_NAME, MAX_BYTES, ODD, SHA256, naming, one_line, opened, short, shown
from learngene_hub._lock import locked
from learngene_hub.errors import ArtefactError, LearngeneError, NoPoolError, SettingsError, StoreError
from learngene_hub.methods._adaptive_key import Space
from learngene_hub.methods._adaptive_merge import FORMS

MANIFEST, ENTRIES = "pool.json", "entries"
FORMAT, READ_BY = 1, "0.1.0"
MAX_MANIFEST = 2**20  # bytes
MAX_ENTRIES = 1024
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
TOPOLOGIES = ("star", "chain", "adaptive")
KEYS = ("anchor", "components", "digest", "entries", "entry", "format", "key", "read_by", "topology")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A file of a pool."""

    name: str  # of an entry, for people; "anchor" of the anchor
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        require_name(self.name)
        if not (isinstance(self.sha256, str) and SHA256.match(self.sha256)):
            raise ArtefactError(f"{self.name} has sha256 {short(self.sha256)}; it is 64 hex digits")
        if type(self.bytes) is not int or not 8 < self.bytes <= 2 * MAX_BYTES:
            raise ArtefactError(f"{self.name} has {short(self.bytes)} bytes; a whole number is needed")


def require_name(name: str) -> None:
    """Nothing, where an entry can be called so.

    Raises:
        SettingsError: it cannot.
    """
    if not (isinstance(name, str) and NAME.match(name)):
        raise SettingsError(
            f"name {name!r:.80} asked; up to 64 letters, digits, '.', '_' and '-' would work: pacs-photo"
        )


def name_after(called: str) -> str:
    """A name for an entry, after what its data are called: of letters, digits, '.', '_' and '-'.

    Raises:
        SettingsError: nothing is left.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", called).strip("._-")[:64].rstrip("._-")
    if not name:
        raise SettingsError(f"no entry can be named after {called!r:.80}; a name of your own (--name NAME) would work")
    return name


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a pool is, and what is in it. The order of the entries is that in which they were added."""

    anchor: Row
    entries: tuple[Row, ...] = ()
    topology: str = "star"  # what an increment stands on: the anchor; all before it ("chain"); the nearest ("adaptive")
    entry: str = "components"  # the form of the increments, see ``_adaptive_merge``
    components: int = 2  # N of an increment; of the form "blocks" the anchor's number of parts
    key: Space = field(default_factory=Space)

    def __post_init__(self) -> None:
        for name, value, known in (("topology", self.topology, TOPOLOGIES), ("entry", self.entry, FORMS)):
            if value not in known:
                raise SettingsError(f"{name} {value!r:.80} asked; there are {', '.join(known)}")
        require_int("components", self.components, at_least=1, error=SettingsError)
        if len(self.entries) > MAX_ENTRIES:
            raise SettingsError(
                f"{len(self.entries)} entries given; a pool has at most {MAX_ENTRIES}: begin a second one"
            )
        if any(row.name == "anchor" for row in self.entries):
            raise SettingsError("an entry named anchor asked; any other name would work")
        for what in ("name", "sha256"):
            values = [getattr(row, what) for row in self.entries]
            if twice := [value for value in values if values.count(value) > 1]:
                raise SettingsError(f"{what} {twice[0]} is in the pool already; another {what} would work")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the digest."""
        rest = {key: getattr(self, key) for key in ("topology", "entry", "components")}
        rows = [asdict(row) for row in self.entries]
        sealed = {"sha256": self.anchor.sha256, "bytes": self.anchor.bytes}
        return {
            **rest, "anchor": sealed, "entries": rows, "key": asdict(self.key), "format": FORMAT, "read_by": READ_BY
        }  # fmt: skip

    @property
    def digest(self) -> str:
        """The sha256 of what it says."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self) -> bytes:
        """The bytes of the file."""
        whole = {**self.to_dict(), "digest": self.digest}
        return (json.dumps(whole, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def parse(data: bytes) -> Manifest:
    """The manifest in these bytes.

    Raises:
        ArtefactError: they are none, or were edited by hand.
    """
    try:
        top = json.loads(data)
        number = top.get("format") if isinstance(top, dict) else None
        if type(number) is not int or number < 1:
            raise ArtefactError(f"format {short(number)}; this library reads the manifest of a pool in format {FORMAT}")
        if number > FORMAT:
            raise ArtefactError(
                f"format {short(number)}; a later version reads it: pip install --upgrade learngene-hub"
            )
        if odd := sorted(set(top) ^ set(KEYS)):
            raise ArtefactError(f"keys missing or unknown: {short(odd)}")
        found = _manifest(top)
        same = found.encode() == data
    except ArtefactError:
        raise
    except LearngeneError as error:
        raise ArtefactError(f"its facts do not hold: {one_line(error)}") from error
    except ODD as error:
        raise ArtefactError(f"it cannot be read: {one_line(error)}") from error
    if top["digest"] != found.digest:
        raise ArtefactError("its digest is of another manifest: it was edited by hand; fetch the pool again")
    if not same:
        raise ArtefactError("it is not written in the one way that format 1 has; fetch the pool again")
    return found


def _manifest(top: Mapping[str, Any]) -> Manifest:
    anchor, rows, key = top["anchor"], top["entries"], top["key"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in (anchor, key, *rows)):
        raise ArtefactError("anchor and key are objects, entries is a list of them")
    return Manifest(
        anchor=Row(name="anchor", **anchor),
        entries=tuple(Row(**row) for row in rows),
        topology=top["topology"],
        entry=top["entry"],
        components=top["components"],
        key=Space(**key),
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a pool's folder.

    Raises:
        ArtefactError: it is none.
        NoPoolError: there is no pool.
        StoreError: it cannot be read.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise NoPoolError(f"no folder {shown(folder)}; `learngene pool create` makes a pool")
    if not path.exists():
        raise NoPoolError(f"{shown(folder)} is not a pool: it has no {MANIFEST}; `learngene pool create` makes one")
    with naming(path), opened(path) as (file, size):
        if size > MAX_MANIFEST:
            raise ArtefactError(f"{size} bytes; a manifest has at most {MAX_MANIFEST}")
        return parse(file.read(MAX_MANIFEST + 1))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Puts a manifest in place of the one that is there, whole or not at all.

    Raises:
        StoreError: it cannot be written.
    """
    data = manifest.encode()
    if len(data) > MAX_MANIFEST:
        raise StoreError(f"the manifest would have {len(data)} bytes; {MAX_MANIFEST} is the most: begin a second pool")
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)
    except OSError as error:
        raise StoreError(f"cannot write {shown(folder / MANIFEST)}: {error.strerror}; the pool is as it was") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write a new pool into, which takes the place of ``folder`` at the end; nothing is left of a failure.

    Raises:
        StoreError: something is in the folder, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{shown(folder)} is there already; a new folder would work")
    target = folder.resolve()
    made = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        made.mkdir(parents=True)
        yield made
        if target.exists():
            target.rmdir()  # empty: Windows renames over no folder
        os.replace(made, target)
    except OSError as error:
        raise StoreError(f"cannot write the pool {shown(folder)}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """No other process adds to the pool inside.

    Raises:
        StoreError: another one has been at it for a minute, or the folder cannot be written.
    """
    try:
        with locked(folder.resolve() / MANIFEST):
            yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot write {shown(folder)}: {error.strerror or error}; the pool is as it was") from error


def path_within(row: Row) -> str:
    """Where a file of a pool lies, from its folder on."""
    return FILE_NAME if row.name == "anchor" else f"{ENTRIES}/{row.sha256}.safetensors"


def place_of(folder: Path, row: Row) -> Path:
    """Where a file of a pool lies."""
    return folder / path_within(row)


def require_there(folder: Path, row: Row) -> None:
    """Nothing, where a file of a pool is there and as long as promised.

    Raises:
        ArtefactError: it is not.
    """
    path = place_of(folder, row)
    size = path.stat().st_size if path.is_file() else None
    if size != row.bytes:
        there = "is missing" if size is None else f"has {size} bytes"
        raise ArtefactError(f"{shown(path)} {there}; the pool promises {row.bytes}: fetch the pool again")


def strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Files beside those of the pool, by their names within ``entries``; hidden ones are the system's."""
    inside = folder / ENTRIES
    known = {f"{row.sha256}.safetensors" for row in manifest.entries}
    there = {path.name for path in inside.iterdir() if not path.name.startswith(".")} if inside.is_dir() else set()
    return sorted(there - known)
