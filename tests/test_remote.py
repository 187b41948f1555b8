"""Searching the Hub, over real HTTP with the real client, and reading the client's cache."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from loopback import READER, TOKEN, Hub, Repo, serve
from test_registry import rows
from typer.testing import CliRunner

from learngene_hub import _remote, _shelf
from learngene_hub._command import verb
from learngene_hub._remote import Cached, cached, cached_path, find_remote
from learngene_hub.errors import SettingsError, StoreError

FILE = "learngene.safetensors"
app = typer.Typer(rich_markup_mode=None)
app.command("list")(verb(_shelf.list_))
app.command("verify")(verb(_shelf.verify))


def shelve(hub: Hub, name: str, nbytes: int, *tags: str, license: str = "apache-2.0", file: str = FILE) -> Repo:
    """A repository of one file of so many bytes, tagged ``learngene`` and as asked."""
    repo = hub.repo(name)
    card = f"---\nlicense: {license}\ntags: {json.dumps(['learngene', *tags])}\n---\n# {name}\n"
    repo.commit({file: name[:1].encode() * nbytes, "README.md": card.encode()})
    return repo


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with four learngenes that all may see (one gated), a private one, a descendant, and something else."""
    with serve() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"  # made of the former at import
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", READER)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        shelve(hub, "author/big", 3000, "lsamd").downloads = 7
        shelve(hub, "team/small", 1000, "tleg", license="mit").downloads = 9
        shelve(hub, "team/gated", 2000, "lsamd").gated = True
        shelve(hub, "stranger/odd", 500, "a-method-of-their-own").likes = 3
        shelve(hub, "author/secret", 100, "lsamd").private = True
        shelve(hub, "author/grown", 100, "lsamd", file="model.safetensors")
        hub.repo("author/other").commit({FILE: b"12", "README.md": b"---\nlicense: mit\n---\n"})
        yield hub


def names(found: list[_remote.Found]) -> list[str]:
    return [row.repo for row in found]


# --- searching --------------------------------------------------------------------------------------------------------


def test_a_learngene_is_described_by_its_server(server: Hub) -> None:
    first = find_remote()[0]
    repo = server.repos["team/small"]
    commit = repo.revisions["main"]
    assert first == _remote.Found(
        repo="team/small",
        revision=commit,
        method="tleg",
        license="mit",
        author="team",
        downloads=9,
        likes=0,
        updated=repo.history[commit].date[:19] + "Z",
        nbytes=1000,
        sha256=hashlib.sha256(b"t" * 1000).hexdigest(),
        private=False,
        gated=False,
        tags=("safetensors", "learngene", "tleg", "license:mit", "region:us"),
    )
    assert first.uri == f"hf://team/small@{commit}"


def test_only_what_has_a_learngene_is_found_and_only_by_who_may(server: Hub) -> None:
    public = {"author/big", "team/small", "team/gated", "stranger/odd"}
    assert set(names(find_remote())) == public
    assert set(names(find_remote(token=TOKEN))) == public | {"author/secret"}
    assert [(row.repo, row.private) for row in find_remote(token=TOKEN, search="secret")] == [("author/secret", True)]
    assert [row.gated for row in find_remote(search="gated")] == [True]


def test_a_pool_is_told_by_the_names_of_its_files(server: Hub) -> None:
    card = b"---\nlicense: mit\ntags: [learngene]\n---\n"
    server.repo("team/pool").commit({FILE: b"12", "README.md": card, "pool.json": b"{}"})
    assert {row.repo for row in find_remote() if row.is_pool} == {"team/pool"}
    shown = CliRunner().invoke(app, ["list", "--remote", "--search", "team", "--sort", "name"]).stdout.splitlines()
    assert [line.split("\t")[:2] for line in shown] == [
        ["name", "kind"], ["team/gated", "learngene"], ["team/pool", "pool"], ["team/small", "learngene"],
    ]  # fmt: skip


