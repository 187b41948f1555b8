"""The Hub's client, as the stores use it: names of repositories, patience, and one line for whatever goes wrong."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from learngene_hub.errors import SettingsError, StoreError
from learngene_hub.learngene import FILE_NAME

WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
CHANGED = "has changed meanwhile: nothing was overwritten; look at what is there, then push again"
BUSY = (408, 429, 500, 502, 503, 504)  # answers after which a further attempt may succeed
MOST_WAIT = 60.0  # seconds that a server may ask for
SLOW = 2.0  # seconds without an answer after which it is said that one is waited for
LOGIN = "`hf auth login`"
_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_REPOSITORY = re.compile(rf"(?:hf://)?(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]{{1,255}}))?", re.ASCII)

T = TypeVar("T")
_LOG = logging.getLogger("learngene_hub.hub")


class Repository(NamedTuple):
    """A Hub repository at a revision; None: its main branch."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def is_repository(name: str) -> bool:
    """Whether a name has the form of a Hub repository."""
    return _REPOSITORY.fullmatch(name) is not None


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


class _Retry(logging.Handler):
    """The first line that the client logs of an attempt that failed becomes one of ours."""

    def __init__(self, server: str) -> None:
        super().__init__(logging.WARNING)
        self.server, self.told = server, False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.told and "thrown while requesting" in record.getMessage():
            self.told = True
            _LOG.info("%s is busy, or cannot be reached: it is asked again, for about half a minute", self.server)


@contextlib.contextmanager
def quiet_client(server: str | None = None) -> Iterator[None]:
    """Without the client's log of each retry: what went wrong comes once, in the StoreError.

    That the server (the client's own where None) is slow, or is asked again, is logged once, as information.
    """
    from huggingface_hub import constants

    server = server or constants.ENDPOINT
    log, retry = logging.getLogger("huggingface_hub"), _Retry(server)
    before = [(handler, handler.level) for handler in log.handlers]
    slow = threading.Timer(SLOW, _LOG.info, ("waiting for %s", server))
    slow.daemon = True
    for handler, level in before:
        handler.setLevel(max(level, logging.ERROR))
    log.addHandler(retry)
    slow.start()
    try:
        yield
    finally:
        slow.cancel()
        log.removeHandler(retry)
        for handler, level in before:
            handler.setLevel(level)


def patiently(call: Callable[[], T]) -> T:
    """What ``call`` returns, tried again where the server is busy: the client does so for files, not for questions."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise
            time.sleep(asked_wait(error, wait))
    return call()


def is_passing(error: BaseException) -> bool:
    """Whether a further attempt may succeed: a busy server, or a connection that broke."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in BUSY
    broken = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of its HTTP library: httpx, later httpx2
    return isinstance(error, broken)


def asked_wait(error: BaseException, least: float) -> float:
    """Seconds to wait: what the server asks for, within reason, and at least ``least``."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    text = str(headers.get("Retry-After", ""))
    return min(max(least, float(text)), MOST_WAIT) if text.isdecimal() else least


def is_absent(error: StoreError) -> bool:
    """Whether the server answered that there is no such thing; False where it gave no answer, or another."""
    from huggingface_hub import errors

    cause = error.__cause__
    local = isinstance(cause, errors.LocalEntryNotFoundError)  # in no cache; what the server has is not known
    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    return isinstance(cause, absent) and not isinstance(cause, errors.GatedRepoError) and not local


def why_unread(asked: Repository, error: BaseException, *, server: str, file_name: str = FILE_NAME) -> str:
    """Why a file of a repository could not be read, and what would work, on one line."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"{asked.repo} is gated: accept its terms at {server}/{asked.repo}, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no repository {asked.repo} on {server}: check the name, or {LOGIN} if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{asked.repo} has no revision {asked.revision!r}: {server}/{asked.repo}/commits lists them"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return f"{asked} is not in the cache and HF_HUB_OFFLINE is set: load it once online"
        error = error.__cause__ or error
    elif isinstance(error, errors.EntryNotFoundError):
        return f"{asked} has no {file_name}: another repository, or revision, may have"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        works = f"{LOGIN} with a token that may read it" if status in (401, 403) else "try again later"
        return f"{server} answered {status} for {asked}: {works}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to fetch {asked}: free some, or set HF_HOME to another disk"
    if isinstance(error, errors.HFValidationError):
        return f"{asked} is not a name that the Hub allows; org/repo would work"
    return f"{asked} could not be fetched from {server} ({_kind(error)}): check the connection, or HF_ENDPOINT"


def why_unwritten(asked: Repository, error: BaseException, *, server: str) -> str:
    """Why nothing could be written to a repository, and what would work, on one line."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # the client's wrapping of an upload's error
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so nothing can be pushed to {asked}: unset it"
    if isinstance(error, errors.GatedRepoError):
        return f"{asked.repo} is gated: accept its terms at {server}/{asked.repo}, then {LOGIN}"
    if isinstance(error, errors.HFValidationError):
        return f"{asked} is not a name that the Hub allows; org/repo would work"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"{server} does not know you (401 for {asked}): {LOGIN}, or HF_TOKEN"
        if status == 403:
            return f"{server} does not let you write to {asked} (403): {LOGIN} with a token that may, or a pull request"
        if status in (409, 412):
            return f"{asked} {CHANGED}"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"no repository {asked.repo} on {server} that you may write to: check the name, or {LOGIN}"
        works = "try again later" if status in BUSY else "the server's words tell why"
        return f"{server} answered {status} for {asked} ({_kind(error)}): {works}"
    return f"{asked} could not be pushed to {server} ({_kind(error)}): check the connection, or HF_ENDPOINT"


def _kind(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
