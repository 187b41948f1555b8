"""Where learngenes come from: paths, the registry, the Hugging Face Hub. The only room that imports huggingface_hub.

A name is resolved in this order: an existing path; a name of the registry; a Hub repository, ``org/repo``,
``org/repo@revision`` or ``hf://org/repo@revision``. Of a folder or repository ``learngene.safetensors`` is read.

Every load checks a sha256 where one is known: the registry's; else the one that the server gave, under which the Hub's
client keeps the file in its cache, and which the client itself does not check. A file of the cache that turns out to
be damaged is fetched once more. The client's own settings hold: HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT, tokens, timeouts.
The user's own registry, LEARNGENE_REGISTRY, may be a repository with a registry.yaml.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from learngene_hub import registry
from learngene_hub._client import Repository as Repository
from learngene_hub._client import is_absent, is_repository
from learngene_hub._client import parse_repository as parse_repository
from learngene_hub._pool_push import push_pool as push_pool
from learngene_hub._push import push as push
from learngene_hub._push import push_descendant as push_descendant
from learngene_hub._remote import POOL_FILE as POOL_FILE
from learngene_hub._remote import Cached as Cached
from learngene_hub._remote import Found as Found
from learngene_hub._remote import cached as cached
from learngene_hub._remote import find_remote as find_remote
from learngene_hub._send import Pushed as Pushed
from learngene_hub._store import FolderStore as FolderStore
from learngene_hub._store import HubStore as HubStore
from learngene_hub._store import Peek, digests, file_at, refuse_revision, resolved_revision
from learngene_hub._store import Store as Store
from learngene_hub.errors import ArtefactError, NoPoolError, SettingsError, StoreError
from learngene_hub.learngene import FILE_NAME, Learngene
from learngene_hub.registry import Entry, Registry

if TYPE_CHECKING:
    from learngene_hub.pool import Pool


class Located(NamedTuple):
    """A learngene's file on this machine, and what is known of it before it is read."""

    path: Path
    sha256: str | None  # promised; None where nobody promised one
    entry: Entry | None  # of the registry
    revision: str | None = None  # the commit; None for what did not come from a repository
    uri: str = ""  # hf://org/repo@<commit>; else a path, of an entry the one in its registry


class Fetched(NamedTuple):
    """A learngene, and where it was found."""

    learngene: Learngene
    located: Located


class _Place(NamedTuple):
    """What a name stands for: a path or a repository, and the entry that says so."""

    path: Path | None
    asked: Repository | None
    entry: Entry | None


def pull(name_or_path_or_uri: str | os.PathLike[str], *, revision: str | None = None) -> Learngene:
    """The learngene of this path, registry name or Hub repository, its sha256 checked where one is known.

    Raises:
        RegistryError: no such name; the nearest are listed.
        StoreError: it cannot be read or fetched.
        ArtefactError: what is there is not a learngene; DigestError: its bytes are not the promised ones.
        SettingsError: a revision is asked of something that has none, or two different ones are.
    """
    return fetch(name_or_path_or_uri, revision=revision).learngene


def fetch(name_or_path_or_uri: str | os.PathLike[str], *, revision: str | None = None) -> Fetched:
    """What ``pull`` returns, and where it was found.

    Raises:
        RegistryError, StoreError, ArtefactError, SettingsError: as ``pull``.
    """
    located = locate(name_or_path_or_uri, revision=revision)
    try:
        return Fetched(Learngene.load(located.path, sha256=located.sha256), located)
    except ArtefactError:
        if not _mended(located):
            raise
    return Fetched(Learngene.load(located.path, sha256=located.sha256), located)


def pull_pool(source: str | os.PathLike[str] | Pool, *, revision: str | None = None) -> Pool:
    """The pool of this path, registry name or Hub repository, every file checked; a Pool is itself.

    One from the Hub lies in the cache of its client and cannot be added to: ``Pool.copy`` makes one that can.

    Raises:
        RegistryError, StoreError, SettingsError: as ``pull``.
        NoPoolError: it is a learngene, and no pool.
        ArtefactError: it was edited, or a file is not what the manifest promises.
    """
    from learngene_hub._pool_file import path_within, read_manifest
    from learngene_hub.pool import Pool

    if isinstance(source, Pool):
        refuse_revision(revision, f"a pool that is loaded already, {source.name}")
        return source
    located = locate(source, revision=revision)
    folder = located.path.parent
    if located.revision is None:
        if pool_at(located.path) is None:
            raise _no_pool(os.fspath(source))
        return Pool.load(folder)
    asked = parse_repository(located.uri)
    try:
        HubStore(file_name=POOL_FILE).read(located.uri)
    except StoreError as error:
        raise (_no_pool(os.fspath(source)) if is_absent(error) else error) from error
    for row in read_manifest(folder).entries:
        store = HubStore(file_name=path_within(row))
        if digests(store.read(located.uri))[0] != row.sha256:
            store.read(located.uri, again=True)
    return replace(Pool.load(folder), origin=(asked.repo, located.revision))


def _no_pool(name: str) -> NoPoolError:
    return NoPoolError(f"{name} is not a pool: it has no {POOL_FILE}; `learngene pool create` makes one around it")


