"""Where learngenes come from: paths, the registry, the Hugging Face Hub. The only file that imports huggingface_hub.

A name is resolved in this order: an existing path; a name of the registry; a Hub repository, ``org/repo``,
``org/repo@revision`` or ``hf://org/repo@revision``. Of a folder or repository ``learngene.safetensors`` is read.

Every load checks a sha256 where one is known: the registry's; else the one under which the Hub's client keeps the file
in its cache, which the client itself does not check. The client's own settings hold: HF_HUB_OFFLINE, HF_HOME,
HF_ENDPOINT, tokens, timeouts. The user's own registry, LEARNGENE_REGISTRY, may be a repository with a registry.yaml.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from learngene_hub import registry
from learngene_hub.errors import SettingsError, StoreError
from learngene_hub.learngene import FILE_NAME, Learngene
from learngene_hub.registry import Entry, Registry, is_inside

_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_REPOSITORY = re.compile(rf"(?:hf://)?(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]{{1,255}}))?", re.ASCII)


class Store(Protocol):
    """Where bytes live."""

    def read(self, uri: str, revision: str | None = None) -> Path:
        """The local path of the learngene at ``uri``, fetched where it has to be.

        Raises:
            StoreError: it is not there, or cannot be read.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FolderStore:
    """A folder with one folder, or one file, per learngene: ``model_cards/`` is in one."""

    root: Path

    def read(self, uri: str, revision: str | None = None) -> Path:
        """The path of the learngene at ``uri``, a path below ``root``.

        Raises:
            SettingsError: a revision is asked; a folder has none.
            StoreError: it is not there.
        """
        _refuse_revision(revision, f"the folder {self.root}")
        if not is_inside(uri):
            raise StoreError(f"{uri!r} asked of {self.root}; a path below that folder would work")
        return _file_at(self.root / uri)


@dataclass(frozen=True, kw_only=True)
class HubStore:
    """The Hugging Face Hub, or a server that speaks its protocol."""

    endpoint: str | None = None  # None: the client's own, HF_ENDPOINT
    cache: Path | None = None  # None: the client's own, under HF_HOME
    file_name: str = FILE_NAME  # what is read of a repository

    def read(self, uri: str, revision: str | None = None) -> Path:
        """The path, in the client's cache, of the file of a repository (see ``parse_repository``).

        Raises:
            SettingsError: the revision is given twice, differently.
            StoreError: the repository, revision or file is not there, not allowed, or not reachable.
        """
        from huggingface_hub import hf_hub_download

        asked = parse_repository(uri, revision)
        try:
            with _quiet_client():
                path = hf_hub_download(
                    asked.repo, self.file_name, revision=asked.revision, endpoint=self.endpoint, cache_dir=self.cache
                )
        except Exception as error:  # the client lets errors of its HTTP library through, whose name changed with 2.0
            raise StoreError(_reason(asked, self, error)) from error
        return Path(path)


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
    """Without the client's log of each retry: what went wrong comes once, in the StoreError."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class Repository(NamedTuple):
    """A Hub repository at a revision; None: its main branch."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


class Located(NamedTuple):
    """A learngene's file on this machine, and what is known of it before it is read."""

    path: Path
    sha256: str | None  # promised; None where nobody promised one
    entry: Entry | None  # of the registry


def pull(name_or_path_or_uri: str | os.PathLike[str], *, revision: str | None = None) -> Learngene:
    """The learngene of this path, registry name or Hub repository, its sha256 checked where one is known.

    Raises:
        RegistryError: no such name; the nearest are listed.
        StoreError: it cannot be read or fetched.
        ArtefactError: what is there is not a learngene; DigestError: its bytes are not the promised ones.
        SettingsError: a revision is asked of something that has none, or two different ones are.
    """
    located = locate(name_or_path_or_uri, revision=revision)
    return Learngene.load(located.path, sha256=located.sha256)


def locate(name_or_path_or_uri: str | os.PathLike[str], *, revision: str | None = None) -> Located:
    """The file that ``pull`` would load, fetched where it has to be.

    Raises:
        RegistryError, StoreError, SettingsError: as ``pull``.
    """
    name = os.fspath(name_or_path_or_uri)
    path = os.path.expanduser(name)
    if name and os.path.exists(path):
        _refuse_revision(revision, f"{path}, which is on this machine")
        return Located(_file_at(Path(path)), None, None)
    if _REPOSITORY.fullmatch(name) and not name.endswith(".safetensors"):
        file = HubStore().read(name, revision)
        return Located(file, _cached_digest(file), None)
    if name.startswith(("hf:", "http:", "https:")):
        raise StoreError(f"{name!r} is not a Hub repository; hf://org/repo or hf://org/repo@revision would work")
    if "/" in name or os.sep in name or name.endswith(".safetensors"):
        raise StoreError(f"no file or folder {name!r}; give a path, a name of the registry, or org/repo on the Hub")
    return _locate_entry(known().find(name), revision)