def test_a_page_is_one_request_and_a_row_another(server: Hub) -> None:
    assert len(find_remote()) == 4
    asked = [re.sub(r"\?.*", "", line) for line in server.requests]
    assert asked[0] == "GET /api/models"
    assert sorted(asked[1:]) == sorted(
        f"GET /api/models/{name}/tree/{server.repos[name].revisions['main']}"
        for name in ("author/big", "team/small", "team/gated", "stranger/odd")
    )
    server.requests.clear()
    assert names(find_remote(limit=1)) == ["team/small"]
    assert len(server.requests) == 2  # who wants one row pays for one
    server.requests.clear()
    server.page = 2  # big, small, gated, odd and grown: three pages
    assert len(find_remote()) == 4
    assert sum(line.startswith("GET /api/models?") for line in server.requests) == 3


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"search": "SMALL"}, "team/small"),
        ({"search": "nothing-like-it"}, ""),
        ({"method": "lsamd", "sort": "name"}, "author/big team/gated"),
        ({"method": "a-method-of-their-own"}, "stranger/odd"),
        ({"author": "team", "sort": "name"}, "team/gated team/small"),
        ({"author": "Team", "method": "tleg"}, "team/small"),
        ({"max_bytes": 2000, "sort": "bytes"}, "stranger/odd team/small team/gated"),
        ({"max_bytes": 1999, "sort": "bytes"}, "stranger/odd team/small"),
        ({"max_bytes": 499}, ""),
        ({"max_bytes": 2999, "limit": 1}, "team/small"),
        ({"sort": "bytes", "limit": 2}, "stranger/odd team/small"),
        ({"sort": "name", "limit": 3}, "author/big stranger/odd team/gated"),
        ({"sort": "downloads"}, "team/small author/big stranger/odd team/gated"),
        ({"sort": "likes", "limit": 1}, "stranger/odd"),
        ({"sort": "updated", "limit": 1}, "team/gated"),
    ],
)
def test_filters_orders_and_limits(server: Hub, asked: dict[str, Any], found: str) -> None:
    repo = server.repos["team/gated"]
    commit = repo.revisions["main"]
    repo.history[commit] = _later(repo.history[commit])
    assert names(find_remote(**asked)) == found.split()


def _later(commit: Any) -> Any:
    return type(commit)(**{**vars(commit), "date": "2099-01-01T00:00:00.000000Z"})


@pytest.mark.parametrize("page", [1, 1000])
def test_a_limit_is_kept_whatever_the_page(server: Hub, page: int) -> None:
    server.page = page
    for limit in range(1, 6):
        assert len(find_remote(limit=limit)) == min(limit, 4)