def locate(name_or_path_or_uri: str | os.PathLike[str], *, revision: str | None = None) -> Located:
    """The file that ``pull`` would load, fetched where it has to be.

    Raises:
        RegistryError, StoreError, SettingsError: as ``pull``.
    """
    place = _resolve(name_or_path_or_uri, revision)
    entry = place.entry
    if place.path is not None:
        return Located(place.path, entry and entry.sha256, entry, uri=entry.uri if entry else str(place.path))
    assert place.asked is not None
    store = HubStore()
    path = store.read(str(place.asked))
    commit = resolved_revision(path)
    asked = Repository(place.asked.repo, commit or place.asked.revision)
    sha256 = entry.sha256 if entry else store.promised(path, asked)
    return Located(path, sha256, entry, commit, f"hf://{asked}")


def preview(name_or_path_or_uri: str | os.PathLike[str], *, revision: str | None = None) -> tuple[str, Peek]:
    """The uri of what ``pull`` would load, and its commit and size; nothing is fetched. The commit is "" where none is.

    Raises:
        RegistryError, StoreError, SettingsError: as ``pull``.
    """
    place = _resolve(name_or_path_or_uri, revision)
    if place.path is not None:
        uri = place.entry.uri if place.entry else str(place.path)
        return uri, Peek("", place.path.stat().st_size, cached=True)
    assert place.asked is not None
    peek = HubStore().peek(str(place.asked))
    return f"hf://{place.asked.repo}@{peek.revision}", peek


def seen(name_or_path_or_uri: str | os.PathLike[str]) -> Path | None:
    """The file that ``pull`` would load, as far as this machine knows without asking anybody: None of a repository that
    is not in the client's cache.

    Raises:
        RegistryError, StoreError, SettingsError: as ``pull``.
    """
    place = _resolve(name_or_path_or_uri, None)
    if place.path is not None or place.asked is None:
        return place.path
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.asked.repo, FILE_NAME, revision=place.asked.revision)
    return Path(found) if isinstance(found, str) else None


def pool_at(path: Path) -> Path | None:
    """The folder of the pool whose anchor is this file; None where it is of none, as far as this machine knows."""
    return path.parent if path.name == FILE_NAME and (path.parent / POOL_FILE).is_file() else None


def pool_problems(path: Path) -> list[str]:
    """What is wrong with the pool whose anchor is this file, one line each; nothing, where it is of none."""
    folder = pool_at(path)
    if folder is None:
        return []
    from learngene_hub.pool import Pool

    try:
        return Pool.load(folder).verify()
    except (ArtefactError, StoreError) as error:
        return [str(error)]


def known() -> Registry:
    """The built-in registry with the user's own layered over it, a path or a repository in LEARNGENE_REGISTRY.

    Raises:
        RegistryError, StoreError: one of them cannot be read.
    """
    own = os.environ.get(registry.ENVIRONMENT, "")
    if not own.startswith("hf:"):
        return Registry.default()
    store = HubStore(file_name=registry.FILE_NAME)
    path = store.read(own)
    if store.is_damaged(path):
        path = store.read(own, again=True)
        if store.is_damaged(path):
            raise StoreError(f"{own} is not what {store.server} promises; delete {os.path.realpath(path)}, try later")
    pinned = Repository(parse_repository(own).repo, resolved_revision(path))
    return Registry.built_in().under(Registry.load(path, origin=f"hf://{pinned}"))


def list_learngenes() -> list[Entry]:
    """The entries of the registry, in its order: the bundled ones by usefulness (README.md), then one's own.

    Raises:
        RegistryError, StoreError: the registry cannot be read.
    """
    return list(known().entries.values())


def _resolve(name_or_path_or_uri: str | os.PathLike[str], revision: str | None) -> _Place:
    name = os.fspath(name_or_path_or_uri)
    path = os.path.expanduser(name)
    if name and os.path.exists(path):
        refuse_revision(revision, f"{path}, which is on this machine")
        return _Place(file_at(Path(path)), None, None)
    if is_repository(name) and not name.endswith(".safetensors"):
        return _Place(None, parse_repository(name, revision), None)
    if name.startswith(("hf:", "http:", "https:")):
        raise StoreError(f"{name!r} is not a Hub repository; hf://org/repo or hf://org/repo@revision would work")
    if "/" in name or os.sep in name or name.endswith(".safetensors"):
        raise StoreError(f"no file or folder {name!r}; give a path, a name of the registry, or org/repo on the Hub")
    return _resolve_entry(known().find(name), revision)


def _resolve_entry(entry: Entry, revision: str | None) -> _Place:
    if not entry.is_remote:
        refuse_revision(revision, f"{entry.name}, which the registry keeps at {entry.uri}")
        return _Place(FolderStore(root=entry.root).read(entry.uri), None, entry)
    repository = parse_repository(entry.uri)
    if revision is not None:
        raise SettingsError(
            f"revision {revision!r} asked of {entry.name}, which the registry pins to {repository}; "
            f"{repository.repo}@{revision} would work"
        )
    return _Place(None, repository, entry)


def _mended(located: Located) -> bool:
    """Whether a file of the cache was not what the server had promised, and could be fetched again.

    It may have been damaged on its way, on the disk, or by a branch that moved while it was fetched.
    """
    if located.revision is None:
        return False
    store, asked = HubStore(), parse_repository(located.uri)
    promised = store.promised(located.path, asked)
    if promised is None or digests(located.path)[0] == promised:
        return False
    try:
        path = store.read(str(asked), again=True)
        if not path.is_symlink() and digests(path)[0] != promised:  # without links the client leaves the old copy there
            path.unlink()
            store.read(str(asked))
    except StoreError:  # offline: what was wrong is told as it was found
        return False
    return True