def known() -> Registry:
    """The built-in registry with the user's own layered over it, a path or a repository in LEARNGENE_REGISTRY.

    Raises:
        RegistryError, StoreError: one of them cannot be read.
    """
    own = os.environ.get(registry.ENVIRONMENT, "")
    if not own.startswith("hf:"):
        return Registry.default()
    path = HubStore(file_name=registry.FILE_NAME).read(own)
    return Registry.built_in().under(Registry.load(path))


def list_learngenes() -> list[Entry]:
    """The entries of the registry, by name.

    Raises:
        RegistryError, StoreError: the registry cannot be read.
    """
    entries = known().entries
    return [entries[name] for name in sorted(entries)]


def parse_repository(uri: str, revision: str | None = None) -> Repository:
    """The repository that ``org/repo``, ``org/repo@revision`` or ``hf://org/repo@revision`` names.

    Raises:
        StoreError: it is none of these.
        SettingsError: the revision is given twice, differently.
    """
    match = _REPOSITORY.fullmatch(uri)
    if match is None:
        raise StoreError(f"{uri!r} is not a Hub repository; hf://org/repo or hf://org/repo@revision would work")
    written = match["revision"]
    if written and revision and written != revision:
        raise SettingsError(f"revision {revision!r} asked, and {written!r} in {uri!r}; give one of them")
    return Repository(match["repo"], revision or written)


def _locate_entry(entry: Entry, revision: str | None) -> Located:
    if not entry.is_remote:
        _refuse_revision(revision, f"{entry.name}, which the registry keeps at {entry.uri}")
        return Located(FolderStore(root=entry.root).read(entry.uri), entry.sha256, entry)
    if revision is not None:
        repository = parse_repository(entry.uri)
        raise SettingsError(
            f"revision {revision!r} asked of {entry.name}, which the registry pins to {repository}; "
            f"{repository.repo}@{revision} would work"
        )
    return Located(HubStore().read(entry.uri), entry.sha256, entry)


def _file_at(path: Path) -> Path:
    """The file itself, or ``learngene.safetensors`` in the folder."""
    if not path.is_dir():
        if not path.exists():
            raise StoreError(f"no file or folder {path}; a {FILE_NAME}, or a folder with one, would work")
        return path
    if not (path / FILE_NAME).exists():
        hint = "; an existing folder goes before a name of the registry" if len(path.parts) == 1 else ""
        raise StoreError(f"no {FILE_NAME} in the folder {path}; save_pretrained writes one{hint}")
    return path / FILE_NAME


def _refuse_revision(revision: str | None, of: str) -> None:
    if revision is not None:
        raise SettingsError(f"revision {revision!r} asked of {of}; only Hub repositories, org/repo, have revisions")


def _cached_digest(path: Path) -> str | None:
    """The sha256 that names a cached file: the client keeps big files as ``blobs/<sha256>``, behind a link."""
    try:
        target = Path(os.readlink(path))
    except OSError:  # not a link: this system has none
        return None
    return target.name if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name) else None


def _reason(asked: Repository, store: HubStore, error: Exception) -> str:
    """Why a repository could not be read, and what would work, on one line."""
    from huggingface_hub import constants, errors

    server = store.endpoint or constants.ENDPOINT
    login = "`hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"{asked.repo} is gated: accept its terms at {server}/{asked.repo}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no repository {asked.repo} on {server}: check the name, or {login} if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{asked.repo} has no revision {asked.revision!r}: {server}/{asked.repo}/commits lists them"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return f"{asked} is not in the cache and HF_HUB_OFFLINE is set: load it once online"
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    elif isinstance(error, errors.EntryNotFoundError):
        return f"{asked} has no {store.file_name}: another repository, or revision, may have"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        works = f"{login} with a token that may read it" if status in (401, 403) else "try again later"
        return f"{server} answered {status} for {asked}: {works}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to fetch {asked}: free some, or set HF_HOME to another disk"
    if isinstance(error, errors.HFValidationError):
        return f"{asked} is not a name that the Hub allows; org/repo would work"
    kind, text = type(error).__name__, " ".join(str(error).split())[:200]
    return f"{asked} could not be fetched from {server} ({kind}: {text}): check the connection, or HF_ENDPOINT"