def test_a_repository_whose_files_may_not_be_seen_is_listed_without_size(server: Hub, monkeypatch: Any) -> None:
    """And one that is gone since it was listed is not."""
    from _loopback_files import ROUTES

    def tree(request: Any) -> Any:
        from _loopback_store import Refusal

        if request.parts["repo"] == "team/gated":
            raise Refusal(403, "Access is restricted", "GatedRepo")
        if request.parts["repo"] == "stranger/odd":
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return honest(request)

    place = next(i for i, (_, _, function) in enumerate(ROUTES) if function.__name__ == "tree")
    verb_, pattern, honest = ROUTES[place]
    routes = [*ROUTES[:place], (verb_, pattern, tree), *ROUTES[place + 1 :]]
    monkeypatch.setattr("loopback.ROUTES", routes)
    assert [(row.repo, row.nbytes, row.sha256 is None) for row in find_remote(sort="bytes")] == [
        ("team/small", 1000, False),
        ("author/big", 3000, False),
        ("team/gated", None, True),
    ]
    assert names(find_remote(sort="bytes", max_bytes=10**9)) == ["team/small", "author/big"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sort": "size"}, "sort 'size' asked; there are name, bytes, downloads, likes, updated"),
        ({"limit": 0}, "limit 0 asked; 1 or more"),
        ({"max_bytes": 0}, "max_bytes 0 asked; 1 or more"),
    ],
)
def test_arguments_out_of_range(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        find_remote(**asked)


# --- strangers --------------------------------------------------------------------------------------------------------

ODD_NAMES = ("--yes", "author/--yes", "../../x", "author/x y", "author/x\x1b[2J", "author/x\ny", "author", "a/b/c", "")


def test_a_name_that_is_none_is_left_out(server: Hub) -> None:
    for name in ODD_NAMES:
        shelve(server, name, 10)
    assert set(names(find_remote(limit=100))) == {"author/big", "team/small", "team/gated", "stranger/odd"}


def test_what_a_stranger_writes_is_shown_and_not_obeyed(server: Hub) -> None:
    hostile = "\x1b]0;owned\x07[red]\u202e\ud800"
    row = shelve(server, "stranger/evil", 10, hostile, "x" * 5000, license=json.dumps(f"mit\n{hostile}"))
    row.downloads, row.likes = "many", -4  # type: ignore[assignment]
    (found,) = find_remote(search="evil")
    shown = r"\x1b]0;owned\x07[red]\u202e\ud800"
    assert shown in found.tags and found.license == rf"mit\n{shown}"
    assert (found.method, found.downloads, found.likes) == (None, None, None)
    assert max(map(len, found.tags)) == 100
    for options in ([], ["--json"], ["-q"]):
        printed = CliRunner().invoke(app, ["list", "--remote", "--search", "evil", *options])
        assert printed.exit_code == 0 and "stranger/evil" in printed.stdout and printed.stderr == ""
        assert not {c for c in printed.stdout if not c.isprintable()} - {"\n", "\t"}


def test_files_that_a_stranger_names(server: Hub) -> None:
    server.fault = "names"  # ../../x and the like beside the learngene
    assert {row.repo: row.nbytes for row in find_remote()}["team/small"] == 1000


ODD_ANSWERS: dict[str, Any] = {
    "not JSON": b"<html>",
    "an object": {"error": "no"},
    "numbers": [1, 2],
    "a row without a name": [{"tags": []}],
    "a date that is none": [{"id": "a/b", "lastModified": "yesterday"}],
    "files without names": [{"id": "a/b", "siblings": [{}]}],
    "a list of lists": [[]],
    "null": None,
}


@pytest.mark.parametrize("what", ODD_ANSWERS)
def test_an_answer_that_is_no_list_of_models(server: Hub, what: str, monkeypatch: Any) -> None:
    _answer_lists_with(ODD_ANSWERS[what], monkeypatch)
    with pytest.raises(StoreError, match=f"{server.url} did not answer with a list of models: check HF_ENDPOINT"):
        find_remote()


def test_a_bare_row_is_enough_where_the_file_is_there(server: Hub, monkeypatch: Any) -> None:
    """A simple server may ignore what it is asked to tell; odd values are unknown."""
    odd = {"tags": "x", "downloads": True, "likes": 2**80, "sha": "main", "author": 3, "gated": None, "private": 1}
    _answer_lists_with([{"id": "team/small", **odd}, {"id": "author/grown"}, {"id": "author/gone"}], monkeypatch)
    (found,) = find_remote()
    assert (found.repo, found.revision, found.uri) == ("team/small", None, "hf://team/small")
    assert (found.nbytes, found.tags, found.author, found.downloads, found.likes) == (1000, (), "team", None, None)
    assert (found.gated, found.private, found.license, found.updated) == (False, False, None, None)
    assert find_remote(method="lsamd") == []  # a server that ignores filters does not decide what is shown
    assert find_remote(author="author") == []


def _answer_lists_with(content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import loopback
    from _loopback_api import Answer

    honest, body = loopback.dispatch, content if isinstance(content, bytes) else json.dumps(content).encode()

    def dispatch(hub: Hub, method: str, address: str, headers: Any, sent: bytes) -> Any:
        if address.startswith("/api/models?"):
            return Answer(body, 200, {"Content-Type": "application/json"})
        return honest(hub, method, address, headers, sent)

    monkeypatch.setattr(loopback, "dispatch", dispatch)


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["flaky", "limited"])
def test_a_server_that_is_busy_for_a_moment(server: Hub, fault: str, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.fault = fault
    assert len(find_remote()) == 4
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("broken", "answered 500 to a search for learngenes: try again later"),
        ("hidden", "answered 401 to a search for learngenes: `hf auth login`"),
        ("denied", "answered 403 to a search for learngenes: `hf auth login`"),
        ("portal", "did not answer with a list of models: check HF_ENDPOINT"),
    ],
)
def test_each_refusal_says_what_would_work(server: Hub, fault: str, message: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.fault = fault
    with pytest.raises(StoreError, match=message) as caught:
        find_remote()
    assert "\n" not in str(caught.value) and server.url in str(caught.value)
    printed = CliRunner().invoke(app, ["list", "--remote", "--json"])
    assert (printed.exit_code, printed.stdout) == (1, "")
    assert len(printed.stderr.splitlines()) == 1 and printed.stderr.startswith(f"Error: {server.url}")


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="http://127.0.0.1:9 could not be searched .*: check the connection, or"):
        find_remote()


