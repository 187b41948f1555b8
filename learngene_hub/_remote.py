"""What the Hub offers, and what its client has kept: learngenes by search, and those in the cache.

A repository of the Hub holds a learngene if it is tagged ``learngene`` and has a file ``learngene.safetensors``; a
descendant has the tag, but not the file. One request per page of the server's list tells everything but sizes and
digests, which no server tells in a list; these take one more, small request for each repository that is shown. So they
come from the server, not from what an author wrote into a card.

Whatever a list says was written by strangers: a name that is not one of a repository is left out, other text is cut
and its control characters are shown as escapes, and numbers that are none are unknown.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learngene_hub._client import LOGIN, is_repository, quiet_client
from learngene_hub.errors import SettingsError, StoreError
from learngene_hub.learngene import FILE_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TAG = "learngene"
POOL_FILE = "pool.json"  # that of ``_pool_file``, which imports torch; `learngene list` and its like should not
SORTS = {  # ours -> the server's; None where the server cannot
    "name": None,
    "bytes": None,
    "downloads": "downloads",
    "likes": "likes",
    "updated": "last_modified",
}
MAX_ROWS = 1000  # repositories of a list that are looked at
MAX_FILES = 1000  # files of a repository that are looked at
MAX_TEXT = 100  # characters of a stranger's text
PARALLEL = 8  # requests at a time
EXPAND: Any = ("author", "downloads", "gated", "lastModified", "likes", "private", "sha", "siblings", "tags")
PUBLISHED = (  # methods by their names in tags, here too because importing the table of methods imports torch
    *("lsamd", "lets", "ldr", "tleg", "sws", "net2net", "weight-selection", "front", "heuristic", "auto"),
    *("cluster", "learngene-pool", "sn-net", "adaptive", "gene-fl"),
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A learngene on the Hub, as its server and strangers describe it; ``pull`` checks what it is."""

    repo: str  # org/name
    revision: str | None  # commit of the main branch
    method: str | None  # by the tags
    license: str | None  # by the tags
    author: str | None
    downloads: int | None  # in the last 30 days
    likes: int | None
    updated: str | None  # ISO 8601, UTC
    nbytes: int | None  # of learngene.safetensors; None where the server does not say
    sha256: str | None  # of learngene.safetensors; None where the server does not say
    private: bool
    gated: bool
    tags: tuple[str, ...]
    is_pool: bool = False  # whether its learngene is the anchor of a pool, by the names of its files

    @property
    def uri(self) -> str:
        """Where it is, pinned to its commit: what ``pull`` and a registry take."""
        return f"hf://{self.repo}@{self.revision}" if self.revision else f"hf://{self.repo}"


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A learngene in the client's cache."""

    repo: str  # org/name
    revision: str  # commit
    path: Path
    sha256: str | None  # under which the client keeps it; None where this system has no links


def find_remote(
    *,
    search: str | None = None,
    method: str | None = None,
    author: str | None = None,
    max_bytes: int | None = None,
    sort: str = "downloads",
    limit: int = 20,
    token: str | None = None,
) -> list[Found]:
    """Learngenes on the Hub, of the first 1000 repositories that it lists for these filters.

    Args:
        search: text in the repository's name.
        method: a tag, such as "lsamd".
        author: user or organisation.
        max_bytes: of learngene.safetensors; what has no known size is left out.
        sort: "downloads", "likes", "updated" (most or newest first), "bytes" or "name" (least first).
        limit: at most so many.
        token: None is the client's own login.

    Raises:
        StoreError: the Hub cannot be reached, refuses, or answers with something else.
        SettingsError: an argument is out of its range.
    """
    if sort not in SORTS:
        raise SettingsError(f"sort {sort!r} asked; there are {', '.join(SORTS)}")
    for name, number in (("limit", limit), ("max_bytes", max_bytes)):
        if number is not None and number < 1:
            raise SettingsError(f"{name} {number} asked; 1 or more would work")
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with quiet_client(), _explained(api.endpoint):
        order: Any = SORTS[sort]
        tags = [TAG, method] if method else [TAG]
        infos = api.list_models(filter=tags, author=author, search=search, sort=order, expand=[*EXPAND])
        rows = (_row(info, method) for info in islice(infos, MAX_ROWS))
        listed: Iterable[Found] = (row for row in rows if row and _is_asked(row, method, author))
        if sort == "name":
            listed = _ordered(listed, sort)
        found = _measured(api, listed, batch=min(limit, PARALLEL))
        if sort == "bytes":
            found = iter(_ordered(found, sort))
        fitting = (row for row in found if max_bytes is None or (row.nbytes is not None and row.nbytes <= max_bytes))
        return _ordered(islice(fitting, limit), sort)  # a server may leave the order to us


def cached() -> list[Cached]:
    """The learngenes in the client's cache, by repository and commit; the network is not asked.

    The client's own scan is not used: it leaves out a repository with one broken link, and an audit should not.
    """
    pattern = f"models--*--*/snapshots/*/{FILE_NAME}"
    paths = [path for path in _cache().glob(pattern) if path.is_file() and _COMMIT.fullmatch(path.parent.name)]
    rows = []
    for path in paths:
        repo = path.parents[2].name.removeprefix("models--").replace("--", "/")
        if _is_name(repo):
            rows.append(Cached(repo=repo, revision=path.parent.name, path=path, sha256=linked_digest(path)))
    return sorted(rows, key=lambda row: (row.repo, row.revision))


