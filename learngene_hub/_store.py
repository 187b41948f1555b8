"""Stores: where bytes live. A folder on this machine, and the Hugging Face Hub or a server that speaks its protocol.

The client does the work, with its own cache, locks, logins and settings (HF_ENDPOINT, HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, timeouts). Added here: each refusal is one line; one commit is tried again where the connection broke,
without ever making a second one; and servers without Xet take uploads (see ``_operation``).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from learngene_hub._client import (
    WAITS,
    Repository,
    asked_wait,
    is_passing,
    parse_repository,
    patiently,
    quiet_client,
    why_unread,
    why_unwritten,
)
from learngene_hub.errors import SettingsError, StoreError
from learngene_hub.learngene import FILE_NAME
from learngene_hub.registry import is_inside

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile, RepoFolder, RepoSibling

PUBLIC = ("https://huggingface.co", "https://hub-ci.huggingface.co")  # the Hub itself, which speaks Xet
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")

Files = Mapping[str, Path | bytes]  # name -> a file on this machine, or the content itself
T = TypeVar("T")


class Written(NamedTuple):
    """What a write made: a commit, and the address of a pull request; None where the store has no such thing."""

    revision: str | None
    pull_request: str | None = None


class Peek(NamedTuple):
    """What would be fetched."""

    revision: str  # commit
    nbytes: int | None
    cached: bool  # on this machine already


class Store(Protocol):
    """Where bytes live."""

    def read(self, uri: str, revision: str | None = None) -> Path:
        """The local path of the learngene at ``uri``, fetched where it has to be.

        Raises:
            StoreError: it is not there, or cannot be read.
        """
        ...

    def write(self, files: Files, uri: str) -> Written:
        """Puts the files at ``uri``, where no reader ever finds half of one.

        Raises:
            StoreError: they cannot be written there.
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
        refuse_revision(revision, f"the folder {self.root}")
        return file_at(self._inside(uri))

    def write(self, files: Files, uri: str) -> Written:
        """Writes the files into the folder ``uri`` below ``root``, made where missing: each is whole, or as it was.

        Raises:
            StoreError: a name that is no plain file name, or a folder that cannot be written.
        """
        folder = self._inside(uri)
        if odd := [name for name in files if not is_inside(name) or Path(name).name != name]:
            raise StoreError(f"{odd[0]!r} asked in {folder}; a plain file name would work")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                _replace(folder / name, content)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "no space left" if full else error.strerror or error
            raise StoreError(f"cannot write to {folder}: {why}; another folder would work") from error
        return Written(None)

    def _inside(self, uri: str) -> Path:
        if not is_inside(uri):
            raise StoreError(f"{uri!r} asked of {self.root}; a path below that folder would work")
        return self.root / uri