def test_offline_nothing_is_asked(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="the Hub cannot be searched while HF_HUB_OFFLINE is set: unset it"):
        find_remote()
    assert not server.requests


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_a_table_ids_and_json(server: Hub) -> None:
    def run(*options: str) -> Any:
        return CliRunner().invoke(app, ["list", "--remote", *options])

    day = server.repos["team/small"].history[server.repos["team/small"].revisions["main"]].date[:19] + "Z"
    table = run("--limit", "1")
    assert table.stdout == (
        f"name\tmethod\tbytes\tlicense\tdownloads\tupdated\nteam/small\ttleg\t1.0 kB\tmit\t9\t{day}\n"
    )
    assert table.stderr == "More fit; --limit 2 shows more\n"
    assert run("-q", "--limit", "4").stdout.split() == ["team/small", "author/big", "stranger/odd", "team/gated"]
    assert run("--limit", "4").stderr == ""
    (row,) = json.loads(run("--json", "--max-bytes", "0.5kB").stdout)
    assert row == {
        "name": "stranger/odd",
        "kind": "learngene",
        "method": None,
        "bytes": 500,
        "license": "apache-2.0",
        "downloads": 0,
        "likes": 3,
        "updated": row["updated"],
        "author": "stranger",
        "uri": f"hf://stranger/odd@{server.repos['stranger/odd'].revisions['main']}",
        "sha256": hashlib.sha256(b"s" * 500).hexdigest(),
        "private": False,
        "gated": False,
        "tags": ["safetensors", "learngene", "a-method-of-their-own", "license:apache-2.0", "region:us"],
    }
    assert run("--author", "nobody").stdout == "No results found.\n"
    assert run("--author", "nobody", "--json").stdout == "[]\n"