def cached_path(uri: str) -> Path | None:
    """The file of ``hf://org/repo@<40-hex commit>`` in the client's cache; None where it is not there."""
    repo, _, commit = uri.removeprefix("hf://").partition("@")
    path = _cache() / f"models--{repo.replace('/', '--')}" / "snapshots" / commit / FILE_NAME
    return path if _COMMIT.fullmatch(commit) and path.is_file() else None


def linked_digest(path: Path) -> str | None:
    """The sha256 that names a cached file: the client keeps big files as ``blobs/<sha256>``, behind a link."""
    try:
        target = Path(os.readlink(path))
    except OSError:  # not a link: this system has none
        return None
    return target.name if target.parent.name == "blobs" and _SHA256.fullmatch(target.name) else None


def _cache() -> Path:
    """The folder of the client's cache. Importing its constants alone takes milliseconds."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _row(info: Any, method: str | None) -> Found | None:
    """What a list says of one repository; None where it is no learngene that could be pulled."""
    files = None if info.siblings is None else [sibling.rfilename for sibling in info.siblings]
    if not _is_name(info.id) or (files is not None and FILE_NAME not in files):
        return None
    tags = tuple(_text(tag) for tag in info.tags if isinstance(tag, str)) if isinstance(info.tags, list) else ()
    by_tag = next((tag for tag in tags if tag in _methods()), None)
    return Found(
        repo=info.id,
        revision=info.sha if _is_match(_COMMIT, info.sha) else None,
        method=method if method in tags else by_tag,
        license=next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None),
        author=_text(info.author) if isinstance(info.author, str) else info.id.partition("/")[0],
        downloads=_count(info.downloads),
        likes=_count(info.likes),
        updated=_moment(info.last_modified),
        nbytes=None,
        sha256=None,
        private=info.private is True,
        gated=bool(info.gated),
        tags=tags,
        is_pool=files is not None and POOL_FILE in files,
    )


def _is_asked(row: Found, method: str | None, author: str | None) -> bool:
    """Whether a row fits what was asked: some servers ignore a filter that they do not know."""
    owner = row.repo.partition("/")[0]
    return (method is None or row.method == method) and (author is None or owner.lower() == author.lower())


def _measured(api: HfApi, rows: Iterable[Found], batch: int) -> Iterator[Found]:
    """The rows that do have a learngene, with its size and digest, asked as far as somebody reads on."""
    rows = iter(rows)
    with ThreadPoolExecutor(PARALLEL) as pool:
        while some := list(islice(rows, batch)):
            yield from (row for row in pool.map(lambda row: _measure(api, row), some) if row)


def _measure(api: HfApi, row: Found) -> Found | None:
    """``row`` with the size and sha256 of its file; as it was where the server keeps these from us."""
    from huggingface_hub import RepoFile, errors

    try:
        files = islice(api.list_repo_tree(row.repo, revision=row.revision), MAX_FILES)
        file = next((file for file in files if isinstance(file, RepoFile) and file.path == FILE_NAME), None)
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):  # gated: listed for everyone, open to some
            return row
        if error.response.status_code == 404:  # gone since it was listed
            return None
        raise
    if file is None:
        return None
    digest = file.lfs.sha256 if file.lfs else None
    return replace(row, nbytes=_count(file.size), sha256=digest if _is_match(_SHA256, digest) else None)


def _ordered(rows: Iterable[Found], sort: str) -> list[Found]:
    """``rows`` in the order that ``sort`` names; what is unknown comes last, equals stand by name."""
    by_name = sorted(rows, key=lambda row: row.repo.lower())
    if sort == "name":
        return by_name
    if sort == "bytes":
        return sorted(by_name, key=lambda row: math.inf if row.nbytes is None else row.nbytes)
    unknown = "" if sort == "updated" else -1
    return sorted(by_name, key=lambda row: unknown if (value := getattr(row, sort)) is None else value, reverse=True)


def _methods() -> frozenset[str]:
    return frozenset(PUBLISHED) | {point.name for point in entry_points(group="learngene_hub.methods")}


def _text(value: str) -> str:
    """A stranger's text for one line: cut, and with escapes for what a terminal would obey or could not encode."""
    cut = value if len(value) <= MAX_TEXT else f"{value[: MAX_TEXT - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def _is_name(value: Any) -> bool:
    """Whether this is ``org/name`` and nothing more."""
    return isinstance(value, str) and is_repository(value) and not re.search("[:@]", value)


def _is_match(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def _moment(value: Any) -> str | None:
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(value, datetime) else None


@contextlib.contextmanager
def _explained(server: str) -> Iterator[None]:
    """Turns whatever the client raises while it lists into a StoreError of one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        works = f"{LOGIN} with a token that may list" if status in (401, 403) else "try again later"
        raise StoreError(f"{server} answered {status} to a search for learngenes: {works}") from error
    except errors.OfflineModeIsEnabled as error:
        raise StoreError("the Hub cannot be searched while HF_HUB_OFFLINE is set: unset it") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # what the client raises for odd JSON
        raise StoreError(f"{server} did not answer with a list of models: check HF_ENDPOINT") from error
    except Exception as error:  # the client lets errors of its HTTP library through, whose name changed with 2.0
        kind, text = type(error).__name__, " ".join(str(error).split())[:200]
        works = "check the connection, or HF_ENDPOINT"
        raise StoreError(f"{server} could not be searched ({kind}: {text}): {works}") from error