@dataclass(frozen=True, kw_only=True)
class HubStore:
    """The Hugging Face Hub, or a server that speaks its protocol."""

    endpoint: str | None = None  # None: the client's own, HF_ENDPOINT
    cache: Path | None = None  # None: the client's own, under HF_HOME
    file_name: str = FILE_NAME  # what is read of a repository
    token: str | None = field(default=None, repr=False)  # None: the client's own login

    @property
    def server(self) -> str:
        """Its address."""
        from huggingface_hub import constants

        return self.endpoint or constants.ENDPOINT

    def api(self) -> HfApi:
        """The client."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.server, token=self.token)

    def read(self, uri: str, revision: str | None = None, *, again: bool = False) -> Path:
        """The path, in the client's cache, of the file of a repository (see ``parse_repository``).

        Args:
            again: fetch it even where the cache has it.

        Raises:
            SettingsError: the revision is given twice, differently.
            StoreError: the repository, revision or file is not there, not allowed, or not reachable.
        """
        from huggingface_hub import hf_hub_download

        asked = parse_repository(uri, revision)
        with self._reading(asked):
            path = hf_hub_download(
                asked.repo, self.file_name, revision=asked.revision, endpoint=self.server, cache_dir=self.cache,
                token=self.token, force_download=again,
            )  # fmt: skip
        return Path(path)

    def peek(self, uri: str, revision: str | None = None) -> Peek:
        """What ``read`` would fetch; nothing is.

        Raises:
            SettingsError, StoreError: as ``read``.
        """
        from huggingface_hub import hf_hub_download

        asked = parse_repository(uri, revision)
        with self._reading(asked):
            found = hf_hub_download(
                asked.repo, self.file_name, revision=asked.revision, endpoint=self.server, cache_dir=self.cache,
                token=self.token, dry_run=True,
            )  # fmt: skip
        return Peek(found.commit_hash, found.file_size, found.is_cached)

    def promised(self, path: Path, asked: Repository) -> str | None:
        """The sha256 that the server gave for a file that ``read`` fetched; None where it gave none.

        The client keeps big files as ``blobs/<sha256>`` behind a link. Where there are no links, the server is asked.
        """
        with contextlib.suppress(OSError):
            blob = Path(os.readlink(path))
            return blob.name if blob.parent.name == "blobs" and _SHA256.match(blob.name) else None
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with (
            contextlib.suppress(Exception),
            quiet_client(self.server),
        ):  # offline, or not reachable: nothing is promised
            url = hf_hub_url(asked.repo, self.file_name, revision=asked.revision, endpoint=self.server)
            etag = get_hf_file_metadata(url, token=self.token, endpoint=self.server).etag
            return etag if etag and _SHA256.match(etag) else None
        return None

    def is_damaged(self, path: Path) -> bool:
        """Whether a file of the client's cache differs from the digest that is its name there: sha256, or git's."""
        name = Path(os.path.realpath(path)).name if path.is_symlink() else ""
        return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) is not None and name not in digests(path)

    def write(
        self, files: Files, uri: str, *, message: str = "Push", create_pr: bool = False, parent: str | None = None
    ) -> Written:
        """One commit with the files on the branch that ``uri`` names, main where it names none.

        Args:
            parent: the commit that the branch must still be at; without one, whatever it is at. Given one, a commit
                whose answer was lost is looked for before it is tried again, so that there never are two.

        Raises:
            StoreError: not allowed, not reachable, or the branch has moved; then nothing was written.
        """
        asked = parse_repository(uri)
        for wait in (*WAITS, None):
            try:
                return self._commit(files, asked, message=message, create_pr=create_pr, parent=parent)
            except Exception as error:  # the client lets errors of its HTTP library through
                if create_pr or parent is None or wait is None or not is_passing(error):
                    raise StoreError(why_unwritten(asked, error, server=self.server)) from error
                time.sleep(asked_wait(error, wait))
            head = self.ask(asked, lambda api: api.model_info(asked.repo, revision=asked.revision)).sha
            if head != parent:  # it arrived and only the answer was lost, or somebody else's came first
                if self.differing(files, f"{asked.repo}@{head}"):
                    raise StoreError(
                        f"{asked} has changed meanwhile: nothing was overwritten; look at it, then push again"
                    )
                return Written(head)
        raise AssertionError("the last attempt returns or raises")

    def _commit(self, files: Files, asked: Repository, *, message: str, create_pr: bool, parent: str | None) -> Written:
        with contextlib.ExitStack() as stack, quiet_client(self.server):
            operations = [_operation(name, content, self.server, stack) for name, content in files.items()]
            made = self.api().create_commit(
                asked.repo, operations, commit_message=message, revision=asked.revision, create_pr=create_pr,
                parent_commit=parent,
            )  # fmt: skip
        return Written(made.oid, made.pr_url)

    def differing(self, files: Files, uri: str) -> dict[str, str]:
        """What the server says it has in place of these files: name -> its digest, empty where it has no such file.

        Raises:
            StoreError: the server cannot be asked.
        """
        asked = parse_repository(uri)
        found = self.ask(asked, lambda api: api.get_paths_info(asked.repo, list(files), revision=asked.revision))
        there = {info.path: file_digest(info) for info in found}
        return {name: there.get(name, "") for name in files if there.get(name) not in digests(files[name])}

    def ask(self, asked: Repository, question: Callable[[HfApi], T]) -> T:
        """The client's answer, asked again where the server is busy.

        Raises:
            StoreError: there is none.
        """
        try:
            with quiet_client(self.server):
                return patiently(lambda: question(self.api()))
        except Exception as error:  # the client lets errors of its HTTP library through
            raise StoreError(why_unwritten(asked, error, server=self.server)) from error

    @contextlib.contextmanager
    def _reading(self, asked: Repository) -> Iterator[None]:
        try:
            with quiet_client(self.server):
                yield
        except Exception as error:  # the client lets errors of its HTTP library through, whose name changed with 2.0
            why = why_unread(asked, error, server=self.server, file_name=self.file_name)
            raise StoreError(why) from error


def digests(content: Path | bytes) -> tuple[str, str]:
    """The two digests by which a server may know a file: its sha256, and git's sha1 of it."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
            git.update(chunk)
    return sha256.hexdigest(), git.hexdigest()


def file_digest(info: RepoFile | RepoFolder | RepoSibling) -> str:
    """The digest by which the server knows a file: its sha256 where it is big, else git's sha1; empty for a folder."""
    lfs = getattr(info, "lfs", None)
    return lfs.sha256 if lfs else getattr(info, "blob_id", None) or ""


def resolved_revision(path: Path) -> str | None:
    """The commit that a file of the client's cache belongs to."""
    folder = path.parent
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.match(folder.name) else None


def file_at(path: Path) -> Path:
    """The file itself, or ``learngene.safetensors`` in the folder.

    Raises:
        StoreError: there is none.
    """
    if not path.is_dir():
        if not path.exists():
            raise StoreError(f"no file or folder {path}; a {FILE_NAME}, or a folder with one, would work")
        return path
    if not (path / FILE_NAME).exists():
        hint = "; an existing folder goes before a name of the registry" if len(path.parts) == 1 else ""
        raise StoreError(f"no {FILE_NAME} in the folder {path}; save_pretrained writes one{hint}")
    return path / FILE_NAME


def refuse_revision(revision: str | None, of: str) -> None:
    """Makes sure that no revision is asked of what has none.

    Raises:
        SettingsError: one is.
    """
    if revision is not None:
        raise SettingsError(f"revision {revision!r} asked of {of}; only Hub repositories, org/repo, have revisions")


def _operation(name: str, content: Path | bytes, server: str, stack: contextlib.ExitStack) -> CommitOperationAdd:
    """The client's order to upload a file.

    Given a path, the client asks any server for Xet, and gives up where there is none; given an open file, it uploads
    in the way that every server knows.
    """
    from huggingface_hub import CommitOperationAdd

    if isinstance(content, bytes):
        return CommitOperationAdd(name, content)
    source = str(content) if server in PUBLIC else stack.enter_context(content.open("rb"))
    return CommitOperationAdd(name, source)


def _replace(path: Path, content: Path | bytes) -> None:
    """Write a whole file, or nothing: a temporary name in the same folder, flushed, renamed."""
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                with content.open("rb") as source:
                    shutil.copyfileobj(source, file, 2**20)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