def test_a_search_needs_no_torch(server: Hub, tmp_path: Path) -> None:
    code = (
        "import sys, typer; from learngene_hub import _shelf; from learngene_hub._command import verb\n"
        "app = typer.Typer(); app.command()(verb(_shelf.list_)); app(standalone_mode=False)\n"
        "print(*[m for m in ('torch', 'timm', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "--remote", "-q", "--sort", "name"]
    env = server.environment(tmp_path / "home")
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert shown.stderr.strip() == ""
    assert shown.stdout.split() == ["author/big", "author/secret", "stranger/odd", "team/gated", "team/small"]


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_cache_as_the_client_leaves_it(server: Hub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    assert cached() == []
    cache, repo = tmp_path / "cache", server.repos["team/small"]
    first = repo.revisions["main"]
    repo.tag("v1")
    second = repo.commit({FILE: b"newer", "README.md": b"# new"})
    for revision in ("v1", "main"):
        hf_hub_download("team/small", FILE, revision=revision, cache_dir=cache)
    hf_hub_download("author/big", "README.md", cache_dir=cache)  # a card alone is no learngene
    folder = cache / "models--team--small" / "snapshots"
    digests = {first: hashlib.sha256(b"t" * 1000).hexdigest(), second: hashlib.sha256(b"newer").hexdigest()}
    server.requests.clear()
    assert cached() == [
        Cached(repo="team/small", revision=commit, path=folder / commit / FILE, sha256=digests[commit])
        for commit in sorted(digests)
    ]
    assert cached_path(f"hf://team/small@{first}") == folder / first / FILE
    assert cached_path(f"hf://author/big@{server.repos['author/big'].revisions['main']}") is None
    assert cached_path("hf://team/small@main") is cached_path("hf://team/small") is None
    assert not server.requests
    link = folder / first / FILE
    content = link.read_bytes()
    link.unlink()
    link.write_bytes(content)  # as the client does where there are no links
    assert {row.revision: row.sha256 for row in cached()} == {first: None, second: digests[second]}


def test_one_damaged_repository_hides_no_other(server: Hub, tmp_path: Path) -> None:
    """The client's own scan leaves a repository out for one broken link, or one name that leads nowhere."""
    from huggingface_hub import hf_hub_download, scan_cache_dir

    cache = tmp_path / "cache"
    for name in (FILE, "README.md"):
        hf_hub_download("team/small", name, cache_dir=cache)
    folder = cache / "models--team--small"
    (folder / "snapshots" / server.repos["team/small"].revisions["main"] / "README.md").resolve().unlink()
    (folder / "refs" / "v9").write_text("9" * 40)
    assert not scan_cache_dir(cache).repos
    assert [row.repo for row in cached()] == ["team/small"]


def test_a_registry_on_the_hub_is_verified(server: Hub) -> None:
    commit = server.repos["team/small"].revisions["main"]
    text = rows({"name": "far", "uri": f"hf://team/small@{commit}"})
    server.repo("team/shelf").commit({"registry.yaml": text.encode()})
    shown = CliRunner().invoke(app, ["verify", "--registry", "hf://team/shelf", "--json"])
    (row,) = json.loads(shown.stdout)
    assert (shown.exit_code, shown.stderr, row["name"], row["ok"]) == (0, "", "far", None)
    assert not [line for line in server.requests if "team/small" in line]
    missing = CliRunner().invoke(app, ["verify", "--registry", "hf://team/nowhere"])
    assert (missing.exit_code, missing.stdout, len(missing.stderr.splitlines())) == (1, "", 1)
    assert "no repository team/nowhere" in missing.stderr


PULL_AND_VERIFY = """
import socket, typer
from huggingface_hub import hf_hub_download
path = hf_hub_download('team/pico', {file!r})
def blocked(*_):
    raise AssertionError('a socket was opened')
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = blocked
from typer.testing import CliRunner
from learngene_hub import _shelf
from learngene_hub._command import verb
app = typer.Typer()
app.command()(verb(_shelf.verify))
def run():
    done = CliRunner().invoke(app, ['--cached', '-q'])
    print(repr((done.exit_code, done.stdout, done.stderr)))
run()
data = open(path, 'rb').read()
open(path, 'wb').write(data[:-1] + bytes([data[-1] ^ 1]))
run()
"""


def test_what_was_pulled_is_verified_offline(server: Hub, tmp_path: Path, pico_learngene: Any) -> None:
    """Over HTTP into the cache, then damaged, with the client's own environment and without network."""
    content = pico_learngene.save_pretrained(tmp_path / "pico").read_bytes()
    commit = server.repo("team/pico").commit({FILE: content, "README.md": b"---\ntags: [learngene]\n---\n"})
    code = PULL_AND_VERIFY.format(file=FILE)
    env = {**server.environment(tmp_path / "home"), "PYTHONPATH": str(Path(_remote.__file__).parents[1])}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    whole, damaged = map(ast.literal_eval, shown.stdout.splitlines())
    assert whole == (0, "", "")
    name = f"team/pico@{commit}"
    blob = tmp_path / "home" / "hub" / "models--team--pico" / "blobs" / pico_learngene.digest
    changed = hashlib.sha256(blob.read_bytes()).hexdigest()
    assert damaged[:2] == (1, f"{name}\n") and len(damaged[2].splitlines()) == 1
    said = f"its sha256 is {changed}, {pico_learngene.digest} was promised (next: learngene pull {name})\n"
    assert damaged[2].endswith(said)
